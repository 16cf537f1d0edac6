"""From a data set of any size to forward passes: which sequences it holds, and how they are cut and ordered.

Rows are read in windows, so that neither a huge data set nor an endless one has to fit into memory. Within a window
every prompt stands once, with all its completions; the longest come first.
"""

from __future__ import annotations

import hashlib
import json
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from fastdpo.data.tokenize import tokenized
from fastdpo.data.validate import (
    ID_COLUMNS,
    MISMATCHED,
    TOKENIZED,
    data_of,
    implicit_prompt_length,
    is_tokenized,
    ranks_problem,
    row_problem,
)
from fastdpo.models import PositionLimit
from fastdpo.packing import PreferenceCollator
from fastdpo.packing.collator import PromptCompletion
from fastdpo.packing.tree import SortedSequences, pays
from fastdpo.reference.fingerprint import sequence_key
from fastdpo.types import DataError

WINDOW_ROWS = 16_384
WINDOW_TOKENS = 1 << 24
_READ_ROWS = 1024  # of a table at a time

T = TypeVar("T")


@dataclass(eq=False)
class Prompt:
    """A prompt and completions of it by key (`sequence_key`), all int32 ids; row: the first that they stand in."""

    ids: np.ndarray
    row: int
    completions: dict[bytes, np.ndarray] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Each once."""
        return len(self.ids) + sum(map(len, self.completions.values()))

    @property
    def sequences(self) -> list[np.ndarray]:
        """Prompt and completion in one, of each completion."""
        return [np.concatenate([self.ids, completion]) for completion in self.completions.values()]

    def part(self, keys: Iterable[bytes]) -> Prompt:
        return Prompt(self.ids, self.row, {key: self.completions[key] for key in keys})


@dataclass(frozen=True)
class Window:
    """rows: that were read for it, those of other slices too; prompts: of this slice, each once."""

    rows: int
    prompts: list[Prompt]

    @property
    def keys(self) -> list[bytes]:
        return [key for prompt in self.prompts for key in prompt.completions]


@dataclass(frozen=True)
class Pass:
    """What one forward pass scores."""

    prompts: tuple[Prompt, ...]

    @property
    def completions(self) -> list[tuple[Prompt, np.ndarray]]:
        return [(prompt, completion) for prompt in self.prompts for completion in prompt.completions.values()]

    @property
    def keys(self) -> list[bytes]:
        return [key for prompt in self.prompts for key in prompt.completions]

    @property
    def tokens(self) -> int:
        return sum(prompt.tokens for prompt in self.prompts)


@dataclass(frozen=True)
class Reader:
    """Reads the rows of one slice of a data set into windows.

    tokenizer                 for rows of text or messages; rows of token ids need none
    num_shards, shard_index   the slice: a prompt belongs to one by its content, wherever in the data it stands
    num_tokens                size of the vocabulary that ids must lie in; None: not checked
    limit                     of the model's positions
    """

    collator: PreferenceCollator
    tokenizer: Any = None
    num_shards: int = 1
    shard_index: int = 0
    num_tokens: int | None = None
    limit: PositionLimit | None = None

    def windows(self, dataset: Iterable[Mapping[str, Any]]) -> Iterator[Window]:
        """Where reading fails, what was read before comes first: a broken stream costs nothing that it gave."""
        prompts: dict[bytes, Prompt] = {}
        rows = own = tokens = 0  # own: of this slice, which alone take memory
        failure: Exception | None = None
        numbered = enumerate(token_rows(dataset))
        while failure is None:
            try:
                number, row = next(numbered)
                row = self._checked(row, number)
                if self.num_shards == 1 or content_slice(row, self.num_shards) == self.shard_index:
                    tokens += self._take(row, number, prompts)
                    own += 1
                rows += 1
            except StopIteration:
                break
            except Exception as error:
                failure = error
            if own == WINDOW_ROWS or tokens >= WINDOW_TOKENS:
                yield Window(rows, list(prompts.values()))
                prompts, rows, own, tokens = {}, 0, 0, 0
        if rows:
            yield Window(rows, list(prompts.values()))
        if failure is not None:
            raise failure

    def sequences(self, row: Mapping[str, Any], number: int) -> tuple[PromptCompletion, ...]:
        """(prompt, completion) of each answer of a row, as they are scored: chosen and rejected; best to worst.

        Raises:
            DataError: the row cannot be used; its number and the remedy.
        """
        return self._sequences(self._checked(row, number), number)

    def _sequences(self, row: Mapping[str, Any], number: int) -> tuple[PromptCompletion, ...]:
        """Of a row that is checked."""
        if not is_tokenized(row):
            row = self._checked(tokenized(row, self.tokenizer, place(number)), number)
        sequences = self.collator.sequences(row)
        for prompt, completion in sequences:
            self._check_length(len(prompt) + len(completion), number)
        return sequences

    def _take(self, row: Mapping[str, Any], number: int, prompts: dict[bytes, Prompt]) -> int:
        """Adds the sequences of a row that is checked; returns its tokens."""
        tokens = 0
        for prompt, completion in self._sequences(row, number):
            key, prompt_key = sequence_key(prompt, completion), sequence_key(prompt, ())
            if prompt_key not in prompts:
                # Copies: a slice would keep the whole table alive that it was read from.
                prompts[prompt_key] = Prompt(np.array(prompt, np.int32), number)
            prompts[prompt_key].completions.setdefault(key, np.array(completion, np.int32))
            tokens += len(prompt) + len(completion)
        return tokens

    def _checked(self, row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        """Rows of token ids as arrays; rows of text as they are, without fields that are None."""
        if is_tokenized(row):
            return self._checked_ids(row, number)
        row = {name: value for name, value in row.items() if value is not None}
        problem = row_problem(row)
        if problem is None and self.tokenizer is None:
            problem = "it holds text, not token ids; pass the tokenizer."
        if problem is not None:
            raise DataError(f"{place(number)}: {problem}")
        return row

    def _checked_ids(self, row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
        data = data_of(row)
        columns = ID_COLUMNS[data]
        for name in columns:
            if row.get(name) is None:
                raise DataError(
                    f"{place(number)}: the field {name!r} is missing; tokenized rows need {', '.join(columns)}."
                )
        if data != "lists":
            names = (*columns, MISMATCHED) if row.get(MISMATCHED) is not None else columns
            return {name: self._ids(row[name], name, number) for name in names}
        several = row["completions_ids"]
        if not isinstance(several, list | tuple | np.ndarray):
            raise DataError(f"{place(number)}: 'completions_ids' must be a list of lists of token ids.")
        problem = ranks_problem(len(several), row.get("ranks"))
        if problem is not None:
            raise DataError(f"{place(number)}: {problem}")
        completions = [self._ids(ids, "completions_ids", number) for ids in several]
        ranks = {} if row.get("ranks") is None else {"ranks": row["ranks"]}
        return {
            "prompt_ids": self._ids(row["prompt_ids"], "prompt_ids", number),
            "completions_ids": completions,
            **ranks,
        }

    def _ids(self, values: Any, name: str, number: int) -> np.ndarray:
        try:
            ids = np.asarray(values)
        except ValueError:  # lists of unequal lengths in it
            ids = np.empty((0, 0))
        bools = isinstance(values, list | tuple) and bool in set(map(type, values))  # numpy takes them for 0 and 1
        if bools or ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise DataError(f"{place(number)}: {name!r} must be a list of token ids (integers from 0).")
        if self.num_tokens is not None and len(ids) and not (ids.min() >= 0 and ids.max() < self.num_tokens):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise DataError(
                f"{place(number)}: {name!r} holds the id {wrong}, and the model knows {self.num_tokens} tokens, "
                "counted from 0; tokenize with the tokenizer of this model, or give the model the tokens that were "
                "added (model.resize_token_embeddings(len(tokenizer)))."
            )
        if not len(ids) and name != "prompt_ids":
            raise DataError(f"{place(number)}: {name!r} is empty; write an answer or remove the row.")
        return ids.astype(np.int64, copy=False)

    def _check_length(self, length: int, number: int) -> None:
        if self.limit is not None and length > self.limit.tokens:
            raise DataError(
                f"{place(number)} has {length} tokens, and the model has "
                f"{self.limit.why}; set max_length={self.limit.tokens} to cut such rows, or leave them out."
            )


def place(number: int) -> str:
    """Of a row, for messages."""
    return f"row {number} of the data set (counted from 0)"


def token_rows(dataset: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows; those of a `datasets.Dataset` of token ids as arrays, without a Python object a token."""
    if "datasets" in sys.modules:
        from datasets import Dataset

        if isinstance(dataset, Dataset) and set(TOKENIZED) <= set(dataset.column_names):
            return _table_rows(dataset.select_columns(list(TOKENIZED)).with_format("arrow"))
    return iter(dataset)


