"""Which base model an adapter belongs to: cheap, the same for every copy of one base, and able to say why
not.

Looked at are the base's own parameters: no adapter tensors, and no parts that are new with each task (heads,
pooler, projection to the vocabulary), so that one backbone under two task classes is one base. Names are left
out, so that an upstream rename of modules changes nothing: shapes count as a multiset, and values are taken
at fixed positions of sixteen matrices, in the order in which the model defines them. They are compared as
closely as the coarser of the two storage types allows: exactly between copies of one precision, to its
rounding between an fp32 and a bf16 copy. Quantised and unloaded (meta) matrices have no values to compare;
their shapes still count.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.adapters.documents import dump, take, take_list
from graftwork.errors import BadFile

MATRICES, VALUES = 16, 8
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
TINIEST = 2.0**-24  # half precision rounds smaller values to zero
SETTINGS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "activation_function",
    "feed_forward_proj",
    "rotary_pct",
    "partial_rotary_factor",
)


@dataclass(frozen=True)
class Sample:
    """A few values of one matrix; `values` is None where it has none to show."""

    shape: tuple[int, ...]
    dtype: str
    values: tuple[float, ...] | None


@dataclass(frozen=True)
class BaseIdentity:
    """What an adapter file remembers of its base.

    Attributes:
        architecture: name of the model's class (information; not compared).
        model_type: the family, empty for models without a configuration.
        settings: values of the configuration that change what the weights mean.
        shapes: "64x64" -> number of parameters of that shape.
        samples: values at fixed positions.
    """

    architecture: str
    model_type: str
    settings: Mapping[str, Any]
    shapes: Mapping[str, int]
    samples: tuple[Sample, ...]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits for people and logs; values enter in bf16."""
        rounded = [None if s.values is None else _bf16(s.values) for s in self.samples]
        text = dump({"type": self.model_type, "shapes": dict(self.shapes), "values": rounded})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def document(self) -> dict[str, Any]:
        """As plain JSON."""
        samples = [
            {"shape": list(s.shape), "dtype": s.dtype, "values": None if s.values is None else _hex(s.values)}
            for s in self.samples
        ]
        return {
            "architecture": self.architecture,
            "model_type": self.model_type,
            "settings": dict(self.settings),
            "shapes": dict(self.shapes),
            "samples": samples,
            "fingerprint": self.fingerprint,
        }


def identify(
    model: nn.Module, adapter_tensors: Iterable[Tensor], task_modules: Iterable[str]
) -> BaseIdentity:
    """The identity of the base under `model`.

    Args:
        adapter_tensors: parameters that adapters brought; left out.
        task_modules: dotted names of modules that are new with each task; left out.
    """
    parameters = base_parameters(model, adapter_tensors, task_modules)
    shapes = Counter("x".join(map(str, _shape(p))) for p in parameters)
    config = getattr(model, "config", None)
    settings = {key: getattr(config, key) for key in SETTINGS if _plain(getattr(config, key, None))}
    matrices = [p for p in parameters if len(_shape(p)) > 1] or parameters
    samples = tuple(_sample(matrices[i]) for i in _spread(len(matrices), MATRICES))
    kind = str(getattr(config, "model_type", ""))
    return BaseIdentity(class_name(model), kind, settings, dict(sorted(shapes.items())), samples)


def class_name(module: nn.Module) -> str:
    """The class of a module by name, as it was before sharding (FSDP2 puts a class of its own in front)."""
    kinds = type(module).__mro__
    return next(k.__name__ for k in kinds if all(above.__name__ != "FSDPModule" for above in k.__mro__))


def base_parameters(
    model: nn.Module, adapter_tensors: Iterable[Tensor], task_modules: Iterable[str]
) -> list[nn.Parameter]:
    """The base's own parameters in the model's order, each once."""
    foreign = {id(tensor) for tensor in adapter_tensors}
    tasks = tuple(f"{name}." for name in task_modules)
    named = model.named_parameters()
    return [p for name, p in named if id(p) not in foreign and not name.startswith(tasks)]


