"""Fills a reference cache: forward only, prompts shared, sorted by length, by token budget.

    rows  ->  windows  ->  what the cache lacks  ->  passes  ->  log-probs  ->  shards

Beside a GPU, windows and passes (`fastdpo.reference.work`) are made by threads, ahead of the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastdpo.adapters import adapters_in_use
from fastdpo.attention import BACKENDS
from fastdpo.device import freed_memory_kept
from fastdpo.models import causal_lm, evaluating, position_limit, vocabulary_size
from fastdpo.packing import PreferenceCollator
from fastdpo.reference.cache import ReferenceCache, default_cache_dir
from fastdpo.reference.fingerprint import model_fingerprint
from fastdpo.reference.folder import differences
from fastdpo.reference.progress import FillBar, Filled
from fastdpo.reference.work import Pass, Prompt, Reader, Window, ahead, passes, place
from fastdpo.scoring import ScoringBatch, score, scoring_batch, scoring_device
from fastdpo.types import UserError
from fastdpo.verify import choose_packing

TOKENS_PER_PASS = {"cpu": 2048, "cuda": 32768}
PASSES_PER_SHARD = 16
SECONDS_PER_SHARD = 60.0

T = TypeVar("T")


def precompute(
    model: Any,
    dataset: Iterable[Mapping[str, Any]],
    cache: ReferenceCache | str | Path | None = None,
    *,
    per_token: bool | None = None,
    autocast_dtype: torch.dtype | None = None,
    **options: Any,
) -> ReferenceCache:
    """Computes what the cache lacks of the completions' log-probs under `model`, and returns the cache.

        logps[t] = log softmax(logits[t])[completion[t]]        float32, for each token of each completion

    Args:
        model: a transformers causal language model, the reference; with PEFT adapters as they are switched now.
        dataset: rows of token ids (`prompt_ids`, `chosen_ids`, `rejected_ids`), or of text or messages with
            `tokenizer=`: a list, a `datasets.Dataset`, or a stream of unknown length.
        cache: a folder or a ReferenceCache; default: the model's folder in the user's cache.
        per_token: False keeps only the sums in a new folder; True refuses one that has no more than sums.
        autocast_dtype: run under autocast in this dtype, as a mixed-precision trainer does.
        options: of `fill_cache`: tokenizer, max_length, truncation_mode, max_tokens, batch_size, packing,
            attention_backend, num_shards, shard_index, num_rows, progress.

    Raises:
        UserError: a cache of another model, dtype or format; a row that cannot be used; log-probs that are no numbers;
            a folder that cannot be written. What was computed before is kept.
    """
    fingerprint = model_fingerprint(model, autocast_dtype)
    if isinstance(cache, ReferenceCache):
        cache.require(fingerprint, per_token)
    else:
        folder = cache if cache is not None else default_cache_dir(fingerprint)
        cache = ReferenceCache(folder, fingerprint, per_token=per_token, about=about(model))
    fill_cache(model, dataset, cache, autocast_dtype=autocast_dtype, **options)
    return cache


def fill_cache(
    model: Any,
    dataset: Iterable[Mapping[str, Any]],
    cache: ReferenceCache,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_tokens: int | None = None,
    batch_size: int | None = None,
    packing: str = "auto",
    attention_backend: str = "auto",
    autocast_dtype: torch.dtype | None = None,
    num_shards: int = 1,
    shard_index: int = 0,
    num_rows: int | None = None,
    progress: bool = True,
) -> Filled:
    """Adds to `cache`, which must be one of this model's, what it lacks of `dataset`; says what that was.

    Before the first pass the model's fingerprint is compared with the cache's, and where a weight was written to
    meanwhile, again before each shard.

    Killed at any moment, it loses the shard in flight (16 passes, a minute at most); run again, it computes what is
    missing, to the same bits. Several processes may fill one folder; each does best with a slice of its own.

    Args:
        tokenizer: for rows of text or messages.
        max_length, truncation_mode: as in training (`PreferenceCollator`): they decide which tokens are scored.
        max_tokens: tokens a forward pass; default by device.
        batch_size: prompts a forward pass at most.
        packing: "prefix", "varlen", "padded", or "auto": the first that the model allows. The values are the same up to
            rounding.
        num_shards, shard_index: compute only one of so many slices, counted from 0. A prompt belongs to a slice by its
            content, so the slices of a data set are complete together in whatever order its rows come.
        num_rows: for the progress bar, of a data set that does not know its own length.

    Raises:
        UserError: as `precompute`; the model was changed since the cache was opened for it.
    """
    if not 0 <= shard_index < num_shards:
        raise UserError(f"shard_index is {shard_index}; of num_shards={num_shards} it must be 0 to {num_shards - 1}.")
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be above 0, or None.")
    if attention_backend not in ("auto", *BACKENDS):
        raise UserError(f"attention_backend is {attention_backend!r}; it must be auto, {', '.join(BACKENDS)}.")
    inner = causal_lm(model)
    device = scoring_device(model)
    reader = Reader(
        collator=PreferenceCollator(max_length=max_length, truncation_mode=truncation_mode),
        tokenizer=tokenizer,
        num_shards=num_shards,
        shard_index=shard_index,
        num_tokens=vocabulary_size(inner),
        limit=position_limit(inner),
    )
    scorer = _Scorer(
        model, device, packing, attention_backend, max_tokens or TOKENS_PER_PASS.get(device.type, 8192), batch_size
    )
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else nullcontext()
    filled = Filled()
    began = time.perf_counter()
    with (
        FillBar(num_rows or _length(dataset), filled, progress) as bar,
        evaluating(model),
        _current(device),
        freed_memory_kept(device),
        _ShardWriter(cache, _SameModel(model, cache, autocast_dtype)) as shard,
    ):
        for window in _early(reader.windows(dataset), device):
            cache.reload()  # another process may have added to the folder since
            missing = _missing(window, cache)
            if missing:
                shard.same_model.require()
            bar.open(window, missing)
            with autocast:
                for work, logps in scorer.run(missing, cache):
                    shard.add(work.keys, logps)
                    bar.advance(work)
            shard.write()  # what is in the cache, the next window finds
            bar.close()
    filled.seconds = time.perf_counter() - began
    return filled


def about(model: Any) -> dict[str, str]:
    """What a person wants to know of a cache: never compared."""
    import transformers

    import fastdpo

    return {
        "model": str(getattr(causal_lm(model).config, "_name_or_path", "")),
        "fastdpo": fastdpo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _missing(window: Window, cache: ReferenceCache) -> list[Prompt]:
    """The prompts that have completions which the cache lacks, with these alone."""
    keys = window.keys
    found = iter(cache.lookup(keys)[0].tolist() if keys else [])
    left = [(prompt, [key for key in prompt.completions if not next(found)]) for prompt in window.prompts]
    return [prompt.part(lacking) for prompt, lacking in left if lacking]


@dataclass
class _Scorer:
    """Runs the model over prompts, pass by pass; the next pass is packed, and its work queued, while one is read."""

    model: Any
    device: torch.device
    packing: str
    attention_backend: str
    max_tokens: int
    batch_size: int | None

    def run(self, prompts: list[Prompt], cache: ReferenceCache) -> Iterator[tuple[Pass, list[np.ndarray]]]:
        """Each pass with the log-probs of its completions, float32 on the host, but for what `cache` holds by then.

        Raises:
            UserError: the model gives NaN or -inf for a completion; which one, after what came before it.
        """
        if not prompts:
            return
        self.packing = choose_packing(self.model, self.packing, self.attention_backend)
        before: _Running | None = None
        todo = passes(prompts, self.max_tokens, self.batch_size, self.packing)
        for work, scoring in _early(map(self._packed, todo), self.device):
            if cache.lookup(work.keys)[0].all():
                continue  # another process has computed it in the meantime
            batch = scoring.batch.to(self.device, non_blocking=True)
            logps = score(self.model, batch, attention_backend=self.attention_backend)
            now = _Running(work, scoring.counts, logps)
            if before is not None:
                yield before.work, before.values()
            before = now
        if before is not None:
            yield before.work, before.values()

    def _packed(self, work: Pass) -> tuple[Pass, ScoringBatch]:
        scoring = scoring_batch([(prompt.ids, ids) for prompt, ids in work.completions], self.packing)
        if self.device.type == "cuda":
            with _current(self.device):  # in this thread, too
                scoring = replace(scoring, batch=scoring.batch.pin_memory())
        return work, scoring


class _Running:
    """A pass whose log-probs are on their way to the host."""

    def __init__(self, work: Pass, counts: tuple[int, ...], logps: Tensor) -> None:
        self.work, self._counts = work, counts
        self._arrived: Any = None
        if logps.device.type == "cuda":
            host = torch.empty(logps.shape, dtype=logps.dtype, pin_memory=True)
            self._logps = host.copy_(logps, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(logps.device))
        else:
            self._logps = logps.cpu()

    def values(self) -> list[np.ndarray]:
        """The log-probs of each completion; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values = np.split(self._logps.numpy(), np.cumsum(self._counts)[:-1])
        for (prompt, completion), value in zip(self.work.completions, values, strict=True):
            if not np.isfinite(value).all():
                wrong = value[~np.isfinite(value)][0]
                raise UserError(
                    f"the reference gives a log-prob of {wrong:g} for {place(prompt.row)}, in a completion "
                    f"of {len(completion)} tokens; check the model's weights, or load it in a "
                    "dtype that does not overflow (bfloat16 or float32). What was computed before is kept."
                )
        return values