def _table_rows(dataset: Any) -> Iterator[dict[str, np.ndarray]]:
    import pyarrow as pa

    for table in dataset.iter(batch_size=_READ_ROWS):
        columns = []
        for name in TOKENIZED:
            lists = table[name].combine_chunks().cast(pa.large_list(pa.int64()))
            columns.append(
                np.split(lists.flatten().to_numpy(), (lists.offsets.to_numpy() - lists.offsets[0].as_py())[1:-1])
            )
        for row in zip(*columns, strict=True):
            yield dict(zip(TOKENIZED, row, strict=True))


def content_slice(row: Mapping[str, Any], count: int) -> int:
    """Which of `count` slices a row belongs to: decided by its prompt, so that completions of one stay together."""
    prompt = row.get("prompt_ids")
    if prompt is not None:
        content = np.asarray(prompt, dtype="<i8").tobytes()
    else:
        prompt = row.get("prompt")
        if prompt is None:
            chosen, rejected = row.get("chosen") or [], row.get("rejected") or []
            prompt = chosen[: implicit_prompt_length(chosen, rejected)]
        content = json.dumps(_without_none(prompt), sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") % count


def _without_none(value: Any) -> Any:
    """Tables fill missing fields of messages with None, which must not move a row to another slice."""
    if isinstance(value, Mapping):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list | tuple) else value


