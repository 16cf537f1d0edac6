"""Rows of preference data, each with the place it came from: from files, folders, pipes and the hub."""

from __future__ import annotations

import glob
import gzip
import json
import os
import stat
import sys
import textwrap
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import IO, Any

from fastdpo.data.validate import (
    ID_COLUMNS,
    LARGEST_ID,
    LARGEST_WEIGHT,
    SIDES,
    TEXT_COLUMNS,
    TOKENIZED,
    bad_rows,
    data_of_fields,
    is_tokenized,
    row_problem,
)
from fastdpo.types import DataError

LONGEST_LINE = 1 << 28  # bytes; more is no row, and would fill the memory
SUPPORTED = ".jsonl, .jsonl.gz, .json or .parquet"
_IN_FOLDERS = (".jsonl", ".jsonl.gz", ".parquet")  # .json: there it is mostly a description of the data
_OF_FILES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".gz", ".ndjson", ".tsv", ".txt", ".zip")
_HUB_FORMATS = ("json", "parquet", "arrow")  # what reading neither unpickles nor runs
_BATCH_ROWS = 256  # of a table at a time
_STDIN = "standard input"
_DAMAGED = "the file is damaged; write or download it again"
_NOT_AS_SAVED = "the folder is not as save_to_disk wrote it; save it again"

Row = dict[str, Any]
Placed = tuple[str, Row]  # the place for messages: "FILE, row 3", with the line where it is another number


@dataclass
class RowSource:
    """Rows of one data set, read as they are asked for; only of a .json file all are held in memory.

    name     as it was given, for messages
    length   rows; None where that is not known before all are read (`check` finds it)
    stream   read as it arrives and so not checked beforehand: a pipe, which is read once, or a streamed hub data set
    """

    name: str
    parts: Sequence[_Part]
    length: int | None = None
    stream: bool = False

    def __iter__(self) -> Iterator[Placed]:
        """Place and row, fields of a table that are None left out.

        Raises:
            DataError: at the first row that cannot be used; where there are no rows; where a pipe is read again.
        """
        for place, row in self.unchecked():
            if problem := row_problem(row):
                raise DataError(f"{place}: {problem}")
            yield place, row

    def unchecked(self) -> Iterator[Placed]:
        """The same without a look at what the rows hold, for those who want all of them and `validate_rows`."""
        empty = True
        for part in self.parts:
            for placed in part.rows():
                empty = False
                yield placed
        if empty:
            raise self._no_rows()

    @property
    def once(self) -> bool:
        """Whether the rows are gone when they have been read: those of a pipe."""
        return any(isinstance(part, _Pipe) for part in self.parts)

    def check(self) -> int | None:
        """Reads a source that is no stream through once; the number of its rows, and None of a stream.

        Raises:
            DataError: the first row that cannot be used, and how many more there are.
        """
        if self.stream:
            return None
        rows, more, first = 0, 0, ""
        try:
            for part in self.parts:
                for place, problem in part.problems():
                    rows += 1
                    if problem is not None:
                        more += bool(first)
                        first = first or f"{place}: {problem}"
        except DataError:  # nothing can be read from there on
            if not first:
                raise
            more += 1
        if first:
            raise bad_rows(first, more)
        if not rows:
            raise self._no_rows()
        self.length = rows
        return rows

    def _no_rows(self) -> DataError:
        rows = "rows" if self.length == 0 else "one JSON object a line"
        return DataError(f"{self.name} holds no rows; it needs {rows} with prompt, chosen and rejected.")


