"""A plain training loop and scores for adapters on small hosts: sentences to classes, masked words, next words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from graftwork.engine.adapter import Adapter

Groups = list[dict[str, Any]]
BATCH, LONGEST = 16, 24
WARMUP = 0.06
HEAD_RATE = 1e-2  # of a fresh head whatever the rate of the rest: MiniLM's pooled features are small


@dataclass(frozen=True)
class Labelled:
    """Sentences and the number of the class of each."""

    texts: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, numbers: Sequence[int]) -> Labelled:
        """The rows of these numbers."""
        return Labelled([self.texts[n] for n in numbers], [self.labels[n] for n in numbers])


def fit(
    model: nn.Module,
    groups: Groups,
    loss: Callable[[Sequence[int]], Tensor],
    sizes: Sequence[int],
    *,
    steps: int,
    seed: int,
) -> None:
    """Train: AdamW (second momentum 0.98, decay 0.01), warm-up, linear decay to 0, as in the paper's scripts.

    Args:
        groups: parameters with their rates, as an optimiser takes them.
        loss: of the rows of these numbers. Batches are of rows of similar size, which saves padding.
        sizes: of the rows.
    """
    optimizer = AdamW(groups, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), (steps - step) / steps, 1.0)
    )
    rng = random.Random(seed)
    model.train()
    for _ in range(steps):
        loss(_batch(rng, sizes)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def groups_of(adapter: Adapter, rate: float) -> Groups:
    """An adapter's tensors at this rate, a head at its own."""
    named = list(adapter.named_parameters())
    heads = [p for name, p in named if name.startswith("head")]
    rest = [p for name, p in named if not name.startswith("head")]
    return [{"params": rest, "lr": rate}, *([{"params": heads, "lr": HEAD_RATE}] if heads else [])]


def _batch(rng: random.Random, sizes: Sequence[int]) -> list[int]:
    drawn = sorted(rng.sample(range(len(sizes)), min(8 * BATCH, len(sizes))), key=lambda n: sizes[n])
    start = rng.randrange(max(1, len(drawn) - BATCH + 1))
    return drawn[start : start + BATCH]


def sentence_loss(model: nn.Module, tokenizer: Any, data: Labelled) -> Callable[[Sequence[int]], Tensor]:
    """Cross-entropy of a classifier."""

    def loss(numbers: Sequence[int]) -> Tensor:
        part = data.part(numbers)
        return model(**encoded(tokenizer, part.texts), labels=torch.tensor(part.labels)).loss

    return loss


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, data: Labelled) -> float:
    """Share of sentences whose class is found; batches of similar length."""
    order = sorted(range(len(data)), key=lambda n: len(data.texts[n]))
    right = 0
    for start in range(0, len(order), 2 * BATCH):
        part = data.part(order[start : start + 2 * BATCH])
        found = model(**encoded(tokenizer, part.texts)).logits.argmax(-1)
        right += int((found == torch.tensor(part.labels)).sum())
    return right / len(data)


def encoded(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """A padded batch, sentences cut at LONGEST tokens."""
    return dict(
        tokenizer(list(texts), truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
    )


class MaskedWords(nn.Module):
    """A head that names masked words of an encoder: one layer, then the encoder's own embeddings.

    It is trained once with the encoder frozen, and then stays, so that adapters learn the text and not the task.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        width = table.shape[1]
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.table = table.detach()
        self.bias = nn.Parameter(torch.zeros(len(table)))

    def loss_of(
        self, model: nn.Module, tokenizer: Any, texts: Sequence[str], seed: int
    ) -> Callable[[Sequence[int]], Tensor]:
        """The loss of some of the texts."""
        rng = torch.Generator().manual_seed(seed)
        return lambda numbers: self.loss(model, tokenizer, [texts[n] for n in numbers], rng)

    def loss(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], rng: torch.Generator) -> Tensor:
        """Cross-entropy at 15 % of the tokens, all of them masked."""
        batch = encoded(tokenizer, texts)
        words = batch["input_ids"]
        special = (
            (words == tokenizer.cls_token_id)
            | (words == tokenizer.sep_token_id)
            | (words == tokenizer.pad_token_id)
        )
        masked = (torch.rand(words.shape, generator=rng) < 0.15) & ~special
        masked[0, 1] = True
        batch["input_ids"] = words.masked_fill(masked, tokenizer.mask_token_id)
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1][masked]
        return functional.cross_entropy(self.transform(hidden) @ self.table.T + self.bias, words[masked])
