"""The laws that every technique obeys on every host, as functions: run them over your own technique too.

    for law in LAWS.values():
        law("llama", MyTechnique(rank=4))

A law builds tiny models (`graftwork.testing`), compares numbers and raises AssertionError. Where a host cannot take
the technique, `attach` raises PortUnavailable or NothingMatches, and so does the law.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graftwork as gw
from graftwork.engine.adapter import Adapter
from graftwork.engine.recompute import enable_checkpointing
from graftwork.engine.verbs import reads_hints
from graftwork.errors import NotComposable, NotMergeable, RouteError
from graftwork.reference.properties import Port
from graftwork.reference.site import Access, Kind
from graftwork.reference.technique import Technique
from graftwork.testing import companions, grafted, tiny, tiny_batch

Law = Callable[[str, Technique], None]
ROWS = 3


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's main output: logits, or the last hidden state."""
    with told(model, batch):
        out = model(**batch)
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        found = getattr(out, name, None)
        if found is not None:
            return found
    return out[0] if isinstance(out, tuple) else out


def told(model: nn.Module, batch: dict[str, Tensor]) -> AbstractContextManager[None]:
    """A query and a passage for each row, made up, where an adapter reads them."""
    if not reads_hints(model):
        return contextlib.nullcontext()
    rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    made = torch.randint(3, 40, (rows, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(rows, 4, dtype=torch.long)
    mask[0, 0] = 0
    query = {"input_ids": made[:, :4], "attention_mask": mask}
    return gw.hints(model, query=query, passage={"input_ids": made[:, 4:]})


def uncached(host: str) -> dict[str, Any]:
    """Inputs without a cache: a state-space model's own one cannot be split by adapter."""
    batch: dict[str, Any] = tiny_batch(host)
    return {**batch, "use_cache": False} if host.startswith("mamba") else batch


def real(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The output at real positions (what stands at padding means nothing)."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is None or output.dim() != 3 or output.shape[:2] != mask.shape or "decoder_input_ids" in batch:
        return output
    return output * mask.unsqueeze(-1)


def stir(adapter: Adapter, size: float = 0.1, seed: int = 1) -> None:
    """Move an adapter off its starting values, the same way every time."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Assert that two outputs agree relative to their size."""
    scale = max(1.0, float(b.detach().abs().max()))
    gap = float((a.detach().double() - b.detach().double()).abs().max())
    assert gap <= tolerance * scale, f"{what}: differs by {gap:.3g} (outputs up to {scale:.3g})"


@torch.no_grad()
def attach_changes_nothing(host: str, technique: Technique) -> None:
    """Base values, keys, classes and signatures stay; identity at the start is identity; detach is bitwise."""
    model, batch = tiny(host), tiny_batch(host)
    before = answer(model, batch)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    shape = [(type(m), sorted(m.__dict__), m.training) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    signature = inspect.signature(model.forward)
    adapter = grafted(model, host, technique)
    keys = [key for key in model.state_dict() if ".grafts." not in f".{key}"]
    assert keys == list(state), "base keys changed"
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items()), (
        "base values changed"
    )
    kinds = [type(m).__qualname__ for name, m in model.named_modules() if ".grafts" not in f".{name}"]
    assert kinds == [kind.__qualname__ for kind, _, _ in shape], "class names changed"
    assert inspect.signature(model.forward) == signature, "signature changed"
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".grafts." not in f".{k}"), (
        "base trains"
    )
    if all(card.identity_at_init for card in adapter.cards):
        close(answer(model, batch), before, 1e-6, "not identity at the start")
    stir(adapter)
    assert not torch.equal(answer(model, batch), before), "a stirred adapter changes nothing"
    with gw.active(model):
        assert torch.equal(answer(model, batch), before), "switched off is not the base"
    gw.detach(model)
    assert torch.equal(answer(model, batch), before), "detach changed the output"
    assert [(type(m), sorted(m.__dict__), m.training) for m in model.modules()] == shape, "detach left traces"
    assert [p.requires_grad for p in model.parameters()] == flags, "detach left requires_grad changed"
    assert list(model.state_dict()) == list(state), "detach left keys"


def every_tensor_trains(host: str, technique: Technique) -> None:
    """The first backward reaches every trainable tensor, and nothing of the base."""
    model, batch = tiny(host), tiny_batch(host)
    adapter = grafted(model, host, technique)
    stir(adapter, 0.01)
    answer(model, batch).square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"{name} has a gradient that is not finite"
    base = [k for k, p in model.named_parameters() if ".grafts." not in f".{k}" and p.grad is not None]
    assert not base, f"the base received gradients: {base[:3]}"


@torch.no_grad()
def merge_is_forward(host: str, technique: Technique) -> None:
    """Merged equals unmerged where the card says linear; else merging says why not. Unmerge is bitwise."""
    model, batch = tiny(host), tiny_batch(host)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = grafted(model, host, technique)
    stir(adapter)
    attached = answer(model, batch)
    linear = all(card.linear for card in adapter.cards)
    try:
        gw.merge(model, tie="split")
    except NotMergeable as refusal:
        assert not linear or "bias" in str(refusal), f"says it is linear and does not merge: {refusal}"
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items()), "half-merged"
        assert torch.equal(answer(model, batch), attached)
        return
    rows = any(
        place.site.kind is Kind.EMBEDDING for place in adapter.placed
    )  # any function of a row is a row
    assert linear or rows, "merged although its card says it is not linear"
    close(answer(model, batch), attached, 1e-5, "merged differs")
    gw.unmerge(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items()), (
        "unmerge is not bitwise"
    )
    assert torch.equal(answer(model, batch), attached), "unmerge lost the adapter"


@torch.no_grad()
def less_itself_is_nothing(host: str, technique: Technique) -> None:
    """An adapter and its negative add up to the bare base, or the sum is refused with a reason; operands stay."""
    model, batch = tiny(host), tiny_batch(host)
    adapter = grafted(model, host, technique, name="a", head=False)
    stir(adapter)
    before = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    with gw.active(model):
        base = answer(model, batch)
    try:
        gw.negate(model, "a", name="minus")
        negative = answer(model, batch)
        gw.add(model, "a", "minus", name="nothing")
    except NotComposable as refusal:
        assert adapter.techniques[0].stored().name in str(refusal), f"refused without its name: {refusal}"
        assert not {"minus", "nothing"} & set(gw.adapters(model)), "half-composed"
    else:
        close(answer(model, batch), base, 1e-5, "an adapter and its negative are not the base")
        assert not torch.equal(negative, base), "the negative changes nothing"
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.tensors().items()), (
        "operand changed"
    )


