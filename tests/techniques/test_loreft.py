"""LoReFT: its formula, its subspace, and the positions it edits, against editing by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from answers import close, logits
from torch import Tensor

import graftwork as gw
from graftwork.errors import BadOption, NothingMatches, NotMergeable, StateError
from graftwork.laws import stir
from graftwork.reference.site import Kind, Site
from graftwork.testing import tiny, tiny_batch


def built(width: int, **options: Any) -> Any:
    site = Site(key="0/layer", workspace="layer", kind=Kind.BLOCK, module="layer", channels_out=width)
    return gw.LoReFT(**options).build(site).double().eval()


def by_hand(host: str, adapter: Any, layers: Any, chosen: Tensor) -> Any:
    """The host with each layer's output edited where `chosen` (B, T) says."""
    model = tiny(host)
    for layer, module in zip(layers(model), adapter.modules.values(), strict=True):

        def edit(_: Any, __: Any, out: Any, module: Any = module) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            r = module.rows()
            change = (h @ module.source.weight.T + module.source.bias - h @ r.T) @ r
            h = torch.where(chosen[..., None], h + change, h)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        layer.register_forward_hook(edit)
    return model


def test_toy_value() -> None:
    for options, expected in (
        ({}, [3.5, 3.0]),
        ({"orthogonal": False, "subtract": False}, [5.5, 3.0]),
    ):
        module = built(2, **options)
        module.rotation.data = torch.tensor([[1.0, 0.0]]).double()
        module.source.weight.data = torch.tensor([[0.0, 1.0]]).double()
        module.source.bias.data.fill_(0.5)
        h = torch.tensor([2.0, 3.0]).double()
        close(h + module(h), torch.tensor(expected).double(), 1e-12)


@pytest.mark.parametrize("name", ["loreft", "noreft", "direft"])
def test_formula(name: str) -> None:
    technique = gw.LoReFT(rank=3) if name == "loreft" else getattr(gw.LoReFT, name)(rank=3)
    module = built(8, **technique.options())
    for parameter in module.parameters():
        parameter.data.normal_()
    h, r = torch.randn(2, 5, 8).double(), module.rows()
    taken = 0 if name == "direft" else h @ r.T
    close(module(h), (h @ module.source.weight.T + module.source.bias - taken) @ r, 1e-12)
    free = name != "loreft"
    assert torch.equal(r, module.rotation) is free
    assert torch.allclose(r @ r.T, torch.eye(3).double()) is not free


def test_rows_stay_orthonormal_while_training_and_start_as_they_are() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    adapter = gw.attach(model, gw.LoReFT(rank=4))
    modules = list(adapter.modules.values())
    close(modules[0].rows(), modules[0].rotation)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    for module in modules:
        assert not torch.allclose(module.rotation @ module.rotation.T, torch.eye(4), atol=1e-3)
        close(module.rows() @ module.rows().T, torch.eye(4))


def test_count() -> None:
    assert gw.attach(tiny("llama"), gw.LoReFT(rank=4)).count() == 2 * 4 * (2 * 32 + 1)


@pytest.mark.parametrize(("first", "last"), [(2, 0), (0, 2), (1, 2), (9, 9)])
@pytest.mark.parametrize("host", ["llama", "bert"])
def test_edits_first_and_last_real_positions(host: str, first: int, last: int) -> None:
    model, batch = tiny(host), tiny_batch(host)  # row 0: two pads, left in llama, right in bert
    adapter = gw.attach(model, gw.LoReFT(rank=2, first=first, last=last))
    stir(adapter)
    order = [row.nonzero().flatten().tolist() for row in batch["attention_mask"]]
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    for row, real in enumerate(order):
        chosen[row, real[:first] + (real[-last:] if last else [])] = True
    layers = (lambda m: m.model.layers) if host == "llama" else (lambda m: m.bert.encoder.layer)
    close(logits(model, **batch), logits(by_hand(host, adapter, layers, chosen), **batch))


def test_padded_row_is_the_row_alone() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    stir(gw.attach(model, gw.LoReFT(rank=2, first=1, last=2)))
    alone = logits(model, input_ids=batch["input_ids"][:1, 2:])
    close(logits(model, **batch)[:1, 2:], alone)


def test_images_have_all_positions_real() -> None:
    model, batch = tiny("vit"), tiny_batch("vit")
    adapter = gw.attach(model, gw.LoReFT(rank=2, first=1, last=3), head=False)
    stir(adapter)
    chosen = torch.zeros(3, 17, dtype=torch.bool)
    chosen[:, [0, 14, 15, 16]] = True
    close(logits(model, **batch), logits(by_hand("vit", adapter, lambda m: m.vit.layers, chosen), **batch))


