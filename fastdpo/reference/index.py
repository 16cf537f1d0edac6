"""Where each sequence of a reference cache stands: its shard, its row there, its tokens, its sum.

Keys are hashes, so the first eight bytes nearly always decide: a binary search in one uint64 column, then a look at the
other eight. 36 bytes a row in columns, no Python object a row. The rows are held in sorted runs; a new run is merged
into its neighbour until each is at least twice as long as the next, so that many small additions stay cheap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

KEY_BYTES = 16


class Rows(NamedTuple):
    """Columns (n,), of equal length."""

    high: np.ndarray  # uint64, bytes 0-7 of the key read as a big-endian number: sorted as the bytes are
    low: np.ndarray  # uint64, bytes 8-15
    shard: np.ndarray  # int32, into ShardIndex.shards
    row: np.ndarray  # int32
    tokens: np.ndarray  # int32
    sums: np.ndarray  # float64


_NO_ROWS = Rows(*(np.empty(0, kind) for kind in ("u8", "u8", "i4", "i4", "i4", "f8")))


class Found(NamedTuple):
    """Columns (n,) for n keys asked for; shard is -1 and the sum NaN where the key is unknown."""

    shard: np.ndarray
    row: np.ndarray
    tokens: np.ndarray
    sums: np.ndarray


class ShardIndex:
    """Sequence key -> place and sum. A key that stands in several shards is found in the one whose name is first.

    The doubles stay in the index, so that dropping a shard uncovers the next one's rows.
    """

    def __init__(self) -> None:
        self.shards: list[str] = []
        self._runs: list[Rows] = []
        self._ranks = np.empty(0, np.int64)

    def __len__(self) -> int:
        """The number of different keys."""
        return int(self.rows()[1].sum())

    def rows(self) -> tuple[Rows, np.ndarray]:
        """All rows, by key, then by the name of their shard; and (n,) bool, true for the first row of each key."""
        while len(self._runs) > 1:
            self._merge_last_two()
        rows = self._runs[0] if self._runs else _NO_ROWS
        first = np.ones(len(rows.high), bool)
        first[1:] = (rows.high[1:] != rows.high[:-1]) | (rows.low[1:] != rows.low[:-1])
        return rows, first

    def add(self, shards: Iterable[tuple[str, np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Takes in (name, keys (n, 16) uint8, tokens (n,), sums (n,)) of each shard."""
        parts: list[Rows] = []
        names: list[str] = []
        for name, keys, tokens, sums in shards:
            assert len(keys), name
            high, low = split_keys(keys)
            shard = np.full(len(keys), len(self.shards) + len(names), np.int32)
            row = np.arange(len(keys), dtype=np.int32)
            parts.append(Rows(high, low, shard, row, tokens.astype(np.int32), sums.astype(np.float64)))
            names.append(name)
        if not parts:
            return
        self.shards += names  # only now: nothing has changed where a shard could not be read
        self._runs.append(self._sorted(parts))
        while len(self._runs) > 1 and len(self._runs[-2].high) < 2 * len(self._runs[-1].high):
            self._merge_last_two()

    def drop(self, numbers: Sequence[int]) -> None:
        """Forgets the rows of these shards."""
        masks = [np.isin(run.shard, numbers, invert=True) for run in self._runs]
        kept = (Rows(*(column[mask] for column in run)) for run, mask in zip(self._runs, masks, strict=True))
        self._runs = [run for run in kept if len(run.high)]

    def find(self, keys: np.ndarray) -> Found:
        """Looks up keys (n, 16) uint8."""
        high, low = split_keys(keys)
        count = len(high)
        found = Found(
            np.full(count, -1, np.int32), np.zeros(count, np.int32), np.zeros(count, np.int32), np.full(count, np.nan)
        )
        for run in self._runs:
            at = run.high.searchsorted(high)
            last = len(run.high) - 1
            place = np.minimum(at, last)
            while True:  # hardly ever more than once: two hashes would have to share their first half
                short = (run.high[place] == high) & (run.low[place] < low) & (place < last)
                if not short.any():
                    break
                place += short
            hits = np.flatnonzero((run.high[place] == high) & (run.low[place] == low))
            before = found.shard[hits]
            if (before >= 0).any():
                rank = self._rank()
                hits = hits[(before < 0) | (rank[run.shard[place[hits]]] < rank[before])]
            place = place[hits]
            for into, column in zip(found, (run.shard, run.row, run.tokens, run.sums), strict=True):
                into[hits] = column[place]
        return found

    def has(self, key: bytes) -> bool:
        """`find` for one key, without the cost of arrays."""
        if len(key) != KEY_BYTES:
            return False
        high, low = np.uint64(int.from_bytes(key[:8], "big")), np.uint64(int.from_bytes(key[8:], "big"))
        for run in self._runs:
            at = int(run.high.searchsorted(high))
            while at < len(run.high) and run.high[at] == high:
                if run.low[at] == low:
                    return True
                at += 1
        return False

    def _merge_last_two(self) -> None:
        parts = self._runs[-2:]
        del self._runs[-2:]  # so that their memory is free while the merged run is sorted
        self._runs.append(self._sorted(parts))

    def _sorted(self, parts: list[Rows]) -> Rows:
        """One run, by key, then by name of the shard. Empties `parts`, whose memory is needed."""
        rows = Rows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        parts.clear()
        order = np.argsort(rows.high, kind="stable")  # merges runs that are already sorted in linear time
        high = rows.high[order]
        equal = high[1:] == high[:-1]
        if equal.any():
            tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
            members = order[tied]
            rank = self._rank()[rows.shard[members]]
            order[tied] = members[np.lexsort((rank, rows.low[members], rows.high[members]))]
        return Rows(*(column[order] for column in rows))

    def _rank(self) -> np.ndarray:
        """For each shard its place among the names in order."""
        if len(self._ranks) != len(self.shards):
            order = sorted(range(len(self.shards)), key=self.shards.__getitem__)
            self._ranks = np.empty(len(order), np.int64)
            self._ranks[order] = np.arange(len(order))
        return self._ranks


def key_array(keys: np.ndarray | Sequence[bytes]) -> np.ndarray:
    """Keys as (n, 16) uint8.

    Raises:
        ValueError: a key is not of 16 bytes, or the array is of another shape or dtype.
    """
    if isinstance(keys, np.ndarray):
        if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
            raise ValueError(f"keys: an array (n, {KEY_BYTES}) of uint8 is wanted, not {keys.shape} of {keys.dtype}.")
        return keys
    for number, key in enumerate(keys):
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ValueError(f"keys[{number}] is {key!r}; a key is {KEY_BYTES} bytes (`sequence_key`).")
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The halves of keys (n, 16) uint8, as numbers that sort as the bytes do."""
    halves = np.ascontiguousarray(keys).view(">u8")  # (n, 2)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def join_keys(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Keys (n, 16) uint8 from their halves."""
    return np.stack([high, low], axis=1).astype(">u8").view(np.uint8)