def differences(stored: BaseIdentity, present: BaseIdentity) -> list[str]:
    """What sets two bases apart, in words; empty when they are the same."""
    found = []
    if stored.model_type != present.model_type:
        found.append(f"model type {stored.model_type or 'unknown'}, here {present.model_type or 'unknown'}")
    for key in sorted(stored.settings.keys() & present.settings.keys()):
        if stored.settings[key] != present.settings[key]:
            found.append(f"{key} {stored.settings[key]}, here {present.settings[key]}")
    found += _shape_differences(stored.shapes, present.shapes)
    return found or _value_differences(stored.samples, present.samples)


def read_identity(document: Mapping[str, Any], where: str) -> BaseIdentity:
    """From plain JSON. Raises BadFile."""
    shapes = take(document, "shapes", dict, where)
    if not all(isinstance(count, int) for count in shapes.values()):
        raise BadFile(f"{where}: 'shapes' must count parameters")
    samples = tuple(_read_sample(entry, where) for entry in take_list(document, "samples", dict, where))
    return BaseIdentity(
        take(document, "architecture", str, where),
        take(document, "model_type", str, where),
        take(document, "settings", dict, where),
        shapes,
        samples,
    )


def _read_sample(entry: Mapping[str, Any], where: str) -> Sample:
    shape = tuple(take_list(entry, "shape", int, where))
    values = None if entry.get("values") is None else _unhex(take(entry, "values", str, where), where)
    return Sample(shape, take(entry, "dtype", str, where), values)


def _shape_differences(stored: Mapping[str, int], present: Mapping[str, int]) -> list[str]:
    apart = [s for s in sorted({*stored, *present}) if stored.get(s, 0) != present.get(s, 0)]
    lines = [f"{stored.get(s, 0)} parameters of shape {s}, here {present.get(s, 0)}" for s in apart[:6]]
    return lines + ([f"and {len(apart) - 6} more shapes"] if len(apart) > 6 else [])


def _value_differences(stored: tuple[Sample, ...], present: tuple[Sample, ...]) -> list[str]:
    pairs = list(zip(stored, present, strict=False))
    apart = [one for one, other in pairs if not _agree(one, other)]
    if not apart:
        return []
    return [f"the weights themselves: {len(apart)} of the {len(pairs)} matrices compared hold other values"]


def _agree(one: Sample, other: Sample) -> bool:
    if one.values is None or other.values is None:
        return True
    if one.shape != other.shape or len(one.values) != len(other.values):
        return False
    kinds = {one.dtype, other.dtype}
    if len(kinds) == 1:
        return one.values == other.values
    slack = sum(ROUNDING.get(kind, 0.0) for kind in kinds)
    return all(
        abs(a - b) <= slack * max(abs(a), abs(b)) + TINIEST
        for a, b in zip(one.values, other.values, strict=True)
    )


def _sample(parameter: nn.Parameter) -> Sample:
    shape, dtype = _shape(parameter), str(parameter.dtype).removeprefix("torch.")
    unreadable = parameter.is_meta or not parameter.is_floating_point() or parameter.numel() == 0
    if unreadable or tuple(parameter.shape) != shape:
        return Sample(shape, dtype, None)
    whole = parameter.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()
    picks = torch.tensor(_spread(whole.numel(), VALUES), device=whole.device)
    return Sample(shape, dtype, tuple(whole.reshape(-1)[picks].float().tolist()))


def _shape(parameter: Tensor) -> tuple[int, ...]:
    state = getattr(parameter, "quant_state", None)  # packed 4-bit weights keep their true shape there
    return tuple(parameter.shape if state is None else state.shape)


def _spread(length: int, wanted: int) -> list[int]:
    """Up to `wanted` positions, evenly over `length`, each in the middle of its share."""
    count = min(length, wanted)
    return [(2 * k + 1) * length // (2 * count) for k in range(count)]


def _plain(value: object) -> bool:
    return isinstance(value, int | float | str)


def _bf16(values: tuple[float, ...]) -> list[float]:
    return torch.tensor(values).bfloat16().float().tolist()


def _hex(values: tuple[float, ...]) -> str:
    return torch.tensor(values, dtype=torch.float32).view(torch.uint8).numpy().tobytes().hex()


def _unhex(text: str, where: str) -> tuple[float, ...]:
    try:
        return tuple(torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32).tolist())
    except (ValueError, RuntimeError):
        raise BadFile(f"{where}: the base's sample values are unreadable") from None
