"""One Parquet file of a reference cache: how it is written, and how every kind of damage to it is found.

Its metadata hold a header, JSON that says what the manifest of its folder says and the digest of the index columns, and
the digest of the header. Pages carry checksums. What neither covers, log-probs must agree with their sums and counts.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastdpo.reference.folder import Kind
from fastdpo.reference.index import KEY_BYTES, ShardIndex
from fastdpo.types import UserError

GROUP_ROWS = 4096  # rows of a shard that are read together; part of the format
ABOVE_ZERO = 1e-3  # rounding lifts a log-prob no further
_HEADER, _DIGEST = b"fastdpo.header", b"fastdpo.digest"


class DamagedShard(Exception):
    """What is wrong with a shard, in a few words."""


class ForeignShard(UserError):
    """A sound shard that belongs in another folder."""

    def __init__(self, shard: Path, differences: list[str]) -> None:
        self.reason = f"it is of another cache ({'; '.join(differences)}): move it out of the folder"
        super().__init__(f"{shard} cannot be used: {self.reason}.")


def shard_name() -> str:
    return f"shard-{time.time_ns():020d}-{secrets.token_hex(4)}.parquet"


def write_shard(
    file: BinaryIO,
    kind: Kind,
    keys: np.ndarray,
    tokens: np.ndarray,
    sums: np.ndarray,
    groups: Iterable[np.ndarray] | None = None,
) -> None:
    """Writes keys (n, 16) uint8, tokens (n,), sums (n,), and, where they are kept, log-probs.

    Args:
        groups: the float32 log-probs of each GROUP_ROWS rows, row after row; one group at a time is in memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    header = json.dumps({**kind.as_dict(), "digest": _digest(keys, tokens, sums)}, sort_keys=True).encode()
    columns = {"key": pa.binary(KEY_BYTES), "tokens": pa.int32(), "sum": pa.float64()}
    if kind.per_token:
        columns["logps"] = pa.list_(pa.float32())
    schema = pa.schema(columns, metadata={_HEADER: header, _DIGEST: _hash(header)})
    # Hashes and log-probs do not compress.
    options = {"write_page_checksum": True, "write_statistics": False, "use_dictionary": False, "compression": "none"}
    flats = iter(groups or ())
    with pq.ParquetWriter(file, schema, **options) as writer:
        for start in range(0, len(keys), GROUP_ROWS):
            rows = slice(start, start + GROUP_ROWS)
            key = np.ascontiguousarray(keys[rows])
            arrays = [
                pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(key), [None, pa.py_buffer(key)]),
                pa.array(tokens[rows], pa.int32()),
                pa.array(sums[rows], pa.float64()),
            ]
            if kind.per_token:
                ends = pa.array(np.append(0, np.cumsum(tokens[rows])), pa.int32())
                arrays.append(pa.ListArray.from_arrays(ends, pa.array(next(flats))))
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=GROUP_ROWS)


def group_tokens(tokens: np.ndarray) -> np.ndarray:
    """The number of log-probs of each GROUP_ROWS rows."""
    return np.add.reduceat(tokens, np.arange(0, len(tokens), GROUP_ROWS), dtype=np.int64)


