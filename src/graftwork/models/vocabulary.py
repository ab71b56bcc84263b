"""The small hosts' tokenizer: byte-level BPE trained on the embedded text: no character is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graftwork.models.hosts import EOS, PAD, SENTINELS, VOCABULARY

_PAD, _EOS = "<pad>", "<eos>"


def train_tokenizer(texts: Iterable[str], *, sentinels: bool, size: int = VOCABULARY) -> Any:
    """A fast tokenizer with `size` tokens.

    With `sentinels` (encoder-decoders) it has 32 span markers on top, and every encoded text ends with <eos>.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_PAD, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert (tokenizer.token_to_id(_PAD), tokenizer.token_to_id(_EOS)) == (PAD, EOS)
    marks = [f"<extra_id_{n}>" for n in range(SENTINELS)] if sentinels else []
    if sentinels:
        tokenizer.add_special_tokens(marks)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {_EOS}", pair=f"$A {_EOS} $B {_EOS}", special_tokens=[(_EOS, EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_EOS,
        bos_token=None if sentinels else _EOS,
        extra_special_tokens=marks,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
