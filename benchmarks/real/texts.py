"""The texts that SmolLM2 is judged on: prose and code that are on every machine with Python and this package.

    python benchmarks/real/texts.py build/smollm2 build/smollm2-calibration.txt    # writes the text that plans are made on

prose: the Python Language Reference and parts of the Library Reference, as the standard library carries them for `help()`
(`pydoc_data.topics`, PSF licence). It is technical English with short examples; topics repeat each other, so a paragraph is
kept only where it stands first. It changes with the version of Python, so every record names its text by a hash.
code: the text that the package carries, modules of Python 3.11's standard library.

The last document of each kind is kept for calibration and never judged. The model may have met both texts in its training;
"held out" means that no method and no plan was chosen on them.
"""

import argparse
import hashlib
from pathlib import Path
from pydoc_data import topics

from hyperattention.reference.model import LoadedModel, load_model
from hyperattention.reference.samples import EvaluationSample, samples_of_text, tokens_of_text
from hyperattention.reference.text import held_out_text

# more than either text holds: all documents are cut, so that a document's number names it
_ALL = 10**6


def prose() -> str:
    seen: set[str] = set()
    kept: list[str] = []
    for text in sorted(topics.topics.values(), key=lambda text: (-len(text), text)):
        paragraphs = [each for each in text.split("\n\n") if each.strip() not in seen]
        seen.update(each.strip() for each in paragraphs)
        kept.append("\n\n".join(paragraphs))
    return "\n\n".join(kept)


def code() -> str:
    return held_out_text().decode()


TEXTS = {"prose": prose, "code": code}


def judged_documents(loaded: LoadedModel, kind: str, length: int) -> tuple[EvaluationSample, ...]:
    """All documents of a kind but for the last."""
    documents = samples_of_text(TEXTS[kind](), loaded, length, _ALL)
    if len(documents) < 2:
        raise SystemExit(f"--length {length}: {kind} has one document so long, kept for calibration: give a shorter one")
    return documents[:-1]


def calibration_text(loaded: LoadedModel, length: int) -> str:
    """A text of `length` tokens and some more, half prose and half code, of the last document of each kind."""
    assert loaded.tokenizer is not None
    # tokens at the seams may join, so each half is a little longer
    half = length // 2 + 64
    tokens = [tokens_of_text(text(), loaded) for text in TEXTS.values()]
    ends = [len(each) // length * length for each in tokens]
    halves = [each[end - length :][:half].tolist() for each, end in zip(tokens, ends, strict=True)]
    return "\n\n".join(str(loaded.tokenizer.decode(each)) for each in halves)


def name_of(sample: EvaluationSample) -> str:
    """A short name of a document's tokens, for records."""
    return hashlib.sha256(str(sample.tokens.tolist()).encode()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=8192)
    options = parser.parse_args()
    options.out.write_text(calibration_text(load_model(options.model), options.length))


if __name__ == "__main__":
    main()
