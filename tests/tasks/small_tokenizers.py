"""Small tokenizers for the task tests."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def word_tokenizer(words: str, *, pieces: tuple[str, ...] = (), most: int = 512) -> PreTrainedTokenizerFast:
    """BERT-like: one number per word, `##` pieces, [CLS] and [SEP] around."""
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, *dict.fromkeys(words.split()), *pieces])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(
        zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=most, model_input_names=inputs, **names
    )


def plain_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """GPT-like: one number per word, nothing added, <eos> as end and padding (number 0)."""
    vocabulary = {token: n for n, token in enumerate(["<eos>", *dict.fromkeys(words.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