def open_rows(dataset: str | Path, *, split: str | None = None, streaming: bool = False) -> RowSource:
    """What `dataset` names; of files, little more than their names is looked at here.

    - a .jsonl or .jsonl.gz file (one JSON object a line, empty lines skipped; also a file without a suffix), a .json
      file (an array of objects), a .parquet file;
    - a folder of .jsonl, .jsonl.gz and .parquet files, or a pattern (`data/*.parquet`), read in the order of the names;
    - a folder that `save_to_disk` of a `datasets.Dataset` wrote, or of a `DatasetDict`, of which `split` is read;
    - `-`, standard input, or a named pipe: JSON lines, read once;
    - owner/name, where no such path exists: `split` of a data set of the hub, with `streaming` not downloaded first.

    `split` is "train" where it is not given; what has no splits refuses one. `streaming` changes nothing for what is
    here already: it is read piece by piece anyway. Nothing is unpickled, and no code that comes with the data is run.

    Raises:
        DataError: nothing there that could be read, and what to do.
    """
    name = os.fspath(dataset)
    mode = None if name == "-" else _mode(name)
    if mode is None and is_hub_name(name):
        return _hub(name, split or "train", streaming)
    if mode is not None and os.path.isfile(os.path.join(name, "dataset_dict.json")):
        return _of_parts(name, [_saved(_split_folder(name, split or "train"))])
    if split is not None:
        raise DataError(f"{name} has no splits to take {split!r} from; leave the split out, or name the file of it.")
    if name == "-":
        return RowSource(_STDIN, [_Pipe(_STDIN, lambda: nullcontext(sys.stdin.buffer))], stream=True)
    if mode is None:
        return _of_parts(name, [_file(path) for path in _matches(name)])
    if stat.S_ISDIR(mode):
        is_saved = os.path.isfile(os.path.join(name, "state.json"))
        return _of_parts(name, [_saved(name)] if is_saved else [_file(path) for path in _files_in(name)])
    if stat.S_ISREG(mode):
        return _of_parts(name, [_file(name)])
    return RowSource(name, [_Pipe(name, lambda: open(name, "rb"))], stream=True)


def read_rows(path: str | Path) -> tuple[list[Row], list[str]]:
    """All rows that `open_rows` finds there, not yet checked.

    Returns the rows and, for messages, where each stands: "FILE, row 3", with the line where it is another number.

    Raises:
        DataError: no such file, a line that is no JSON object, no rows at all; names file and line.
    """
    rows: list[Row] = []
    places: list[str] = []
    for place, row in open_rows(path).unchecked():
        rows.append(row)
        places.append(place)
    return rows, places


# What there is under a name


def _mode(path: str) -> int | None:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from None


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def is_hub_name(name: str) -> bool:
    """Of a data set or a model: owner/name. A path that was mistyped should not be asked for over the network."""
    owner, _, rest = name.partition("/")
    if not owner or not rest or "/" in rest or owner[0] in ".~" or _is_pattern(name):
        return False
    return not rest.lower().endswith(_OF_FILES)


def _matches(name: str) -> list[str]:
    if not _is_pattern(name):
        raise DataError(f"{name}: there is no such file; check the path given as the data set.")
    paths = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
    if not paths:
        raise DataError(f"{name}: no file matches this pattern; check the path given as the data set.")
    return paths


def _files_in(folder: str) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise _unreadable(folder, error) from None
    wanted = [name for name in names if name.lower().endswith(_IN_FOLDERS) and not name.startswith(".")]
    paths = [path for path in (os.path.join(folder, name) for name in wanted) if os.path.isfile(path)]
    if not paths:
        found = textwrap.shorten(", ".join(names) or "nothing", 200)
        raise DataError(
            f"{folder} is a folder without data files (found: {found}); give a {SUPPORTED} file, a folder of .jsonl or "
            ".parquet files, or one that save_to_disk wrote."
        )
    return paths


def _file(path: str) -> _Part:
    name = os.path.basename(path).lower()
    if name.endswith(".parquet"):
        return _parquet(path)
    if name.endswith(".json"):
        return _JsonArray(path)
    if name.endswith(".jsonl.gz"):
        return _JsonLines(path, lambda: gzip.open(path, "rb"))
    if name.endswith(".jsonl") or not Path(name).suffix:
        return _JsonLines(path, lambda: open(path, "rb"))
    raise DataError(f"{path}: files of this kind cannot be read; give a {SUPPORTED} file.")


def _of_parts(name: str, parts: Sequence[_Part]) -> RowSource:
    lengths = [part.length for part in parts]
    return RowSource(name, parts, None if None in lengths else sum(filter(None, lengths)))


# Kinds of parts


class _Part(ABC):
    """Rows of one file or table; they can be read several times but for those of a pipe."""

    length: int | None = None

    @abstractmethod
    def rows(self) -> Iterator[Placed]:
        """Not yet checked."""

    def problems(self) -> Iterator[tuple[str, str | None]]:
        """Place and `row_problem` of every row; where there is none, the place may be that of the file."""
        for place, row in self.rows():
            yield place, row_problem(row)


