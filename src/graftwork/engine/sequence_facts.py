"""What the sequence port must know of a stack, read once when a prompt is seated there. Plain data."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace

from torch import nn

from graftwork.anatomy.anatomy import Stack, places_of
from graftwork.anatomy.resolve import anatomy_of, layer_modules, stack_of
from graftwork.anatomy.walk import expand
from graftwork.engine.swap import base_of
from graftwork.errors import PortUnavailable
from graftwork.reference.site import Site

_CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Facts:
    """One stack.

    Attributes:
        where: what messages call it.
        arguments: names of its forward's parameters, in order.
        cache: the argument that holds the cache, "" where there is none.
        positions: how positions are counted where none are given: "arange" from the cache's length, "mask"
            along the padding mask, "ids" along the ids that are no padding; "" where they are no argument.
        padding: the padding id that "ids" counts from.
        table: path below the stack of a learned position table that is called with positions of its own.
        rows: positions the learned table has, 0 without one.
        keep: leading positions that stay in front of a prompt.
        front: filler lies in front of a row.
        causal: the stack looks back only.
        stays: the prompt stays in the output, for a decoder to see it.
        between: positions enter at the first layer and leave behind the last.
        reach: how far back the layers' sliding windows look together, 0 where a layer has none.
    """

    where: str
    arguments: tuple[str, ...]
    cache: str
    positions: str
    padding: int
    table: str
    rows: int
    keep: int
    front: bool
    causal: bool
    stays: bool
    between: bool
    reach: int


def facts_of(model: nn.Module, site: Site) -> Facts:
    """The facts of the stack that a site belongs to."""
    stack = stack_of(model, site)
    module = model.get_submodule(stack.path)
    names = parameters(module)
    table, rows = ("", 0) if stack.sequence == "layers" else _table(model, stack, module)
    return Facts(
        where=_name(site, module),
        arguments=names,
        cache=next((name for name in _CACHES if name in names), ""),
        positions=_counting(module) if "position_ids" in names else "",
        padding=_padding(module),
        table=table if "position_ids" not in names else "",
        rows=rows,
        keep=stack.sequence_start,
        front=getattr(module, "pooler", None) is None,
        causal=stack.causal or bool(getattr(getattr(module, "config", None), "is_decoder", False)),
        stays=_is_read(model, site),
        between=stack.sequence == "layers",
        reach=_reach(module),
    )


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's own forward parameters, in order."""
    function = inspect.unwrap(base_of(type(module)).forward)  # type: ignore[attr-defined]
    found = list(inspect.signature(function).parameters.values())[1:]
    return tuple(p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def stack_path(model: nn.Module, site: Site) -> str:
    """Dotted name of the module that runs the site's layers."""
    return stack_of(model, site).path


def layer_paths(model: nn.Module, site: Site) -> tuple[str, ...]:
    """Dotted names of the layers of the site's stack."""
    return layer_modules(model, site)


def decoder_site(model: nn.Module, site: Site) -> Site:
    """The site of the decoder that reads the output of an encoder's site."""
    return replace(site, stack="decoder", layer=None)


def _is_read(model: nn.Module, site: Site) -> bool:
    """Whether a decoder reads the output of the site's stack."""
    names = {stack.name for stack in anatomy_of(model).stacks}
    return site.stack == "encoder" and "decoder" in names


def relative_bias(stack: nn.Module) -> str:
    """Path below a stack of the attention that computes one relative bias for all layers (T5), "" without."""
    for path, module in stack.named_modules():
        if getattr(module, "has_relative_attention_bias", False) and hasattr(
            module, "_relative_position_bucket"
        ):
            return path
    return ""


def check_embeds(facts: Facts, site: Site, stack: nn.Module) -> None:
    """Refuse a stack that cannot be given embeddings."""
    takes = "inputs_embeds" in facts.arguments and hasattr(stack, "get_input_embeddings")
    if not facts.between and not takes:
        raise PortUnavailable(
            f"sequence port: {facts.where} at {site.module or 'the root'} takes no inputs_embeds, so no "
            "positions can be put in there; use the attention port (prefix tuning)"
        )


def _name(site: Site, module: nn.Module) -> str:
    family = getattr(getattr(module, "config", None), "model_type", "")
    return f"{' '.join(part for part in (family, site.stack) if part)} ({type(module).__name__})".strip()


def _reach(module: nn.Module) -> int:
    config = getattr(module, "config", None)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not window or (kinds and any("sliding" not in kind for kind in kinds)):
        return 0
    return int(window) * int(getattr(config, "num_hidden_layers", 0))


def _counting(module: nn.Module) -> str:
    embeddings, table = getattr(module, "embeddings", None), getattr(module, "embed_positions", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return "ids"
    return "mask" if table is not None and "attention_mask" in parameters(table) else "arange"


def _padding(module: nn.Module) -> int:
    found = getattr(getattr(module, "embeddings", None), "padding_idx", None)
    return found if isinstance(found, int) else 0


def _table(model: nn.Module, stack: Stack, module: nn.Module) -> tuple[str, int]:
    """Path below the stack and rows of its learned position table."""
    patterns = [place.path for name, place in places_of(stack.around) if name == "embedding.position"]
    found = [
        hit for pattern in patterns for hit in expand(model, pattern) if isinstance(hit[1], nn.Embedding)
    ]
    if not found:
        return "", 0
    path, table = found[0]
    unused = getattr(table, "offset", 0) or (_padding(module) + 1 if _counting(module) == "ids" else 0)
    below = path.removeprefix(f"{stack.path}.") if stack.path else path
    return below, int(table.num_embeddings - unused)  # type: ignore[operator]
