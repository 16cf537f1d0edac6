"""Data sets of a run: checked, tokenized, and without the rows that no token of an answer is left of."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from fastdpo.data.tokenize import tokenized
from fastdpo.data.validate import (
    ID_COLUMNS,
    MISMATCHED,
    REF_COLUMNS,
    REF_MISMATCHED,
    REFERENCES,
    ROW_COLUMNS,
    data_of,
    data_of_fields,
    references_problem,
    row_problem,
)
from fastdpo.losses import WeightedLosses
from fastdpo.models import PositionLimit
from fastdpo.types import DataError

logger = logging.getLogger(__name__)

# How many tokens of "prompt" and "completion" stay; "data": what the first row is; "all_or_none", of streams: which of
# those columns the first row has.
Cuts = dict[str, Any]

# A row's place in a file, in words, for messages; the column is dropped.
PLACE = "place of the row"

# The columns of a tokenized data set, whatever its rows are.
KEPT = tuple(
    dict.fromkeys(
        name
        for data in ID_COLUMNS
        for name in (*ID_COLUMNS[data], *REFERENCES[data], *ROW_COLUMNS[data], "row_number")
    )
)  # fmt: skip


def all_or_none(columns: Iterable[str]) -> tuple[str, ...]:
    """Columns that every row must have if any row has them: the reference's sums, and KTO's mismatched completions."""
    return (*REFERENCES[data_of_fields(columns)], MISMATCHED, REF_MISMATCHED)


def check_kind(dataset: Any, name: str) -> None:
    """That a data set, if any, is a table, a stream or a list of rows; `name` is what the message calls it.

    Raises:
        TypeError: it is something else: several data sets under names, a path.
    """
    if dataset is None or isinstance(dataset, list | Dataset | IterableDataset):
        return
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping) and dataset:
        raise TypeError(
            f"{name} is {kind} with {', '.join(map(str, dataset))}, and one data set is wanted; pass one of them, as "
            f"data[{next(iter(dataset))!r}]."
        )
    raise TypeError(
        f"{name} is {kind}; it must be a datasets.Dataset, a datasets.IterableDataset or a list of rows, as "
        "datasets.load_dataset('json', data_files=..., split='train') makes one."
    )


def prepare_dataset(dataset: Any, tokenizer: Any, args: Any, *, name: str) -> Any:
    """Token ids of every row. `name` says in messages which data set it is.

    Raises:
        DataError: a row that cannot be used, or no row left.
    """
    cuts = {"prompt": args.max_prompt_length, "completion": args.max_completion_length}
    if isinstance(dataset, list):
        dataset = _from_list(dataset, tokenizer, name, cuts, progress=not args.disable_tqdm)
    else:
        dataset = _from_dataset(dataset, tokenizer, name, cuts, args.dataset_num_proc)
    if isinstance(dataset, Dataset):
        check_columns(dataset, name, *all_or_none(dataset.column_names))
    if args.max_length is None or args.truncation_mode != "keep_start":
        return dataset
    # Plain values, not `args`: the fingerprint of the data set's file in datasets' cache is made from them.
    options: dict[str, Any] = {"fn_kwargs": {"max_length": args.max_length}}
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_leaves_a_completion, input_columns=["prompt_ids"], **options)
    options |= {"input_columns": ["prompt_ids"], "desc": f"checking lengths of {name}"}
    kept = dataset.filter(_leaves_a_completion, **options)
    dropped = len(dataset) - len(kept)
    if dropped:
        logger.warning(
            "%d of %d rows of the %s data set are left out: their prompt alone fills max_length=%d.",
            dropped, len(dataset), name, args.max_length,
        )  # fmt: skip
    if not len(kept):
        raise no_row_left(name, args)
    return kept


def _leaves_a_completion(prompt_ids: Sequence[int], max_length: int) -> bool:
    """keep_start would leave nothing of the completions of a row whose prompt fills max_length."""
    return len(prompt_ids) < max_length


class NoRowLeft(DataError):
    """Every prompt of a data set fills max_length."""


def no_row_left(name: str, args: Any) -> NoRowLeft:
    return NoRowLeft(
        f"no row of the {name} data set is left: every prompt fills max_length={args.max_length}; raise max_length or "
        "set truncation_mode='keep_end'."
    )


def check_data(dataset: Any, losses: WeightedLosses, *, name: str) -> None:
    """That a prepared data set, or None, is of rows that the losses are a function of.

    Raises:
        DataError: it is not; or its references cannot be those of `ld_alpha`.
    """
    if dataset is None:
        return
    columns = columns_of(dataset)
    data = data_of_fields(columns)
    if data != losses.data:
        raise DataError(
            f"the {name} data set holds {data}, and loss_type {losses.names} is a loss of {losses.data}; choose a loss "
            f"of {data} (fastdpo.list_losses() has them)."
        )
    given = [column for column in REFERENCES[data] if column in columns]
    if losses.reference_free and given:
        raise DataError(
            f"the {name} data set has {', '.join(given)}, and reference_free=True takes them as 0; drop one of the two."
        )
    if "pair_weight" in columns and not losses.per_pair:
        raise DataError(
            f"the {name} data set has pair_weight, and loss_type {losses.names} compares the pairs of a whole batch; "
            "leave one of them out."
        )
    if losses.ld_alpha is not None and given:
        raise DataError(
            f"the {name} data set has {', '.join(given)}, sums over all tokens alike, and "
            f"ld_alpha={losses.ld_alpha} weighs tokens; drop the columns and set ref_logps to a cache, which keeps "
            "every token."
        )


def check_weights(dataset: Any, *, name: str) -> None:
    """That some row of a table weighs something.

    Raises:
        DataError: none does.
    """
    if not isinstance(dataset, Dataset) or "pair_weight" not in dataset.column_names:
        return
    largest, unweighted = 0.0, 0
    for table in dataset.select_columns(["pair_weight"]).with_format("arrow").iter(_TABLE_ROWS):
        largest = max(largest, pc.max(table["pair_weight"]).as_py() or 0.0)
        unweighted += table["pair_weight"].null_count
    if len(dataset) and not unweighted and largest < _LEAST_WEIGHT:
        raise DataError(
            f"no row of the {name} data set weighs anything: pair_weight is 0 in all {len(dataset)} rows"
            + (f", or next to it (up to {largest:g})" if largest else "")
            + "; set weights above 0, or drop the column."
        )


_TABLE_ROWS = 10_000  # looked at together
_LEAST_WEIGHT = 1e-20  # of the heaviest row: sums of less are lost in float32


def within_vocabulary(dataset: Any, sizes: Mapping[str, int], *, name: str) -> Any:
    """The data set, whose token ids all have embeddings; a stream's are looked at as its rows come.

    Args:
        sizes: of each model, named as in messages, how many tokens it has embeddings for.

    Raises:
        DataError: an id beyond them; row, column, id, and the remedy.
    """
    if dataset is None or not sizes:
        return dataset
    whose, size = min(sizes.items(), key=lambda item: item[1])
    if isinstance(dataset, IterableDataset):
        return dataset.map(_row_within, fn_kwargs={"whose": whose, "size": size, "name": name})
    for column in (each for each in _IDS if each in dataset.column_names):
        for first, tokens, rows in _flat_tokens(dataset, column):
            if len(tokens) and (int(tokens.max()) >= size or int(tokens.min()) < 0):
                place = int(((tokens >= size) | (tokens < 0)).argmax())
                number = dataset[first + rows(place)]["row_number"]
                raise _beyond(name, number, column, int(tokens[place]), whose, size)
    return dataset


_IDS = tuple(dict.fromkeys(name for names in (*ID_COLUMNS.values(), (MISMATCHED,)) for name in names))


def _flat_tokens(dataset: Dataset, column: str) -> Iterator[tuple[int, np.ndarray, Any]]:
    """Of so many rows at a time: the number of the first, all their tokens, and of a token's place its row."""
    first = 0
    for table in dataset.select_columns([column]).with_format("arrow").iter(_TABLE_ROWS):
        lists = table[column].combine_chunks()
        bounds = np.cumsum(_lengths(lists).astype(np.int64, copy=False))
        tokens = lists.flatten()
        if column == "completions_ids":
            bounds = np.cumsum(_lengths(tokens))[bounds - 1]
            tokens = tokens.flatten()
        yield first, tokens.to_numpy(zero_copy_only=False), partial(np.searchsorted, bounds, side="right")
        first += len(table)


