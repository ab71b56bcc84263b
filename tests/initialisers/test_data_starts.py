"""Starts that come from data: what calibration gathers, EVA, LoRA-GA, and what is said where data do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graftwork as gw
from graftwork.analysis.cost import Cost
from graftwork.engine import progress
from graftwork.engine.operations import operation_of
from graftwork.errors import BadOption, UnknownName
from graftwork.initialisers.statistics import InputDirections
from graftwork.laws import LAWS, answer, stir
from graftwork.testing import tiny, tiny_batch

pytestmark = pytest.mark.slow

STARTS = {
    "lora, eva": gw.LoRA(rank=2, init="eva"),
    "lora, lora-ga": gw.LoRA(rank=2, alpha=4, init="lora-ga"),
    "lora, kasa": gw.LoRA(rank=2, init="kasa"),
    "dora, pissa": gw.DoRA(rank=2, alpha=4, init="pissa", dropout=0.0),
    "dora, lora-ga": gw.DoRA(rank=2, init="lora-ga"),
    "kasa, eva": gw.KaSA(rank=2, init="eva"),
    "adalora, eva": gw.AdaLoRA(total_steps=10, rank=3, target_rank=2, init="eva"),
    "s2ft, product": gw.S2FT(share=0.2, selection="product", keep="smallest"),
    "s2ft, gradient": gw.S2FT(share=0.2, selection="gradient"),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("start", STARTS)
def test_law(start: str, law: str) -> None:
    torch.manual_seed(0)
    LAWS[law]("llama", STARTS[start])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("host", ["bert", "bert-classification", "gpt2", "t5", "vit", "resnet"])
def test_law_of_eva(host: str, law: str) -> None:
    torch.manual_seed(0)
    LAWS[law](host, gw.LoRA(rank=2, init="eva", workspaces=("all-linear|conv",)))


def line(width_in: int = 12, width_out: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width_in, width_out, dtype=torch.float64))


class Scored(nn.Module):
    """A linear layer with a loss."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.layer.weight.data = weight.clone()

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        y = self.layer(input)
        return y if labels is None else (y - labels).square().sum()


class Apart(nn.Sequential):
    """Layers with a signal each."""

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self, (a, b, c), strict=False) if x is not None]


def rows(count: int, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64) * 0.5 ** torch.arange(width)
    return 3.0 + torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixed.T


def only(adapter: gw.Adapter) -> nn.Module:
    return next(iter(adapter.modules.values()))


