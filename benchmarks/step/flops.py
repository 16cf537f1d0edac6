"""Counted work of a training step, or a forward pass: the FLOPs of its matrix products, from lengths and config.

By formula and not by `torch.utils.flop_counter`, which sees neither what runs inside other people's kernels nor which
keys a causal kernel leaves out; `tests/benchmarks/test_train_step.py` compares the two where it sees everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """What one step or pass runs.

    tokens         through the backbone, padding too
    keys           that these tokens attend to, all together: the token's and those before it, whatever a kernel may
                   compute beyond them
    head_tokens    through the head
    head_products  matrix products of head_tokens x D x V: 1 forward; 3 with the backward, or 4 where the logits are
                   formed twice
    """

    tokens: int
    keys: int
    head_tokens: int
    head_products: int


def forward_work(rows: Iterable[Mapping[str, Sequence[int]]]) -> Work:
    """The least work of the log-probs of the completions: each beginning of a sequence through the backbone once, each
    different completion's tokens through the head once.

    rows: `prompt_ids`, `chosen_ids`, `rejected_ids`.
    """
    beginnings: dict[tuple[int, int], int] = {}  # (the beginning before, token) -> number
    scored: dict[tuple[int, int], int] = {}  # (sequence, tokens of its prompt) -> tokens of its completion
    keys = 0
    for row in rows:
        for side in ("chosen_ids", "rejected_ids"):
            before = 0
            for length, token in enumerate([*row["prompt_ids"], *row[side]], start=1):
                if (before, token) not in beginnings:
                    beginnings[before, token] = len(beginnings) + 1
                    keys += length
                before = beginnings[before, token]
            scored[before, len(row["prompt_ids"])] = len(row[side])
    return Work(len(beginnings), keys, sum(scored.values()), head_products=1)


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of forward and backward of a Llama whose weights are all trained.

    A weight costs two a token forward and four backward. Attention costs four a key and channel of the queries forward
    (scores, and the sum of the values), and two and a half times that backward, where the scores are formed again. A
    checkpointed layer runs forward again, but for its last product (that of `down_proj`), whose result nobody needs.
    """

    layers: int
    layer_weights: int
    last_weights: int  # of the layer's last product
    channels: int
    head_weights: int

    @classmethod
    def of(cls, config: Any) -> ModelFlops:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        channels, kv_channels = (head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
        mlp = config.hidden_size * config.intermediate_size
        return cls(
            layers=config.num_hidden_layers,
            layer_weights=config.hidden_size * 2 * (channels + kv_channels) + 3 * mlp,
            last_weights=mlp,
            channels=channels,
            head_weights=config.hidden_size * config.vocab_size,
        )

    def linear(self, work: Work, checkpointing: bool) -> int:
        """Of everything but attention."""
        weights = 6 * self.layer_weights + (2 * (self.layer_weights - self.last_weights) if checkpointing else 0)
        return self.layers * weights * work.tokens + 2 * work.head_products * self.head_weights * work.head_tokens

    def attention(self, work: Work, checkpointing: bool) -> int:
        return self.layers * self.channels * work.keys * (18 if checkpointing else 14)

    def forward(self, work: Work) -> int:
        """Of a forward pass alone."""
        layers = self.layers * (2 * self.layer_weights * work.tokens + 4 * self.channels * work.keys)
        return layers + 2 * work.head_products * self.head_weights * work.head_tokens

    def __call__(self, work: Work, checkpointing: bool) -> int:
        return self.linear(work, checkpointing) + self.attention(work, checkpointing)
