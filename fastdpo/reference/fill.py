"""Fills a reference cache: forward only, prompts shared, sorted by length, by token budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from fastdpo.device import freed_memory_kept
from fastdpo.models import causal_lm, evaluating
from fastdpo.packing import PreferenceCollator
from fastdpo.reference.cache import ReferenceCache, default_cache_dir
from fastdpo.reference.fingerprint import model_fingerprint, sequence_key
from fastdpo.scoring import completion_logps
from fastdpo.types import UserError

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 32768}
PASSES_PER_SHARD = 16


def precompute(
    model: Any,
    dataset: Iterable[Mapping[str, Any]],
    cache: ReferenceCache | str | Path | None = None,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_tokens: int | None = None,
    batch_size: int | None = None,
    packing: str = "prefix",
    attention_backend: str = "auto",
    autocast_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ReferenceCache:
    """Computes what the cache lacks of the completions' log-probs under `model`, and returns the cache.

    Args:
        model: a transformers causal language model, the reference.
        dataset: tokenized rows (`prompt_ids`, `chosen_ids`, `rejected_ids`).
        cache: a folder or a ReferenceCache; default: the model's folder in the user's cache.
        max_length, truncation_mode: as in training (`PreferenceCollator`): they decide which tokens are scored.
        max_tokens: tokens a forward pass; default by device.
        batch_size: prompts a forward pass at most.
        packing: "prefix", "varlen" or "padded"; the values are the same.
        autocast_dtype: run under autocast in this dtype, as a mixed-precision trainer does.
    """
    if not isinstance(cache, ReferenceCache):
        fingerprint = model_fingerprint(causal_lm(model), autocast_dtype)
        cache = ReferenceCache(cache if cache is not None else default_cache_dir(fingerprint), fingerprint)
    cache.reload()  # another process may have added to the folder since
    collator = PreferenceCollator(max_length=max_length, truncation_mode=truncation_mode)
    wanted: dict[tuple[int, ...], dict[bytes, Sequence[int]]] = {}
    for row in dataset:
        for prompt, completion in collator.sequences(row):
            key = sequence_key(prompt, completion)
            if key not in cache:
                wanted.setdefault(tuple(prompt), {})[key] = completion
    missing = sum(len(group) for group in wanted.values())
    bar = tqdm(total=missing, desc="reference log-probs", unit="seq", disable=not progress or not missing)
    device = next(causal_lm(model).parameters()).device
    budget = max_tokens or TOKENS_PER_PASS.get(device.type, 8192)
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext()
    pending: dict[bytes, np.ndarray] = {}
    tokens = 0
    try:
        with evaluating(model), freed_memory_kept(device):
            for number, (sequences, keys) in enumerate(_passes(wanted, budget, batch_size), start=1):
                with autocast:
                    logps = completion_logps(model, sequences, packing=packing, attention_backend=attention_backend)
                pending.update((key, values.numpy()) for key, values in zip(keys, logps, strict=True))
                tokens += sum(len(prompt) + len(completion) for prompt, completion in sequences)
                bar.update(len(keys))
                bar.set_postfix_str(f"{tokens / max(1e-9, bar.format_dict['elapsed']):,.0f} tokens/s", refresh=False)
                if number % PASSES_PER_SHARD == 0:
                    cache.add(pending)
                    pending = {}
    finally:
        cache.add(pending)  # also when interrupted: what is computed is kept
        bar.close()
    return cache


def reference_columns(
    cache: ReferenceCache,
    dataset: Iterable[Mapping[str, Any]],
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
) -> dict[str, list[float]]:
    """{"ref_chosen_logps", "ref_rejected_logps"}: the sums of each row, from the cache.

    Raises:
        UserError: the cache lacks some.
    """
    collator = PreferenceCollator(max_length=max_length, truncation_mode=truncation_mode)
    keys = [sequence_key(*sequence) for row in dataset for sequence in collator.sequences(row)]
    found, sums, _ = cache.lookup(keys)
    if not found.all():
        raise UserError(
            f"{cache.path} lacks {int((~found).sum())} of {len(keys)} sequences; compute them with fastdpo.precompute."
        )
    return {"ref_chosen_logps": sums[::2].tolist(), "ref_rejected_logps": sums[1::2].tolist()}


def _passes(
    wanted: Mapping[tuple[int, ...], Mapping[bytes, Sequence[int]]], budget: int, batch_size: int | None
) -> Iterator[tuple[list[tuple[Sequence[int], Sequence[int]]], list[bytes]]]:
    """Prompts of like length with their completions, as many a pass as the budget holds tokens; the longest first."""

    def size(item: tuple[tuple[int, ...], Mapping[bytes, Sequence[int]]]) -> int:
        return len(item[0]) + sum(map(len, item[1].values()))

    sequences: list[tuple[Sequence[int], Sequence[int]]] = []
    keys: list[bytes] = []
    tokens = prompts = 0
    for item in sorted(wanted.items(), key=size, reverse=True):
        if sequences and (tokens + size(item) > budget or prompts == batch_size):
            yield sequences, keys
            sequences, keys, tokens, prompts = [], [], 0, 0
        prompt, completions = item
        sequences += [(prompt, completion) for completion in completions.values()]
        keys += completions.keys()
        tokens += size(item)
        prompts += 1
    if sequences:
        yield sequences, keys
