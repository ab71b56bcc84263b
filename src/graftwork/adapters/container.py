"""The safetensors container: written as a stream, read with every doubt.

Layout: eight bytes little-endian length, that many bytes of JSON (tensor name -> dtype, shape, offsets, and a
`__metadata__` of strings), then the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftwork.errors import BadFile

LONGEST_HEADER = 32 * 2**20

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PICKLE_ADVICE = (
    "Pickles can run code when read, so they are not. In a process that you trust with it, read it with "
    "torch.load(path, weights_only=True) and write it with safetensors.torch.save_file."
)


@dataclass(frozen=True)
class Header:
    """What a file says of itself: strings, and name -> (dtype, shape) of its tensors."""

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[str, tuple[int, ...]]]


def write(out: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Stream tensors (on the CPU, contiguous) to `out`; the same tensors always give the same bytes."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    head: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in order:
        stop = start + tensors[name].nbytes
        shape = list(tensors[name].shape)
        head[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        out.write(raw(tensors[name]))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def writable(tensor: Tensor, name: str) -> Tensor:
    """A tensor as a file takes it: gathered, on the CPU, contiguous, not empty, finite. Raises BadFile."""
    whole = tensor.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()
    if whole.is_meta:
        raise BadFile(f"{name} has no values (meta device): load the model's weights before saving")
    check_values(whole, name)
    return whole.cpu().contiguous()


def check_values(tensor: Tensor, name: str) -> None:
    """Refuse tensors that cannot be an adapter's: empty ones, kinds of numbers without meaning here, NaN."""
    if tensor.numel() == 0:
        raise BadFile(
            f"{name} has no elements (shape {tuple(tensor.shape)}): a partitioned parameter must be gathered "
            "before it is saved"
        )
    if tensor.dtype not in _NAMES:
        raise BadFile(f"{name} is of type {tensor.dtype}, which adapter files do not hold")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BadFile(f"{name} holds NaN or infinity: the training it comes from has diverged")


def read_header(path: Path) -> Header:
    """What a safetensors file says of itself, without its tensors. Raises BadFile."""
    check_container(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
            return Header(file.metadata() or {}, shapes)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise _broken(path, error) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, copied to memory of their own. Raises BadFile."""
    check_container(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise _broken(path, error) from None
    for name, tensor in tensors.items():
        check_values(tensor, f"{path}: {name}")
    return tensors


def check_container(path: Path) -> None:
    """Refuse what is not a safetensors file by its first bytes, before any library reads it."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise BadFile(f"{path} is not a file")
        with open(path, "rb") as file:
            start = file.read(16)
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read ({error})") from None
    refuse_pickle(start, path)
    if len(start) < 8:
        raise BadFile(f"{path} is cut off: {len(start)} bytes")
    length = struct.unpack("<Q", start[:8])[0]
    if length > info.st_size - 8:
        raise BadFile(
            f"{path} is cut off or no safetensors file: a header of {length} bytes, {info.st_size} in all"
        )
    if length > LONGEST_HEADER:
        raise BadFile(f"{path}: a header of {length} bytes, more than the {LONGEST_HEADER} that are read")


def refuse_pickle(start: bytes, path: Path) -> None:
    """Refuse a pickle by its content, whatever its name says."""
    zipped = start[:4] == b"PK\x03\x04"
    pickled = len(start) > 1 and start[0] == 0x80 and start[1] <= 5
    header = (
        start[2:9] == b"\0\0\0\0\0\0{"
    )  # a safetensors file whose header is 0x0580 bytes long begins alike
    if zipped or (pickled and not header):
        raise BadFile(f"{path} is a pickle (torch.save). {_PICKLE_ADVICE}")


def _broken(path: Path, error: Exception) -> BadFile:
    return BadFile(f"{path} is corrupt or no safetensors file ({str(error)[:200]})")