def row_sums(flat: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The sum (n,) float64 of each row's log-probs, summed in float64."""
    sums = np.zeros(len(tokens))
    held = np.flatnonzero(tokens)  # reduceat gives an empty row the value of the next
    if len(held):
        starts = np.cumsum(tokens) - tokens
        sums[held] = np.add.reduceat(flat, starts[held], dtype=np.float64)
    return sums


def read_kind(shard: Path) -> Kind:
    """What the header says."""
    with _opened(shard) as file:
        return _header(file)[0]


def read_index_columns(shard: Path, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (n, 16) uint8, tokens (n,) int32, sums (n,) float64.

    Raises:
        ForeignShard: the shard is not of this kind.
        FileNotFoundError, UserError, DamagedShard: as `_opened`.
    """
    with _opened(shard) as file:
        own, digest = _header(file)
        differences = kind.differences(own)
        if differences:
            raise ForeignShard(shard, differences)
        keys, tokens, sums = _fixed_columns(file.read(columns=["key", "tokens", "sum"], use_threads=False))
        # Page checksums cover neither the pages' headers nor the file's footer.
        if digest != _digest(keys, tokens, sums):
            raise ValueError("the digest does not match")
    return keys, tokens, sums


def read_index(shards: Iterable[Path], kind: Kind) -> tuple[ShardIndex, dict[str, str]]:
    """The index of those shards that can be read, and what is wrong with the others, by name."""
    unreadable = {}

    def columns() -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
        for shard in shards:
            try:
                yield shard.name, *read_index_columns(shard, kind)
            except FileNotFoundError:
                continue  # another process has just put it into a larger one
            except (DamagedShard, UserError) as error:
                unreadable[shard.name] = reason(error)

    index = ShardIndex()
    index.add(columns())
    return index, unreadable


def reason(error: DamagedShard | UserError) -> str:
    """What is wrong with a shard that is named beside it."""
    return error.reason if isinstance(error, ForeignShard) else str(error)


def read_group(shard: Path, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The log-probs of a row group, row after row, and where each row ends in them."""
    import pyarrow as pa

    with _opened(shard) as file:
        table = file.read_row_group(group, use_threads=False)
        _, tokens, sums = _fixed_columns(table)
        if len(tokens) != min(GROUP_ROWS, file.metadata.num_rows - group * GROUP_ROWS):
            raise ValueError("rows are missing")
        lists = table.column("logps").combine_chunks()
        if lists.type != pa.list_(pa.float32()) or lists.null_count or lists.values.null_count:
            raise ValueError("logps are of another type")
        flat, lengths = lists.flatten().to_numpy(), np.diff(lists.offsets.to_numpy())
        if not np.array_equal(lengths, tokens) or not np.allclose(row_sums(flat, lengths), sums, equal_nan=True):
            raise ValueError("logps do not match their sums")
    return flat, np.cumsum(tokens, dtype=np.int64)


def check_values(shard: Path, kind: Kind, sums: np.ndarray) -> None:
    """Reads the rest of a shard whose index columns were read.

    Raises:
        DamagedShard: what `read_group` finds, or a value that no log-prob can have.
    """
    wrong = impossible(sums)
    for group in range(-(-len(sums) // GROUP_ROWS)) if kind.per_token else ():
        flat, ends = read_group(shard, group)
        found = impossible(flat)
        if found and not wrong:
            row = group * GROUP_ROWS + int(ends.searchsorted(found[0], side="right"))
            wrong = row, found[1]
    if wrong:
        raise DamagedShard(f"row {wrong[0]} holds {wrong[1]}")


def impossible(logps: np.ndarray) -> tuple[int, str] | None:
    """Place and name of the first value that is NaN or above zero."""
    wrong = np.flatnonzero(~(logps <= ABOVE_ZERO))
    return (int(wrong[0]), f"a log-prob of {logps[wrong[0]]:g}") if len(wrong) else None


def _hash(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _digest(keys: np.ndarray, tokens: np.ndarray, sums: np.ndarray) -> str:
    columns = ((keys, "u1"), (tokens, "<i4"), (sums, "<f8"))
    return _hash(*(np.ascontiguousarray(column, dtype=dtype).data for column, dtype in columns))


def _header(file: Any) -> tuple[Kind, str]:
    """What the header says of the shard's kind, and the digest of its index columns."""
    metadata = file.schema_arrow.metadata or {}
    header = metadata.get(_HEADER)
    if header is None:
        return Kind(True, {}, _older_format(file, metadata)), ""
    if metadata.get(_DIGEST) != _hash(header).encode():
        raise ValueError("the header does not match its digest")
    values = json.loads(header)
    return Kind.from_dict(values), values["digest"]


def _older_format(file: Any, metadata: dict[bytes, bytes]) -> int:
    """The format of a shard without a header, which is damaged unless it is of format 1 or 2."""
    if file.schema_arrow.names == ["key", "logps"]:
        return 1
    columns = _fixed_columns(file.read(columns=["key", "tokens", "sum"], use_threads=False))
    if metadata.get(_DIGEST) != _digest(*columns).encode():
        raise ValueError("it has no header")
    return 2


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """The shard as a ParquetFile.

    Raises:
        FileNotFoundError: there is no such shard.
        UserError: it may not be opened, which is no damage.
        DamagedShard: in place of what reading it raises.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pa.OSFile(str(shard))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{shard} cannot be opened ({error.strerror or error}); check its permissions.") from error
    with file:
        try:
            yield pq.ParquetFile(file, page_checksum_verification=True)
        except UserError:
            raise
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DamagedShard((str(error) or type(error).__name__).splitlines()[0]) from error


def _fixed_columns(table: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The columns of the index, as arrays that share the table's memory."""
    import pyarrow as pa

    columns = [table.column(name).combine_chunks() for name in ("key", "tokens", "sum")]
    for column, wanted in zip(columns, (pa.binary(KEY_BYTES), pa.int32(), pa.float64()), strict=True):
        if column.type != wanted or column.null_count or not len(column):
            raise ValueError(f"a column holds {column.type}, not {wanted}")
    key, tokens, sums = columns
    keys = np.frombuffer(key.buffers()[1], np.uint8, len(key) * KEY_BYTES, key.offset * KEY_BYTES)
    return keys.reshape(-1, KEY_BYTES), tokens.to_numpy(), sums.to_numpy()
