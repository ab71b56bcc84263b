"""The peer: Hugging Face PEFT, measured beside graftwork where it is installed (a development dependency)."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from torch import nn

from graftwork.bench.hosts import Host

NAME = "peft"
ABSENT = "peft is not installed, so its columns are empty: pip install 'graftwork[dev]'"


def available() -> bool:
    """Whether the peer can be imported."""
    return importlib.util.find_spec(NAME) is not None


def config(kind: str, host: Host, **options: Any) -> Any:
    """A configuration of the peer (`LoraConfig`, ...) for a host's task."""
    import peft

    task = {"causal": "CAUSAL_LM", "classes": "SEQ_CLS"}[host.task]
    return getattr(peft, kind)(task_type=task, **options)


def wrap(model: nn.Module, wanted: Any, name: str = "default") -> Any:
    """The model inside the peer's, with one adapter."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, wanted, adapter_name=name)  # type: ignore[arg-type]


def lora(host: Host, rank: int = 16, modules: str = "linears", **options: Any) -> Any:
    """LoRA as every part uses it: alpha twice the rank."""
    return config(
        "LoraConfig", host, r=rank, lora_alpha=2 * rank, target_modules=host.modules[modules], **options
    )


def ia3(host: Host) -> Any:
    """(IA)3 on keys, values and the inner activation."""
    return config(
        "IA3Config", host,
        target_modules=host.modules["rescaled"], feedforward_modules=host.modules["rescaled-inputs"],
    )  # fmt: skip


def prefix(host: Host) -> Any:
    """Prefix tuning with 20 directly trained positions."""
    return config("PrefixTuningConfig", host, num_virtual_tokens=20)


def prompt(host: Host) -> Any:
    """Prompt tuning with 20 positions."""
    return config("PromptTuningConfig", host, num_virtual_tokens=20)


def norms(host: Host) -> Any:
    """Tuning of all norms."""
    return config("LNTuningConfig", host, target_modules=host.modules["norms"])
