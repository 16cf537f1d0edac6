"""A folder of reference log-probs, keyed by content.

    manifest.json                   format, what is kept, the fingerprint of the model of all values, and about it
    shard-<time>-<random>.parquet   one row a sequence: key (16 bytes), tokens (int32), sum (float64) and, unless only
                                    sums are kept, logps (float32 of each completion token)

A file is written under a temporary name, flushed to disk, then renamed: it is there whole or not at all. Nobody ever
writes to a finished shard, so several processes may add shards at once, and folders may be merged by copying them
together: each shard says what its manifest says, and one of another model is refused. The first three columns are read
into an index in memory; log-probs stay on disk until they are asked for. A shard that is damaged is named, set aside as
<name>.damaged, and what it alone held is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastdpo.reference.folder import (
    FORMAT,
    MANIFEST,
    SHARDS,
    Kind,
    differences,
    read_manifest,
    require_manifest,
    set_aside,
    write_file,
    write_manifest,
)
from fastdpo.reference.index import Found, ShardIndex, key_array
from fastdpo.reference.shard import (
    GROUP_ROWS,
    DamagedShard,
    group_tokens,
    impossible,
    read_group,
    read_index_columns,
    row_sums,
    shard_name,
    write_shard,
)
from fastdpo.types import DamageWarning, UserError

OPEN_BYTES = 64 << 20  # log-probs kept in memory after they were read


def user_cache_dir() -> Path:
    """$FASTDPO_CACHE, or fastdpo under $XDG_CACHE_HOME (~/.cache)."""
    given = os.environ.get("FASTDPO_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastdpo"


def default_cache_dir(fingerprint: Mapping[str, str]) -> Path:
    """The folder, in the user's cache, of the reference with this fingerprint, in this format."""
    name = hashlib.blake2b(json.dumps(dict(fingerprint), sort_keys=True).encode(), digest_size=16).hexdigest()
    return user_cache_dir() / f"reference-{FORMAT}" / name


