"""A LoRA step on quantised linears (bitsandbytes), against the same base unquantised and against the peer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graftwork.bench import peer, training
from graftwork.bench.hosts import Host
from graftwork.bench.measure import interleaved
from graftwork.bench.parts.saved import MIB, kept_by
from graftwork.bench.settings import Settings
from graftwork.bench.table import Table
from graftwork.bench.variants import LINEARS, Subject, base_of

PART = "quantised"
HEADINGS = ("base", "ms", "saved MiB", f"{peer.NAME} ms", f"{peer.NAME} saved MiB", f"time / {peer.NAME}")
ABSENT = "bitsandbytes is not installed, so nothing was measured: pip install 'graftwork[quantised]'"


def measure(settings: Settings) -> list[Table]:
    """One table per causal host."""
    out = []
    for host in settings.causal:
        table = Table(PART, f"{host.about}, LoRA r16 on all linears, {settings.device}", HEADINGS)
        if importlib.util.find_spec("bitsandbytes") is None:
            table.notes.append(ABSENT)
        else:
            for kind in ("bf16", "8-bit", "4-bit"):
                _row(table, kind, host, settings)
        out.append(table)
    return out


def _row(table: Table, kind: str, host: Host, settings: Settings) -> None:
    batch = host.batch_of(settings.device)
    built = {"ours": _own, **({"peer": _theirs} if peer.available() else {})}
    subjects = {}
    for side, make in built.items():
        try:
            subjects[side] = _trained(
                Subject(kind, side, make(_base(kind, host, settings.device), host)), batch
            )
        except Exception as error:  # a kernel that this device does not have
            table.notes.append(f"{kind}, {side}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    times = interleaved(
        {side: step for side, (step, _) in subjects.items()}, settings.rounds, device=settings.device
    )
    cells = [
        value
        for side in ("ours", "peer")
        for value in ((times[side].median * 1e3, subjects[side][1]) if side in times else (None, None))
    ]
    table.rows.append((kind, *cells, times["ours"].over(times["peer"]) if len(times) == 2 else None))


def _trained(subject: Subject, batch: dict[str, Any]) -> tuple[Callable[[], None], float]:
    step = training.stepper(subject, batch)
    step()
    return step, kept_by(subject, batch) / MIB


def _base(kind: str, host: Host, device: str) -> nn.Module:
    """A bf16 host whose layers' linears are replaced by quantised ones of the same weights."""
    model = base_of(host, torch.bfloat16, "cpu")
    if kind != "bf16":
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and ".layers." in f".{path}":
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, _quantised(kind, module))
    return model.to(device)


def _quantised(kind: str, linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    sizes = linear.in_features, linear.out_features
    if kind == "8-bit":
        new: Any = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return new


def _own(model: nn.Module, host: Host) -> nn.Module:
    from graftwork.engine.attach import attach
    from graftwork.techniques.lora import LoRA

    attach(model, LoRA(rank=16, alpha=32, workspaces=LINEARS))
    return model.train()


def _theirs(model: nn.Module, host: Host) -> nn.Module:
    return peer.wrap(model, peer.lora(host)).train()
