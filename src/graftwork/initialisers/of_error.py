"""Starts out of what quantisation lost."""

from __future__ import annotations

from graftwork.engine.modules import planned
from graftwork.errors import BadOption
from graftwork.initialisers import matrices
from graftwork.initialisers.plain import kaiming
from graftwork.initialisers.start import Start, weight_of
from graftwork.reference.site import Site


def loftq(site: Site, rank: int, scale: float) -> Start:
    """The top singular triplets of W - Q, halved between the factors: s B A is the best correction of its rank of the
    quantised weight Q (Li et al. 2023, arXiv:2310.08659, whose later rounds quantise W - s B A anew)."""
    if planned():
        return kaiming(site, rank, scale)
    stored = weight_of(site, rank, "loftq")
    if site.original is None:
        raise BadOption(
            f"init='loftq' at {site.key} needs the weights from before quantisation: attach(model, technique, "
            "originals=...), the model in full precision or its state dict"
        )
    lost = matrices.finite(site.original(), f"{site.key}: its original weight") - stored
    left, values, right = matrices.top_singular(lost, rank)
    if not bool((values[..., 0] > 0).all()):
        raise BadOption(
            f"init='loftq' at {site.key}: its weight is the original one, so there is nothing to make good. Attach to "
            "the quantised model"
        )
    root = (values / scale).sqrt()
    return Start(root.unsqueeze(-1) * right.mT, left * root.unsqueeze(-2))
