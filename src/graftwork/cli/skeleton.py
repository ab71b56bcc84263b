"""A model without weights, for what needs shapes only."""

from __future__ import annotations

from typing import Any

from torch import nn

from graftwork.errors import NothingMatches, UnknownName


def skeleton(name: str, task: str | None = None) -> nn.Module:
    """The model called `name` on the meta device, with the head of `task` or its published one."""
    import torch
    import transformers

    from graftwork.tasks.registry import task_class

    config, published = _config(name)
    kind = task_class(task).model_class if task else published
    loader = getattr(transformers, kind)
    try:
        with torch.device("meta"):
            return loader.from_config(config) if kind.startswith("Auto") else loader(config)
    except ValueError as error:
        raise NothingMatches(f"{name} cannot be built as {kind}: {str(error)[:300]}") from None


def _config(name: str) -> tuple[Any, str]:
    import transformers

    from graftwork.models.base import locate
    from graftwork.models.hosts import HOSTS

    if name in HOSTS:
        return HOSTS[name].config(), HOSTS[name].model_class
    try:
        config = transformers.AutoConfig.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise UnknownName(f"{name!r} is no model: {str(error)[:300]}") from None
    return config, (config.architectures or ["AutoModel"])[0]
