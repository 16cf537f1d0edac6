"""Noise on the embeddings (NEFTune, Jain et al. 2023, arXiv:2310.05914), the same in every packing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class EmbeddingNoise:
    """embeddings + uniform(-w, w), w = alpha / sqrt(L * D)

    D is the width of the embeddings and L the length of the longest sequence of the batch, in tokens, which is the
    width of a padded batch, so the noise is that of TRL. transformers' own hook takes for L the width of what it
    sees: of a packed batch that is the tokens of all sequences together, and the noise so much too small.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.longest = 1  # L of the batch that runs now

    def __call__(self, embeddings: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        if not embeddings.training:
            return output
        half_width = self.alpha / (self.longest * output.shape[-1]) ** 0.5
        return output + torch.empty_like(output).uniform_(-half_width, half_width)

    @contextmanager
    def on(self, model: Any) -> Iterator[None]:
        """Within it, a transformers model in training mode runs with the noise."""
        handle = model.get_input_embeddings().register_forward_hook(self)
        try:
            yield
        finally:
            handle.remove()
