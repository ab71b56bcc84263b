"""Tiny pretrained models on disk, each with what makes its inputs: runs go through the same doors as a user's."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from graftwork.testing import VOCABULARY, tiny

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]


def save_host(family: str, folder: Path) -> Path:
    """The tiny model of a family with a word-level tokenizer."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        model_max_length=64,
    ).save_pretrained(folder)
    tiny(family).save_pretrained(folder)
    return folder


def save_pair(folder: Path) -> tuple[str, str]:
    """Folders with the tiny vision transformer and the tiny Llama."""
    vision = tiny("vit")
    vision.save_pretrained(folder / "vision")
    side = vision.config.image_size
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder / "vision")
    return str(folder / "vision"), str(save_host("llama", folder / "text"))
