"""Merging into the base and back: time, agreement with the unmerged forward, and whether every bit returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graftwork.bench import peer
from graftwork.bench.hosts import Host
from graftwork.bench.measure import once
from graftwork.bench.settings import DTYPES, Settings
from graftwork.bench.table import Cell, Goal, Table
from graftwork.bench.variants import LINEARS, base_of

PART = "merge"
HEADINGS = ("library", "merge, ms", "unmerge, ms", "merged logits off by", "weights changed after unmerge")


def measure(settings: Settings) -> list[Table]:
    """One table per causal host and precision."""
    return [_table(settings, host, name) for host in settings.causal for name in settings.dtypes]


def _table(settings: Settings, host: Host, dtype: str) -> Table:
    table = Table(PART, f"{host.name}, LoRA r16 on all linears; base in {dtype}, {settings.device}", HEADINGS)
    ids = torch.randint(3, host.vocabulary, (2, 16), device=settings.device)
    own = Own(base_of(host, DTYPES[dtype], settings.device).eval())
    changed = _row(table, "graftwork", own, ids, settings)
    if peer.available():
        _row(
            table, peer.NAME, Peer(base_of(host, DTYPES[dtype], settings.device).eval(), host), ids, settings
        )
    else:
        table.notes.append(peer.ABSENT)
    table.goals.append(Goal(f"weights changed by merge and unmerge, {dtype}", 0.0, changed, ""))
    return table


def _row(table: Table, name: str, merger: Any, ids: Tensor, settings: Settings) -> float:
    stored = {key: p.detach().clone() for key, p in merger.base.named_parameters() if _is_base(key)}
    rounds = {"merge": [], "unmerge": []}  # type: dict[str, list[float]]
    with torch.no_grad():
        before = merger.model(input_ids=ids).logits.float()
        for turn in range(settings.rounds):
            rounds["merge"].append(once(merger.merge, settings.device))
            if turn == 0:
                merged = merger.model(input_ids=ids).logits.float()
            rounds["unmerge"].append(once(merger.unmerge, settings.device))
    now = dict(merger.base.named_parameters())
    total = sum(t.numel() for t in stored.values())
    changed = sum(int((now[key] != t).sum()) for key, t in stored.items()) / total
    off = float((merged - before).norm() / before.norm())
    middle = [sorted(taken)[len(taken) // 2] * 1e3 for taken in rounds.values()]
    cells: tuple[Cell, ...] = (name, *middle, f"{off:.1e}", f"{changed:.2%}")
    table.rows.append(cells)
    return changed


def _is_base(key: str) -> bool:
    return "lora" not in key and "grafts" not in key.split(".")


class Own:
    """Our adapter on a model."""

    def __init__(self, model: nn.Module) -> None:
        from graftwork.engine.attach import attach
        from graftwork.techniques.lora import LoRA

        self.base = self.model = model
        adapter = attach(model, LoRA(rank=16, alpha=32, workspaces=LINEARS))
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.02)

    def merge(self) -> None:
        from graftwork.engine.merging import merge

        merge(self.model, "default")

    def unmerge(self) -> None:
        from graftwork.engine.merging import unmerge

        unmerge(self.model)


class Peer:
    """The peer's adapter on a model."""

    def __init__(self, model: nn.Module, host: Host) -> None:
        self.base, self.model = model, peer.wrap(model, peer.lora(host))
        for key, parameter in model.named_parameters():
            if "lora" in key:
                nn.init.normal_(parameter, std=0.02)

    def merge(self) -> None:
        self.model.merge_adapter()

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