def same_up_to_sign(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Row by row."""
    cosines = functional.cosine_similarity(ours.double(), theirs.double()).abs()
    assert float((1 - cosines).max()) < tolerance


# what is gathered


def test_directions_batch_by_batch_are_those_of_all_inputs_centred() -> None:
    x = rows(40)
    statistic = InputDirections(12, tolerance=2.0)
    for part in x.split([3, 17, 1, 19]):
        statistic.see(part)
    centred = x - x.mean(0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(statistic.values, values)
    same_up_to_sign(statistic.directions, right, 1e-9)
    torch.testing.assert_close(statistic.explained(), values.square() / centred.square().sum())


def test_directions_settle_and_then_take_in_no_more() -> None:
    statistic = InputDirections(2)
    statistic.see(rows(200))
    assert not statistic.settled
    statistic.see(rows(200))
    assert statistic.settled
    before = statistic.directions
    statistic.see(torch.randn(50, 12, dtype=torch.float64))
    assert statistic.directions is before


def test_batches_stop_when_all_has_settled() -> None:
    drawn = []

    def batches():
        for number in range(50):
            drawn.append(number)
            yield {"input": rows(300)}

    gw.attach(line(), gw.LoRA(rank=2, init="eva", rho=1.0), calibration=batches())
    assert drawn == [0, 1]


def test_patches_of_a_convolution_are_unfold() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 4, 7, 5)
    found = operation_of(nn.Conv2d).rows(layer, x)
    unfolded = functional.unfold(x, 3, stride=2, padding=1)  # (B, C x kernel, positions)
    wanted = unfolded.unflatten(1, (2, 18)).mT.reshape(-1, 18)
    torch.testing.assert_close(found, wanted)
    matrix = operation_of(nn.Conv2d).matrix(layer, layer.weight)
    parts = found.unflatten(0, (2, 2, -1))  # sample, group, position
    y = torch.stack([parts[:, g] @ matrix[3 * g : 3 * g + 3].T for g in (0, 1)], 1)
    y = y.mT.flatten(1, 2).unflatten(-1, (4, 3)) + layer.bias[:, None, None]
    torch.testing.assert_close(y, layer(x))


def test_padding_and_ignored_labels_are_left_out() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    where = ("attention.query",)
    seen: list[Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    labels = batch["input_ids"].clone()
    labels[:, :2] = -100
    adapter = gw.attach(
        model, gw.LoRA(rank=4, init="eva", rho=1.0, workspaces=where, layers=(0,)),
        calibration=[{**batch, "labels": labels}],
    )  # fmt: skip
    counted = batch["attention_mask"].bool() & (labels != -100)
    assert 0 < int(counted.sum()) < counted.numel()
    x = seen[0][counted].double()
    right = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    same_up_to_sign(only(adapter).down.detach(), right[:4], 1e-5)


def test_nothing_of_the_model_changes() -> None:
    model, batch = tiny("llama"), tiny_batch("llama")
    model.train()
    model.model.layers[1].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    kept = parameters[1].grad
    before = [p.clone() for p in parameters]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    seen: list[tuple[list[bool], list[bool]]] = []

    def fed():
        yield {**batch, "labels": batch["input_ids"], "use_cache": False}
        seen.append(([p.requires_grad for p in parameters], [m.training for m in model.modules()]))
        torch.rand(3)

    with pytest.raises(BadOption, match="labels"):
        gw.attach(model, gw.LoRA(rank=1, init="lora-ga"), calibration=[batch])
    assert [m.training for m in model.modules()] == modes
    gw.attach(model, gw.S2FT(selection="gradient"), calibration=fed())
    assert not any(seen[0][1])
    assert sum(seen[0][0]) == 4, "the weights that are asked for, no more"
    assert torch.equal(torch.get_rng_state(), state)
    gw.detach(model)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in parameters] == [False, *(True for _ in parameters[1:])]
    assert parameters[1].grad is kept
    assert not any(p.grad is not None for p in parameters[2:])
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_other_adapters_play_no_part() -> None:
    technique, batch = gw.LoRA(rank=2, init="eva"), tiny_batch("llama")
    alone = gw.attach(tiny("llama"), technique, calibration=[batch])
    model = tiny("llama")
    stir(gw.attach(model, gw.LoRA(rank=2), name="other"), size=1.0)
    beside = gw.attach(model, technique, name="eva", calibration=[batch])
    for (name, one), two in zip(alone.named_parameters(), beside.parameters(), strict=True):
        assert name.endswith("up") or torch.equal(one, two), name


def test_sites_that_read_one_signal_share_the_work(monkeypatch) -> None:
    calls: list[int] = []
    see = InputDirections.see
    monkeypatch.setattr(InputDirections, "see", lambda self, x: (calls.append(id(self)), see(self, x))[1])
    where = ("attention.query", "attention.key", "attention.value", "feedforward.gate", "feedforward.up")
    batch = tiny_batch("llama")
    adapter = gw.attach(
        tiny("llama"), gw.LoRA(rank=2, init="eva", rho=1.0, workspaces=where), calibration=[batch]
    )
    assert len(calls) == 4
    modules = adapter.modules
    assert torch.equal(modules[0, "0/attention.query"].down, modules[0, "0/attention.value"].down)
    assert not torch.equal(modules[0, "0/attention.query"].down, modules[0, "0/feedforward.up"].down)


def test_a_bar_only_on_a_terminal_and_only_when_it_takes_a_while(monkeypatch, capsys) -> None:
    assert list(progress.watched([1, 2], "calibrating")) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress.watched(iter([1, 2]), "calibrating")) == [1, 2]
    assert "calibrating" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress.watched([1, 2], "calibrating")) == [1, 2]
    assert "calibrating" in capsys.readouterr().err


# EVA


def test_eva_is_the_leading_directions_and_changes_no_output() -> None:
    x, model = rows(40), line()
    before = model(x)
    module = only(gw.attach(model, gw.LoRA(rank=3, init="eva", rho=1.0), calibration=[{"input": x}]))
    right = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    same_up_to_sign(module.down.detach(), right[:3], 1e-9)
    assert not module.up.any()
    assert torch.equal(model(x), before)


def test_ranks_go_where_directions_explain_most() -> None:
    model = Apart(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(3)))
    inputs = [torch.randn(60, 6, dtype=torch.float64) * torch.tensor(scale) for scale in (
        [9.0, 1, 1, 1, 1, 1], [3.0, 3, 3, 1, 1, 1], [1.0, 1, 1, 1, 1, 1]
    )]  # fmt: skip
    shares = []
    for x in inputs:
        values = torch.linalg.svdvals(x - x.mean(0))
        shares.append((values.square() / values.square().sum())[:4])
    batch = dict(zip("abc", inputs, strict=True))
    technique = gw.LoRA(rank=2, init="eva", rho=2.0, workspaces=("linear",))
    adapter = gw.attach(model, technique, calibration=[batch], verify=False)
    best = sorted(((float(v), n) for n, own in enumerate(shares) for v in own), reverse=True)[:6]
    wanted = [sum(number == n for _, number in best) for n in range(3)]
    found = {place.site.module: len(place.graft.module.down) for place in adapter.placed}
    assert [found.get(str(n), 0) for n in range(3)] == wanted
    assert sum(wanted) == 6
    assert len(set(wanted)) > 1
    assert {place.graft.module.scale for place in adapter.placed} == {1.0}


def test_ranks_of_their_own_go_into_a_file_and_to_peft(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    ranks = {"0/attention.query": 3, "1/attention.query": 0}
    technique = gw.LoRA(
        rank=2, alpha=4, rank_by_site=ranks, workspaces=("attention.query", "attention.value")
    )
    model, batch = tiny("llama"), tiny_batch("llama")
    adapter = gw.attach(model, technique)
    assert {k: len(m.down) for (_, k), m in adapter.modules.items()} == {
        "0/attention.query": 3, "0/attention.value": 2, "1/attention.value": 2,
    }  # fmt: skip
    stir(adapter)
    wanted = answer(model, batch)
    gw.save(model, tmp_path / "own")
    fresh = tiny("llama")
    loaded = gw.load(fresh, tmp_path / "own")
    assert loaded.techniques[0].rank_by_site == ranks
    torch.testing.assert_close(answer(fresh, batch), wanted, rtol=1e-6, atol=1e-6)
    gw.save(model, tmp_path / "peft", format="hf-peft")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "peft")
    torch.testing.assert_close(answer(theirs, batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_agrees_with_peft(rho: float) -> None:
    peft = pytest.importorskip("peft")
    names = {"q_proj": "attention.query", "o_proj": "attention.output", "down_proj": "feedforward.down"}
    host, batch = tiny("llama"), tiny_batch("llama")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 99, (8, 12), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = peft.LoraConfig(
        r=3, lora_alpha=3, target_modules=list(names), init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, tau=0.99),
    )  # fmt: skip
    theirs = peft.get_peft_model(host, config)
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    downs = {k.split("layers.")[1]: v for k, v in theirs.state_dict().items() if "lora_A" in k}
    adapter = gw.attach(
        tiny("llama"),
        gw.LoRA(rank=3, init="eva", rho=rho, workspaces=tuple(names.values())),
        calibration=[batch],
    )
    found = {place.site.module.split("layers.")[1]: place.graft.module.down for place in adapter.placed}
    assert {k: len(v) for k, v in found.items()} == {
        k.removesuffix(".lora_A.default.weight"): len(v) for k, v in downs.items()
    }
    for key, down in found.items():
        # HF PEFT decomposes by a sketch of twice as many directions as it keeps: its last one is the least exact.
        same_up_to_sign(down.detach(), downs[f"{key}.lora_A.default.weight"], 1e-3 if rho > 1 else 5e-2)


# LoRA-GA


def gradient_of(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return 2 * (x @ weight.T - y).T @ x


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_lora_ga_is_its_formula_and_takes_it_out_of_the_weight(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    model, x, y = Scored(weight), rows(9, shape[1]), torch.randn(9, shape[0], dtype=torch.float64)
    batches = [{"input": a, "labels": b} for a, b in zip(x.split(3), y.split(3), strict=True)]
    before = model(x)
    adapter = gw.attach(
        model, gw.LoRA(rank=2, alpha=4, init="lora-ga", workspaces=("linear",)), calibration=batches
    )
    module = only(adapter)
    left, _, rest = torch.linalg.svd(gradient_of(weight, x, y), full_matrices=False)
    size = shape[0] ** 0.25 / 4
    same_up_to_sign(module.down.detach(), rest[:2], 1e-9)
    same_up_to_sign(module.up.detach().T, left[:, 2:4].T, 1e-9)
    torch.testing.assert_close(module.down.norm(dim=1), torch.full((2,), size, dtype=torch.float64))
    torch.testing.assert_close(module.up.norm(dim=0), torch.full((2,), size, dtype=torch.float64))
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model.layer.weight, weight)


def test_the_first_step_of_lora_ga_is_the_best_of_its_rank() -> None:
    """Gradient descent on A and B moves B A along G A^T A + B B^T G: G's best approximation of rank 2r."""
    torch.manual_seed(0)
    weight = torch.randn(8, 12, dtype=torch.float64)
    model, x, y = Scored(weight), rows(9), torch.randn(9, 8, dtype=torch.float64)
    batch = {"input": x, "labels": y}
    adapter = gw.attach(model, gw.LoRA(rank=2, init="lora-ga", workspaces=("linear",)), calibration=[batch])
    module = only(adapter)
    model(**batch).backward()
    step = module.up.grad @ module.down.detach() + module.up.detach() @ module.down.grad
    left, values, right = torch.linalg.svd(gradient_of(weight, x, y), full_matrices=False)
    best = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(step, 8**0.5 / 16 * best)


def test_lora_ga_agrees_with_peft_in_its_directions() -> None:
    """HF PEFT multiplies B by the singular values and scales B alone; the directions are the same."""
    peft = pytest.importorskip("peft")
    host, batch = tiny("llama"), tiny_batch("llama")
    batch = {**batch, "labels": batch["input_ids"]}
    config = peft.LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    peft.preprocess_loraga(host, config, lambda: host(**batch).loss.backward())
    theirs = peft.get_peft_model(host, config)
    tensors = {k.split("layers.")[1]: v for k, v in theirs.state_dict().items() if "lora_" in k}
    adapter = gw.attach(
        tiny("llama"), gw.LoRA(rank=2, init="lora-ga", workspaces=("attention.query",)), calibration=[batch]
    )
    for layer in (0, 1):
        module, front = adapter.modules[0, f"{layer}/attention.query"], f"{layer}.self_attn.q_proj"
        same_up_to_sign(module.down.detach(), tensors[f"{front}.lora_A.default.weight"], 1e-3)
        same_up_to_sign(module.up.detach().T, tensors[f"{front}.lora_B.default.weight"].T, 1e-3)


# inits and techniques


def test_kasa_as_a_start_of_lora_is_the_truncated_model() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 12, dtype=torch.float64), rows(5)
    model = Scored(weight)
    module = only(gw.attach(model, gw.LoRA(rank=3, init="kasa", workspaces=("linear",))))
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(model(x), x @ (left[:, :5] * values[:5] @ right[:5]).T)
    assert module.down.any()
    assert not module.up.any()