def _row_within(row: dict[str, Any], whose: str, size: int, name: str) -> dict[str, Any]:
    for column in _IDS:
        ids = row.get(column) or ()
        for part in ids if column == "completions_ids" else [ids]:
            if len(part) and (max(part) >= size or min(part) < 0):
                wrong = next(token for token in part if not 0 <= token < size)
                raise _beyond(name, row["row_number"], column, wrong, whose, size)
    return row


def _beyond(name: str, number: int, column: str, token: int, whose: str, size: int) -> DataError:
    return DataError(
        f"{name} data set, row {number} (counted from 0): {column} hold the token id {token}, and {whose} has "
        f"embeddings for {size} tokens, 0 to {size - 1}; tokenize with the tokenizer of this model, or give the "
        "model the tokens that were added (model.resize_token_embeddings(len(tokenizer)))."
    )


def columns_of(dataset: Any) -> list[str]:
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))  # a streamed data set learns its columns from its first row


def _from_list(rows: list[dict[str, Any]], tokenizer: Any, name: str, cuts: Cuts, progress: bool) -> Dataset:
    """Row by row: a list may mix text, messages and columns of any kind, which a table of rows could not hold."""
    if not rows:
        raise DataError(f"the {name} data set is empty; it needs rows with prompt, chosen and rejected.")
    cuts = {**cuts, "data": data_of(rows[0])}
    with tqdm(rows, desc=f"tokenizing {name}", unit="row", disable=not progress, leave=False) as bar:
        ids = table_of([_tokenized(row, number, tokenizer, name, cuts) for number, row in enumerate(bar)])
    return with_other_columns(ids, rows, KEPT)


