"""Adam's two moments as an optimiser keeps them: in fp32, or in 8 bits with a scale for each block of 256 values.

8 bits are bitsandbytes' dynamic blockwise codes (Dettmers et al. 2021, arXiv:2110.02861), signed for the mean, unsigned
for the mean square. They are read into fp32, updated there and coded again in each step.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from graftwork.errors import BadOption

BITS = (8, 32)
BLOCK = 256
MEAN, SQUARE = "exp_avg", "exp_avg_sq"

State = dict[str, Any]


def check_bits(bits: object) -> None:
    """Raise BadOption unless moments can be kept in so many bits here."""
    if bits not in BITS:
        raise BadOption(f"state_bits={bits!r}: take one of {', '.join(map(str, BITS))}")
    if bits == 8 and importlib.util.find_spec("bitsandbytes") is None:
        raise BadOption(
            "state_bits=8 needs bitsandbytes: pip install 'graftwork[quantised]', or keep state_bits=32"
        )


def bits_of(state: State) -> int:
    """In how many bits a state holds its moments."""
    return 8 if state[MEAN].dtype is torch.uint8 else 32


def read(state: State, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square in the shape and precision of `like`; zeros at the start. In 32 bits those of the state
    itself, which are changed in place."""
    if MEAN not in state:
        return torch.zeros_like(like), torch.zeros_like(like)
    if bits_of(state) == 32:
        return state[MEAN], state[SQUARE]
    return _decoded(state, MEAN, like), _decoded(state, SQUARE, like)


def write(state: State, mean: Tensor, square: Tensor, bits: int) -> None:
    """Keep both moments."""
    if bits == 32:
        state[MEAN], state[SQUARE] = mean, square
        return
    for name, value in ((MEAN, mean), (SQUARE, square)):
        codes, scales = _library().quantize_blockwise(
            value.float(), code=_code(name, value.device), blocksize=BLOCK
        )
        state[name], state[f"{name}_scale"] = codes, scales.absmax


def _decoded(state: State, name: str, like: Tensor) -> Tensor:
    code = _code(name, like.device)
    scale = state[f"{name}_scale"]
    values: Tensor = _library().dequantize_blockwise(state[name], absmax=scale, code=code, blocksize=BLOCK)
    return values.to(like.dtype)


@functools.cache
def _code(name: str, device: torch.device) -> Tensor:
    """The 256 values that codes stand for."""
    values: Tensor = _library().create_dynamic_map(signed=name == MEAN).to(device)
    return values


def _library() -> Any:
    return importlib.import_module("bitsandbytes.functional")