def passes(
    prompts: Sequence[Prompt], budget: int, batch_size: int | None = None, packing: str = "prefix"
) -> Iterator[Pass]:
    """Prompts of like length with their completions, as many a pass as `budget` holds tokens; the longest first.

    What is left of the prompts when some passes are done gives the passes that were left: a run that is broken off and
    begun again computes the same numbers, to the last bit.
    """
    parts = [part for prompt in prompts for part in _parts(prompt, budget, packing)]
    parts.sort(key=lambda part: (-_Load(packing).with_prompt(part).tokens, next(iter(part.completions))))
    taken: list[Prompt] = []
    load = _Load(packing)
    for part in parts:
        more = load.with_prompt(part).within(budget, (*taken, part))
        if taken and (more is None or len(taken) == batch_size):
            yield Pass(tuple(taken))
            taken, more = [], None
        taken.append(part)
        load = more or _Load(packing).with_prompt(part)
    if taken:
        yield Pass(tuple(taken))


def _parts(prompt: Prompt, budget: int, packing: str) -> Iterator[Prompt]:
    """The prompt, again for every few of its completions where all of them together would not fit."""
    keys: list[bytes] = []
    load = _Load(packing)
    for key, completion in sorted(prompt.completions.items(), key=lambda item: (-len(item[1]), item[0])):
        lengths = len(prompt.ids), len(completion)
        more = load.with_completion(*lengths, first=not keys).within(budget, [prompt.part([*keys, key])])
        if keys and more is None:
            yield prompt.part(keys)
            keys = []
        load = more or _Load(packing).with_completion(*lengths, first=True)
        keys.append(key)
    if keys:
        yield prompt.part(keys)


@dataclass(frozen=True)
class _Load:
    """The tokens that the backbone runs in a pass.

    With "varlen" a prompt counts for every completion of it, in "padded" rows all are as long as the longest. With
    "prefix" prompts count once, where sharing pays (`fastdpo.packing.tree`): no less than the row holds, and more where
    prompts or completions begin alike. `within` counts exactly before it says that something does not fit.
    """

    packing: str
    shared: int = 0
    unshared: int = 0
    rows: int = 0
    longest: int = 0

    @property
    def tokens(self) -> int:
        if self.packing == "padded":
            return self.rows * self.longest
        shares = self.packing == "prefix" and pays(self.unshared - self.shared, self.unshared)
        return self.shared if shares else self.unshared

    def with_completion(self, prompt: int, completion: int, first: bool) -> _Load:
        return _Load(
            self.packing,
            self.shared + completion + (prompt if first else 0),
            self.unshared + prompt + completion,
            self.rows + 1,
            max(self.longest, prompt + completion),
        )

    def with_prompt(self, prompt: Prompt) -> _Load:
        load = self
        for number, completion in enumerate(prompt.completions.values()):
            load = load.with_completion(len(prompt.ids), len(completion), first=number == 0)
        return load

    def within(self, budget: int, prompts: Sequence[Prompt]) -> _Load | None:
        """This load, which is that of `prompts`, where it keeps to the budget; counted exactly if need be."""
        if self.tokens <= budget or self.packing != "prefix":
            return self if self.tokens <= budget else None
        sequences = SortedSequences([ids for prompt in prompts for ids in prompt.sequences])
        exact = replace(self, shared=sequences.fewest_tokens(), unshared=sequences.unshared_tokens())
        return exact if exact.tokens <= budget else None


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """The items, `depth` of them made by a thread while the one before is in use; errors come through in place."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not unwanted.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if unwanted.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    threading.Thread(target=make, daemon=True, name="fastdpo-ahead").start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        unwanted.set()