@pytest.mark.parametrize("init", ["pissa", "olora", "kasa"])
def test_dora_on_what_a_start_leaves(init: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8, 12, dtype=torch.float64), rows(5)
    model = Scored(weight)
    technique = gw.DoRA(rank=3, alpha=6, init=init, dropout=0.5, workspaces=("linear",))
    module = only(gw.attach(model, technique))
    left = weight - module.taken_up @ module.taken_down + 2 * module.up @ module.down
    torch.testing.assert_close(module.magnitude, left.norm(dim=1))
    if init != "kasa":
        torch.testing.assert_close(left.detach(), weight)
    with torch.no_grad():
        module.up.mul_(0.5), module.magnitude.mul_(1.1)
    model.eval()
    v = weight - module.taken_up @ module.taken_down + 2 * module.up @ module.down
    wanted = x @ (v * (module.magnitude / v.norm(dim=1)).unsqueeze(1)).T
    torch.testing.assert_close(model(x), wanted)
    with torch.no_grad():
        module.up.zero_()
    v = weight - module.taken_up @ module.taken_down
    model.train()
    torch.testing.assert_close(model(x), x @ (v * (module.magnitude / v.norm(dim=1)).unsqueeze(1)).T)


def test_adalora_and_kasa_start_from_the_inputs() -> None:
    x = rows(40)
    right = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3]
    for technique in (
        gw.AdaLoRA(total_steps=9, rank=3, target_rank=2, init="eva"),
        gw.KaSA(rank=3, init="eva"),
    ):
        module = only(gw.attach(line(), technique, calibration=[{"input": x}]))
        same_up_to_sign(module.down.detach(), right, 1e-9)


