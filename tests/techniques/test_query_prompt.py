"""Q-PEFT's modules against its formulas, and their place in a host (checks of arXiv:2404.04522's note)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graftwork as gw
from graftwork.engine.hints import Hints
from graftwork.engine.modules import CrossAttention
from graftwork.errors import BadData, BadOption, PortUnavailable, RouteError, StateError
from graftwork.testing import tiny, tiny_batch

WIDTH, VOCABULARY = 32, 99
QUERY = {
    "input_ids": torch.tensor([[11, 12, 13, 0], [0, 0, 14, 15], [16, 17, 18, 19]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]]),
}
PASSAGE = {
    "input_ids": torch.tensor([[21, 22, 23, 22, 0], [24, 25, 26, 27, 28], [29, 30, 31, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
POSITION = torch.tensor([2, 0, 5])


def grafted(**options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = tiny("llama")
    adapter = gw.attach(model, gw.QueryPrompt(**options), name="q")
    for parameter in adapter.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model, adapter


def module_of(adapter: Any) -> Any:
    return next(iter(adapter.modules.values()))


def told(
    table: nn.Module, query: Sequence[int], passage: Sequence[int], mask: Sequence[int] | None = None
) -> Hints:
    asked, given = torch.tensor([query]), torch.tensor([passage])
    shown = torch.ones_like(given) if mask is None else torch.tensor([mask])
    return Hints(asked, asked >= 0, given, shown != 0, None, 0, table)


def toy(
    query: Sequence[int], passage: Sequence[int], mask: Sequence[int] | None = None, **options: Any
) -> list[int]:
    """What the retrieval form chooses with the note's six embeddings."""
    table = nn.Embedding(6, 3)
    rows = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]
    table.weight.data = torch.tensor(rows, dtype=torch.float)
    hints = told(table, query, passage, mask)
    distinct = options.get("distinct", True)
    seen = hints.seen(distinct, options.get("unasked", False))
    count = options.get("count", 3)
    return hints.nearest(table(hints.query), table(hints.passage), seen, count, distinct)[0].tolist()


def one(encoding: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: values[row : row + 1] for name, values in encoding.items()}


def test_check_1_gradients_reach_the_module_alone_and_only_rows_that_were_looked_up():
    for form, extra in (("retrieval", set()), ("attention", {11, 12, 13, 14, 15, 16, 17, 18, 19})):
        model, adapter = grafted(form=form, length=3, embedding="copy", opening_ids=(5, 6), closing_ids=(7,))
        module = module_of(adapter)
        seen: list[Tensor] = []
        module.rows = lambda ids, hints, plain=module.rows, seen=seen: (seen.append(ids), plain(ids, hints))[
            1
        ]
        with gw.hints(model, query=QUERY, passage=PASSAGE, position=POSITION):
            model(**tiny_batch("llama")).logits.square().mean().backward()
        touched = set(module.table.grad.abs().sum(1).nonzero().flatten().tolist())
        chosen = set(seen[-1].flatten().tolist()) if form == "retrieval" else set()
        assert touched == {5, 6, 7} | extra | chosen
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
        own = {id(p) for p in adapter.parameters()}
        assert not any(p.grad is not None for p in model.parameters() if id(p) not in own)


def test_check_2_top_k_toy():
    assert toy([3], [0, 1, 2, 4, 4, 5], count=6, distinct=False) == [0, 1, 4, 4, 5, 2]
    assert toy([3], [0, 1, 2, 4, 4, 5], count=5) == [0, 1, 4, 5, 2]
    assert toy([3], [0, 1, 2, 4, 4, 5]) == [0, 1, 4]
    assert toy([0], [0, 1, 2, 3, 0, 5], count=2) == [0, 3]
    without = toy([0], [0, 1, 2, 3, 0, 5], count=4, unasked=True)
    assert without == [3, 5, 1, 2]
    assert toy([0], [0, 0], count=2, unasked=True) == [0, 0]  # none left: the unfiltered list
    assert toy([3], [0, 2], count=5) == [0, 2, 0, 2, 0]  # fewer than k: again from the first


def test_the_retrieval_form_is_the_note_s_procedure_written_out():
    torch.manual_seed(1)
    table = nn.Embedding(40, 8)
    for trial in range(20):
        rng = torch.Generator().manual_seed(trial)
        query = torch.randint(0, 20, (5,), generator=rng).tolist()
        passage = torch.randint(20, 40, (12,), generator=rng).tolist()
        passage[3] = query[2]  # one of them only: two would be nearest alike
        rows = nn.functional.normalize(table.weight.detach(), dim=1)
        score = torch.sigmoid(rows[query] @ rows[passage].T)
        pairs = score.flatten().argsort(descending=True, stable=True).tolist()
        ordered = list(dict.fromkeys(passage[pair % 12] for pair in pairs))
        asked = [token for token in ordered if token not in query]
        for unasked, expected in ((False, ordered), (True, asked)):
            hints = told(table, query, passage)
            seen = hints.seen(True, unasked)
            found = hints.nearest(table(hints.query), table(hints.passage), seen, 4, True)[0].tolist()
            assert found == expected[:4]


