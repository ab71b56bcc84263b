"""Task identity by k-means centres of the base's features (S-Prompts, Wang et al. 2022, arXiv:2207.12819).

    A_t = kmeans(f0(D_t) / |f0(D_t)|, k)        t* = argmin_t min_j dist(f0(x) / |f0(x)|, A_t[j])

The paper measures the distance in L2, its published code in L1; the two can disagree.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from graftwork.errors import BadData, BadOption

Distance = Literal["l2", "l1"]
_ORDERS: dict[str, float] = {"l2": 2.0, "l1": 1.0}


def check_distance(distance: str) -> None:
    """BadOption for a distance that does not exist."""
    if distance not in _ORDERS:
        raise BadOption(f"distance={distance!r} is neither 'l2' (paper) nor 'l1' (published code)")


def centres_of(features: Tensor, count: int) -> Tensor:
    """(count, D) k-means centres of normalised features (n, D); the centres are not normalised again."""
    from sklearn.cluster import KMeans

    if len(features) < count:
        raise BadData(f"{len(features)} samples cannot have {count} centres; take fewer (centres=)")
    normed = functional.normalize(features.double(), dim=-1).cpu().numpy()
    found = KMeans(n_clusters=count, n_init=10, random_state=0).fit(normed)
    return torch.from_numpy(found.cluster_centers_).to(features)


def nearest_task(features: Tensor, centres: list[Tensor], distance: Distance = "l2") -> Tensor:
    """(B,) the task whose nearest centre is nearest to each normalised feature (B, D).

    Args:
        centres: (k, D) of each task.
    """
    normed = functional.normalize(features, dim=-1)
    order = _ORDERS[distance]
    apart = [torch.cdist(normed, each.to(normed), p=order).amin(-1) for each in centres]
    return torch.stack(apart).argmin(0)
