"""Learning to Prompt itself: a pool of prompts, and a head that reads the outputs at their positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftwork.anatomy.resolve import stack_of
from graftwork.continual.features import Pooling, hidden_states
from graftwork.continual.keys import Mode
from graftwork.continual.pool import KeyInit, Pool
from graftwork.continual.samples import Samples
from graftwork.engine.adapter import Adapter
from graftwork.engine.attach import attach
from graftwork.engine.sequence_layout import leading
from graftwork.engine.verbs import active
from graftwork.techniques.prompt_pool import PooledPrompts
from graftwork.techniques.prompt_pool import PromptPool as Prompts

_NAME = "prompts"


class PromptPool(Pool):
    """L2P: each sample is given the N prompts whose keys are most like its query, one behind another.

    Args:
        length: positions of each prompt.
        init: of prompts and keys: "symmetric" draws from U(-1, 1) (PyTorch port), "positive" from U(0, 0.01)
            (published code).
        read_prompts: the head reads the mean of the outputs at the prompts' positions (published); False: the
            features at the usual positions, as with the other techniques.

    Otherwise as `Pool`. The prompts get no position embedding where the host's embeddings add them before the
    prompts come in (ViT); the published code adds that of CLS, a constant that trained prompts can take up.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        *,
        length: int = 5,
        members: int = 10,
        chosen: int = 5,
        pull: float = 0.1,
        mode: Mode = "instance",
        mask: bool = True,
        own_members: bool = False,
        init: KeyInit = "symmetric",
        pooling: Pooling = "first",
        read_prompts: bool = True,
    ) -> None:
        super().__init__(
            model,
            Prompts(size=members, length=length, init=init),
            classes,
            members=members,
            chosen=chosen,
            pull=pull,
            mode=mode,
            mask=mask,
            own_members=own_members,
            key_init=init,
            pooling=pooling,
        )
        self.length, self.read_prompts = length, read_prompts

    def settings(self) -> dict[str, object]:
        return {**super().settings(), "read_prompts": self.read_prompts}

    def _attach(self) -> list[Adapter]:
        adapter = attach(self.model, self.technique, name=_NAME, head=False)
        self._module(adapter).stays = self.read_prompts
        return [adapter]

    def _chosen_features(self, samples: Samples, chosen: Tensor) -> Tensor:
        adapter = self._adapters()[0]
        module = self._module(adapter)
        module.choose(chosen)
        try:
            with active(self.model, _NAME):
                if not self.read_prompts:
                    return self._features(samples)
                hidden = hidden_states(self.model(**samples.inputs))
        finally:
            module.choose(None)
        return _mean_at(hidden, self._first(adapter, samples), self.chosen * self.length)

    def _first(self, adapter: Adapter, samples: Samples) -> Tensor:
        """(B,) where each row's prompts begin: behind leading padding and what stays first (CLS)."""
        keep = stack_of(self.model, adapter.placed[0].site).sequence_start
        start = torch.full((len(samples),), keep, device=samples.labels.device)
        mask = samples.inputs.get("attention_mask")
        return start if mask is None else leading(mask, start)

    @staticmethod
    def _module(adapter: Adapter) -> PooledPrompts:
        found = adapter.placed[0].graft.module
        assert isinstance(found, PooledPrompts)
        return found


def _mean_at(hidden: Tensor, first: Tensor, count: int) -> Tensor:
    """(B, D) mean of `count` positions of each row (B, T, D) from `first` (B,) on."""
    places = first[:, None] + torch.arange(count, device=hidden.device)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])).mean(1)
