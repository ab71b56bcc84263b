"""Ranking data: corpora, queries, judgments and runs, in the formats of TREC and BEIR; candidates by BM25.

A run is, for each query, its passages from best to worst with their scores. Judgments are, for each query, the grades
of judged passages; 0 and what is not listed are not relevant.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.data.tables import text_of
from graftwork.errors import BadData, BadOption, nearest

Ranked = Sequence[tuple[str, float]]
Run = Mapping[str, Ranked]
Judgments = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Collection:
    """Passages and queries by their names, and which passage answers which query.

    Raises BadData for a judgment of a query or passage that is not there.
    """

    passages: Mapping[str, str]
    queries: Mapping[str, str]
    judgments: Judgments
    origin: str = "collection"

    def __post_init__(self) -> None:
        for query, grades in self.judgments.items():
            if query not in self.queries:
                raise BadData(f"{self.origin}: judgments of query {query!r}, which is not among the queries")
            for passage in grades:
                if passage not in self.passages:
                    raise BadData(f"{self.origin}: query {query!r} judges {passage!r}, which is no passage")

    def relevant(self, query: str) -> list[str]:
        """Passages with a grade above 0, in order."""
        return [name for name, grade in self.judgments.get(query, {}).items() if grade > 0]

    def of_queries(self, names: Iterable[str]) -> Collection:
        """The same passages with some of the queries."""
        kept = list(names)
        queries = {name: self.queries[name] for name in kept}
        judgments = {name: self.judgments[name] for name in kept if name in self.judgments}
        return Collection(self.passages, queries, judgments, self.origin)


def read_beir(folder: Path, split: str = "test") -> Collection:
    """A BEIR folder: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv (or qrels.tsv). Only judged queries are kept.

    A passage's title stands before its text, a blank between. Names are in `_id`, `doc_id` or `query_id`.
    """
    files = [folder / "corpus.jsonl", folder / "queries.jsonl"]
    judged = next((f for f in (folder / "qrels" / f"{split}.tsv", folder / "qrels.tsv") if f.is_file()), None)
    missing = [file.name for file in files if not file.is_file()]
    if missing or judged is None:
        there = ", ".join([*missing, *([] if judged else [f"qrels/{split}.tsv"])])
        raise BadData(f"{folder} has no {there}: it is no BEIR folder")
    passages, queries = _texts(files[0], "doc_id"), _texts(files[1], "query_id")
    judgments = read_judgments(judged)
    known = {name: queries[name] for name in judgments if name in queries}
    if len(known) < len(judgments):
        absent = next(name for name in judgments if name not in known)
        raise BadData(f"{judged}: query {absent!r} is not in {files[1].name}")
    return Collection(passages, known, judgments, str(folder))


def read_judgments(path: Path) -> dict[str, dict[str, int]]:
    """qrels: `query 0 passage grade` (TREC), or query, passage and grade with a header line (BEIR)."""
    judgments: dict[str, dict[str, int]] = {}
    for number, fields in _fields(path):
        if number == 1 and len(fields) == 3 and not _whole(fields[2]):
            continue
        if len(fields) not in (3, 4):
            raise BadData(f"{path}, line {number}: {len(fields)} fields; a judgment has 4 (TREC) or 3 (BEIR)")
        query, passage, grade = fields[0], fields[-2], fields[-1]
        if not _whole(grade):
            raise BadData(f"{path}, line {number}: grade {grade!r} is no whole number")
        if passage in judgments.setdefault(query, {}):
            raise BadData(f"{path}, line {number}: query {query!r} judges passage {passage!r} twice")
        judgments[query][passage] = int(grade)
    return judgments


def read_run(path: Path) -> dict[str, list[tuple[str, float]]]:
    """A TREC run: `query Q0 passage rank score tag`. Scores decide, as for trec_eval; equal ones keep their order."""
    run: dict[str, dict[str, float]] = {}
    for number, fields in _fields(path):
        if len(fields) != 6:
            raise BadData(
                f"{path}, line {number}: {len(fields)} fields; a line of a run has 6: query Q0 passage rank score tag"
            )
        query, _, passage, _, score, _ = fields
        if passage in run.setdefault(query, {}):
            raise BadData(f"{path}, line {number}: query {query!r} ranks passage {passage!r} twice")
        run[query][passage] = _score(score, f"{path}, line {number}")
    return {query: ranked(scores) for query, scores in run.items()}


def write_run(path: Path, run: Run, tag: str = "graftwork") -> None:
    """A TREC run; BadOption for a name with blanks, which the format cannot hold."""
    lines = []
    for query, passages in run.items():
        for rank, (passage, score) in enumerate(passages, start=1):
            fields = [query, "Q0", passage, str(rank), repr(float(score)), tag]
            spaced = [field for field in fields if len(field.split()) != 1]
            if spaced:
                raise BadOption(
                    f"{spaced[0]!r} cannot stand in a TREC run: a name is one word without blanks"
                )
            lines.append(" ".join(fields) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def ranked(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """From the highest score to the lowest; equal ones in the order given."""
    return sorted(scores.items(), key=lambda pair: -pair[1])


def bm25(passages: Mapping[str, str], queries: Mapping[str, str], top: int = 100) -> Run:
    """The `top` passages of each query by BM25 (bm25s, Lucene's form, English stop words left out)."""
    try:
        import bm25s
    except ImportError:
        raise BadOption("BM25 needs bm25s: pip install 'graftwork[ranking]', or read a run") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it reports every step
    names = list(passages)
    if not 1 <= top <= len(names):
        raise BadOption(f"top={top} of {len(names)} passages; give 1 to {len(names)}")
    index = bm25s.BM25()
    index.index(_words(bm25s, passages.values()), show_progress=False)
    if not queries:
        return {}
    found, scores = index.retrieve(_words(bm25s, queries.values()), k=top, show_progress=False)
    return {
        query: [(names[n], float(score)) for n, score in zip(row, values, strict=True)]
        for query, row, values in zip(queries, found, scores, strict=True)
    }


def hard_negatives(run: Run, collection: Collection, count: int) -> dict[str, list[str]]:
    """The `count` highest passages of each query that do not answer it."""
    return {
        query: [name for name, _ in passages if name not in set(collection.relevant(query))][:count]
        for query, passages in run.items()
    }


def _words(bm25s: Any, texts: Iterable[str]) -> list[list[str]]:
    return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)


def _fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text_of(path).splitlines(), start=1):
        fields = line.split("\t") if line.count("\t") == 2 else line.split()
        if fields:
            yield number, fields


def _whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _score(text: str, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        raise BadData(f"{where}: score {text!r} is no number") from None
    if not math.isfinite(score):
        raise BadData(f"{where}: score {text!r} is not finite")
    return score


def _texts(path: Path, other: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, line in enumerate(text_of(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadData(f"{where} is no JSON: {error}") from None
        name, text = _named(record, other, where)
        if name in texts:
            raise BadData(f"{where}: {name!r} is there twice")
        texts[name] = text
    return texts


def _named(record: Any, other: str, where: str) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise BadData(f"{where} is a {type(record).__name__}, expected an object with named fields")
    key = "_id" if "_id" in record else other
    for name in (key, "text"):
        if name not in record:
            raise BadData(f"{where} has no {name!r}. {nearest(name, record)}")
        if not isinstance(record[name], str):
            raise BadData(f"{where}: {name!r} is a {type(record[name]).__name__}, expected text")
    title = record.get("title") or ""
    return record[key], f"{title} {record['text']}".strip() if isinstance(title, str) else record["text"]
