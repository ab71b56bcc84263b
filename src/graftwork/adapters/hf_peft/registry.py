"""The types of HF PEFT that are read and written, one file each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftwork.adapters.hf_peft import (
    adalora,
    boft,
    fourierft,
    hra,
    ia3,
    loha,
    lokr,
    lora,
    lora_writing,
    miss,
    multitask,
    norms,
    oft,
    prefix,
    prompt,
    randlora,
    shira,
    vera,
)
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.host import Host, Part
from graftwork.adapters.hf_peft.keys import LAYERS, PROMPTS
from graftwork.adapters.stored import StoredAdapter
from graftwork.errors import BadFile, nearest

Read = Callable[[Config, dict[str, Tensor], Host], list[Part]]
Write = Callable[[StoredAdapter, Host | None], tuple[dict[str, Any], dict[str, Tensor]]]


@dataclass(frozen=True)
class Translator:
    """How one type is read and written.

    Attributes:
        front: what module paths begin with in the file.
        leads: names of techniques, one of which makes an adapter one of this type.
        carries: names of further techniques that it can hold beside.
    """

    peft_type: str
    front: str
    read: Read
    write: Write
    leads: frozenset[str] = frozenset()
    carries: frozenset[str] = frozenset()


_WHOLE = frozenset({"fine-tuning", "norm-tuning"})
_HEAD = frozenset({"fine-tuning"})
_LOW_RANK = frozenset({"lora", "ba-lora", "dora", "kasa"})

TRANSLATORS: dict[str, Translator] = {
    t.peft_type: t
    for t in (
        Translator("LORA", LAYERS, lora.read, lora_writing.write, _LOW_RANK, _WHOLE | {"bitfit"}),
        Translator("ADALORA", LAYERS, adalora.read, lora_writing.write),
        Translator("IA3", LAYERS, ia3.read, ia3.write, frozenset({"ia3"}), _WHOLE),
        Translator("LOHA", LAYERS, loha.read, loha.write, frozenset({"loha"}), _WHOLE),
        Translator("LOKR", LAYERS, lokr.read, lokr.write, frozenset({"lokr"}), _WHOLE),
        Translator("VERA", LAYERS, vera.read, vera.write, frozenset({"vera"}), _WHOLE),
        Translator("RANDLORA", LAYERS, randlora.read, randlora.write, frozenset({"randlora"}), _WHOLE),
        Translator("FOURIERFT", LAYERS, fourierft.read, fourierft.write, frozenset({"fourierft"}), _WHOLE),
        Translator("SHIRA", LAYERS, shira.read, shira.write, frozenset({"shira"}), _WHOLE),
        Translator("MISS", LAYERS, miss.read, miss.write, frozenset({"miss"}), _WHOLE),
        Translator("OFT", LAYERS, oft.read, oft.write, frozenset({"oft"}), _WHOLE),
        Translator("BOFT", LAYERS, boft.read, boft.write, frozenset({"boft"}), _WHOLE),
        Translator("HRA", LAYERS, hra.read, hra.write, frozenset({"hra"}), _WHOLE),
        Translator("LN_TUNING", LAYERS, norms.read, norms.write, frozenset({"norm-tuning"}), _HEAD),
        Translator("PROMPT_TUNING", PROMPTS, prompt.read, prompt.write, frozenset({"prompt-tuning"}), _HEAD),
        Translator(
            "MULTITASK_PROMPT_TUNING",
            PROMPTS,
            multitask.read,
            multitask.write,
            frozenset({"multitask-prompt-tuning"}),
            _HEAD,
        ),
        Translator("P_TUNING", PROMPTS, prompt.read, prompt.write),
        Translator("PREFIX_TUNING", PROMPTS, prefix.read, prefix.write, frozenset({"prefix-tuning"}), _HEAD),
    )
}


def translator_of(peft_type: str, where: str) -> Translator:
    """The translator of a type by its name in the file."""
    if peft_type not in TRANSLATORS:
        raise BadFile(f"{where}: HF PEFT's type {peft_type!r} is not read. {nearest(peft_type, TRANSLATORS)}")
    return TRANSLATORS[peft_type]


def translator_for(techniques: Iterable[str]) -> Translator:
    """The translator that can write an adapter of these techniques. Raises BadFile where HF PEFT has no such
    type.
    """
    names = frozenset(techniques)
    for translator in TRANSLATORS.values():
        if names & translator.leads and names <= translator.leads | translator.carries:
            return translator
    if "bitfit" in names and names <= TRANSLATORS["LORA"].carries:
        return TRANSLATORS["LORA"]
    held = ", ".join(sorted({name for t in TRANSLATORS.values() for name in t.leads} | {"bitfit"}))
    raise BadFile(
        f"HF PEFT's format has no type for an adapter of {' and '.join(sorted(names))}; it holds one of "
        f"{held}, with a trained head. Keep graftwork's own format"
    )
