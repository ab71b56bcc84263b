"""Prefixes trained in a cache, as HF PEFT keeps them: tokens count on behind them."""

from __future__ import annotations

import pytest
import torch
from grafting import answer, gap, prefix, routed, rows_of, stepwise, tokens, whole
from torch import nn

from graftwork.engine.attach import attach, detach
from graftwork.engine.rotary import rotate_keys_back
from graftwork.engine.verbs import active, route
from graftwork.errors import PortUnavailable, StateError
from graftwork.testing import tiny, tiny_batch

peft = pytest.importorskip("peft")

SIZE = 5
TASKS = {
    "bert-base": "FEATURE_EXTRACTION",
    "roberta-base": "FEATURE_EXTRACTION",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}
ROTARY = ("llama", "qwen3", "gpt-neox", "phi3", "mixtral", "gemma3")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def peer(name: str, heads: int) -> tuple[nn.Module, torch.Tensor]:
    """The peer's model, and its prefix as (N, layers, 2, width)."""
    config = peft.PrefixTuningConfig(
        task_type=TASKS.get(name, "CAUSAL_LM"),
        num_virtual_tokens=SIZE,
        num_layers=2,
        num_attention_heads=heads,
        token_dim=8 * heads,
    )
    model = peft.get_peft_model(tiny(name), config).eval()
    flat = model.prompt_encoder["default"].embedding.weight.data.normal_().unflatten(-1, (2, 2, 8 * heads))
    # For an encoder-decoder the peer doubles the list and gives layer i of the decoder the entry 2 i of it.
    return model, flat[:, [0, 0]] if config.num_transformer_submodules == 2 else flat


def ours(name: str, flat: torch.Tensor, shift: bool, where: str = "attention") -> nn.Module:
    model = tiny(name)
    adapter = attach(model, prefix(SIZE, workspaces=(where,)), name="a", head=False)
    for layer, place in enumerate(adapter.placed):
        place.graft.module.key.data, place.graft.module.value.data = flat[:, layer, 0], flat[:, layer, 1]
    if shift:
        _shift(model)
    return model


def _shift(model: nn.Module) -> None:
    """Attach anew with modules that ask for the move, as a reader of such files builds them."""
    tensors = [t.clone() for key, t in model.state_dict().items() if ".grafts.a." in key]
    where = tuple(place.site.key for place in model._graft.state.adapters["a"].placed)
    stacks = {key.rpartition(".")[0] for key in where if "." in key.split("/")[0]}
    detach(model, "a")
    workspace = f"{stacks.pop()}.attention" if stacks else "attention"
    adapter = attach(model, Moved(length=SIZE, hidden=None, workspaces=(workspace,)), name="a", head=False)
    for place, (key, value) in zip(
        adapter.placed, zip(tensors[::2], tensors[1::2], strict=True), strict=True
    ):
        place.graft.module.key.data, place.graft.module.value.data = key, value


class Moved(type(prefix(1))):
    def build(self, site):
        module = super().build(site)
        module.shift_positions = self.length
        return module


@pytest.mark.parametrize("name", ["gpt2", "bert-base", "roberta-base", "t5", "bart", "llama"])
def test_moved_positions_give_the_peers_answers(name):
    theirs, flat = peer(name, 2 if name == "llama" else 4)
    model = ours(name, flat, shift=True, where="decoder.attention" if name in ("t5", "bart") else "attention")
    batch = tiny_batch(name, padding=False)
    mask = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        assert gap(answer(model, batch), answer(theirs, {**batch, "attention_mask": mask})) < 3e-6


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_moved_positions_hold_through_generation_and_routes(name):
    model = tiny(name)
    for who, size in (("a", 5), ("b", 9)):
        adapter = attach(model, Moved(length=size, hidden=None), name=who, head=False)
        for parameter in adapter.parameters():
            parameter.data.normal_()
    ids, mask = tokens(length=9)
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        assert gap(routed(model, batch), rows_of(model, batch)) < 2e-6
        with route(model, ["a", "b"], torch.tensor([0, 1, -1])):
            assert gap(stepwise(model, ids, mask, 6, 1), whole(model, ids, mask), mask) < 2e-5


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_moved_positions_hold_in_a_cached_decoder(name):
    _, flat = peer(name, 4)
    model = ours(name, flat, shift=True, where="decoder.attention")
    batch = tiny_batch(name)
    given = batch["decoder_input_ids"]
    with torch.no_grad():
        full = model(**batch).logits
        rest = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
        first = model(**rest, decoder_input_ids=given[:, :3], use_cache=True)
        second = model(**rest, decoder_input_ids=given[:, 3:], past_key_values=first.past_key_values)
        assert gap(torch.cat([first.logits, second.logits], 1), full) < 5e-6
        alone = rows_of(model, batch, ("a", None, "a"))
        with route(model, ["a"], torch.tensor([0, -1, 0])):
            assert gap(answer(model, batch), alone) < 5e-6


@pytest.mark.parametrize("name", ROTARY)
def test_keys_turned_back_leave_the_tokens_where_they_are(name):
    heads = 4 if name == "gpt-neox" else 2
    model = ours(name, torch.randn(SIZE, 2, 2, 8 * heads), shift=False)
    ids, _ = tokens()
    with torch.no_grad(), active(model, "a"):
        moved = model(input_ids=ids, position_ids=torch.arange(SIZE, SIZE + 7).expand(3, -1)).logits
        for place in model._graft.state.adapters["a"].placed:
            key = place.graft.module.key
            key.data = rotate_keys_back(key.data, SIZE, model, place.site.module)
        assert gap(model(input_ids=ids).logits, moved) < 3e-6


def test_keys_without_rotary_positions_cannot_be_turned():
    model = tiny("gpt2")
    with pytest.raises(PortUnavailable, match="no rotary positions"):
        rotate_keys_back(torch.zeros(2, 32), 2, model, "transformer.h.0.attn")


def test_a_moved_row_that_outgrows_the_position_table_is_refused():
    model = tiny("gpt2", {"n_positions": 10})
    attach(model, Moved(length=5, hidden=None), head=False)
    model(input_ids=torch.full((1, 5), 7))
    with pytest.raises(StateError, match=r"prefix 5 \+ sequence 7 exceeds the 10 learned positions"):
        model(input_ids=torch.full((1, 7), 7))


def test_detach_ends_the_move():
    batch = tiny_batch("gpt2")
    model = tiny("gpt2")
    attach(model, prefix(3), name="plain", head=False)
    before = answer(model, batch)
    attach(model, Moved(length=4, hidden=None), name="moved", head=False)
    detach(model, "moved")
    with active(model, "plain"):
        assert torch.equal(answer(model, batch), before)
    assert model.transformer._graft.around is None