@pytest.mark.parametrize(
    ("technique", "reason"),
    [
        (lambda: gw.KaSA(init="pissa"), "take a part of their own out of the weight"),
        (lambda: gw.AdaLoRA(total_steps=9, init="pissa"), "lose a part of the weight when cut"),
    ],
)
def test_inits_that_do_not_fit_are_refused_with_the_reason(technique, reason: str) -> None:
    with pytest.raises(BadOption, match=reason):
        technique()


def test_counting_needs_no_data() -> None:
    def counted(technique: gw.Technique) -> Cost:
        return gw.cost(tiny("llama"), technique, sequence=8)

    plain = counted(gw.LoRA(rank=2)).trainable_parameters
    assert counted(gw.LoRA(rank=2, init="eva")).trainable_parameters == plain
    assert counted(gw.LoRA(rank=2, init="lora-ga")).trainable_parameters == plain
    assert counted(gw.LoRA(rank=2, init="pissa")).trainable_parameters == plain
    assert counted(gw.LoRA(rank=2, init="kasa")).trainable_parameters == plain
    assert counted(gw.DoRA(rank=2, init="olora")).trainable_parameters > plain
    assert counted(gw.S2FT(selection="gradient")).trainable_parameters > 0
    assert counted(gw.S2FT(selection="weight")).trainable_parameters > 0


