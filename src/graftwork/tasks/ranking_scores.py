"""How well runs rank what is relevant: recall, hit rate, nDCG at cutoffs, mean reciprocal rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from graftwork.data.ranking import Judgments, Run
from graftwork.errors import BadData, BadOption

CUTOFFS = (1, 5, 10)


def ranking_scores(run: Run, judgments: Judgments, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over the queries that have a relevant passage; a query that the run lacks counts 0.

    recall@k: share of its relevant passages among the first k. hit@k: whether there is one. mrr: 1 / rank of the first.
    ndcg@k: grades as gains, divided by log2(rank + 1), over what the best order gives (Järvelin and Kekäläinen 2002).

    Raises BadData where no query has a relevant passage, BadOption for a cutoff below 1.
    """
    wanted = {query: grades for query, grades in judgments.items() if any(g > 0 for g in grades.values())}
    if not wanted:
        raise BadData("no query has a relevant passage, so there is nothing to measure")
    if any(k < 1 for k in cutoffs):
        raise BadOption(f"cutoffs={list(cutoffs)}: each is at least 1")
    rows = [
        _of_query([name for name, _ in run.get(query, ())], grades, cutoffs)
        for query, grades in wanted.items()
    ]
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def _of_query(names: Sequence[str], grades: Mapping[str, int], cutoffs: Sequence[int]) -> dict[str, float]:
    gains = [max(0, grades.get(name, 0)) for name in names]
    best = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    first = next((rank for rank, gain in enumerate(gains, start=1) if gain), math.inf)
    scores = {"mrr": 1 / first}
    for k in cutoffs:
        found = sum(gain > 0 for gain in gains[:k])
        scores[f"recall@{k}"] = found / len(best)
        scores[f"hit@{k}"] = float(found > 0)
        scores[f"ndcg@{k}"] = _discounted(gains[:k]) / _discounted(best[:k])
    return scores


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