@torch.no_grad()
def stacks_with_others(host: str, technique: Technique) -> None:
    """Active together with another adapter: both count, order is kept, either alone is what it was."""
    model, batch = tiny(host), tiny_batch(host)
    one = grafted(model, host, technique, name="one")
    stir(one)
    first = answer(model, batch)
    two = gw.attach(model, gw.LoRA(rank=2), name="two")
    stir(two, seed=2)
    second = answer(model, batch)
    with gw.active(model, "one", "two"):
        both = answer(model, batch)
    with gw.active(model, "one"):
        close(answer(model, batch), first, 1e-6, "an inactive neighbour changed the output")
    assert not torch.equal(both, first), "the stacked LoRA does nothing"
    assert not torch.equal(both, second), "the technique does nothing when stacked"
    gw.detach(model, "two")
    with gw.active(model, "one"):
        close(answer(model, batch), first, 1e-6, "detaching a neighbour changed the output")


def routed_is_one_by_one(host: str, technique: Technique) -> None:
    """A routed batch equals its rows computed one adapter at a time; row -1 is the bare base."""
    model, batch = tiny(host), uncached(host)
    base = answer(model, batch)
    alone = []
    for number, name in enumerate(("a", "b")):
        stir(grafted(model, host, technique, name=name), seed=number)
        alone.append(answer(model, batch))
    for rows in ([0, -1, 1], [1, 1, 0], [-1, -1, -1], [0, 0, 0]):
        with gw.route(model, ["a", "b"], torch.tensor(rows)):
            routed = answer(model, batch)
        wanted = torch.stack([base[i] if row < 0 else alone[row][i] for i, row in enumerate(rows)])
        close(real(routed, batch), real(wanted, batch), 2e-6, f"route {rows}")


