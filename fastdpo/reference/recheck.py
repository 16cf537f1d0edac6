"""Some of a cache's values against the model itself, run plainly: whether they can be trusted on this machine."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from fastdpo.models import causal_lm, evaluating
from fastdpo.packing import PreferenceCollator
from fastdpo.reference.cache import ReferenceCache
from fastdpo.reference.fingerprint import model_fingerprint, sequence_key
from fastdpo.reference.work import Reader, token_rows
from fastdpo.types import UserError
from fastdpo.verify import own_logps

# How far a sum may lie from the model's own, in nats a token, by the dtype of the arithmetic: many times the rounding,
# and far below what another model would make of it.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# And what rounding two logits alone may make of an answer of one token: logits of 32 are 1/4 apart in bfloat16.
_LOGIT = {torch.float16: 3e-2, torch.bfloat16: 2.5e-1}


@dataclass(frozen=True)
class Recheck:
    """What the comparison of some sequences gave."""

    sequences: int
    largest: float  # difference of a sum, in nats a token, but for what the rounding of logits makes of it
    row: int  # in which it was, counted from 0
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.largest <= self.tolerance


def recheck(
    model: Any,
    dataset: Iterable[Mapping[str, Any]],
    cache: ReferenceCache,
    *,
    rows: int = 32,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    autocast_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Recheck:
    """Draws rows that the cache holds, and runs both answers of each through the model, alone and unpacked.

    Raises:
        UserError: the cache holds no row of the data set, or belongs to another model.
    """
    cache.require(model_fingerprint(model, autocast_dtype))
    reader = Reader(PreferenceCollator(max_length=max_length, truncation_mode=truncation_mode), tokenizer)
    drawn = _drawn(dataset, reader, cache, rows, random.Random(seed))
    if not drawn:
        raise UserError(f"{cache.path} holds no row of this data set, so nothing can be compared; check both paths.")
    inner = causal_lm(model)
    dtype = autocast_dtype or inner.dtype
    autocast = torch.autocast(inner.device.type, autocast_dtype) if autocast_dtype else nullcontext()
    worst = (0.0, drawn[0][0])
    with evaluating(model), torch.no_grad(), autocast:
        for number, sequences in tqdm(drawn, desc="against the model", unit="row", disable=None):
            _, sums, tokens = cache.lookup([sequence_key(*sequence) for sequence in sequences])
            for (prompt, completion), held, count in zip(sequences, sums, tokens, strict=True):
                own = float(own_logps(model, prompt, completion).double().sum())
                off = max(0.0, abs(own - float(held)) - _LOGIT.get(dtype, 0.0)) / max(1, int(count))
                worst = max(worst, (off if off == off else float("inf"), number))
    return Recheck(sum(len(sequences) for _, sequences in drawn), *worst, _TOLERANCE.get(dtype, 1e-4))


def _drawn(dataset: Any, reader: Reader, cache: ReferenceCache, count: int, draw: random.Random) -> list[Any]:
    """Up to `count` rows of which the cache holds both answers, each as likely as any other."""
    drawn: list[Any] = []
    seen = 0
    for number, row in enumerate(token_rows(dataset)):
        sequences = reader.sequences(row, number)
        if not all(sequence_key(*sequence) in cache for sequence in sequences):
            continue
        seen += 1
        if len(drawn) < count:
            drawn.append((number, sequences))
        elif (place := draw.randrange(seen)) < count:
            drawn[place] = (number, sequences)
    return drawn