class _JsonLines(_Part):
    def __init__(self, name: str, open_file: Callable[[], AbstractContextManager[Any]]) -> None:
        self.name, self.open_file = name, open_file

    def rows(self) -> Iterator[Placed]:
        number = 0
        try:
            with self.open_file() as file:
                for line_number, line in enumerate(_lines(file), start=1):
                    at_line = "" if number + 1 == line_number else f" (line {line_number})"
                    place = f"{self.name}, row {number + 1}{at_line}"
                    row = _row_of_line(line, place, first=line_number == 1)
                    if row is not None:
                        number += 1
                        yield place, row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.name}, after row {number}: the gzip file is damaged or cut short ({_reason(error)}); "
                "copy or compress it again."
            ) from None
        except OSError as error:
            raise _unreadable(self.name, error) from None


class _Pipe(_JsonLines):
    read = False

    def rows(self) -> Iterator[Placed]:
        if self.read:
            raise DataError(
                f"{self.name} is a stream and can be read once only; write its rows to a file and give that."
            )
        self.read = True
        yield from super().rows()


class _JsonArray(_Part):
    def __init__(self, path: str) -> None:
        self.path = path

    def rows(self) -> Iterator[Placed]:
        for number, row in enumerate(self._array(), start=1):
            yield f"{self.path}, row {number}", row

    def _array(self) -> list[Row]:
        try:
            text = Path(self.path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
        except OSError as error:
            raise _unreadable(self.path, error) from None
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            raise DataError(f"{self.path}, line {line}: this is no JSON ({_no_json(text, error)}); a .json "
                            "file must hold one array of objects.") from None  # fmt: skip
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(
                f"{self.path}: a .json file must hold one array of objects; use .jsonl for one object a line."
            )
        return rows


class _Table(_Part):
    """read: the `pyarrow.Table`s of one pass, `_BATCH_ROWS` rows each."""

    def __init__(self, name: str, columns: Sequence[str], length: int, read: Callable[[], Iterator[Any]]) -> None:
        self.name, self.length, self.read = name, length, read
        fields = dict.fromkeys(columns)
        data = data_of_fields(fields)
        wanted = ID_COLUMNS[data] if is_tokenized(fields) else TEXT_COLUMNS[data]
        missing = [column for column in wanted if column not in columns]
        if missing and not set(SIDES) <= set(columns):
            raise DataError(
                f"{name} has no column {missing[0]!r} (its columns: {', '.join(columns) or 'none'}); name the columns "
                f"prompt, {' and '.join(SIDES)}, or those of token ids {', '.join(TOKENIZED)}."
            )

    def rows(self) -> Iterator[Placed]:
        for first, table in self._tables():
            yield from self._placed(first, table)

    def problems(self) -> Iterator[tuple[str, str | None]]:
        for first, table in self._tables():
            if _are_good_ids(table):
                yield from repeat((self.name, None), len(table))
            else:
                yield from ((place, row_problem(row)) for place, row in self._placed(first, table))

    def _tables(self) -> Iterator[tuple[int, Any]]:
        """Each with the number of its first row."""
        first, tables = 1, self.read()
        while True:
            with self._naming(first):
                table = next(tables, None)
            if table is None:
                return
            yield first, table
            first += len(table)

    def _placed(self, first: int, table: Any) -> Iterator[Placed]:
        with self._naming(first):
            rows = _decoded(table)
        for number, row in enumerate(rows, start=first):
            yield f"{self.name}, row {number}", _without_none(row)

    def _naming(self, first: int) -> AbstractContextManager[None]:
        return _as_data_error(f"{self.name} cannot be read from row {first} on", _DAMAGED)


class _HubStream(_Part):
    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.dataset = name, dataset

    def rows(self) -> Iterator[Placed]:
        with _as_data_error(f"{self.name} cannot be read on", "try again, or download it first (without streaming)"):
            for number, row in enumerate(self.dataset, start=1):
                yield f"{self.name}, row {number}", _without_none(row)


def _parquet(path: str) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read() -> Iterator[Any]:
        # Without these two options a whole row group is held in memory, which may be the whole file.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                yield pa.Table.from_batches([batch])

    try:
        with open(path, "rb"):  # whose error says more than pyarrow's
            pass
    except OSError as error:
        raise _unreadable(path, error) from None
    with _as_data_error(f"{path} cannot be read", _DAMAGED), pq.ParquetFile(path) as file:
        columns, length = file.schema_arrow.names, file.metadata.num_rows
    return _Table(path, columns, length, read)


def _saved(folder: str) -> _Table:
    from datasets import load_from_disk

    with _as_data_error(f"{folder} cannot be read", _NOT_AS_SAVED):
        return _of_dataset(folder, load_from_disk(folder))


def _split_folder(folder: str, split: str) -> str:
    with _as_data_error(f"{folder} cannot be read", _NOT_AS_SAVED):
        splits = json.loads(Path(folder, "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}: give one, or its folder.")
    return os.path.join(folder, split)


def _of_dataset(name: str, dataset: Any) -> _Table:
    tables = dataset.with_format("arrow")
    return _Table(name, dataset.column_names, len(dataset), lambda: tables.iter(_BATCH_ROWS))


def _hub(name: str, split: str, streaming: bool) -> RowSource:
    import datasets

    remedy = "check the name, the split and the connection, or give a file"
    with _as_data_error(f"{name}: there is no such file, and no such data set could be had from the hub", remedy):
        builder = datasets.load_dataset_builder(name)
        if builder.name not in _HUB_FORMATS:
            raise DataError(
                f"{name} is kept on the hub as {builder.name}; only {', '.join(_HUB_FORMATS)} are read: write its rows "
                f"to a {SUPPORTED} file."
            )
        if streaming:
            return RowSource(name, [_HubStream(name, builder.as_streaming_dataset(split=split))], stream=True)
        builder.download_and_prepare()
        return _of_parts(name, [_of_dataset(name, builder.as_dataset(split=split))])


# Lines and tables into rows


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Pieces of a line that is too long are `LONGEST_LINE` bytes long, and one more."""
    return iter(lambda: file.readline(LONGEST_LINE + 1), b"")


def _row_of_line(line: bytes, place: str, first: bool) -> Row | None:
    """None: the line is empty. The first may begin with a byte order mark."""
    if len(line) > LONGEST_LINE:
        raise DataError(
            f"{place}: the line is longer than {LONGEST_LINE} bytes; each line must be one JSON object (an array of "
            "all rows belongs in a .json file)."
        )
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: this is not UTF-8 text (byte {error.start + 1} of the line); save the file as UTF-8."
        ) from None
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: this is no JSON ({_no_json(text, error)}); each line must be one JSON object."
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: this is a JSON {type(row).__name__}; each line must be an object "
            '{"prompt": ..., "chosen": ..., "rejected": ...}.'
        )
    return row


def _no_json(text: str, error: Exception) -> str:
    if text.startswith("\ufeff"):
        return "it begins with a byte order mark too many, which must go"
    if "\0" in text:
        return "it holds NUL bytes: the file is damaged, or UTF-16 and not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return _reason(error)


def _without_none(row: Row) -> Row:
    """Tables fill missing fields with None."""
    return {name: value for name, value in row.items() if value is not None}


def _decoded(table: Any) -> list[Row]:
    """Values as they were put in: `datasets` keeps what fits no column type as JSON text."""
    rows = table.to_pylist()
    if any("extension<arrow.json>" in str(field.type) for field in table.schema):
        from datasets import Features

        features = Features.from_arrow_schema(table.schema)
        return [features.decode_example(row) for row in rows]
    return rows


def _are_good_ids(table: Any) -> bool:
    """Whether `row_problem` finds none in any row, seen without a Python object a token. False: it has to be asked."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if any(table.column_names.count(name) != 1 for name in TOKENIZED):
        return False
    prompt, chosen, rejected = (table[name].combine_chunks() for name in TOKENIZED)
    for ids in (prompt, chosen, rejected):
        is_list = pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type)
        if not is_list or not pa.types.is_integer(ids.type.value_type) or ids.null_count:
            return False
        tokens = ids.flatten()
        if tokens.null_count or (
            len(tokens) and not 0 <= pc.min(tokens).as_py() <= pc.max(tokens).as_py() <= LARGEST_ID
        ):
            return False
    if "pair_weight" in table.column_names and not _are_good_weights(table["pair_weight"]):
        return False
    lengths = [pc.list_value_length(ids).to_numpy() for ids in (chosen, rejected)]
    if chosen.type != rejected.type or not np.min(lengths, initial=1):
        return False
    return not any(chosen[int(i)].equals(rejected[int(i)]) for i in np.flatnonzero(lengths[0] == lengths[1]))


def _are_good_weights(weights: Any) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_floating(weights.type) or pa.types.is_integer(weights.type)):
        return False
    good = pc.and_(pc.greater_equal(weights, 0), pc.less_equal(weights, LARGEST_WEIGHT))  # neither for NaN
    return pc.all(good).as_py() is not False


# What is raised


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror or _reason(error)}); check its permissions.")


@contextmanager
def _as_data_error(what: str, remedy: str) -> Iterator[None]:
    """For what pyarrow, datasets and the network raise, which is of any class."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({_reason(error)}); {remedy}.") from error


def _reason(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300) or type(error).__name__