def blended_is_routed(host: str, technique: Technique) -> None:
    """A blend with one weight 1 is a routed batch, with none the bare base; where it cannot be, it is refused."""
    model, batch = tiny(host), uncached(host)
    for number, name in enumerate(("a", "b")):
        stir(grafted(model, host, technique, name=name), seed=number)
    rows = torch.tensor([0, -1, 1])
    with gw.route(model, ["a", "b"], rows):
        routed = answer(model, batch)
    weights = torch.zeros(3, 2)
    weights[0, 0] = weights[2, 1] = 1.0
    placed = gw.adapters(model)["a"].placed
    read = any(place.site.access in (Access.READ, Access.EITHER) for place in placed)
    ports = {place.port for place in placed}
    try:
        with gw.route(model, ["a", "b"], weights=weights):
            blended = answer(model, batch)
    except RouteError:
        assert read or not ports <= {Port.WEIGHT, Port.HIDDEN}, "possible by its ports, and refused"
        return
    close(real(blended, batch), real(routed, batch), 2e-6, "a blend of one")


def routes_per_token(host: str, technique: Technique) -> None:
    """Per token, a technique that acts on tokens one by one equals masking; any other says that it cannot."""
    model, batch = tiny(host), uncached(host)
    adapter = grafted(model, host, technique, name="a", head=False)
    stir(adapter)
    ids = batch.get("input_ids")
    if ids is None or "decoder_input_ids" in batch:
        return
    with gw.active(model, "a"):
        everywhere = answer(model, batch)
    with gw.active(model):
        nowhere = answer(model, batch)
    ports = {card.port for card in adapter.cards}
    possible = all(card.token_wise for card in adapter.cards) and ports <= {Port.WEIGHT, Port.HIDDEN}
    with contextlib.ExitStack() as stack:
        stack.enter_context(gw.route(model, ["a"], torch.zeros_like(ids)))
        try:
            close(real(answer(model, batch), batch), real(everywhere, batch), 2e-6, "all tokens routed to it")
        except RouteError:
            read = any(place.site.access in (Access.READ, Access.EITHER) for place in adapter.placed)
            pooled = any(place.site.workspace in ("pooler", "head") for place in adapter.placed)
            assert not possible or read or pooled, "token-wise by its card, and refused"
            return
    with gw.route(model, ["a"], torch.full_like(ids, -1)):
        close(answer(model, batch), nowhere, 2e-6, "all tokens at the base")
    index = torch.full_like(ids, -1)
    index[:, -1] = 0
    with gw.route(model, ["a"], index):
        mixed = answer(model, batch)
    assert not torch.equal(mixed, nowhere), "the last token's adapter does nothing"


def a_file_brings_it_back(host: str, technique: Technique) -> None:
    """Saved, loaded onto a fresh base: the same outputs, active and frozen."""
    model, batch = tiny(host), tiny_batch(host)
    adapter = grafted(model, host, technique, name="fr")
    stir(adapter)
    wanted = answer(model, batch)
    with tempfile.TemporaryDirectory() as folder:
        gw.save(model, folder, name="fr")
        fresh = tiny(host)
        companions(fresh, technique)
        loaded = gw.load(fresh, Path(folder), name="fr")
    assert not loaded.trainable, "a loaded adapter trains without being asked"
    close(answer(fresh, batch), wanted, 1e-6, "loaded differs")


