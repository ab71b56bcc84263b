"""A captioner out of two bases by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from graftwork.errors import BadOption, NothingMatches
from graftwork.models.captioner import Captioner, captioner
from graftwork.models.pair import load_pair
from graftwork.models.readers import ImageText
from small_bases import save_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("pair"))


def test_two_names_make_a_captioner_with_what_it_reads(folders: tuple[str, str]) -> None:
    vision, text = folders
    model, both = load_pair(vision, text)
    assert type(model) is Captioner
    assert isinstance(both, ImageText)
    assert (both.image_token, both.rows) == (model.config.image_token_id, model.config.image_seq_length)
    assert both.ids("w1 w2") == [6, 7]
    assert both.pixels(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()).shape == (3, 16, 16)


def test_only_the_connector_differs_from_one_loading_to_the_next(folders: tuple[str, str]) -> None:
    one, other = (load_pair(*folders)[0].state_dict() for _ in range(2))
    apart = {name for name in one if not torch.equal(one[name], other[name])}
    assert apart == {
        f"model.multi_modal_projector.{n}" for n in ("first.weight", "second.weight", "before", "after")
    }


def test_it_is_what_is_put_together_by_hand(folders: tuple[str, str]) -> None:
    found, _ = load_pair(*folders)
    by_hand = captioner(
        AutoModel.from_pretrained(folders[0]), AutoModelForCausalLM.from_pretrained(folders[1])
    )
    by_hand.connector.load_state_dict(found.connector.state_dict())
    ids = torch.randint(5, 60, (2, found.config.image_seq_length + 4))
    ids[:, : found.config.image_seq_length] = found.config.image_token_id
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    torch.testing.assert_close(found.eval()(**batch).logits, by_hand.eval()(**batch).logits)


def test_the_image_tokens_row_is_the_mean_of_the_others(folders: tuple[str, str]) -> None:
    model, _ = load_pair(*folders)
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[-1], table[:-1].mean(0))


def test_a_vision_model_that_knows_no_classes(folders: tuple[str, str], tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    tower = CLIPVisionModel(config)
    tower.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(folders[0], backend="pil").save_pretrained(tmp_path)
    model, both = load_pair(str(tmp_path), folders[1])
    assert both.rows == 16 + 2
    kept = tower.state_dict()
    assert all(
        torch.equal(tensor, kept[name]) for name, tensor in model.model.vision_tower.state_dict().items()
    )


def test_bases_that_do_not_go_together(folders: tuple[str, str], tmp_path: Path) -> None:
    vision, text = folders
    with pytest.raises(BadOption, match="no vision transformer"):
        load_pair(text, text)
    with pytest.raises(NothingMatches, match="head for causal-lm"):
        load_pair(vision, vision)
    bare = tmp_path / "bare"
    headless = AutoModelForCausalLM.from_pretrained(text)
    headless.config.tie_word_embeddings = False
    headless.model.save_pretrained(bare)
    AutoTokenizer.from_pretrained(text).save_pretrained(bare)
    with pytest.raises(BadOption, match=r"bare lacks lm_head\.weight"):
        load_pair(vision, str(bare))
