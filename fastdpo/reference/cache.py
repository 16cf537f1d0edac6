"""A folder of reference log-probs, keyed by content.

    manifest.json                   format version, what is kept, and the fingerprint of the model of all values
    shard-<time>-<random>.parquet   one row a sequence: key (16 bytes), tokens (int32), sum (float64) and, unless only
                                    sums are kept, logps (float32 of each completion token)

A shard is written under a temporary name, flushed to disk, then renamed: it is there whole or not at all. Nobody ever
writes to a finished shard, so several processes may add shards at once. The first three columns are read into an index
in memory; log-probs stay on disk until they are asked for. Pages carry checksums, the index columns a digest; a shard
that is damaged is named, set aside as <name>.damaged, and what it held is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastdpo.reference.index import KEY_BYTES, ShardIndex, key_array
from fastdpo.types import UserError

FORMAT = 2
MANIFEST = "manifest.json"
GROUP_ROWS = 4096  # rows of a shard that are read together
OPEN_BYTES = 64 << 20  # log-probs kept in memory after they were read


def user_cache_dir() -> Path:
    """$FASTDPO_CACHE, or fastdpo under $XDG_CACHE_HOME (~/.cache)."""
    given = os.environ.get("FASTDPO_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastdpo"


def default_cache_dir(fingerprint: Mapping[str, str]) -> Path:
    """The folder, in the user's cache, of the reference with this fingerprint, in this format."""
    return (
        user_cache_dir()
        / f"reference-{FORMAT}"
        / "-".join(fingerprint[part] for part in ("weights", "config", "dtype"))
    )


class ReferenceCache:
    """Log-probs by sequence key: sums from an index in memory, per-token values from disk.

    Args:
        path: the folder; made when the first values are added.
        fingerprint: of the model the values are for (`model_fingerprint`). Without it, the folder must exist, and the
            fingerprint is taken from its manifest.
        per_token: whether values of each token are needed beside the sums. A new folder keeps them unless this is
            False. A folder that exists decides for itself; True is refused where it keeps sums only.

    Raises:
        UserError: the folder belongs to another model, dtype or format, or is no cache, or cannot be used.
    """

    def __init__(
        self, path: str | Path, fingerprint: Mapping[str, str] | None = None, *, per_token: bool | None = None
    ) -> None:
        self.path = Path(path)
        self._index = ShardIndex()
        self._seen: set[str] = set()
        self._groups: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._group_bytes = 0
        manifest = self._manifest()
        if manifest is None:
            if fingerprint is None:
                raise UserError(f"{self.path} is no reference cache: it has no {MANIFEST}.")
            self.fingerprint = dict(fingerprint)
            self.per_token = per_token is not False
        else:
            self.fingerprint = dict(manifest["fingerprint"])
            self._check_fingerprint(fingerprint)
            self.per_token = manifest["per_token"]
            if per_token and not self.per_token:
                raise self._sums_only()
        self.reload()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return self._index.has(key)

    def __getitem__(self, key: bytes) -> np.ndarray:
        """The log-probs (completion tokens,) float32, read from disk."""
        return self.logps([key])[0]

    def lookup(self, keys: np.ndarray | Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Found (n,) bool, sums (n,) float64 and tokens (n,) int32; NaN and 0 where not found. No file is read.

        Args:
            keys: (n, 16) uint8, or n times 16 bytes.
        """
        found = self._index.find(key_array(keys))
        return found.shard >= 0, found.sums, found.tokens

    def logps(self, keys: np.ndarray | Sequence[bytes]) -> list[np.ndarray]:
        """The log-probs (completion tokens,) float32 of each key, read from disk.

        Raises:
            KeyError: a key is not in the cache.
            UserError: only sums are kept, or a shard turned out damaged; its rows are then no longer in the cache.
        """
        if not self.per_token:
            raise self._sums_only()
        keys = key_array(keys)
        found = self._index.find(keys)
        absent = np.flatnonzero(found.shard < 0)
        if len(absent):
            raise KeyError(keys[absent[0]].tobytes())
        values: list[np.ndarray] = [None] * len(keys)  # type: ignore[list-item]
        for at in np.lexsort((found.row, found.shard)):  # each part of a shard is read once
            group, row = divmod(int(found.row[at]), GROUP_ROWS)
            flat, ends = self._group(int(found.shard[at]), group)
            # A copy, so that one row does not keep thousands in memory.
            values[at] = flat[ends[row] - found.tokens[at] : ends[row]].copy()
        return values

    def reload(self) -> None:
        """Reads the shards that have appeared since the last look."""
        if self.path.is_dir():
            new = sorted(shard for shard in self.path.glob("shard-*.parquet") if shard.name not in self._seen)
            self._index.add(self._index_columns(new))
            self._seen.update(shard.name for shard in new)

    def add(self, values: Mapping[bytes, np.ndarray]) -> None:
        """Writes one shard with these log-probs; on disk when it returns."""
        if not values:
            return
        rows = [np.asarray(value, dtype=np.float32) for value in values.values()]
        keys, tokens = key_array(list(values)), np.array([len(row) for row in rows])
        flat = np.concatenate(rows)
        name = f"shard-{time.time_ns():020d}-{secrets.token_hex(4)}.parquet"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / MANIFEST).exists():
                manifest = {"format": FORMAT, "per_token": self.per_token, "fingerprint": self.fingerprint}
                self._write(MANIFEST, lambda file: file.write(json.dumps(manifest, indent=2).encode()))
            self._write(name, lambda file: write_shard(file, keys, tokens, flat, self.per_token))
        except OSError as error:
            raise UserError(
                f"{self.path}: the reference cache cannot be written ({error.strerror or error}); "
                "free space or name another folder. What was written before is kept."
            ) from error
        self._seen.add(name)
        self._index.add([(name, keys, tokens, row_sums(flat, tokens))])

    def _write(self, name: str, write: Any) -> None:
        temporary = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename, too, must survive a power cut
        finally:
            os.close(folder)

    def _index_columns(self, shards: list[Path]) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
        for shard in shards:
            try:
                columns = read_index_columns(shard)
            except FileNotFoundError:
                continue  # another process has just set it aside
            except DamagedShard as error:
                warnings.warn(
                    f"{shard} is damaged ({error}); {_set_aside(shard)}, and the values it held "
                    "will be computed again.",
                    stacklevel=5,
                )
                continue
            yield shard.name, *columns

    def _group(self, number: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """All log-probs of a row group and the end of each row in them; what was read last stays in memory."""
        if (number, group) in self._groups:
            self._groups.move_to_end((number, group))
            return self._groups[number, group]
        shard = self.path / self._index.shards[number]
        try:
            read = read_group(shard, group)
        except (DamagedShard, FileNotFoundError) as error:
            self._index.drop(number)
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{shard} is gone; run again, and the values it held will be computed anew.") from None
            raise UserError(
                f"{shard} is damaged ({error}); {_set_aside(shard)}. "
                "Run again, and the values it held will be computed anew."
            ) from None
        self._groups[number, group] = read
        self._group_bytes += sum(part.nbytes for part in read)
        while self._group_bytes > OPEN_BYTES and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._group_bytes -= sum(part.nbytes for part in oldest)
        return read

    def _sums_only(self) -> UserError:
        return UserError(
            f"{self.path} keeps only the sums of log-probs (per_token=False), not the value of each token; "
            "name another folder."
        )

    def _manifest(self) -> dict[str, Any] | None:
        path = self.path / MANIFEST
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a reference cache is a folder. Name another path.")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if self.path.is_dir() and any(self.path.glob("shard-*.parquet")):
                raise UserError(
                    f"{self.path} holds shards but no {MANIFEST}, so nobody knows which model they are of; "
                    "restore the manifest or name another folder."
                ) from None
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
        try:
            manifest = json.loads(text)
            version, _ = manifest["format"], dict(manifest["fingerprint"])
            if version == FORMAT and not isinstance(manifest["per_token"], bool):
                raise ValueError("per_token")
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; restore it or name another folder.") from None
        if version != FORMAT:
            raise UserError(
                f"{self.path} is a reference cache of format {version}, and this fastdpo reads format {FORMAT}; "
                "name another folder."
            )
        return manifest

    def _check_fingerprint(self, wanted: Mapping[str, str] | None) -> None:
        if wanted is None:
            return
        differing = [part for part in wanted if self.fingerprint.get(part) != wanted[part]]
        if differing:
            what = "; ".join(f"{part} {self.fingerprint.get(part)} there, {wanted[part]} here" for part in differing)
            raise UserError(
                f"{self.path} holds log-probs of another reference model ({what}); "
                "name another folder or load the model it was made with."
            )


class DamagedShard(Exception):
    """What is wrong with a shard, in a few words."""


def write_shard(file: BinaryIO, keys: np.ndarray, tokens: np.ndarray, flat: np.ndarray, per_token: bool = True) -> None:
    """Writes keys (n, 16) uint8, tokens (n,), and log-probs (sum of tokens,) float32, row after row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sums = row_sums(flat, tokens)
    key_column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))]
    )
    columns = {"key": key_column, "tokens": pa.array(tokens, pa.int32()), "sum": pa.array(sums)}
    if per_token:
        ends = pa.array(np.append(0, np.cumsum(tokens)), pa.int32())
        columns["logps"] = pa.ListArray.from_arrays(ends, pa.array(flat))
    table = pa.table(columns).replace_schema_metadata({_DIGEST: _digest(keys, tokens, sums)})
    # Hashes and log-probs do not compress.
    pq.write_table(
        table,
        file,
        row_group_size=GROUP_ROWS,
        write_page_checksum=True,
        write_statistics=False,
        use_dictionary=False,
        compression="none",
    )


