"""A language model that reads images: a vision encoder, a connector, a decoder (Context-PEFT, arXiv:2312.08900).

transformers' LLaVA with another connector: LayerNorm, Linear, GELU, Linear without biases, and a learned vector before
and after the rows of an image, so that P patches take P + 2 positions. Features are those of the second last vision
layer, class token dropped.

    B samples, P patches, V width of the vision encoder, D width of the language model
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from graftwork.errors import BadOption


class CaptionerConfig(LlavaConfig):
    """LLaVA's (`image_seq_length` counts the two edges too), and the rate of dropout inside the connector."""

    model_type = "graftwork-captioner"
    connector_dropout: float = 0.0


class Connector(nn.Module):
    """Vision features (B, P, V) -> rows of the language model's input (B, P + 2, D)."""

    def __init__(self, width_in: int, width_out: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        self.first = nn.Linear(width_in, width_out, bias=False)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width_out, width_out, bias=False)
        self.before = nn.Parameter(torch.empty(width_out))
        self.after = nn.Parameter(torch.empty(width_out))

    def start(self, spread: float) -> None:
        """Draw everything but the norm from N(0, spread²)."""
        for tensor in (self.first.weight, self.second.weight, self.before, self.after):
            nn.init.normal_(tensor, std=spread)

    def forward(self, features: Tensor) -> Tensor:
        rows = self.second(self.dropout(self.act(self.first(self.norm(features)))))
        before, after = (edge.to(rows.dtype).expand(len(rows), 1, -1) for edge in (self.before, self.after))
        return torch.cat([before, rows, after], dim=1)


class Captioner(LlavaForConditionalGeneration):
    """LLaVA with `Connector`; saved, loaded and generated from as any model of transformers."""

    config_class = CaptionerConfig

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = _connector(config)
        _drop_pooler(self.model.vision_tower)
        self.loss_type = "ForCausalLM"  # transformers would look for it in the class's name

    @property
    def connector(self) -> Connector:
        """What is new in a captioner: neither of its two bases has it."""
        return self.model.multi_modal_projector


AutoConfig.register(CaptionerConfig.model_type, CaptionerConfig)
AutoModelForImageTextToText.register(CaptionerConfig, Captioner)


def captioner(vision: Any, language: Any, *, dropout: float = 0.0) -> Captioner:
    """Put a pretrained vision transformer and a pretrained decoder together, with a fresh connector between.

    The two models' own modules are used, not copied; the encoder loses its pooler, which nothing would read. The
    decoder's vocabulary grows by one token, which stands where image rows go: `config.image_token_id`. Its row is the
    mean of the others, so that two models are always put together to the same one, but for the connector.

    Args:
        vision: a vision transformer with a class token, with or without a head.
        language: a decoder with its language-modelling head.
        dropout: inside the connector.
    """
    tower = vision.base_model
    _check(tower, language)
    image_token = language.get_input_embeddings().num_embeddings
    language.resize_token_embeddings(image_token + 1, mean_resizing=False)
    _start_image_token(language)
    kind: Any = CaptionerConfig  # its fields are named as in files, not as in its signature
    config = kind(
        vision_config=tower.config,
        text_config=language.config,
        image_token_id=image_token,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2 + 2,
        vision_feature_layer=-2,
        connector_dropout=dropout,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        made = Captioner(config)
    _drop_pooler(tower)
    made.model.vision_tower = tower
    made.model.language_model = language.base_model
    made.lm_head = language.get_output_embeddings()
    made.model.multi_modal_projector = _connector(config).to(language.device, language.dtype)
    made.generation_config = language.generation_config
    return made.train(language.training)


def _drop_pooler(tower: Any) -> None:
    """Rows of patches are read, and never what a pooler makes of them; many files lack one."""
    if getattr(tower, "pooler", None) is not None:
        tower.pooler = None


@torch.no_grad()
def _start_image_token(language: Any) -> None:
    """The last row of the table, and of the projection to the vocabulary: the mean of all before it."""
    for part in (language.get_input_embeddings(), language.get_output_embeddings()):
        part.weight[-1] = part.weight[:-1].mean(0)
        if getattr(part, "bias", None) is not None:
            part.bias[-1] = part.bias[:-1].mean()


def _connector(config: Any) -> Connector:
    vision, text = config.vision_config, config.text_config
    made = Connector(vision.hidden_size, text.hidden_size, config.connector_dropout)
    made.start(text.initializer_range)
    return made


def _check(tower: Any, language: Any) -> None:
    if not all(hasattr(tower.config, name) for name in ("image_size", "patch_size", "hidden_size")):
        raise BadOption(
            f"{type(tower).__name__} is no vision transformer: its config has no image_size, patch_size and hidden_size"
        )
    if not type(language).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise BadOption(
            f"{type(language).__name__} is no decoder with a language-modelling head (AutoModelForCausalLM)"
        )