# The types of columns whose values need not tell them: of the first rows they may all be empty or None.
_TYPES = {
    **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", MISMATCHED), List(Value("int64"))),
    "completions_ids": List(List(Value("int64"))),
    **dict.fromkeys(("pair_weight", "margin", *REF_COLUMNS, REF_MISMATCHED), Value("float64")),
    "row_number": Value("int64"),
}


def table_of(rows: list[dict[str, Any]]) -> Dataset:
    """A data set with the columns that any row has, None where a row lacks one.

    `Dataset.from_list` takes the columns of the first row for those of all.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    others = Dataset.from_dict({name: values for name, values in columns.items() if name not in _TYPES}).features
    return Dataset.from_dict(columns, Features({name: _TYPES.get(name) or others[name] for name in columns}))


def with_other_columns(ids: Any, rows: Any, kept: Iterable[str]) -> Any:
    """A tokenized data set with what its rows have besides: callbacks look at prompts, messages and the like.

    Of a list, columns that make no table (of mixed types, say) are left out. A stream is returned as it is.
    """
    if isinstance(ids, IterableDataset):
        return ids
    kept = {*kept, *ids.column_names}
    if isinstance(rows, Dataset):
        parts = [rows.select_columns([name for name in rows.column_names if name not in kept])]
    else:
        names = dict.fromkeys(name for row in rows for name in row if name not in kept)
        parts = [part for name in names if (part := _column(name, [row.get(name) for row in rows])) is not None]
    parts = [part for part in parts if part.column_names]
    return concatenate_datasets([ids, *parts], axis=1) if parts else ids


def _column(name: str, values: list[Any]) -> Dataset | None:
    try:
        return Dataset.from_dict({name: values})
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


def features_after(dataset: Dataset, ids: Iterable[str], kept: Iterable[str]) -> Features:
    """The columns of a tokenized data set: `ids`, a row's number, and those of `kept` that it has now.

    datasets would take the types from the first rows that it writes, where prompts may all be empty.
    """
    names = dict.fromkeys([*(name for name in kept if name in dataset.column_names), *ids, "row_number"])
    return Features({name: _TYPES.get(name) or dataset.features[name] for name in names})


def _from_dataset(dataset: Any, tokenizer: Any, name: str, cuts: Cuts, num_proc: int | None) -> Any:
    if isinstance(dataset, Dataset) and not len(dataset):
        raise DataError(f"the {name} data set is empty; it needs rows with prompt, chosen and rejected.")
    columns = columns_of(dataset)
    first = next(iter(dataset))
    cuts = {**cuts, "data": data_of(first)}
    if isinstance(dataset, IterableDataset):  # of which no one can count the rows beforehand
        cuts["all_or_none"] = _given(first, all_or_none(columns))
    options: dict[str, Any] = {
        "fn_kwargs": {"tokenizer": tokenizer, "name": name, "cuts": cuts},
        "with_indices": True,
    }
    if isinstance(dataset, Dataset):
        features = features_after(dataset, ID_COLUMNS[cuts["data"]], KEPT)
        options |= {"num_proc": num_proc, "desc": f"tokenizing {name}", "features": features}
    ids = dataset.map(_tokenized, remove_columns=[column for column in columns if column not in KEPT], **options)
    return with_other_columns(ids, dataset, KEPT)


def _tokenized(row: dict[str, Any], number: int, tokenizer: Any, name: str, cuts: Cuts) -> dict[str, Any]:
    row = {key: value for key, value in row.items() if value is not None}  # tables fill missing fields with None
    number = own_number(row, number)
    where = row.get(PLACE) or f"{name} data set, row {number} (counted from 0)"
    if "image" in row or "images" in row:
        raise DataError(
            f"{where}: it has images, and batches hold tokens only: what a vision model makes of an image depends on "
            "its own processor. Train on text, or take the loss into a loop of your own (fastdpo.loss on the logits)."
        )
    problem = row_problem(row)
    if problem is None and data_of(row) != cuts["data"]:
        problem = f"it is one of {data_of(row)}, and the first row is one of {cuts['data']}; part them."
    if problem is None and "all_or_none" in cuts:
        problem = _difference(_given(row, all_or_none(row)), cuts["all_or_none"])
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    ids = tokenized(row, tokenizer, where)
    if cuts["prompt"] is not None:
        ids["prompt_ids"] = ids["prompt_ids"][-cuts["prompt"] :]
    if cuts["completion"] is not None:
        for column in ID_COLUMNS[data_of(ids)][1:]:
            end = cuts["completion"]
            lists = column == "completions_ids"
            ids[column] = [each[:end] for each in ids[column]] if lists else ids[column][:end]
    if MISMATCHED in row:
        ids[MISMATCHED] = row[MISMATCHED]
    return {**ids, **_references(row, ids, where), "row_number": number}


def own_number(row: dict[str, Any], number: int) -> int:
    """What the row says of itself, of a data set that was prepared or split before; a column of other things is not."""
    own = row.get("row_number")
    if isinstance(own, int | np.integer) and not isinstance(own, bool) and 0 <= own < 1 << 63:
        return int(own)
    return number


def _given(row: dict[str, Any], names: Iterable[str]) -> set[str]:
    return {name for name in names if row.get(name) is not None}


def _difference(own: set[str], first: set[str]) -> str | None:
    for name in sorted(own ^ first):
        has, other = ("has", "has none") if name in own else ("has no", "has one")
        return f"it {has} {name}, and the first row {other}; add it to all rows or drop it from all."
    return None


def _references(row: dict[str, Any], ids: dict[str, Any], where: str) -> dict[str, Any]:
    """The columns of reference log-probs, where the row has them; `ids` are its tokens."""
    data = data_of(row)
    names = (*REFERENCES[data], *([REF_MISMATCHED] if data == "answers" else []))
    given = {name: row[name] for name in names if name in row}
    if len(given) == 1 and data == "pairs":
        raise DataError(f"{where}: it has {next(iter(given))} but not the other of {', '.join(REF_COLUMNS)}; add it.")
    if problem := references_problem({**ids, **given}):
        raise DataError(f"{where}: {problem}")
    return {name: [float(each) for each in value] if data == "lists" else float(value) for name, value in given.items()}


def check_columns(dataset: Dataset, name: str, *columns: str) -> None:
    """That all rows have a value in each of the columns, or none has: a table fills what is missing with None.

    Raises:
        DataError: some rows have it and others not; how many, the first of them, and the remedy.
    """
    for column in (each for each in columns if each in dataset.column_names):
        tables = dataset.select_columns([column]).with_format("arrow").iter(10_000)
        nulls = np.concatenate([table[column].is_null().to_numpy() for table in tables])
        lacking = int(nulls.sum())
        if lacking:
            row = dataset[int(nulls.argmax())]["row_number"]
            raise DataError(
                f"{lacking} of {len(dataset)} rows of the {name} data set have no {column} (the first is row {row}, "
                "counted from 0), and the others have; add it to these rows or drop the column."
            )


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a data set's rows.

    prompt   (rows,)
    answers  (S,) of each answer, row by row
    counts   (rows,) answers of each row
    """

    prompt: np.ndarray
    answers: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> TokenCounts:
        names = ID_COLUMNS[data_of_fields(dataset.column_names)]
        names = (*names, MISMATCHED) if MISMATCHED in dataset.column_names else names
        prompts, answers, counts = [], [], []
        for table in dataset.select_columns(list(names)).with_format("arrow").iter(batch_size=10_000):
            prompts.append(_lengths(table["prompt_ids"]))
            if "completions_ids" in names:
                counts.append(_lengths(table["completions_ids"]))
                answers.append(_lengths(table["completions_ids"].combine_chunks().flatten()))
            else:
                counts.append(np.full(len(table), len(names) - 1))
                answers.append(np.stack([_lengths(table[name]) for name in names[1:]], axis=1).reshape(-1))
        return cls(*(np.concatenate(parts).astype(np.int64) for parts in (prompts, answers, counts)))

    def cut(self, max_length: int | None) -> TokenCounts:
        """What is left at `max_length`."""
        if max_length is None:
            return self
        prompt = np.minimum(self.prompt, max_length)
        return replace(self, prompt=prompt, answers=np.minimum(self.answers, max_length - self._of_rows(prompt)))

    def _of_rows(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values, self.counts)

    @property
    def answer_total(self) -> np.ndarray:
        """(rows,) of all answers of a row."""
        return np.add.reduceat(self.answers, self._starts)

    @property
    def longest(self) -> np.ndarray:
        """(rows,) of the prompt with the longest answer."""
        return self.prompt + np.maximum.reduceat(self.answers, self._starts)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum(self.counts) - self.counts

    def differs(self, other: TokenCounts) -> np.ndarray:
        """(rows,) bool."""
        answers = np.logical_or.reduceat(self.answers != other.answers, self._starts)
        return (self.prompt != other.prompt) | answers