def low_precision_keeps_its_precision(host: str, technique: Technique) -> None:
    """A bf16 base with fp32 adapter tensors answers in bf16 and keeps no fp32 copy of an activation."""
    model, batch = tiny(host).to(torch.bfloat16), tiny_batch(host)
    batch = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch.items()}
    dtype = answer(model, batch).dtype
    bare = _copies_in_fp32(model, batch)
    adapter = grafted(model, host, technique)
    assert all(p.dtype == torch.float32 for p in adapter.parameters()), "adapter tensors are not fp32"
    stir(adapter, 0.01)
    assert answer(model, batch).dtype == dtype, "the output left the host's precision"
    copies = _copies_in_fp32(model, batch)
    longer = any(
        card.port is Port.SEQUENCE for card in adapter.cards
    )  # the host's own copies grow with the prompt
    surplus = sorted(copies - bare)
    assert len(copies) <= len(bare) if longer else not surplus, f"keeps fp32 copies of shapes {surplus}"
    answer(model, batch).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def _copies_in_fp32(model: nn.Module, batch: dict[str, Tensor]) -> set[torch.Size]:
    """Shapes of activations that autograd keeps in low precision and, besides, in fp32."""
    kept: dict[torch.dtype, set[torch.Size]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() >= 3 and tensor.shape[0] >= ROWS and tensor.shape[-1] > 1:
            kept.setdefault(tensor.dtype, set()).add(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer(model, batch)
    return kept.get(torch.float32, set()) & kept.get(torch.bfloat16, set())


def copies_and_pickles(host: str, technique: Technique) -> None:
    """deepcopy and torch.save keep the adapter, and the copy's state is its own."""
    model, batch = tiny(host), tiny_batch(host)
    stir(grafted(model, host, technique))
    wanted = answer(model, batch)
    twin = copy.deepcopy(model)
    close(answer(twin, batch), wanted, 1e-7, "the copy differs")
    gw.active(twin)
    close(answer(model, batch), wanted, 1e-7, "switching the copy switched the original")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    close(answer(torch.load(file, weights_only=False), batch), wanted, 1e-7, "the pickle differs")


def recomputes_the_same(host: str, technique: Technique) -> None:
    """Gradient checkpointing, with the route left before backward: gradients as without."""
    wanted = _routed_gradients(tiny(host), host, technique, None)
    if wanted is None:
        return
    for reentrant in (True, False):
        found = _routed_gradients(tiny(host), host, technique, reentrant)
        assert found is not None
        for (name, a), (_, b) in zip(found, wanted, strict=True):
            close(a, b, 1e-5, f"gradient of {name}, reentrant={reentrant}")


def _routed_gradients(
    model: Any, host: str, technique: Technique, reentrant: bool | None
) -> list[tuple[str, Tensor]] | None:
    batch = tiny_batch(host)
    if not getattr(model, "supports_gradient_checkpointing", False):
        return None
    adapter = grafted(model, host, technique, name="a")
    stir(adapter)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    if reentrant is not None:
        enable_checkpointing(model, reentrant=reentrant)
        if hasattr(model, "enable_input_require_grads"):
            with contextlib.suppress(NotImplementedError):
                model.enable_input_require_grads()
    torch.manual_seed(0)
    with gw.route(model, ["a"], torch.tensor([0, -1, 0])):
        loss = answer(model, batch).square().mean()
    gw.active(model)
    loss.backward()
    return [
        (name, torch.zeros_like(p) if p.grad is None else p.grad) for name, p in adapter.named_parameters()
    ]


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        attach_changes_nothing,
        every_tensor_trains,
        merge_is_forward,
        less_itself_is_nothing,
        stacks_with_others,
        routed_is_one_by_one,
        blended_is_routed,
        routes_per_token,
        a_file_brings_it_back,
        low_precision_keeps_its_precision,
        copies_and_pickles,
        recomputes_the_same,
    )
}
