"""HF PEFT's folders: nothing in them is guessed, dropped or run."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peft_hosts import host, made_by_peft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, DistilBertConfig, GPT2Config, PreTrainedModel

from graftwork.adapters.convert import convert
from graftwork.adapters.hf_peft import ia3, lora, norms, prefix, prompt
from graftwork.adapters.hf_peft.config import Config
from graftwork.adapters.hf_peft.folder import read_config, read_folder
from graftwork.adapters.hf_peft.matching import by_pattern, safe_pattern, targeted
from graftwork.adapters.hf_peft.rotary import shift_of, turned
from graftwork.adapters.installing import base_of, task_of
from graftwork.adapters.store import load, save
from graftwork.anatomy.resolve import select_sites
from graftwork.engine.attach import attach
from graftwork.engine.verbs import adapters
from graftwork.errors import BadFile, BadOption
from graftwork.reference.properties import Port
from graftwork.reference.technique import Technique
from graftwork.techniques.bottleneck_adapter import BottleneckAdapter
from graftwork.techniques.fine_tuning import FineTuning
from graftwork.techniques.ia3 import IA3
from graftwork.techniques.lora import LoRA
from graftwork.techniques.prefix_tuning import PrefixTuning
from graftwork.techniques.prompt_tuning import PromptTuning
from graftwork.testing import tiny

PATHS = [path for path, _ in host("llama").named_modules() if path]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DATA = (
    Path(os.environ.get("GRAFTWORK_DATA", Path(__file__).parents[3] / "shared" / "data"))
    / "weights-lora-adapters"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    made_by_peft("llama", config, folder)
    return folder


def copied(made: Path, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((made / "adapter_config.json").read_text()), load_file(
        made / "adapter_model.safetensors"
    )


def rewritten(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


REFUSED_FIELDS = {
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.gate_up_proj"],
    "use_qalora": True,
    "alora_invocation_tokens": [3],
    "init_lora_weights": "pissa_niter_4",
    "a_field_of_the_future": 0.5,
    "r": 3,
    "rank_pattern": {"q_proj": 5},
    "lora_alpha": "eight",
    "alpha_pattern": {"(a+)+b": 2},
    "target_modules": ["q_proj"],
    "layers_to_transform": [0],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "modules_to_save": ["lm_head"],
    "bias": 3,
    "peft_type": "TELEPATHY",
    "task_type": "SEQ_CLS",
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_what_cannot_be_honoured_is_refused_by_name(field: str, made: Path, tmp_path: Path) -> None:
    config, tensors = copied(made, tmp_path)
    rewritten(tmp_path, config | {field: REFUSED_FIELDS[field]}, tensors)
    model = host("llama-classifier" if field == "task_type" else "llama")
    with pytest.raises(BadFile) as refused:
        load(model, tmp_path)
    wanted = {
        "r": "rank 3",
        "rank_pattern": "rank 5",
        "alpha_pattern": "repeats",
        "task_type": "score.weight",
    }
    rest = {
        "layers_to_transform": "target_modules",
        "exclude_modules": "target_modules",
        "modules_to_save": "lm_head",
    }
    assert ({field: field} | wanted | rest | {"peft_type": "TELEPATHY"})[field] in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert not adapters(model)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_pain_22_unknown_fields_that_ask_for_nothing_are_ignored(
    value: object, made: Path, tmp_path: Path
) -> None:
    config, tensors = copied(made, tmp_path)
    load(host("llama"), rewritten(tmp_path, config | {"a_field_of_the_future": value}, tensors))


def _renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("self_attn", "attention")] = tensors.pop(name)


PAIN_3: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a factor missing": (lambda t: t.pop(KEY), "too many: model.layers.0.self_attn.q_proj"),
    "a module missing": (
        lambda t: [t.pop(name) for name in list(t) if "layers.1.self_attn.v_proj" in name],
        "missing: model.layers.1.self_attn.v_proj",
    ),
    "a tensor too many": (lambda t: t.update(spy=torch.ones(1)), "no home in this model: spy"),
    "a module too many": (
        lambda t: (
            t.update({KEY.replace("q_proj", x): torch.ones(2, 16) for x in ["k_proj"]})
            or t.update({KEY.replace("q_proj.lora_A", "k_proj.lora_B"): torch.ones(8, 2)})
        ),
        "too many: model.layers.0.self_attn.k_proj",
    ),
    "all renamed": (_renamed, "no module 'model.layers.0.attention.q_proj'. Did you mean"),
    "another width": (
        lambda t: t.update({KEY: torch.ones(2, 17)}),
        "takes 17 and gives 16 channels in the file, 16 and 16 here",
    ),
    "a flat factor": (lambda t: t.update({KEY: torch.ones(2)}), "factors of shapes"),
    "an empty factor": (lambda t: t.update({KEY: torch.ones(0, 16)}), "no elements"),
    "NaN": (lambda t: t[KEY].fill_(torch.nan), "NaN"),
    "DoRA's magnitudes": (
        lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)}),
        "magnitudes do not fit the factors",
    ),
    "nested layers": (
        lambda t: t.update(
            {
                KEY.replace("lora_A", "base_layer.lora_A"): torch.ones(2, 16),
                KEY.replace("lora_A", "base_layer.lora_B"): torch.ones(16, 2),
            }
        ),
        "nested",
    ),
    "other embeddings along": (
        lambda t: t.update({"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(41, 16)}),
        "not those of this base",
    ),
}


@pytest.mark.parametrize("case", PAIN_3)
def test_pain_3_tensors_are_all_placed_or_nothing_is(case: str, made: Path, tmp_path: Path) -> None:
    config, tensors = copied(made, tmp_path)
    edit, said = PAIN_3[case]
    edit(tensors)
    model = host("llama")
    with pytest.raises(BadFile, match=re.escape(said)):
        load(model, rewritten(tmp_path, config, tensors))
    assert not adapters(model)


def test_pain_6_frozen_embeddings_are_neither_needed_nor_written(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    made_by_peft("llama", config, tmp_path / "theirs")
    assert any("base_layer" in name for name in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    model = host("llama")
    load(model, tmp_path / "theirs")
    written = save(model, tmp_path, format="hf-peft")
    assert sum(t.numel() for t in load_file(written / "adapter_model.safetensors").values()) == 2 * (40 + 16)


def test_files_of_a_bare_module_without_prefix_are_read(made: Path, tmp_path: Path) -> None:
    config, tensors = copied(made, tmp_path)
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    load(host("llama"), rewritten(tmp_path, config, plain))
    with pytest.raises(BadFile, match="prefix"):
        load(host("llama"), rewritten(tmp_path, config, tensors | {n: t.clone() for n, t in plain.items()}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "JSON"),
        ("[]", "object"),
        ("{}", "peft_type"),
        ('{"model_class": "BertModel", "config": {}}', "adapter-hub"),
        ('{"peft_type": "LORA", "r": NaN}', "NaN"),
        ("{" * 50_000, "JSON"),
    ],
)
def test_broken_configurations(text: str, said: str, made: Path, tmp_path: Path) -> None:
    rewritten(tmp_path, *copied(made, tmp_path))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(BadFile, match=said):
        load(host("llama"), tmp_path)


def test_an_incomplete_folder_says_what_is_missing(made: Path, tmp_path: Path) -> None:
    config, tensors = copied(made, tmp_path)
    rewritten(tmp_path, config, tensors)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(BadFile, match=r"no adapter_model\.safetensors"):
        load(host("llama"), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(BadFile, match="holds no adapter"):
        load(host("llama"), tmp_path)


UNWRITABLE = {
    "another technique": ((BottleneckAdapter(),), "no type for an adapter of bottleneck-adapter"),
    "two methods": ((LoRA(), IA3()), "no type for an adapter of ia3 and lora"),
    "whole modules alone": ((FineTuning(workspaces=("attention.query",)),), "no type"),
    "two dropouts": (
        (LoRA(dropout=0.1, workspaces=("attention.query",)), LoRA(workspaces=("attention.key",))),
        "one dropout",
    ),
    "a vector on a block": ((IA3(workspaces=("layer",)),), "rescales the output or input of a linear"),
    "some layers only": ((PrefixTuning(length=2, hidden=None, layers=(1,)),), "each of the 3 layers"),
    "two prompts": ((PromptTuning(length=2), PromptTuning(length=3)), "one prompt"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_hf_peft_cannot_hold_is_refused_and_nothing_written(case: str, tmp_path: Path) -> None:
    parts, said = UNWRITABLE[case]
    model = host("llama")
    attach(model, parts, name="fr")
    with pytest.raises(BadFile, match=said):
        save(model, tmp_path, format="hf-peft")
    assert list(tmp_path.iterdir()) == []


ELSEWHERE: dict[str, tuple[str, Technique, str]] = {
    "prompt behind CLS": ("bert-classifier", PromptTuning(length=2), "Train it with front=True"),
    "summary outside the stack": (
        "roberta-classifier",
        PromptTuning(length=2, front=True),
        "reads the first position that its stack gives",
    ),
    "tokens not moved": ("gpt2", PrefixTuning(length=2, hidden=None), "Train it with shift_positions=2"),
    "tokens moved by another number": (
        "t5",
        PrefixTuning(length=2, hidden=None, workspaces=("decoder.attention",), shift_positions=3),
        "Train it with shift_positions=2",
    ),
    "prefix of the encoder": (
        "t5",
        PrefixTuning(length=2, hidden=None, shift_positions=2),
        "to decoder.attention of each of the 3 layers",
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_positions_that_hf_peft_would_put_elsewhere_are_not_written(case: str, tmp_path: Path) -> None:
    name, technique, said = ELSEWHERE[case]
    model = host(name)
    attach(model, technique, name="fr")
    with pytest.raises(BadFile, match=said):
        save(model, tmp_path, format="hf-peft")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_whose_first_position_becomes_the_summary_outside_is_not_read(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    made_by_peft("roberta-classifier", config, tmp_path)
    with pytest.raises(BadFile, match="in HF PEFT the first of the prompt"):
        load(host("roberta-classifier"), tmp_path)


def test_a_prefix_for_fewer_layers_than_the_decoder_has_is_not_read(tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2)
    made_by_peft("t5", config, tmp_path)
    with pytest.raises(BadFile, match="4 layers of width 16"):
        load(host("t5-four"), tmp_path)


@pytest.mark.parametrize("name", ["distilbert-classification", "modernbert", "vit"])
def test_a_prefix_on_a_stack_without_a_cache_is_refused(name: str) -> None:
    model = tiny(name)
    site = select_sites(model, ("attention",), "all", port=Port.ATTENTION)[0]
    with pytest.raises(BadFile, match="takes no cache"):
        shift_of(model, site, 2, "a.json")


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "qwen3"])
def test_turning_keys_is_a_rotation_by_whole_steps(name: str) -> None:
    model = host(name)
    site = select_sites(model, ("attention",), "all", port=Port.ATTENTION)[0]
    keys = torch.randn(4, site.key_width)
    there = turned(model, site, keys, 5, "x")
    assert not torch.allclose(there, keys, atol=0.1)
    torch.testing.assert_close(turned(model, site, there, -5, "x"), keys)
    torch.testing.assert_close(turned(model, site, turned(model, site, keys, 2, "x"), 3, "x"), there)
    torch.testing.assert_close(there.norm(dim=-1), keys.norm(dim=-1))


TARGETS = [
    ["q_proj"],
    ["q_proj", "mlp.up_proj"],
    ["model.layers.0.self_attn.q_proj"],
    ["proj"],
    r".*\.layers\.[01]\.mlp\..*",
    r"model\.norm|lm_head",
    ["layers", "norm"],
]


LAYERS: list[dict[str, Any]] = [
    {},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
]
EXCLUDED = [None, ["k_proj"], r".*\.0\..*"]


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_mean_what_peft_means(targets: object) -> None:
    for layers, excluded in itertools.product([{}] if isinstance(targets, str) else LAYERS, EXCLUDED):
        fields = {
            "target_modules": targets,
            "exclude_modules": excluded,
            "modules_to_save": ["lm_head"],
            **layers,
        }
        theirs = peft.LoraConfig(**fields)
        wanted = [path for path in PATHS if check_target_module_exists(theirs, path)]
        assert targeted(Config(fields, "x"), PATHS) == wanted, (layers, excluded)


@given(
    patterns=st.dictionaries(
        st.sampled_from(
            ["q_proj", r"layers\.1\..*", "self_attn.v_proj", "proj", r"[qk]_proj", "^model.norm"]
        ),
        st.integers(1, 9),
    ),
    path=st.sampled_from(PATHS),
)
def test_patterns_mean_what_peft_means(patterns: dict[str, float], path: str) -> None:
    wanted = patterns.get(get_pattern_key(list(patterns), path), 5)
    assert by_pattern(patterns, path, 5, "x") == wanted


@pytest.mark.parametrize("pattern", ["(a+)+", "(a*)*b", "(.*x){9}", "[", "(?P<x", "a" * 3000])
def test_patterns_that_are_broken_or_endless_are_refused(pattern: str) -> None:
    with pytest.raises(BadFile, match="pattern"):
        safe_pattern(pattern, "x")


def test_converting_says_what_it_needs(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="pass base="):
        convert(made, tmp_path / "x", format="graftwork")
    with pytest.raises(BadFile, match="pass base="):
        convert(made, tmp_path / "x", format="graftwork", base=str(tmp_path / "nowhere"))
    with pytest.raises(BadOption, match="already"):
        convert(made, tmp_path / "x", format="hf-peft")
    with pytest.raises(BadOption, match="no format"):
        convert(made, tmp_path / "x", format="peft")
    assert list(tmp_path.iterdir()) == []
    written = convert(made, tmp_path / "x", format="graftwork", base=host("llama").to("meta"))
    assert written == tmp_path / "x.safetensors"
    load(host("llama"), written)


def real_base(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        if name == "gpt2_emotion_peft":
            return AutoModelForSequenceClassification.from_config(GPT2Config(num_labels=6))
        return AutoModelForSequenceClassification.from_config(DistilBertConfig(num_labels=2))


@pytest.mark.skipif(not DATA.is_dir(), reason="the published adapters are not here")
@pytest.mark.parametrize(
    ("name", "workspaces", "head"),
    [
        ("distilbert_imdb_peft", {"attention.query", "attention.value"}, {"head.weight", "head.bias"}),
        ("gpt2_emotion_peft", {"attention.qkv"}, {"head.weight"}),
    ],
)
def test_published_adapters_find_their_places(name: str, workspaces: set[str], head: set[str]) -> None:
    model = real_base(name)
    stored = read_folder(DATA / name, model, "real", base_of(model), task_of(model))
    lora = stored.manifest.techniques[0]
    assert isinstance(lora, LoRA)
    assert set(lora.workspaces or ()) == workspaces
    assert lora.layers == "all"
    assert lora.rank == read_config(DATA / name).document["r"]
    assert head <= {re.sub(r"head#\d", "head", tensor) for tensor in stored.tensors}
    raw = load_file(DATA / name / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.tensors.values()) == sum(t.numel() for t in raw.values())


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from graftwork.adapters.base import BaseIdentity
from graftwork.adapters.container import read_tensors
from graftwork.adapters.hf_peft.folder import read_config, write_folder
from graftwork.adapters.manifest import Owner, Place
from graftwork.adapters.stored import assemble
from graftwork.errors import BadFile
from graftwork.techniques.lora import LoRA

def made(rank):
    own = {Owner(0, "q", "down"): torch.ones(rank, 512), Owner(0, "q", "up"): torch.ones(512, rank)}
    place = Place("model.q", "Linear", "weight", "output", "linear")
    return assemble("fr", (LoRA(rank=rank),), own, {"q": place}, BaseIdentity("M", "", {}, {}, ()))

folder, chance, states = Path(sys.argv[1]) / "x", random.Random(0), set()
adapters = [made(2), made(3)]
for attempt in range(15):
    child = os.fork()
    if child == 0:
        while True:
            for adapter in adapters:
                write_folder(folder, adapter, None, None)
    time.sleep(chance.uniform(0.01, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        rank = read_config(folder).document["r"]
    except BadFile as error:
        assert "cannot be read" in str(error), error
        states.add("none")
        continue
    tensors = read_tensors(folder / "adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {rank}, "two saves are mixed"
    states.add(rank)
print(*sorted(map(str, states)))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_sigkill_never_mixes_two_saves(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"2", "3"} & set(done.stdout.split())


def test_the_page_names_every_option_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hf-peft.md").read_text()
    lines = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    named: dict[str, list[set[str]]] = {}
    for kinds, *cells in lines:
        for kind in kinds.split(","):
            named.setdefault(kind.strip(), [set(re.findall(r"`(\w+)`", cell)) for cell in cells])
    every = {"modules_to_save"}
    modules = {"LORA": lora, "IA3": ia3, "LN_TUNING": norms, "PROMPT_TUNING": prompt, "P_TUNING": prompt}
    for kind, module in {**modules, "PREFIX_TUNING": prefix}.items():
        assert named[kind][0] == set(module.UNDERSTOOD) - every
        assert named[kind][1] == set(getattr(module, "INDIFFERENT", ()))
    refused = {name for first, *_ in lines for name in re.findall(r"`(\w+)`", first)}
    assert lora.REFUSED.keys() <= refused
    assert all(kind in page for kind in lora.CHANGE_THE_BASE)


def test_a_lora_of_one_rank_is_written_without_patterns_or_whole_modules(tmp_path: Path) -> None:
    """What servers that know one rank and one alpha read (vLLM)."""
    model = host("llama")
    attach(model, LoRA(rank=3, alpha=6, workspaces=("attention.*", "feedforward.up")), name="fr")
    config = json.loads((save(model, tmp_path, format="hf-peft") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["use_dora"]) == (3, 6, "none", False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert "modules_to_save" not in config
