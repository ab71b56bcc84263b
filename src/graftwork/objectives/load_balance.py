"""Load balance: against a router that sends all tokens to one expert (Switch, Fedus et al. 2021, arXiv:2101.03961).

E Σ_i f_i P_i (equation 4), mean over the routers: f_i the share of choices that fall on expert i, without gradient,
P_i the mean of its softmax over all E. 1 where the experts are used alike, E where all tokens go to one for certain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from graftwork.engine.assigned import Assigned
from graftwork.errors import NothingMatches, StateError
from graftwork.objectives.adapted import kinds
from graftwork.objectives.base import Context, Objective, wide


@dataclass(frozen=True, kw_only=True)
class LoadBalance(Objective):
    """For techniques whose modules train a router over experts; published weight 0.01.

    A token makes as many choices as it takes experts, its largest ones (as Mixtral's, whose sum is that many times
    larger); where it takes all of them, only the largest counts. Switch adds its layers up, here they are averaged.

    Tokens count that the batch's `attention_mask` (B, T) does not hide, in a decoder behind an encoder those of
    `decoder_attention_mask` or else those with a counted label; and only those routed to the adapter. All count
    where no mask has the shape of what the router reads (extra positions of a prompt, patches of an image).
    """

    reads_logits = False
    reads_routers = True

    def __call__(self, context: Context) -> Tensor:
        routers = [one for one in context.routers if one.learns]
        if not routers:
            raise NothingMatches(
                f"{self.name} found no trainable router over experts in the last forward (running modules: "
                f"{kinds(context.modules)}); it is for techniques such as mixture-of-lora. Make the Objectives "
                "after attach and before the forward, and call the whole model"
            )
        self._check_gradients(routers)
        return torch.stack(
            [imbalance(wide(one.where(context.real(one.key))), one.takes) for one in routers]
        ).mean()

    def _check_gradients(self, routers: list[Assigned]) -> None:
        blind = [one.key for one in routers if not one.scores.requires_grad]
        if blind and torch.is_grad_enabled():
            raise StateError(
                f"{self.name}: the router at {blind[0]} ran without gradient, so the term would train nothing; "
                "recompute activations with use_reentrant=False, and run the forward outside of torch.no_grad()"
            )


def imbalance(scores: Tensor, takes: int = 1) -> Tensor:
    """E Σ f_i P_i of logits (M, E), `takes` choices a token (of all E: the largest alone); 0 without tokens."""
    tokens, experts = scores.shape
    choices = scores.topk(takes if takes < experts else 1, dim=-1).indices
    used = functional.one_hot(choices, experts).sum((0, 1)).to(scores) / max(choices.numel(), 1)
    return experts * (used * scores.softmax(-1)).sum() / max(tokens, 1)
