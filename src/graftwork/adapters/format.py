"""graftwork's own adapter file: one safetensors file, `NAME.safetensors`.

Its metadata holds the manifest as JSON under `graftwork` and, under `sha256`, a digest of manifest and
tensors, so that any change after writing is noticed. Nothing is ever unpickled or run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from graftwork.adapters.container import raw, read_header, read_tensors, write
from graftwork.adapters.disk import write_atomically
from graftwork.adapters.documents import dump, parse
from graftwork.adapters.manifest import Manifest, read_manifest
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile

KEY, DIGEST = "graftwork", "sha256"


def write_own(path: Path, stored: StoredAdapter) -> None:
    """Write one file, in one step. Tensors come from `container.writable`."""
    if not stored.tensors:
        raise BadFile(f"{path}: adapter {stored.manifest.name!r} holds no tensors; there is nothing to save")
    _compare_names(stored.manifest, stored.tensors, str(path))
    text = dump(stored.manifest.document())
    metadata = {KEY: text, DIGEST: _digest(text, stored.tensors)}
    write_atomically(path, lambda out: write(out, stored.tensors, metadata))


def read_own(path: Path) -> StoredAdapter:
    """Read one file and check everything that can be checked without a model. Raises BadFile."""
    header = read_header(path)
    if KEY not in header.metadata:
        raise BadFile(
            f"{path} is a safetensors file without graftwork's manifest; {_what_else(header.shapes)}"
        )
    tensors = read_tensors(path)
    text = header.metadata[KEY]
    document = parse(text, str(path))
    if header.metadata.get(DIGEST) != _digest(text, tensors):
        raise BadFile(f"{path} is corrupt: its digest does not fit its content")
    manifest = read_manifest(document, str(path))
    _compare_names(manifest, tensors, str(path))
    return StoredAdapter(manifest, tensors)


def read_card(path: Path) -> Manifest:
    """The manifest alone, without reading tensors. Raises BadFile."""
    header = read_header(path)
    if KEY not in header.metadata:
        raise BadFile(
            f"{path} is a safetensors file without graftwork's manifest; {_what_else(header.shapes)}"
        )
    return read_manifest(parse(header.metadata[KEY], str(path)), str(path))


def is_own(path: Path) -> bool:
    """Whether a safetensors file is an adapter file of ours. Raises BadFile when it is no such container."""
    return KEY in read_header(path).metadata


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def _compare_names(manifest: Manifest, tensors: Mapping[str, Tensor], where: str) -> None:
    report = both_directions(manifest.tensors, tensors)
    if report:
        raise BadFile(f"{where}: manifest and tensors do not fit: {report}")


def both_directions(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    """Names missing and names too many, in words; empty when there are none."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    parts = [("missing", missing), ("too many", surplus)]
    return "; ".join(f"{what}: {_some(names)}" for what, names in parts if names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _what_else(names: Mapping[str, object]) -> str:
    if any(".lora_A" in name for name in names) or "prompt_embeddings" in names:
        return "it looks like HF PEFT's: load the folder that holds it and adapter_config.json"
    return "it holds model weights or something else"
