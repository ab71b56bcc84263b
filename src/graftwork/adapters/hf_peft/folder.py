"""HF PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`.

Writing puts both beside the old files first, then takes an old configuration that differs away, renames the
tensors into place and the configuration last. A kill in between leaves a folder without configuration, which
no reader takes for an adapter, never one version's tensors with another's configuration.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from torch import Tensor, nn

from graftwork.adapters.base import BaseIdentity
from graftwork.adapters.container import read_tensors, refuse_pickle, write
from graftwork.adapters.disk import flush_folder, stage
from graftwork.adapters.documents import dump, parse, take
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import FROZEN, PROMPTS
from graftwork.adapters.hf_peft.registry import translator_for, translator_of
from graftwork.adapters.manifest import Owner, place_of
from graftwork.adapters.stored import StoredAdapter, assemble
from graftwork.errors import BadFile

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_adapter.bin")


def read_config(folder: Path) -> Config:
    """The configuration of a folder. Raises BadFile."""
    path = folder / CONFIG
    try:
        content = path.read_bytes() if path.stat().st_size <= 2**24 else b""
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read ({error})") from None
    refuse_pickle(content[:16], path)
    document = parse(content, str(path))
    if "peft_type" not in document and "model_class" in document:
        raise BadFile(f"{folder} was written by adapter-hub's `adapters`, whose format is not read")
    return Config(document, str(path))


def read_folder(folder: Path, model: nn.Module, name: str, base: BaseIdentity, task: str) -> StoredAdapter:
    """A folder as an adapter of `model` (the meta device will do where only shapes and names are needed)."""
    config = read_config(folder)
    translator = translator_of(take(config.document, "peft_type", str, config.where), config.where)
    tensors = _read_tensors(folder, translator.front)
    host = Host(model)
    parts = translator.read(config, tensors, host)
    if tensors:
        some = ", ".join(sorted(tensors)[:6])
        raise BadFile(f"{folder / TENSORS}: {len(tensors)} tensors have no home in this model: {some}")
    return _assembled(parts, host, name, base, task)


def write_folder(folder: Path, stored: StoredAdapter, model: nn.Module | None, base_name: str | None) -> None:
    """Write an adapter so that HF PEFT loads it. Without a model only what needs no base values can be
    written.
    """
    translator = translator_for(technique.name for technique in stored.manifest.techniques)
    if any(owner.name == "gate.weight" for owner in stored.owned()):
        raise BadFile(
            "HF PEFT's format has no place for a gate (gated addition). Keep graftwork's own format"
        )
    config, tensors = translator.write(stored, None if model is None else Host(model))
    config["base_model_name_or_path"] = base_name
    named = {_full(name, translator.front): tensor.contiguous() for name, tensor in tensors.items()}
    _write(folder, dump({k: v for k, v in config.items() if v is not None}, indent=2).encode(), named)


def _full(name: str, front: str) -> str:
    if name in FROZEN:
        return f"{PROMPTS}{name}"
    return f"{front}{name}" if "." in name else name


def _write(folder: Path, config: bytes, tensors: dict[str, Tensor]) -> None:
    def put(out: BinaryIO) -> None:
        out.write(config)

    staged = []
    try:
        staged.append(stage(folder / TENSORS, lambda out: write(out, tensors, {"format": "pt"})))
        staged.append(stage(folder / CONFIG, put))
        if (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() != config:
            (folder / CONFIG).unlink()
            flush_folder(folder)
        os.replace(staged[0], folder / TENSORS)
        os.replace(staged[1], folder / CONFIG)
    finally:
        for part in staged:
            part.unlink(missing_ok=True)
    flush_folder(folder)


def _read_tensors(folder: Path, front: str) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.exists():
        pickles = [name for name in PICKLES if (folder / name).exists()]
        if pickles:
            raise BadFile(
                f"{folder} holds {pickles[0]}, a pickle, which could run code when read. In a process that "
                f"you trust with it, read it with torch.load(path, weights_only=True) and write {TENSORS} "
                "with safetensors.torch.save_file"
            )
        raise BadFile(f"{folder} holds {CONFIG} but no {TENSORS}: an interrupted copy or save")
    tensors = read_tensors(path)
    stripped = {name.removeprefix(front): tensor for name, tensor in tensors.items()}
    if len(stripped) != len(tensors):
        raise BadFile(f"{path}: two tensors differ in the prefix {front!r} only")
    return stripped


def _assembled(parts: list[Part], host: Host, name: str, base: BaseIdentity, task: str) -> StoredAdapter:
    techniques = tuple(part.technique for part in parts)
    owned = {Owner(i, key, own): t for i, part in enumerate(parts) for (key, own), t in part.tensors.items()}
    if not owned:
        raise BadFile(f"the adapter {name!r} holds no tensors")
    places = {site.key: place_of(host.model, site) for part in parts for site in part.sites}
    return assemble(name, techniques, owned, places, base, task)
