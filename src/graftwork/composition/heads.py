"""Task heads in a sum: averaged where all have the same labels, else chosen or left out by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graftwork.composition.operands import Part, Term
from graftwork.composition.parameters import weighted
from graftwork.errors import NotComposable, UnknownName, nearest

MERGE, NONE = "merge", "none"
Labels = Mapping[int, str] | None


def head_of_sum(terms: Sequence[Term], choice: str) -> tuple[Part, Labels]:
    """The new adapter's head and its labels; an empty part where it has none.

    Args:
        choice: "merge": the mean of all heads, weighted as their adapters; "none": no head; else the label of the
            operand whose head is kept as it is.

    Raises:
        NotComposable: heads of different labels or shapes, or weights that make no mean, under "merge".
    """
    if choice == NONE:
        return Part((), {}), None
    if choice != MERGE:
        return _chosen(terms, choice)
    having = [term for term in terms if term.operand.head().tensors]
    if not having:
        return Part((), {}), None
    first = having[0].operand
    for other in having[1:]:
        _check_labels(having[0], other)
    total = math.fsum(term.weight for term in having)
    if len({term.operand.label for term in having}) == 1:
        return first.head(), first.manifest.labels
    if abs(total) < 1e-9:
        raise NotComposable(
            f"the weights of the adapters with a task head add up to 0, so their heads have no mean. {_ADVICE}"
        )
    heads = [term.operand.head().tensors for term in having]
    shares = [term.weight / total for term in having]
    mean = {o: weighted(shares, [head[o] for head in heads]).to(t.dtype) for o, t in heads[0].items()}
    return Part(first.head().techniques, mean), first.manifest.labels


def _chosen(terms: Sequence[Term], label: str) -> tuple[Part, Labels]:
    heads = {term.operand.label: term.operand for term in terms if term.operand.head().tensors}
    if label not in heads:
        raise UnknownName(f"no adapter of the sum called {label!r} has a task head. {nearest(label, heads)}")
    return heads[label].head(), heads[label].manifest.labels


def _check_labels(one: Term, two: Term) -> None:
    a, b = one.operand, two.operand
    shapes = [{o: t.shape for o, t in operand.head().tensors.items()} for operand in (a, b)]
    labels = [list((operand.manifest.labels or {}).values()) for operand in (a, b)]
    if shapes[0] != shapes[1] or a.manifest.labels != b.manifest.labels:
        raise NotComposable(
            f"the task heads of {a.label!r} (labels {', '.join(labels[0])}) and {b.label!r} (labels "
            f"{', '.join(labels[1])}) do not share their labels, so they have no mean. {_ADVICE}"
        )


_ADVICE = "Choose head='none', or head= the name of the adapter whose head is kept"