# bad input


@pytest.mark.parametrize(
    ("technique", "batches", "words"),
    [
        (gw.LoRA(init="eva"), None, "starts from calibration data: attach"),
        (gw.S2FT(selection="activation"), None, "s2ft: starts from calibration data"),
        (gw.LoRA(), [{}], "lora asks for none"),
        (gw.LoRA(init="eva"), [], "hold no batch"),
        (gw.LoRA(init="eva"), [rows(3)], "is a Tensor"),
        (gw.LoRA(rank=2, init="lora-ga"), [{"input": rows(3)}], "put labels into each batch"),
        (gw.LoRA(rank=2, init="eva"), [{"input": rows(3) * torch.nan}], "linear: .* its input is infinite"),
        (gw.LoRA(rank=8, init="eva", rho=1.0), [{"input": rows(3)}], "vary along 2 directions only"),
        (gw.LoRA(rank=5, init="lora-ga"), [{"input": rows(3)}], "at most 8 directions"),
        (
            gw.LoRA(rank=2, init="lora-ga"),
            [{"input": torch.zeros(3, 12).double(), "labels": rows(3, 8)}],
            "does not depend on its weight",
        ),
    ],
)
def test_data_that_do_not_fit(technique, batches, words: str) -> None:
    model = Scored(torch.randn(8, 12, dtype=torch.float64))
    state = torch.get_rng_state()
    technique = type(technique)(**{**technique.options(), "workspaces": ("linear",)})
    with pytest.raises(BadOption, match=words):
        gw.attach(model, technique, calibration=batches)
    assert type(model.layer) is nn.Linear
    assert torch.equal(torch.get_rng_state(), state)
    assert model.layer.weight.requires_grad


def test_a_site_that_no_batch_comes_by_is_named() -> None:
    model = Apart(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(BadOption, match="no calibration batch came by linear#1"):
        gw.attach(
            model, gw.LoRA(rank=2, init="eva", workspaces=("linear",)), calibration=[{"a": torch.randn(9, 4)}]
        )


def test_tables_have_no_inputs_to_read() -> None:
    with pytest.raises(BadOption, match=r"embedding.*a table is looked up"):
        gw.attach(
            tiny("llama"),
            gw.LoRA(rank=2, init="eva", workspaces=("embedding",)),
            calibration=[tiny_batch("llama")],
        )


def test_ranks_given_by_hand_stay_and_a_rank_of_0_asks_for_nothing() -> None:
    ranks = {"0/attention.query": 3, "1/attention.query": 0}
    technique = gw.LoRA(rank=2, init="eva", rank_by_site=ranks, workspaces=("attention.query",))
    adapter = gw.attach(tiny("llama"), technique, calibration=[tiny_batch("llama")])
    assert {key: len(module.down) for (_, key), module in adapter.modules.items()} == {"0/attention.query": 3}


def test_ranks_of_sites_that_are_not_there() -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 0/attention\.query"):
        gw.attach(tiny("llama"), gw.LoRA(rank=2, rank_by_site={"0/attention.qeury": 3}))
    with pytest.raises(BadOption, match="leaves out every site"):
        gw.attach(
            tiny("llama"),
            gw.LoRA(rank_by_site={"0/attention.query": 0}, workspaces=("attention.query",), layers=(0,)),
        )
    with pytest.raises(BadOption, match="must be at least 0 at 'head'"):
        gw.LoRA(rank_by_site={"head": -1})


def test_a_site_whose_every_position_is_left_out_is_named() -> None:
    batch = tiny_batch("llama")
    nothing = {**batch, "labels": torch.full_like(batch["input_ids"], -100)}
    with pytest.raises(BadOption, match="every position is left out"):
        gw.attach(tiny("llama"), gw.S2FT(selection="activation"), calibration=[nothing])