def row_sums(flat: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The sum (n,) float64 of each row's log-probs, summed in float64."""
    sums = np.zeros(len(tokens))
    held = np.flatnonzero(tokens)  # reduceat gives an empty row the value of the next
    if len(held):
        starts = np.cumsum(tokens) - tokens
        sums[held] = np.add.reduceat(flat, starts[held], dtype=np.float64)
    return sums


def read_index_columns(shard: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys (n, 16) uint8, tokens (n,) int32, sums (n,) float64."""
    with _opened(shard) as file:
        keys, tokens, sums = _fixed_columns(file.read(columns=["key", "tokens", "sum"], use_threads=False))
        # Page checksums cover neither the pages' headers nor the file's footer.
        if (file.schema_arrow.metadata or {}).get(_DIGEST) != _digest(keys, tokens, sums):
            raise ValueError("the digest does not match")
    return keys, tokens, sums


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


_DIGEST = b"fastdpo.digest"


def _digest(keys: np.ndarray, tokens: np.ndarray, sums: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for column, dtype in ((keys, "u1"), (tokens, "<i4"), (sums, "<f8")):
        digest.update(np.ascontiguousarray(column, dtype=dtype).data)
    return digest.hexdigest().encode()


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
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
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


def _set_aside(shard: Path) -> str:
    """Renames a damaged shard, where the folder can be written to, and says so."""
    aside = shard.with_name(shard.name + ".damaged")
    try:
        os.replace(shard, aside)
    except OSError as error:
        return f"it could not be set aside ({error.strerror or error}): delete it"
    return f"it was set aside as {aside.name}"
