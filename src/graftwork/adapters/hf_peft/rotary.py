"""How a prefix in the cache, behind which tokens stand n positions later, agrees with one beside the attention.

Where positions come from a table or a relative bias, the tokens are moved (`shift_positions`). Along rotary
positions the keys are turned instead: a query at position n + t meets a stored key as q' R(n + t)' k. Without
the n tokens in the cache it stands at t, and q' R(t)' (R(-n) k) is the same. It holds where position enters
by rotation alone, with angles that do not depend on the sequence; a layer without positions needs no turn.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine.placing import is_adapter_name
from graftwork.engine.sequence_facts import facts_of, relative_bias, stack_path
from graftwork.errors import BadFile
from graftwork.reference.site import Site

CHANGING = ("dynamic", "longrope")


def shift_of(model: nn.Module, site: Site, length: int, where: str) -> int:
    """The `shift_positions` that stands for a prefix of that length in the cache, 0 where keys are turned.

    Raises:
        BadFile: the stack takes no cache, or has positions of another kind.
    """
    attention, facts = model.get_submodule(site.module), facts_of(model, site)
    if facts.cache != "past_key_values":
        raise BadFile(f"{where}: {facts.where} takes no cache, which is where HF PEFT puts a prefix")
    if _rotation(attention) is not None:
        return 0
    if facts.rows or relative_bias(model.get_submodule(stack_path(model, site))):
        return length
    raise BadFile(
        f"{where}: HF PEFT's prefixes move the positions of all tokens, and {type(attention).__name__} has "
        "neither rotary positions nor a table or relative bias of them by which that could be done here"
    )


def turned(model: nn.Module, site: Site, keys: Tensor, steps: int, where: str) -> Tensor:
    """Keys (N, heads x head width) turned by `steps` positions. Raises BadFile where positions are not
    rotary.
    """
    attention = model.get_submodule(site.module)
    if not getattr(attention, "use_rope", True):
        return keys.contiguous()
    rotate = _rotation(attention)
    if rotate is None:
        raise BadFile(f"{where}: {type(attention).__name__} has no rotary positions to turn keys by")
    cos, sin = _angles(model, attention, abs(steps), where)
    width = cos.shape[-1]
    heads = keys.detach().double().reshape(len(keys), site.heads, -1).transpose(0, 1).unsqueeze(0)
    if width > heads.shape[-1]:
        raise BadFile(f"{where}: the rotary angles of {site.module} do not fit its heads")
    front, rest = heads[..., :width], heads[..., width:]
    front = rotate(front, front, cos, sin if steps > 0 else -sin)[1]
    back = torch.cat([front, rest], dim=-1)[0].transpose(0, 1).flatten(1)
    return back.to(keys.dtype).contiguous()


def _rotation(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The family's own way of rotating (halves or pairs), None where positions are not rotary."""
    original = type(attention).__mro__
    modules = [sys.modules.get(kind.__module__) for kind in original]
    found = next((f for m in modules if (f := getattr(m, "apply_rotary_pos_emb", None)) is not None), None)
    forwards = [vars(kind)["forward"] for kind in original if "forward" in vars(kind)][:2]
    takes = any("position_embeddings" in inspect.signature(forward).parameters for forward in forwards)
    return found if takes else None


def _angles(model: nn.Module, attention: nn.Module, position: int, where: str) -> tuple[Tensor, Tensor]:
    """Unscaled cos and sin (1, 1, width) at a position, in double precision."""
    rotary = _rotary(model, where)
    _refuse_windows(attention, where)
    kind = getattr(rotary, "rope_type", "default")
    if isinstance(kind, dict) or kind in CHANGING:
        raise BadFile(
            f"{where}: rotary angles of kind {kind} change with the sequence, so prefixes cannot be moved"
        )
    places = torch.tensor([[position]], device=rotary.inv_freq.device)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64, device=places.device), places)
    scale = float(getattr(rotary, "attention_scaling", 1.0))
    return cos.double().cpu() / scale, sin.double().cpu() / scale


def _rotary(model: nn.Module, where: str) -> Any:
    named = [(n, m) for n, m in model.named_modules() if not is_adapter_name(n)]
    found = [m for _, m in named if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise BadFile(
            f"{where}: expected one module with rotary angles, found {len(found)}: prefixes of this family "
            "cannot be moved"
        )
    return found[0]


def _refuse_windows(attention: nn.Module, where: str) -> None:
    if getattr(attention, "sliding_window", None):
        raise BadFile(
            f"{where}: {type(attention).__name__} has a sliding window, out of which HF PEFT's prefix "
            "slides; graftwork's stays, so results would differ"
        )
