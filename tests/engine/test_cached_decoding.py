"""A module that mixes positions is never shown the newest position alone, whatever cache the host keeps."""

from __future__ import annotations

import pytest
import torch

import graftwork as gw
from graftwork.errors import StateError
from graftwork.laws import stir
from graftwork.testing import tiny, tiny_batch

OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("host", ["llama", "gpt2", "mamba", "t5"])
def test_mixing_positions_in_cached_decoding_is_refused(host: str) -> None:
    model, batch = tiny(host).eval(), tiny_batch(host)
    batch.pop("decoder_input_ids", None)
    stir(gw.attach(model, gw.TinyAttentionAdapter(), name="tiny"))
    with pytest.raises(StateError, match=r"tiny-attention-adapter \('tiny'\) at .*use_cache=False"):
        model.generate(**batch, **OPTIONS, use_cache=True)
    whole = model.generate(**batch, **OPTIONS, use_cache=False)
    with gw.active(model):
        bare = model.generate(**batch, **OPTIONS, use_cache=True)
    assert bare.shape == whole.shape


def test_a_mixing_module_of_the_encoder_alone_decodes_with_a_cache() -> None:
    model, batch = tiny("t5").eval(), tiny_batch("t5")
    del batch["decoder_input_ids"]
    stir(gw.attach(model, gw.TinyAttentionAdapter(workspaces=("encoder.attention",))))
    cached = model.generate(**batch, **OPTIONS, use_cache=True)
    assert torch.equal(cached, model.generate(**batch, **OPTIONS, use_cache=False))
