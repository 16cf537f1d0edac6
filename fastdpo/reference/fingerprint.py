"""What makes reference log-probs comparable: the model that gave them. And the key of a sequence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Fields of a config that change between two loads of one model, without a bearing on its numbers.
_IRRELEVANT = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")


def model_fingerprint(model: Any, compute_dtype: torch.dtype | None = None) -> dict[str, str]:
    """{"weights", "config", "dtype"}: hashes of all parameters and buffers (adapters too) and of the config.

    `compute_dtype` is that of the arithmetic where it differs from the weights' (autocast). Two models with the same
    fingerprint give the same log-probs up to rounding, whatever their paths.
    """
    digest = hashlib.blake2b(digest_size=16)
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.contiguous().view(-1)
        if flat.numel():
            digest.update(memoryview(flat.view(torch.uint8).cpu().numpy()))
    config = model.config.to_dict() if hasattr(model, "config") else {}
    config = {name: value for name, value in config.items() if name not in _IRRELEVANT}
    config_text = json.dumps(config, sort_keys=True, default=str)
    dtype = compute_dtype or next(iter(model.parameters())).dtype
    return {
        "weights": digest.hexdigest(),
        "config": hashlib.blake2b(config_text.encode(), digest_size=16).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def sequence_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """128-bit hash of a prompt and a completion; the length of the prompt marks the border between them."""
    prompt = np.asarray(prompt_ids, dtype="<i8").tobytes()
    completion = np.asarray(completion_ids, dtype="<i8").tobytes()
    return hashlib.blake2b(len(prompt).to_bytes(8, "little") + prompt + completion, digest_size=16).digest()
