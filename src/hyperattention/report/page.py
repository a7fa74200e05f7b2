"""One self-contained page of maps and plots: it includes plotly's script and loads nothing from the network."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from hyperattention.files.atomic_write import atomic_write
from hyperattention.files.outputs import MARK

_PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Section:
    """A figure with its heading and its explanation.

    Args:
        title: the heading.
        reading: one or two sentences that explain the figure.
        figure: the figure.
        wide: whether the figure takes the full width of the page.
    """

    title: str
    reading: str
    figure: Figure
    wide: bool = False


def write_page(path: Path, title: str, lines: Sequence[str], sections: Sequence[Section]) -> None:
    """Write a page.

    Args:
        path: the file, which is replaced.
        title: the title of the page, plain text.
        lines: paragraphs on the measurement and its results, plain text.
        sections: the figures, in order.
    """
    # "</" would end the script element that contains the figures
    figures = ",\n".join(str(section.figure.to_json()).replace("</", "<\\/") for section in sections)
    page = _PAGE.substitute(
        title=html.escape(title),
        maker=MARK,
        plotly=get_plotlyjs(),
        lines="\n".join(f"<p>{html.escape(line)}</p>" for line in lines),
        sections="\n".join(_section(section, number) for number, section in enumerate(sections)),
        figures=figures,
    )
    atomic_write(path, page)


def _section(section: Section, number: int) -> str:
    wide = ' class="wide"' if section.wide else ""
    heading, reading = html.escape(section.title), html.escape(section.reading)
    return f'<section{wide}><h2>{heading}</h2><p>{reading}</p><div id="figure-{number}"></div></section>'