def test_decoded_tokens_are_left_alone() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    adapter = gw.attach(model, gw.LoReFT(rank=2, first=2, last=1))
    stir(adapter)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**batch, **options)
    chosen = torch.zeros(3, 11, dtype=torch.bool)
    chosen[0, [2, 3, 6]] = chosen[1:, [0, 1, 6]] = True
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4, dtype=torch.long)], 1)
    plain = by_hand("llama", adapter, lambda m: m.model.layers, chosen)
    whole = logits(plain, input_ids=found.sequences, attention_mask=mask)
    close(torch.stack(found.logits, 1), whole[:, 6:10], 1e-4)
    static = model.generate(**batch, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, found.sequences)
    beams = model.generate(**batch, max_new_tokens=3, num_beams=2, pad_token_id=0, eos_token_id=None)
    assert beams.shape == (3, 10)


def test_a_prompt_in_chunks_is_refused() -> None:
    model, batch = tiny("llama"), tiny_batch("llama", padding=False)
    gw.attach(model, gw.LoReFT(rank=2, last=1))
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(StateError, match="in one call"):
        model(**batch, past_key_values=cache)


def test_a_route_per_token_says_where_the_prompt_ends() -> None:
    model, batch = tiny("llama"), tiny_batch("llama", padding=False)
    adapter = gw.attach(model, gw.LoReFT(rank=2, first=0, last=1))
    stir(adapter)
    index = torch.full((3, 7), -1)
    index[0, :3], index[1, :5] = 0, 0
    chosen = torch.zeros(3, 7, dtype=torch.bool)
    chosen[0, 2] = chosen[1, 4] = True
    with gw.route(model, ["default"], index):
        routed = logits(model, **batch)
    close(routed, logits(by_hand("llama", adapter, lambda m: m.model.layers, chosen), **batch))


@pytest.mark.parametrize("host", ["llama", "bert", "vit"])
def test_prompts_are_not_counted(host: str) -> None:
    model, batch = tiny(f"{host}-base"), tiny_batch(host)
    edit = gw.attach(model, gw.LoReFT(rank=2, first=2, last=2), name="edit")
    prompt = gw.attach(model, gw.VPT(length=3, dropout=0.0), name="prompt")
    stir(edit), stir(prompt, seed=2)
    seen: list[Tensor] = []
    forward = type(next(iter(edit.modules.values()))).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "graftwork.techniques.loreft.Edit.forward", lambda s, h: seen.append(h) or forward(s, h)
        )
        with torch.no_grad(), gw.active(model, "prompt", "edit"):
            out = model(**batch).last_hidden_state
    assert {len(h) for h in seen} == {12}
    with torch.no_grad(), gw.route(model, ["prompt", "edit"], torch.tensor([0, 1, 1])):
        routed = model(**batch).last_hidden_state
    with torch.no_grad(), gw.active(model, "edit"):
        alone = model(**batch).last_hidden_state
    close(routed[1:], alone[1:])
    assert out.shape == alone.shape


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    stir(gw.attach(model, gw.LoReFT(rank=2, first=1, last=1)))
    wanted = logits(model, **batch)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled, **batch, use_cache=False), wanted)


def test_copies_know_their_positions() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    stir(gw.attach(model, gw.LoReFT(rank=2)))
    assert torch.equal(logits(copy.deepcopy(model), **batch), logits(model, **batch))


def test_what_it_cannot_do_says_so() -> None:
    with pytest.raises(BadOption, match="no position"):
        gw.attach(tiny("llama"), gw.LoReFT(first=0, last=0))
    with pytest.raises(NothingMatches, match="fits"):
        gw.attach(tiny("llama"), gw.LoReFT(rank=33))
    with pytest.raises(NothingMatches, match="fits"):
        gw.attach(tiny("resnet"), gw.LoReFT(), head=False)
    model = tiny("llama")
    gw.attach(model, gw.LoReFT())
    with pytest.raises(NotMergeable):
        gw.merge(model)
    layer: Any = model.model.layers[0]  # type: ignore[union-attr]
    with pytest.raises(StateError, match="outside its stack"):
        layer(torch.randn(1, 4, 32), position_embeddings=(torch.ones(1, 4, 8), torch.zeros(1, 4, 8)))