class ReferenceCache:
    """Log-probs by sequence key: sums from an index in memory, per-token values from disk.

    Args:
        path: the folder; made when the first values are added.
        fingerprint: of the model the values are for (`model_fingerprint`). Without it, the folder must exist, and the
            fingerprint is taken from its manifest.
        per_token: whether values of each token are needed beside the sums. A new folder keeps them unless this is
            False. A folder that exists decides for itself; True is refused where it keeps sums only.
        about: what people may want to know of a new folder, the model's name for instance. Never compared.
        set_aside_damaged: rename damaged shards, so that what writes their values again can go on. False: they are
            only left out, and reading changes nothing on disk.

    Raises:
        UserError: the folder belongs to another model, dtype or format, or is no cache, or cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, str] | None = None,
        *,
        per_token: bool | None = None,
        about: Mapping[str, str] | None = None,
        set_aside_damaged: bool = True,
    ) -> None:
        self.path = Path(path)
        self._sets_aside = set_aside_damaged
        self._about = dict(about or {})
        self._index = ShardIndex()
        self._seen: set[str] = set()
        self._groups: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._group_bytes = 0
        manifest = require_manifest(self.path) if fingerprint is None else read_manifest(self.path)
        self._agreed = manifest is not None  # with the manifest of the folder
        if manifest is not None:
            self.kind = manifest.kind
            self.require(fingerprint, per_token)
        elif fingerprint is not None:
            self.kind = Kind(per_token is not False, dict(fingerprint))
        self.reload()

    @property
    def fingerprint(self) -> dict[str, str]:
        return self.kind.fingerprint

    @property
    def per_token(self) -> bool:
        """Whether values of each token are kept; else sums only."""
        return self.kind.per_token

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return self._index.has(key)

    def __getitem__(self, key: bytes) -> np.ndarray:
        """The log-probs (completion tokens,) float32, read from disk."""
        return self.logps([key])[0]

    def require(self, fingerprint: Mapping[str, str] | None, per_token: bool | None = None) -> None:
        """Nothing, where the values are of this model (None: of any) and are kept as asked for.

        Raises:
            UserError: what differs.
        """
        self._check_fingerprint(fingerprint)
        if per_token and not self.per_token:
            raise self._sums_only()

    def lookup(self, keys: np.ndarray | Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Found (n,) bool, sums (n,) float64 and tokens (n,) int32; NaN and 0 where not found. No file is read.

        Args:
            keys: (n, 16) uint8, or n times 16 bytes.
        """
        found = self._index.find(key_array(keys))
        return found.shard >= 0, found.sums, found.tokens

    def logps(self, keys: np.ndarray | Sequence[bytes]) -> list[np.ndarray]:
        """The log-probs (completion tokens,) float32 of each key, read from disk.

        A shard that turns out damaged, or that another process has put into a larger one, is looked past.

        Raises:
            KeyError: a key is not in the cache.
            UserError: only sums are kept, or a shard is damaged or gone that alone held a key; its rows are then no
                longer in the cache.
        """
        if not self.per_token:
            raise self._sums_only()
        keys = key_array(keys)
        while True:
            found = self._index.find(keys)
            absent = np.flatnonzero(found.shard < 0)
            if len(absent):
                raise KeyError(keys[absent[0]].tobytes())
            try:
                return self._values(found)
            except _LostShard as lost:
                self._look_past(lost, keys)

    def reload(self) -> None:
        """Reads the shards that have appeared since the last look, and forgets those that are gone."""
        while self.path.is_dir():
            present = {shard.name for shard in self.path.glob(SHARDS)}
            self._agree()
            new, gone = sorted(present - self._seen), self._seen - present
            if not new and not gone:
                return
            numbers = [number for number, name in enumerate(self._index.shards) if name in gone]
            if numbers:
                self._index.drop(numbers)
            self._seen -= gone
            self._index.add(self._index_columns(new))
            self._seen.update(new)  # then look again: what went meanwhile may have come under another name

    def add(self, values: Mapping[bytes, np.ndarray]) -> None:
        """Writes one shard with these log-probs; on disk when it returns."""
        if not values:
            return
        rows = [np.asarray(value, dtype=np.float32) for value in values.values()]
        keys, tokens = key_array(list(values)), np.array([len(row) for row in rows])
        flat = np.concatenate(rows)
        sums = row_sums(flat, tokens)
        groups = np.split(flat, group_tokens(tokens).cumsum()[:-1]) if self.per_token else None
        self.add_shard(keys, tokens, sums, lambda file: write_shard(file, self.kind, keys, tokens, sums, groups))

    def add_sums(self, keys: np.ndarray | Sequence[bytes], tokens: np.ndarray, sums: np.ndarray) -> None:
        """Writes one shard with sums (n,) of the log-probs of tokens (n,) each; on disk when it returns.

        Raises:
            UserError: the cache keeps the log-prob of each token, or a sum is NaN or above zero.
        """
        if self.per_token:
            raise UserError(
                f"{self.path} keeps the log-prob of each token, which sums do not tell; "
                "name a folder that keeps sums only (per_token=False)."
            )
        keys, tokens, sums = key_array(keys), np.asarray(tokens, np.int32), np.asarray(sums, np.float64)
        if not tokens.shape == sums.shape == (len(keys),):
            raise ValueError(f"{len(keys)} keys, tokens {tokens.shape} and sums {sums.shape} are not of one length.")
        wrong = impossible(sums)
        if wrong:
            raise UserError(f"sums[{wrong[0]}] is {wrong[1]}, which no model gives; mend or leave out that row.")
        if len(keys):
            self.add_shard(keys, tokens, sums, lambda file: write_shard(file, self.kind, keys, tokens, sums))

    def add_shard(
        self,
        keys: np.ndarray,
        tokens: np.ndarray,
        sums: np.ndarray,
        write: Callable[[BinaryIO], object],
        name: str | None = None,
    ) -> None:
        """Adds a shard, which `write` writes to a file, with these index columns."""
        name = name or shard_name()
        self.create()
        try:
            write_file(self.path / name, write)
        except OSError as error:
            raise self._unwritable(error) from error
        self._seen.add(name)
        self._index.add([(name, keys, tokens, sums)])

    def create(self) -> None:
        """Makes the folder and its manifest where they are missing.

        Raises:
            UserError: another process has made it meanwhile, for other values.
        """
        if not (self.path / MANIFEST).exists():
            self._agreed = False
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_manifest(self.path, self.kind, self._about)
            except OSError as error:
                raise self._unwritable(error) from error
        self._agree()

    def _agree(self) -> None:
        """Compares the manifest, where another process may have written it."""
        manifest = None if self._agreed else read_manifest(self.path)
        if manifest is not None:
            differing = self.kind.differences(manifest.kind)
            if differing:
                raise UserError(
                    f"{self.path} was made by another process meanwhile ({'; '.join(differing)}); name another folder."
                )
            self._agreed = True

    def _index_columns(self, names: list[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
        for name in names:
            shard = self.path / name
            try:
                columns = read_index_columns(shard, self.kind)
            except FileNotFoundError:
                continue  # another process has just set it aside, or put it into a larger one
            except DamagedShard as error:
                after = ", and the values it held will be computed again" if self._sets_aside else ""
                said = f"{shard} is damaged ({error}); {self._set_aside(shard)}{after}."
                warnings.warn(said, DamageWarning, stacklevel=5)
                continue
            yield name, *columns

    def _values(self, found: Found) -> list[np.ndarray]:
        values: list[np.ndarray] = [None] * len(found.row)  # type: ignore[list-item]
        for at in np.lexsort((found.row, found.shard)):  # each part of a shard is read once
            group, row = divmod(int(found.row[at]), GROUP_ROWS)
            flat, ends = self._group(int(found.shard[at]), group)
            # A copy, so that one row does not keep thousands in memory.
            values[at] = flat[ends[row] - found.tokens[at] : ends[row]].copy()
        return values

    def _group(self, number: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """All log-probs of a row group and the end of each row in them; what was read last stays in memory."""
        if (number, group) in self._groups:
            self._groups.move_to_end((number, group))
            return self._groups[number, group]
        try:
            read = read_group(self.path / self._index.shards[number], group)
        except (DamagedShard, FileNotFoundError) as error:
            raise _LostShard(number) from error
        self._groups[number, group] = read
        self._group_bytes += sum(part.nbytes for part in read)
        while self._group_bytes > OPEN_BYTES and len(self._groups) > 1:
            _, oldest = self._groups.popitem(last=False)
            self._group_bytes -= sum(part.nbytes for part in oldest)
        return read

    def _look_past(self, lost: _LostShard, keys: np.ndarray) -> None:
        """Forgets a shard, and looks whether others hold the keys."""
        shard = self.path / self._index.shards[lost.number]
        damage = lost.__cause__ if isinstance(lost.__cause__, DamagedShard) else None
        said = f"{shard} is damaged ({damage}); {self._set_aside(shard)}" if damage else f"{shard} is gone"
        self._index.drop([lost.number])
        self.reload()
        if (self._index.find(keys).shard < 0).any():
            raise UserError(
                f"{said}{'. Run' if damage else '; run'} again, and the values it held will be computed anew."
            ) from None
        if damage:
            warnings.warn(f"{said}, and what was asked for was read from other shards.", DamageWarning, stacklevel=3)

    def _set_aside(self, shard: Path) -> str:
        return set_aside(shard) if self._sets_aside else "it is left out"

    def _sums_only(self) -> UserError:
        return UserError(
            f"{self.path} keeps only the sums of log-probs (per_token=False), not the value of each token; "
            "name another folder."
        )

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path}: the reference cache cannot be written ({error.strerror or error}); "
            "free space or name another folder. What was written before is kept."
        )

    def _check_fingerprint(self, wanted: Mapping[str, str] | None) -> None:
        if wanted is None:
            return
        differing = differences(self.fingerprint, wanted)
        if "dtype" in differing and differing.keys() <= {"dtype", "weights", "buffers"}:
            there, here = (fingerprint.get("dtype", "an unknown dtype") for fingerprint in (self.fingerprint, wanted))
            # Weights that were rounded to another dtype are other weights.
            weights = f" ({differing['weights']})" if "weights" in differing else ""
            raise UserError(
                f"{self.path} holds log-probs computed in {there}, and they are wanted in {here}{weights}; "
                f"name another folder or load the model in {there}."
            )
        if differing:
            raise UserError(
                f"{self.path} holds log-probs of another reference model ({'; '.join(differing.values())}); "
                "name another folder or load the model it was made with."
            )


class _LostShard(Exception):
    """A shard of the index that cannot be read; the cause says why."""

    def __init__(self, number: int) -> None:
        self.number = number
