"""What the laws run over."""

from __future__ import annotations

import graftwork as gw
from graftwork.reference.technique import Technique


def cases() -> dict[str, Technique]:
    """One smallest useful row per technique, and the variants whose cards differ."""
    return {
        "lora": gw.LoRA(rank=2, alpha=4),
        "dora": gw.DoRA(rank=2, alpha=4),
        "lora-pissa": gw.LoRA(rank=2, init="pissa"),
        "kasa": gw.KaSA(rank=2),
        "s2ft": gw.S2FT(share=0.2),
        "ba-lora": gw.BALoRA(rank=2),
        "lora-everywhere": gw.LoRA(rank=2, workspaces=("all-linear|conv",)),
        "bottleneck-adapter": gw.BottleneckAdapter(width=4),
        "parallel-adapter": gw.BottleneckAdapter.parallel(width=4),
        "houlsby-adapter": gw.BottleneckAdapter.houlsby(width=4),
        "tiny-attention-adapter": gw.TinyAttentionAdapter(),
        "adalink": gw.AdaLink(rank=4),
        "adalink-inputs": gw.AdaLink(rank=4, nonlinearity="relu", bias=True, workspaces=("inputs",)),
        "adalink-prompt": gw.AdaLink(rank=4, scope="prompt", workspaces=("inputs",)),
        "compacter": gw.Compacter(),
        "ia3": gw.IA3(),
        "prompt-tuning": gw.PromptTuning(length=4),
        "prompt-pool": gw.PromptPool(size=2, length=2),
        "multitask-prompt-tuning": gw.MultitaskPromptTuning(length=4, rank=2),
        "adapter-fusion": gw.AdapterFusion(of=("nli", "sentiment")),
        "p-tuning": gw.PTuning(length=4),
        "query-prompt": gw.QueryPrompt(length=3, opening_ids=(5, 6), closing_ids=(7,), embedding="copy"),
        "query-prompt-attention": gw.QueryPrompt(form="attention", opening_ids=(5,), dropout=0.0),
        "loreft": gw.LoReFT(rank=2, first=2, last=1, dropout=0.0),
        "lora-gated": gw.LoRA(rank=2, alpha=4, integration="gated addition"),  # type: ignore[arg-type]
        "adapter-gated": gw.BottleneckAdapter(width=4, integration="gated addition"),  # type: ignore[arg-type]
        "prefix-tuning-gated": gw.PrefixTuning(length=4, hidden=8, gated=True),
        "vpt": gw.VPT(length=4),
        "vpt-deep": gw.VPT(length=4, deep=True, dropout=0.0),
        "prefix-tuning": gw.PrefixTuning(length=4, hidden=None),
        "prefix-tuning-mlp": gw.PrefixTuning(length=4, hidden=8),
        "bitfit": gw.BitFit(),
        "norm-tuning": gw.NormTuning(),
        "ssf": gw.SSF(),
        "fine-tuning": gw.FineTuning(),
        "loha": gw.LoHa(rank=2),
        "loha-dense": gw.LoHa(rank=8, alpha=4, workspaces=("all-linear|conv",)),
        "lokr": gw.LoKr(rank=2),
        "lokr-whole": gw.LoKr(rank=8, workspaces=("all-linear|conv",)),
        "vera": gw.VeRA(rank=6),
        "mixture-of-lora": gw.MixtureOfLoRA(experts=3, rank=2, alpha=4),
        "mixture-of-lora, top two": gw.MixtureOfLoRA(experts=3, rank=2, alpha=4, top_k=2),
        "miss": gw.MiSS(rank=5),
        "shira": gw.SHiRA(rank=2),
        "fourierft": gw.FourierFT(count=20),
        "randlora": gw.RandLoRA(rank=12, alpha=24),
        "fact": gw.FacT(rank=3, alpha=2.0),
        "fact-tucker": gw.FacT(rank=3, alpha=2.0, decomposition="tucker"),
        "adalora": gw.AdaLoRA(total_steps=10, rank=3, target_rank=2),
        "oft": gw.OFT(block=4),
        "oft-series": gw.OFT(block=8, terms=5, one_block=True),
        "hra": gw.HRA(rank=4),
        "boft": gw.BOFT(block=4, butterflies=2),
    }


def first_cases() -> dict[str, Technique]:
    """The first row of each technique."""
    rows = cases()
    first = {technique.name: name for name, technique in reversed(rows.items())}
    return {name: rows[name] for name in reversed(first.values())}
