"""Ways to change weights beyond LoRA, each as we do it and as the peer does, on all linears unless named otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graftwork.bench import peer
from graftwork.bench.hosts import Host
from graftwork.bench.variants import LINEARS, Variant

GATES = ("feedforward.gate?", "feedforward.up")
QUERY_VALUE = ("attention.query", "attention.value")
OUTPUTS = ("attention.output", "feedforward.down")


def weight_variants() -> tuple[Variant, ...]:
    """In the order of the tables; LoRA stands first for comparison."""
    from graftwork.techniques.boft import BOFT
    from graftwork.techniques.dora import DoRA
    from graftwork.techniques.hra import HRA
    from graftwork.techniques.kasa import KaSA
    from graftwork.techniques.loha import LoHa
    from graftwork.techniques.lokr import LoKr
    from graftwork.techniques.lora import LoRA
    from graftwork.techniques.miss import MiSS
    from graftwork.techniques.oft import OFT
    from graftwork.techniques.randlora import RandLoRA
    from graftwork.techniques.s2ft import S2FT
    from graftwork.techniques.vera import VeRA

    def lora(workspaces: tuple[str, ...] = LINEARS, **options: Any) -> Callable[[], LoRA]:
        return lambda: LoRA(rank=16, alpha=32, workspaces=workspaces, **options)

    return (
        Variant(name="LoRA r16, all linears", technique=lora(), peer=peer.lora),
        Variant(
            name="LoRA r16, PiSSA", technique=lora(init="pissa")
        ),  # the peer would rewrite the shared base
        Variant(
            name="DoRA r16",
            technique=lambda: DoRA(rank=16, alpha=32, workspaces=LINEARS),
            peer=lambda host: peer.lora(host, use_dora=True),
        ),
        Variant(name="KaSA r16", technique=lambda: KaSA(rank=16, workspaces=LINEARS)),
        Variant(name="LoHa r8", technique=lambda: LoHa(workspaces=LINEARS), peer=_of("LoHaConfig", r=8)),
        Variant(name="LoKr r8", technique=lambda: LoKr(workspaces=LINEARS), peer=_of("LoKrConfig", r=8)),
        Variant(
            name="VeRA r256, gate and up",
            technique=lambda: VeRA(workspaces=GATES),
            peer=_of("VeraConfig", "gates", r=256),
        ),
        Variant(
            name="MiSS r16", technique=lambda: MiSS(rank=16, workspaces=LINEARS), peer=_of("MissConfig", r=16)
        ),
        Variant(
            name="OFT block 32",
            technique=lambda: OFT(workspaces=LINEARS),
            peer=_of("OFTConfig", oft_block_size=32),
        ),
        Variant(
            name="BOFT block 4, query and value",
            technique=lambda: BOFT(workspaces=QUERY_VALUE),
            peer=_of("BOFTConfig", "query-value", boft_block_size=4),
        ),
        Variant(name="HRA r8", technique=lambda: HRA(workspaces=LINEARS), peer=_of("HRAConfig", r=8)),
        Variant(
            name="RandLoRA r32, query and value",
            technique=lambda: RandLoRA(workspaces=QUERY_VALUE),
            peer=_of("RandLoraConfig", "query-value", r=32),
        ),
        Variant(name="LoRA r16, output and down", technique=lora(OUTPUTS)),
        Variant(name="S2FT, as many values", technique=lambda: S2FT(share=0.0482, workspaces=OUTPUTS)),
    )


def _of(kind: str, modules: str = "linears", **options: Any) -> Callable[[Host], Any]:
    return lambda host: peer.config(kind, host, target_modules=host.modules[modules], **options)