def test_check_3_hints_follow_the_query_and_the_passage():
    for form in ("retrieval", "attention"):
        model, adapter = grafted(form=form, length=2)
        made = []
        for query, passage in (
            ([11, 12], [21, 22, 23, 24]),
            ([13, 14], [21, 22, 23, 24]),
            ([11, 12], [31, 32, 33]),
        ):
            hints = told(model.get_input_embeddings(), query, passage)
            made.append(module_of(adapter).eval().positions(hints).values)
        assert not torch.equal(made[0], made[2])
        if form == "attention" or made[0].shape != made[1].shape:
            assert not torch.equal(made[0], made[1])
    assert toy([0], [1, 2, 3, 4, 5], count=2) != toy([2], [1, 2, 3, 4, 5], count=2)


def test_check_4_masked_positions_are_never_chosen():
    assert 3 not in toy([3], [0, 1, 3, 3], [1, 1, 0, 0], count=4)
    module = module_of(grafted(form="attention")[1]).eval()
    seen = [told(nn.Embedding(99, WIDTH), [3], passage, [1, 1, 0]) for passage in ([4, 5, 3], [4, 5, 9])]
    seen[1] = Hints(**{**seen[1].__dict__, "embed": seen[0].embed})
    assert torch.equal(module.positions(seen[0]).values, module.positions(seen[1]).values)


