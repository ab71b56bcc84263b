"""Several adapters in one batch: 16 rows, decoding (1 token) and prefill (256 tokens), without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.bench import peer
from graftwork.bench.hosts import Host, share
from graftwork.bench.measure import Times, interleaved
from graftwork.bench.settings import DTYPES, Settings
from graftwork.bench.table import Cell, Goal, Table
from graftwork.bench.variants import LINEARS, base_of
from graftwork.engine.attach import attach
from graftwork.techniques.lora import LoRA

PART = "mixed"
ROWS, ADAPTERS, SHORT, LONG = 16, 8, 1, 256
NAMES = tuple(f"user{number}" for number in range(ADAPTERS))
INDICES = {
    "8 adapters, rows grouped": [row * ADAPTERS // ROWS for row in range(ROWS)],
    "8 adapters, rows in turn": [row % ADAPTERS for row in range(ROWS)],
}
GOALS = {SHORT: 1.15, LONG: 1.10}
BARE, ONE = "bare host", "one adapter"
HEADINGS = ("rows x tokens", "adapters", "ms", "/ one", f"{peer.NAME} ms", "/ its one", f"/ {peer.NAME}")
Action = Callable[[], object]


def measure(settings: Settings, lengths: tuple[int, int] = (SHORT, LONG)) -> list[Table]:
    """One table per causal host and precision."""
    out = []
    for host in settings.causal:
        for name in settings.dtypes:
            out.append(_table(settings, host, name, lengths))
    return out


def _table(settings: Settings, host: Host, dtype: str, lengths: tuple[int, int]) -> Table:
    base = base_of(host, DTYPES[dtype], settings.device).eval()
    bare, own = share(base), own_model(share(base))
    other = peer_model(share(base), host) if peer.available() else None
    table = Table(PART, f"{host.name}, LoRA r16 on all linears; base in {dtype}, {settings.device}", HEADINGS)
    for length in lengths:
        ids = torch.randint(3, host.vocabulary, (ROWS, length), device=settings.device)
        actions: dict[tuple[str, str], Action] = {(BARE, "ours"): partial(bare, input_ids=ids)}
        actions.update({(case, "ours"): act for case, act in own_cases(own, ids).items()})
        if other is not None:
            actions.update({(case, "peer"): act for case, act in peer_cases(other, ids).items()})
        short = length == lengths[0]
        with torch.no_grad():
            times = interleaved(actions, settings.rounds * (4 if short else 1), device=settings.device)
        _fill(table, length, times)
        if host.name == "llama":
            worst = max(times[case, "ours"].over(times[ONE, "ours"]) for case in INDICES)
            table.goals.append(
                Goal(f"8 LoRAs in {ROWS} x {length}, {dtype}: of one", GOALS[length], worst, "x")
            )
    table.notes = [] if peer.available() else [peer.ABSENT]
    return table


def _fill(table: Table, length: int, times: dict[tuple[str, str], Times]) -> None:
    one = {side: times.get((ONE, side)) for side in ("ours", "peer")}
    for case in (BARE, ONE, *INDICES):
        own, other = times[case, "ours"], times.get((case, "peer"))
        cells = (own.median * 1e3, own.over(times[ONE, "ours"]))
        theirs: tuple[Cell, ...] = (None,) * 3
        if other is not None and one["peer"] is not None:
            theirs = other.median * 1e3, other.over(one["peer"]), own.over(other)
        table.rows.append((f"{ROWS} x {length}", case, *cells, *theirs))


def own_model(model: nn.Module, names: Sequence[str] = NAMES, rank: int = 16) -> nn.Module:
    """Adapters of ours, none the identity."""
    torch.manual_seed(2)
    for name in names:
        adapter = attach(model, LoRA(rank=rank, alpha=2 * rank, workspaces=LINEARS), name=name)
        for parameter in adapter.parameters():
            parameter.data.normal_(std=0.02)
    return model.eval()


def own_cases(model: nn.Module, ids: Tensor) -> dict[str, Action]:
    """One adapter for all rows, then each index; choosing counts as part of the call."""
    from graftwork.engine.verbs import active, route

    def one() -> object:
        with active(model, NAMES[0]):
            return model(input_ids=ids)

    def mixed(index: Tensor) -> object:
        with route(model, NAMES, index):
            return model(input_ids=ids)

    cases: dict[str, Action] = {ONE: one}
    for case, rows in INDICES.items():
        cases[case] = partial(mixed, torch.tensor(rows))
    return cases


def peer_model(model: nn.Module, host: Host, names: Sequence[str] = NAMES, rank: int = 16) -> Any:
    """The same with the peer."""
    wanted = peer.lora(host, rank=rank, init_lora_weights=False)
    wrapped = peer.wrap(model, wanted, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, wanted)
    return wrapped.eval()


def peer_cases(model: Any, ids: Tensor) -> dict[str, Action]:
    """The peer takes the name of each row's adapter with the call."""
    cases: dict[str, Action] = {ONE: partial(model, input_ids=ids)}
    for case, rows in INDICES.items():
        names = [NAMES[number] for number in rows]
        cases[case] = partial(model, input_ids=ids, adapter_names=names)
    return cases
