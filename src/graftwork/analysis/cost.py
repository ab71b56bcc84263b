"""What a technique will cost on a model, before any weight is loaded.

The model is rebuilt without storage, the technique attached, and one training step run on shapes alone: parameters
are counted, what autograd keeps is added up storage by storage, and floating-point operations are counted by torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.analysis.saved import saved_bytes
from graftwork.engine.attach import attach
from graftwork.engine.export import is_adapter_key
from graftwork.engine.recompute import enable_checkpointing
from graftwork.engine.seat import seat_of
from graftwork.errors import BadOption, StateError
from graftwork.reference.technique import Technique

OPTIMISER_STATES = {"adamw": 2, "adafactor": 0, "sgd": 0, "momentum": 1}


@dataclass(frozen=True)
class Cost:
    """The price of one adapter. Bytes are of one training step; FLOPs count a multiply and an add as two.

    Attributes:
        base_parameters, trainable_parameters: values of the host, and those that train.
        weight_bytes: host and adapter.
        gradient_bytes, optimiser_bytes: of the trainable values (fp32 states).
        activation_bytes: what autograd keeps between forward and backward.
        forward_flops, step_flops: of one forward, and of forward and backward.
        file_bytes: tensors of the adapter file.
    """

    technique: str
    base_parameters: int
    trainable_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimiser_bytes: int
    activation_bytes: int
    forward_flops: int
    step_flops: int
    file_bytes: int

    @property
    def trainable_share(self) -> float:
        """Trainable values per value of the host."""
        return self.trainable_parameters / self.base_parameters

    @property
    def training_bytes(self) -> int:
        """Weights, gradients, optimiser states and activations together."""
        return self.weight_bytes + self.gradient_bytes + self.optimiser_bytes + self.activation_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a run card or a table."""
        return {
            **asdict(self),
            "trainable_share": self.trainable_share,
            "training_bytes": self.training_bytes,
        }


def cost(
    model: nn.Module,
    technique: Technique | Sequence[Technique],
    *,
    batch: int = 1,
    sequence: int = 128,
    inputs: Mapping[str, Tensor] | None = None,
    optimiser: str = "adamw",
    checkpointing: bool = False,
) -> Cost:
    """Predict parameters, bytes and FLOPs of training `technique` on `model`; the model is not touched.

    Args:
        model: a model without adapters, on any device (the meta device included).
        batch, sequence: size of the step for models that read tokens; images have the size the model is made for.
        inputs: forward arguments to take instead (values do not matter, shapes and dtypes do).
        optimiser: one of adamw, momentum, sgd, adafactor (whose factored states are left out).
        checkpointing: recompute activations layer by layer.

    Raises:
        StateError: adapters are attached. BadOption: an unknown optimiser, or a model whose inputs are not known.
    """
    if optimiser not in OPTIMISER_STATES:
        raise BadOption(f"optimiser={optimiser!r} is not one of {', '.join(OPTIMISER_STATES)}")
    if seat_of(model) is not None:
        raise StateError("cost() predicts for a bare model; detach its adapters or give a fresh one")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Models that read images count their tokens: with a shape environment a count is a symbol, without one an error.
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        return _predict(_shapes_only(model), technique, batch, sequence, inputs, optimiser, checkpointing)


def _predict(
    model: nn.Module,
    technique: Technique | Sequence[Technique],
    batch: int,
    sequence: int,
    inputs: Mapping[str, Tensor] | None,
    optimiser: str,
    checkpointing: bool,
) -> Cost:
    adapter = attach(model, technique, verify=False)
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    arguments = {k: torch.empty_like(v, device="cpu") for k, v in inputs.items()} if inputs else None
    step = Step(model, arguments or example_inputs(model, batch, sequence))
    base = [p for key, p in model.named_parameters() if not is_adapter_key(key)]
    trained = list(adapter.parameters())
    small = sum(p.numel() * p.element_size() for p in trained)
    forward, whole = step.flops()
    return Cost(
        technique=" + ".join(t.name for t in adapter.techniques),
        base_parameters=sum(p.numel() for p in base),
        trainable_parameters=sum(p.numel() for p in trained),
        weight_bytes=sum(p.numel() * p.element_size() for p in base) + small,
        gradient_bytes=small,
        optimiser_bytes=OPTIMISER_STATES[optimiser] * 4 * sum(p.numel() for p in trained),
        activation_bytes=step.kept(),
        forward_flops=forward,
        step_flops=whole,
        file_bytes=sum(t.numel() * t.element_size() for t in adapter.tensors().values()),
    )


@dataclass(frozen=True)
class Step:
    """One training step of a model on given inputs."""

    model: nn.Module
    inputs: Mapping[str, Tensor]

    def loss(self) -> Tensor:
        """The model's own loss where it has one, else the mean square of its output."""
        out = self.model(**self.inputs)
        loss = getattr(out, "loss", None)
        if loss is not None:
            return loss
        first = out if isinstance(out, Tensor) else next(v for v in _values(out) if isinstance(v, Tensor))
        return first.float().square().mean()

    def kept(self) -> int:
        """Bytes autograd holds between forward and backward."""
        held = [*self.model.parameters(), *self.model.buffers(), *self.inputs.values()]
        return saved_bytes(self.loss, held)

    def flops(self) -> tuple[int, int]:
        """Operations of the forward, and of forward and backward."""
        from torch.utils.flop_counter import FlopCounterMode

        aten = torch.ops.aten  # torch counts `addmm` and `baddbmm`, not their in-place forms
        in_place = {aten.addmm_: _product_flops, aten.baddbmm_: _product_flops}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            loss = self.loss()
            forward = counter.get_total_flops()
            loss.backward()
        return forward, counter.get_total_flops()


def _product_flops(
    _: torch.Size, left: torch.Size, right: torch.Size, out_shape: object = None, **__: object
) -> int:
    """Of a product of (..., M, K) and (..., K, N), a multiply and an add as two."""
    return 2 * math.prod(left) * right[-1]


def example_inputs(model: nn.Module, batch: int, sequence: int) -> dict[str, Tensor]:
    """Inputs of the right shapes for a transformers model: tokens (and labels where it has a loss), or images."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise BadOption(f"{type(model).__name__} does not say what it reads; give cost(..., inputs={{...}})")
    if main == "pixel_values":
        side = config.image_size if hasattr(config, "image_size") else 224
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return {main: torch.zeros(batch, config.num_channels, height, width, dtype=_dtype(model))}
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and sequence > limit:
        raise BadOption(f"sequence={sequence} is longer than the {limit} positions of {type(model).__name__}")
    tokens = torch.zeros(batch, sequence, dtype=torch.long)
    if main != "input_ids":
        raise BadOption(f"{type(model).__name__} reads {main}; give cost(..., inputs={{{main!r}: ...}})")
    return {main: tokens, **_labels(model, tokens)}


def _labels(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    name = type(model).__name__
    if "ForSequenceClassification" in name:
        return {"labels": tokens[:, 0]}
    if any(part in name for part in ("LM", "ForConditionalGeneration", "ForTokenClassification")):
        return {"labels": tokens}
    return {}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _values(out: Any) -> Sequence[Any]:
    return list(out.values()) if isinstance(out, Mapping) else list(out)


def _shapes_only(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors have shapes and no storage."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return copy.deepcopy(model, memo)
