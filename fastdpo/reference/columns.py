"""To and from the columns `ref_chosen_logps` and `ref_rejected_logps` of a data set, one sum an answer."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdpo.data.validate import REF_COLUMNS, REF_MISMATCHED, REFERENCES, data_of, sum_problem
from fastdpo.packing import PreferenceCollator
from fastdpo.reference.cache import ReferenceCache
from fastdpo.reference.fingerprint import sequence_key
from fastdpo.reference.index import KEY_BYTES
from fastdpo.reference.work import Reader, place, token_rows
from fastdpo.types import DataError, UserError

_ANSWER = ("ref_logps", REF_MISMATCHED)
_ROWS = 4096  # whose log-probs are read at a time


@dataclass(frozen=True)
class RowKeys:
    """The S sequences of a data set's rows, row by row.

    data    "pairs", "lists" or "answers"
    keys    (S, 16) uint8
    tokens  (S,) those that are scored
    counts  (rows,) sequences of each row
    """

    data: str
    keys: np.ndarray
    tokens: np.ndarray
    counts: np.ndarray


def reference_columns(
    cache: ReferenceCache,
    dataset: Iterable[Mapping[str, Any]],
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    *,
    tokenizer: Any = None,
    ld_alpha: float | None = None,
) -> dict[str, list[Any]]:
    """{"ref_chosen_logps", "ref_rejected_logps"}: the sum of log-probs of both answers of each row, from the cache.

    Of rows that are ranked lists {"ref_logps"}: lists of K sums, in the order of the row's completions; of single
    answers {"ref_logps"}, one sum each, and of those with `KL_completion_ids` also {"ref_KL_logps"}.

    `ld_alpha` weighs the tokens of a pair's answer that the other is too short for:

        sum_{t < m} logps[t] + ld_alpha * sum_{t >= m} logps[t]         m = min(tokens of chosen, tokens of rejected)

    To add them to a `datasets.Dataset`: `dataset.add_column(name, values)` for each.

    Raises:
        UserError: the cache lacks some, or keeps only sums where `ld_alpha` needs each token.
    """
    return cached_columns(cache, row_keys(dataset, max_length, truncation_mode, tokenizer), ld_alpha)


def cached_columns(cache: ReferenceCache, rows: RowKeys, ld_alpha: float | None = None) -> dict[str, list[Any]]:
    """`reference_columns` of rows whose `row_keys` are known."""
    found, sums, _ = cache.lookup(rows.keys)
    if not found.all():
        raise UserError(
            f"{cache.path} lacks {int((~found).sum()):,} of {len(found):,} sequences; compute them with "
            "fastdpo.precompute."
        )
    names = REFERENCES[rows.data]
    if rows.data == "pairs":
        sums = sums.reshape(-1, 2)
        if ld_alpha is not None:
            keys, tokens = rows.keys.reshape(-1, 2, KEY_BYTES), rows.tokens.reshape(-1, 2)
            sums = _length_desensitized(cache, keys, sums, tokens, ld_alpha)
        return {name: sums[:, side].tolist() for side, name in enumerate(names)}
    if ld_alpha is not None:
        raise UserError(f"ld_alpha={ld_alpha} compares the two answers of a pair, and the rows are {rows.data}.")
    if rows.data == "answers":
        each = sums.reshape(len(rows.counts), -1)  # one, or with an answer to another prompt two
        return {name: each[:, place].tolist() for place, name in zip(range(each.shape[1]), _ANSWER, strict=False)}
    return {names[0]: [part.tolist() for part in np.split(sums, np.cumsum(rows.counts)[:-1])]}


def add_reference_columns(
    cache: ReferenceCache, rows: Sequence[Mapping[str, Any]], **options: Any
) -> list[dict[str, Any]]:
    """The rows, each with its `reference_columns`; `options` are those of `reference_columns`."""
    columns = reference_columns(cache, rows, **options)
    values = zip(*columns.values(), strict=True)
    return [{**row, **dict(zip(columns, own, strict=True))} for row, own in zip(rows, values, strict=True)]


def import_columns(
    cache: ReferenceCache,
    dataset: Iterable[Mapping[str, Any]],
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    *,
    tokenizer: Any = None,
) -> int:
    """Takes the sums that the rows carry, as they were computed elsewhere, into a cache that keeps sums only.

    Whoever calls it vouches that they are sums over all tokens of each answer, cut in the same way, under the model of
    the cache's fingerprint: nothing here can tell. Returns how many sequences were new.

    Raises:
        UserError: a row without the columns, or with one that is no finite number; a cache with values of each token.
    """
    sums: list[tuple[float, float]] = []

    def rows() -> Iterable[Mapping[str, Any]]:
        for number, row in enumerate(dataset):
            if data_of(row) != "pairs":
                raise DataError(f"{place(number)} is one of {data_of(row)}; columns are taken from pairs only.")
            sums.append((_sum(row, REF_COLUMNS[0], number), _sum(row, REF_COLUMNS[1], number)))
            yield row

    own = row_keys(rows(), max_length, truncation_mode, tokenizer)
    keys, first = np.unique(own.keys, axis=0, return_index=True)
    new = ~cache.lookup(keys)[0]
    if new.any():
        cache.add_sums(keys[new], own.tokens[first][new], np.array(sums).reshape(-1)[first][new])
    return int(new.sum())


def row_keys(
    dataset: Iterable[Mapping[str, Any]], max_length: int | None, truncation_mode: str, tokenizer: Any = None
) -> RowKeys:
    """Keys and scored tokens of the answers of each row.

    Raises:
        DataError: a row that cannot be used, or of another kind than the first.
    """
    reader = Reader(PreferenceCollator(max_length=max_length, truncation_mode=truncation_mode), tokenizer)
    keys, tokens, counts = bytearray(), array("q"), array("q")
    data = "pairs"
    for number, row in enumerate(token_rows(dataset)):
        data = data_of(row) if number == 0 else data
        if data_of(row) != data:
            raise DataError(f"{place(number)} is one of {data_of(row)}, and the rows before are {data}; part them.")
        sequences = reader.sequences(row, number)
        if data == "answers" and counts and len(sequences) != counts[0]:
            raise DataError(f"{place(number)}: some rows have KL_completion_ids and others not; add or drop them.")
        counts.append(len(sequences))
        for prompt, completion in sequences:
            keys += sequence_key(prompt, completion)
            tokens.append(max(0, len(completion) - (not len(prompt))))  # nothing predicts the very first token
    return RowKeys(
        data,
        np.frombuffer(bytes(keys), np.uint8).reshape(-1, KEY_BYTES),
        np.array(tokens, np.int64),
        np.array(counts, np.int64),
    )


def _length_desensitized(
    cache: ReferenceCache, keys: np.ndarray, sums: np.ndarray, tokens: np.ndarray, alpha: float
) -> np.ndarray:
    sums = sums.copy()
    shorter = tokens.min(axis=1)
    rows, sides = np.nonzero(tokens > shorter[:, None])
    for start in range(0, len(rows), _ROWS):
        some = slice(start, start + _ROWS)
        for row, side, logps in zip(rows[some], sides[some], cache.logps(keys[rows[some], sides[some]]), strict=True):
            sums[row, side] -= (1 - alpha) * logps[shorter[row] :].sum(dtype=np.float64)
    return sums


def _sum(row: Mapping[str, Any], name: str, number: int) -> float:
    value: Any = row.get(name)
    if problem := sum_problem(value, name):
        raise DataError(f"{place(number)}: {problem}")
    return float(value)
