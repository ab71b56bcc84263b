"""Plain text for language modelling, and CoNLL-U for token classification."""

from __future__ import annotations

from pathlib import Path

from graftwork.data.rows import Rows
from graftwork.data.tables import lines_of, text_of
from graftwork.errors import BadData

# columns of CoNLL-U that serve a task (universaldependencies.org/format.html): number in the line -> our name
_FIELDS = {1: "tokens", 2: "lemmas", 3: "upos", 4: "xpos", 7: "deprel"}


def read_text(path: Path, paragraphs: bool) -> Rows:
    """A column `text`: a row per line that is not blank, or per block between blank lines."""
    lines = lines_of(text_of(path))
    texts = _blocks(lines) if paragraphs else [line.strip() for line in lines if line.strip()]
    return Rows({"text": texts}, str(path))


def _blocks(lines: list[str]) -> list[str]:
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block) for block in blocks if block]


def read_conllu(path: Path) -> Rows:
    """Columns `tokens`, `lemmas`, `upos`, `xpos`, `deprel`, each a list of strings per sentence.

    Ranges of multiword tokens (`3-4`) and empty nodes (`5.1`) are left out; the words they consist of stay.
    """
    sentences: list[list[list[str]]] = [[]]
    for number, line in enumerate(lines_of(text_of(path)), 1):
        if not line.strip():
            sentences.append([])
        elif not line.startswith("#"):
            fields = line.split("\t")
            if len(fields) != 10:
                raise BadData(f"{path}: line {number} has {len(fields)} fields, CoNLL-U has 10, between tabs")
            if fields[0].isdecimal():
                sentences[-1].append(fields)
    full = [sentence for sentence in sentences if sentence]
    if not full:
        raise BadData(f"{path} has no sentences")
    return Rows({name: [[w[n] for w in s] for s in full] for n, name in _FIELDS.items()}, str(path))
