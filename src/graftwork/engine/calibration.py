"""Calibration: a few batches run through the bare model, and techniques are shown what they ask for at their sites.

Signals are read on the way into a module, gradients when they reach a weight, which is then let go of; nothing of the
model changes. Positions that are padding, or whose label is the ignored one, count for nothing.

    B samples, T tokens, N rows, I input channels
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.engine import channels
from graftwork.engine.modules import planned
from graftwork.engine.operations import operation_of
from graftwork.engine.progress import watched
from graftwork.engine.seat import stored_parameter
from graftwork.engine.split import signal
from graftwork.engine.state import Snapshot, State
from graftwork.errors import BadOption
from graftwork.reference.site import Site
from graftwork.reference.statistic import Statistic
from graftwork.reference.technique import Technique

Batch = Mapping[str, Any]
Wanted = tuple[int, Technique, Site]
IGNORED = -100
_ADVICE = "attach(model, technique, calibration=batches), each batch a mapping of the model's own arguments"


def with_statistics(
    model: nn.Module, state: State, wanted: Sequence[Wanted], batches: Iterable[Batch] | None
) -> list[Wanted]:
    """The sites with what their techniques asked for.

    Raises:
        BadOption: data that are needed and not given, or given and not needed; a batch that is no mapping, or without
            a loss where gradients are asked for; a site that saw nothing, or values that are not finite.
    """
    needing = {technique.name for _, technique, _ in wanted if technique.needs_data}
    counting = planned() or any(site.device.type == "meta" for _, _, site in wanted)
    if batches is None and (counting or not needing):
        return list(wanted)
    if batches is None:
        raise BadOption(f"{', '.join(needing)}: starts from calibration data: {_ADVICE}")
    if not needing:
        names = ", ".join(dict.fromkeys(technique.name for _, technique, _ in wanted))
        raise BadOption(f"calibration data are given, but {names} asks for none: leave out calibration=")
    kept = [(number, t, site) for number, (_, t, site) in enumerate(wanted) if not t.omits(site)]
    asked = [(number, site, t.gathers(site)) for number, t, site in kept]
    targets = {number: Target(site, statistic) for number, site, statistic in asked if statistic is not None}
    _Calibration(model, state, list(targets.values())).run(batches)
    found = list(wanted)
    for number, target in targets.items():
        index, technique, site = wanted[number]
        found[number] = index, technique, replace(site, statistic=target.statistic)
    return found


@dataclass
class Target:
    """A site and its statistic; sites that are handed one and the same signal come to share one."""

    site: Site
    statistic: Statistic
    leader: Target | None = None
    called: bool = False
    fed: bool = False

    def see(self, values: Tensor) -> None:
        """Pass on one batch's values."""
        if self.statistic.settled or not values.numel():
            return
        wide = values.detach().float() if values.element_size() < 4 else values.detach()
        if not bool(torch.isfinite(wide).all()):
            what = "the gradient of its weight" if self.statistic.of_gradient else "its input"
            raise BadOption(
                f"{self.site.key}: on a calibration batch {what} is infinite or not a number; leave out such "
                "samples, or calibrate in fp32"
            )
        self.fed = True
        self.statistic.see(wide)

    def follow(self, others: list[Target]) -> None:
        """At a first call, share the statistic of another site that was handed the same signal."""
        if not self.called:
            self.called = True
            alike = (o for o in others if o.fed and o.leader is None and o.statistic == self.statistic)
            self.leader = next(alike, None)
            self.statistic = self.leader.statistic if self.leader else self.statistic