class ModelChanged(UserError):
    """The model is not the one any more that the cache was opened for."""


class _SameModel:
    """Whether the model is still that of the cache: its fingerprint is taken again where a tensor was written to, put
    in the place of another, or made another way of reading it, as its adapters and hooks are."""

    def __init__(self, model: Any, cache: ReferenceCache, autocast_dtype: torch.dtype | None) -> None:
        self._model, self._cache, self._autocast_dtype = model, cache, autocast_dtype
        self._seen: Any = None

    def require(self) -> None:
        """
        Raises:
            UserError: the model has changed since the cache was opened for it.
        """
        seen = self._state()
        if seen == self._seen or any(isinstance(value, DTensor) for value in self._model.parameters()):
            return  # of a sharded model, a process has no more than its part
        differing = differences(self._cache.fingerprint, model_fingerprint(self._model, self._autocast_dtype))
        if differing:
            raise ModelChanged(
                f"the model is not the one that {self._cache.path} is for ({'; '.join(differing.values())}): it was "
                "changed since the cache was opened, or is run in another dtype; open a cache with its fingerprint "
                "as it is now. What was computed before is kept."
            )
        self._seen = self._state()  # anew: the state of a quantized layer is tidied as it is read

    def _state(self) -> list[Any]:
        """What moves when the model is changed; of no cost beside a pass."""
        inner = causal_lm(self._model)
        tensors = (*inner.named_parameters(), *inner.named_buffers())
        return [
            adapters_in_use(inner),
            *((name, id(value), 0 if value.is_inference() else value._version) for name, value in tensors),
        ]


class _ShardWriter:
    """Gathers log-probs and writes a shard every few passes, on `write`, and when it is left, by an error too."""

    def __init__(self, cache: ReferenceCache, same_model: _SameModel) -> None:
        self._cache, self.same_model = cache, same_model
        self._pending: dict[bytes, np.ndarray] = {}
        self._passes = 0
        self._began = time.perf_counter()

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.write()

    def add(self, keys: list[bytes], logps: list[np.ndarray]) -> None:
        self._pending.update(zip(keys, logps, strict=True))
        self._passes += 1
        if self._passes == PASSES_PER_SHARD or time.perf_counter() - self._began > SECONDS_PER_SHARD:
            self.write()

    def write(self) -> None:
        pending, self._pending, self._passes = self._pending, {}, 0
        if pending:
            self.same_model.require()
        self._cache.add(pending)
        self._cache.reload()  # what another process has added since
        self._began = time.perf_counter()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Memory is pinned, and events are recorded, for the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _early(items: Iterable[T], device: torch.device) -> Iterator[T]:
    """Made by a thread while a GPU is busy; a CPU would only be shared with that thread."""
    return iter(items) if device.type == "cpu" else ahead(items)


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None