def test_check_6_the_sequence_grows_by_the_hints_and_their_words():
    for form, lengths in (("retrieval", [3 + 3, 3 + 3, 3 + 3]), ("attention", [3 + 3, 2 + 3, 4 + 3])):
        model, _ = grafted(form=form, length=3, opening_ids=(5, 6), closing_ids=(7,))
        seen: list[Tensor] = []
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, seen=seen: seen.append(args[0]), with_kwargs=True
        )
        batch = {**tiny_batch("llama"), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
        with torch.no_grad(), gw.hints(model, query=QUERY, passage=PASSAGE, position=POSITION):
            out = model(**batch)
        assert seen[0].shape[1] == 7 + max(lengths)
        assert out.logits.shape[:2] == (3, 7)  # labels keep their places


@pytest.mark.parametrize("form", ["retrieval", "attention"])
@pytest.mark.parametrize("position", [None, POSITION])
def test_hints_stand_where_they_are_put(form, position):
    """Against the bare model, given the embeddings row by row."""
    model, adapter = grafted(form=form, length=3, opening_ids=(5, 6), closing_ids=(7,))
    module, batch = module_of(adapter).eval(), tiny_batch("llama")  # the first row begins with two of padding
    with torch.no_grad():
        with gw.hints(model, query=QUERY, passage=PASSAGE, position=position):
            found = model(**batch).logits
        for row in range(3):
            padding = int((batch["attention_mask"][row] == 0).sum())
            start = 0 if position is None else int(position[row])
            with gw.hints(model, query=one(QUERY, row), passage=one(PASSAGE, row)):
                made = module.positions(gw.engine.verbs.state_of(model).hints)
            count = made.values.shape[1] if made.counts is None else int(made.counts[0])
            ids = batch["input_ids"][row, padding:]
            plain = model.get_input_embeddings()(ids)
            whole = torch.cat([plain[:start], made.values[0, :count], plain[start:]])
            with gw.active(model):
                expected = model(inputs_embeds=whole[None]).logits[0]
            expected = torch.cat([expected[:start], expected[start + count :]])
            torch.testing.assert_close(found[row, padding:], expected, atol=2e-5, rtol=2e-5)


def test_a_finished_mask_is_widened_around_hints_in_the_middle():
    model, _ = grafted(form="attention", closing_ids=(7,))
    batch = tiny_batch("llama")
    mask, total = batch["attention_mask"], batch["input_ids"].shape[1]
    square = torch.ones(total, total, dtype=torch.bool).tril() & (mask[:, None] != 0)
    finished = torch.zeros(3, 1, total, total).masked_fill(~square[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad(), gw.hints(model, query=QUERY, passage=PASSAGE, position=torch.tensor([2, 3, 7])):
        plain = model(**batch).logits
        places = (mask.cumsum(1) - 1).clamp(min=0)
        square = model(input_ids=batch["input_ids"], attention_mask=finished, position_ids=places).logits
    real = mask[..., None] != 0
    torch.testing.assert_close(square * real, plain * real, atol=2e-5, rtol=2e-5)


def test_check_7_the_order_of_a_passage_does_not_matter():
    rng = torch.Generator().manual_seed(0)
    passage = torch.randperm(90, generator=rng)[:12]
    other = passage[torch.randperm(12, generator=rng)]
    for form in ("retrieval", "attention"):
        model, adapter = grafted(form=form, length=4)
        module = module_of(adapter).eval()
        table = model.get_input_embeddings()
        first, second = (
            module.positions(told(table, [91, 92, 93], ids.tolist())).values for ids in (passage, other)
        )
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_check_9_attention_is_differentiable_in_the_passage_and_retrieval_is_not():
    for form, differentiable in (("attention", True), ("retrieval", False)):
        adapter = grafted(form=form, length=2, embedding="copy")[1]
        module, table = module_of(adapter), nn.Embedding(99, WIDTH)
        hints = told(table, [3, 4], [5, 6, 7])
        assert torch.equal(module.eval().positions(hints).values, module.positions(hints).values)
        module.positions(hints).values.sum().backward()
        assert (table.weight.grad is not None) == differentiable
    module = module_of(grafted(form="attention", dropout=0.5)[1]).train()
    hints = told(table, [3, 4], list(range(5, 30)))
    assert not torch.equal(module.positions(hints).values, module.positions(hints).values)


def test_check_10_parameter_totals():
    d, v = WIDTH, VOCABULARY
    mlp, attention, table = 2 * (d * d + d), 4 * d * d + 4 * d, v * d
    for options, count in (
        ({"form": "retrieval"}, mlp),
        ({"form": "retrieval", "embedding": "copy"}, mlp + table),
        ({"form": "attention"}, mlp + attention),
        ({"form": "attention", "embedding": "copy"}, mlp + attention + table),
        ({"form": "attention", "depth": 0}, attention),
        ({"form": "retrieval", "depth": 2}, 3 * (d * d + d)),
    ):
        assert sum(p.numel() for p in grafted(**options)[1].parameters()) == count
    assert 2 * (4096**2 + 4096) == 33_562_624  # the note's totals for Llama-2-7B


def test_the_mlp_has_a_relu_between_its_layers_and_no_residual():
    model, adapter = grafted(length=2)
    module = module_of(adapter)
    table = model.get_input_embeddings()
    hints = told(table, [3], [4, 5])
    chosen = hints.nearest(table(hints.query), table(hints.passage), hints.passage_mask, 2, True)
    first, second = [layer for layer in module.mlp if isinstance(layer, nn.Linear)]
    x = table(chosen).double()
    inner = (x @ first.weight.double().T + first.bias.double()).relu()
    expected = inner @ second.weight.double().T + second.bias.double()
    torch.testing.assert_close(module.positions(hints).values.double(), expected, atol=1e-5, rtol=1e-5)


def test_attention_is_torch_s():
    torch.manual_seed(0)
    ours, reference = CrossAttention(8, 2, 0.1).eval(), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    reference.in_proj_weight.data = ours.projection.weight.data
    reference.in_proj_bias.data = torch.randn(24)
    ours.projection.bias.data = reference.in_proj_bias.data
    reference.out_proj.weight.data, reference.out_proj.bias.data = (
        ours.output.weight.data,
        ours.output.bias.data,
    )
    queries, signal = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    seen = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected = reference(queries, signal, signal, key_padding_mask=~seen, need_weights=False)[0]
    torch.testing.assert_close(ours(queries, signal, seen), expected)


def test_a_batch_routed_to_hints_a_prompt_and_the_base_is_its_rows():
    model, _ = grafted(form="attention")
    gw.attach(model, gw.PromptTuning(length=2), name="p")
    batch = tiny_batch("llama")
    with torch.no_grad(), gw.hints(model, query=QUERY, passage=PASSAGE, position=POSITION):
        with gw.route(model, ["q", "p"], torch.tensor([1, -1, 0])):
            routed = model(**batch).logits
        for row, names in enumerate((["p"], [], ["q"])):
            with gw.active(model, *names):
                alone = model(**batch).logits
            torch.testing.assert_close(routed[row], alone[row], atol=1e-5, rtol=1e-5)


def test_generate_cached_uncached_and_by_beams():
    model, _ = grafted(form="attention", opening_ids=(5,))
    batch = tiny_batch("llama")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), gw.hints(model, query=QUERY, passage=PASSAGE, position=torch.tensor([5, 7, 3])):
        cached = model.generate(**batch, **options)
        assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
        beams = model.generate(**batch, **options, num_beams=2)
        assert torch.equal(beams, model.generate(**batch, **options, num_beams=2, use_cache=False))


def test_hints_are_carried_into_recomputation():
    def gradients(how: str) -> list[Tensor]:
        model, adapter = grafted(form="attention", dropout=0.0, embedding="copy")
        model.train()
        if how == "layers":
            model.gradient_checkpointing_enable()
        with gw.hints(model, query=QUERY, passage=PASSAGE, position=POSITION):
            loss = model(**tiny_batch("llama"), use_cache=False).logits.square().mean()
        loss.backward()
        return [p.grad for p in adapter.parameters()]

    for plain, again in zip(gradients("plain"), gradients("layers"), strict=True):
        torch.testing.assert_close(again, plain)
    model, _ = grafted(form="retrieval")
    with gw.hints(model, query=QUERY, passage=PASSAGE):
        out = checkpoint(lambda: model(**tiny_batch("llama")).logits, use_reentrant=False)
    with pytest.raises(StateError, match="recomputed in backward"):
        out.sum().backward()


def test_hints_end_with_the_block_and_a_bare_call_is_refused():
    model, _ = grafted(length=2)
    batch = tiny_batch("llama")
    with pytest.raises(StateError, match="'q' writes hints from the query and the passage of each row"):
        model(**batch)
    with gw.hints(model, query=QUERY, passage=PASSAGE):
        inside = model(**batch).logits
    with pytest.raises(StateError, match="none are set"):
        model(**batch)
    gw.hints(model, query=QUERY, passage=PASSAGE)
    assert torch.equal(model(**batch).logits, inside)
    gw.hints(model)
    with pytest.raises(StateError, match="none are set"):
        model(**batch)
    with gw.active(model):
        model(**batch)


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"query": QUERY}, BadData, "a query and a passage"),
        ({"query": one(QUERY, 0), "passage": PASSAGE}, BadData, "1 queries and 3 passages"),
        ({"query": {"input_ids": [[1]]}, "passage": PASSAGE}, BadData, "query needs input_ids"),
        (
            {"query": QUERY, "passage": {**PASSAGE, "attention_mask": torch.zeros(3, 5)}},
            BadData,
            "passage 0 has no token",
        ),
        (
            {"query": QUERY, "passage": {**PASSAGE, "attention_mask": torch.ones(3, 4)}},
            BadData,
            r"a mask of \(3, 4\)",
        ),
        (
            {"query": {"input_ids": torch.full((3, 2), 99)}, "passage": PASSAGE},
            BadData,
            "token 99, the table has 99",
        ),
        (
            {"query": QUERY, "passage": PASSAGE, "position": torch.tensor([1, 2])},
            BadData,
            "each of 3 rows",
        ),
        (
            {"query": QUERY, "passage": PASSAGE, "position": torch.tensor([1, -2, 0])},
            BadData,
            "-2 is below 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, error, words):
    model, _ = grafted(length=2)
    with pytest.raises(error, match=words):
        gw.hints(model, **given)


def test_what_does_not_fit_the_batch_or_the_host_is_refused():
    model, _ = grafted(length=2)
    two = {name: values[:2] for name, values in tiny_batch("llama").items()}
    with (
        gw.hints(model, query=QUERY, passage=PASSAGE),
        pytest.raises(RouteError, match="3 rows, now there are 2"),
    ):
        model(**two)
    far = torch.tensor([1, 8, 1])
    with (
        gw.hints(model, query=QUERY, passage=PASSAGE, position=far),
        pytest.raises(StateError, match="position 8"),
    ):
        model(**tiny_batch("llama"))
    gw.attach(model, gw.PromptTuning(length=2), name="p")
    gw.hints(model, query=QUERY, passage=PASSAGE, position=POSITION)
    with gw.active(model, "p", "q"), pytest.raises(StateError, match="'p' goes to the front"):
        model(**tiny_batch("llama"))
    other = tiny("llama")
    gw.attach(other, gw.LoRA(rank=2))
    with pytest.raises(StateError, match="no attached adapter reads hints"):
        gw.hints(other, query=QUERY, passage=PASSAGE)
    with pytest.raises(PortUnavailable, match="no vocabulary"):
        gw.attach(tiny("vit"), gw.QueryPrompt())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"opening": "hints: "}, "has no ids"),
        ({"depth": 0}, "nothing to train"),
        ({"form": "attention", "heads": 3}, "no multiple of heads=3"),
    ],
)
def test_options_that_cannot_work(options, words):
    with pytest.raises(BadOption, match=words):
        gw.attach(tiny("llama"), gw.QueryPrompt(**options))


def test_words_are_made_by_the_tokenizer():
    technique = gw.QueryPrompt(opening="ab", closing="c").tokenized(lambda text: [ord(c) - 90 for c in text])
    assert technique.opening_ids == (7, 8)
    assert technique.closing_ids == (9,)
