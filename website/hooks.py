"""What the site adds to docs/: notebooks, contributing and changes, and the reference of every public name."""

import json
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from reference import reference_pages

ROOT = Path(__file__).parents[1]
# pages made of files outside docs/, which GitHub shows where they are
PROJECT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside docs/."""
    for page, source in PROJECT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for page, text in reference_pages().items():
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.name)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to notebooks, which work on GitHub as they are, lead to the pages made of them."""
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Begin a line with each part of a docstring's standard order, which Markdown would join into one paragraph."""
    return (
        re.sub(r"\s+(Source|Differs|Cost|Guarantee): ", r"<br>\1: ", html)
        if page.file.src_uri.startswith("reference/")
        else html
    )


def notebook_page(notebook: dict, name: str) -> str:
    """Write a notebook as a page: its text, its code, and the output that is stored in it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts.extend(_output(each) for each in cell["outputs"])
    parts.insert(1, f"This page is the notebook `notebooks/{name}`, with the output of one run on two CPU cores.")
    return "\n\n".join(parts) + "\n"


def _output(output: dict) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "image/png" in data:
        return f"![output of the cell above](data:image/png;base64,{''.join(data['image/png']).strip()})"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