def _lengths(lists: Any) -> np.ndarray:
    return np.asarray(pc.list_value_length(lists).to_numpy(zero_copy_only=False))


def check_lengths(dataset: Any, limit: PositionLimit | None, args: Any, *, name: str) -> None:
    """Says before anything runs how many rows do not fit, and how: cut, running alone, or refused.

    Raises:
        DataError: sequences that the model has no positions for; how many rows, the longest of them, and the remedy.
    """
    if not isinstance(dataset, Dataset):
        return
    whole = TokenCounts.of(dataset)
    counts = whole.cut(args.max_length)
    cut = int(whole.differs(counts).sum())
    if cut:
        logger.warning(
            "%d of %d rows of the %s data set are longer than max_length=%d and are cut (truncation_mode=%r).",
            cut, len(dataset), name, args.max_length, args.truncation_mode,
        )  # fmt: skip
    budget = args.max_tokens_per_microbatch
    tokens = counts.prompt + counts.answer_total
    if budget is not None and (alone := int((tokens > budget).sum())):
        logger.warning(
            "%d of %d rows of the %s data set run alone: they take more tokens (up to %d) than "
            "max_tokens_per_microbatch=%d.",
            alone, len(dataset), name, tokens.max(), budget,
        )  # fmt: skip
    longest = counts.longest
    too_long = 0 if limit is None else int((longest > limit.tokens).sum())
    if limit is not None and too_long:
        row = int(longest.argmax())
        number = dataset[row].get("row_number", row)
        raise DataError(
            f"{too_long} of {len(longest)} rows of the {name} data set do not fit: the model has {limit.why}, and the "
            f"longest row, number {number} (counted from 0), has {longest[row]} tokens; set "
            f"max_length={limit.tokens} to cut them, or leave them out."
        )