@dataclass
class _Calibration:
    model: nn.Module
    state: State
    targets: list[Target]
    batch: Batch = field(default_factory=dict)
    last: tuple[Tensor | None, list[Target]] = (None, [])

    def run(self, batches: Iterable[Batch]) -> None:
        device = next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))
        with self._prepared() as graded:
            for batch in watched(batches, "calibrating"):
                if not isinstance(batch, Mapping):
                    raise BadOption(f"a calibration batch is a {type(batch).__name__}: {_ADVICE}")
                self.batch = {key: _moved(value, device) for key, value in batch.items()}
                self._step(graded)
                if all(target.statistic.settled for target in self.targets):
                    break
        if not self.batch:
            raise BadOption(f"the calibration data hold no batch: {_ADVICE}")
        self._check_seen()

    def _step(self, graded: bool) -> None:
        self.last = (None, [])
        if not graded:
            with torch.no_grad():
                self.model(**self.batch)
            return
        with torch.enable_grad():
            loss = _loss(self.model(**self.batch))
        loss.backward()

    @contextmanager
    def _prepared(self) -> Iterator[bool]:
        """The bare model in eval mode with hooks at the sites; afterwards it is as it was. Yields whether gradients
        are asked for."""
        parameters: dict[int, tuple[nn.Parameter, list[Target]]] = {}
        modules: dict[str, list[Target]] = {}
        for target in self.targets:
            if target.statistic.of_gradient:
                weight = _weight(self.model, target.site)
                parameters.setdefault(id(weight), (weight, []))[1].append(target)
            else:
                modules.setdefault(target.site.module, []).append(target)
        with ExitStack() as undo:
            undo.enter_context(_undisturbed(self.model, self.state))
            for weight, here in parameters.values():
                weight.requires_grad_(True)
                undo.callback(weight.register_post_accumulate_grad_hook(_graded(self.model, here)).remove)
            for path, here in modules.items():
                hook = self.model.get_submodule(path).register_forward_pre_hook(
                    self._reader(here), with_kwargs=True
                )
                undo.callback(hook.remove)
            yield bool(parameters)

    def _reader(self, here: list[Target]) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = signal(args, kwargs)
            same = self.last[1] if x is self.last[0] else []
            self.last = (x, [*same, *here])
            rows = None
            for target in here:
                target.follow([*same, *here])
                if target.leader is None and not target.statistic.settled:
                    rows = _rows(module, x, target.site, self.batch) if rows is None else rows
                    target.see(rows)

        return read

    def _check_seen(self) -> None:
        missed = [target.site.key for target in self.targets if not (target.leader or target).fed]
        if missed:
            raise BadOption(
                f"no calibration batch came by {', '.join(missed[:8])}"
                + (f" and {len(missed) - 8} more" if len(missed) > 8 else "")
                + ": the model does not call these modules, has no gradient there, or every position is left out. "
                "Choose other workspaces, or an initialiser that needs no data"
            )


def _graded(model: nn.Module, here: list[Target]) -> Any:
    def read(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        for target in here:
            module = model.get_submodule(target.site.module)
            whole = operation_of(type(module)).matrix(module, gradient)  # type: ignore[arg-type]
            own = target.site.channels
            target.see(whole if own is None else channels.take(whole, own, -2))

    return read


def _weight(model: nn.Module, site: Site) -> nn.Parameter:
    weight = stored_parameter(model.get_submodule(site.module), site.parameter)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.is_meta:
        raise BadOption(
            f"{site.key}: its weight is quantised, offloaded or computed, and has no gradient of its own. Load the "
            "base in full precision, or choose an initialiser that reads inputs"
        )
    return weight


def _rows(module: nn.Module, x: Tensor, site: Site, batch: Batch) -> Tensor:
    """What the site's matrix multiplies, (N, I)."""
    real = _real(site, x, batch)
    return operation_of(type(module)).rows(module, x if real is None else x[real])


def _real(site: Site, x: Tensor, batch: Batch) -> Tensor | None:
    """Which positions of x (B, T, I) count, (B, T); None: all."""
    decodes = site.stack == "decoder" and not site.workspace.startswith(
        ("cross_attention.key", "cross_attention.value")
    )
    labels = batch.get("labels")
    mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
    found = [mask.bool()] if mask is not None else []
    found += [labels != IGNORED] if isinstance(labels, Tensor) and site.stack != "encoder" else []
    fitting = [real for real in found if x.dim() == 3 and real.shape == x.shape[:2]]
    return torch.stack(fitting).all(0) if fitting else None


def _loss(out: Any) -> Tensor:
    loss = out if isinstance(out, Tensor) and out.dim() == 0 else getattr(out, "loss", None)
    if loss is None or not loss.requires_grad:
        raise BadOption(
            "gradients are asked for, but the model gives no loss on a calibration batch that depends on the chosen "
            "weights: put labels into each batch"
        )
    return loss  # type: ignore[no-any-return]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _undisturbed(model: nn.Module, state: State) -> Iterator[None]:
    """Eval mode, nothing active, nothing requires a gradient; all of it, and the random numbers, are put back."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    used = {p.device for p, _, _ in before if p.is_cuda}
    try:
        model.eval()
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        with torch.random.fork_rng(devices=list(used)), state.turn(Snapshot((), None, None)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires, gradient in before:
            parameter.requires_grad_(requires)
            parameter.grad = gradient
