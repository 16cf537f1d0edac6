"""Makes a folder of reference log-probs small: what is of no use goes, many small shards become few large ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from fastdpo.reference.folder import (
    MANIFEST,
    SHARDS,
    Kind,
    files_set_aside,
    require_manifest,
    size_of,
    temporary_files,
    write_file,
)
from fastdpo.reference.index import KEY_BYTES, Rows, join_keys, key_array
from fastdpo.reference.shard import (
    GROUP_ROWS,
    DamagedShard,
    check_values,
    group_tokens,
    read_group,
    read_index,
    shard_name,
    write_shard,
)
from fastdpo.types import UserError

SHARD_ROWS = 1 << 18  # of a shard that small ones are put into
SHARD_LOGPS = 1 << 26
STALE_SECONDS = 3600  # by then a temporary file has no writer any more
_ROW_BYTES = KEY_BYTES + 4 + 8  # key, tokens, sum


@dataclass(frozen=True)
class Pruned:
    """What `prune` did, or would do."""

    path: str
    rows_kept: int
    rows_dropped: int
    shards_before: int
    shards_after: int
    removed: list[str]  # files that were set aside, and stale temporary ones
    bytes_freed: int


def prune(path: str | Path, keep: np.ndarray | None = None, *, dry_run: bool = False) -> Pruned:
    """Drops what is of no use, and puts small shards into large ones. Values stay the same to the bit.

    Of no use are files that were set aside, temporary files older than an hour, and rows that stand there twice. A new
    shard is on disk before an old one goes, so that a crash loses nothing, and readers find the rows in the new one.

    Args:
        keep: (n, 16) uint8; rows with other keys are dropped, too.
        dry_run: change nothing; `bytes_freed` is then an estimate.

    Raises:
        UserError: a shard is damaged or of another cache, or another process prunes the folder.
    """
    path = Path(path)
    kind = require_manifest(path).kind
    with nullcontext() if dry_run else _alone(path):
        plan = _Plan(path, kind, keep)
        files = files_set_aside(path) + temporary_files(path, STALE_SECONDS)
        before = size_of(path.iterdir())
        freed = plan.dropped_bytes() + size_of(files)
        if not dry_run:
            try:
                for file in files:
                    file.unlink(missing_ok=True)
                plan.carry_out()
            except OSError as error:
                raise UserError(
                    f"{path} cannot be written ({error.strerror or error}); free space or check its permissions. "
                    "Nothing is lost."
                ) from error
            freed = before - size_of(path.iterdir())
    kept = int(plan.kept.sum())
    return Pruned(
        str(path),
        rows_kept=kept,
        rows_dropped=len(plan.kept) - kept,
        shards_before=len(plan.names),
        shards_after=int((~plan.rewritten).sum()) + len(plan.outputs),
        removed=[file.name for file in files],
        bytes_freed=freed,
    )


class _Plan:
    """Which rows stay, and which shards are written anew. A row's place is its number among the rows of all shards."""

    def __init__(self, path: Path, kind: Kind, keep: np.ndarray | None) -> None:
        self.path, self.kind = path, kind
        index, unreadable = read_index(sorted(path.glob(SHARDS)), kind)
        if unreadable:
            name, what = next(iter(unreadable.items()))
            raise UserError(f"{path / name} cannot be used: {what}; see fastdpo cache verify {path}.")
        self.names = index.shards
        rows, first = index.rows()
        self.borders = np.append(0, np.bincount(rows.shard, minlength=len(self.names)).cumsum())
        order = np.empty(len(first), np.int64)
        order[self.borders[rows.shard] + rows.row] = np.arange(len(first))
        self.kept = first[order]
        if keep is not None:
            found = index.find(key_array(keep))
            wanted = np.zeros(len(first), bool)
            wanted[(self.borders[found.shard] + found.row)[found.shard >= 0]] = True
            self.kept &= wanted
        self.rows = Rows(*(column[order] for column in rows))
        self.rewritten = self._rewritten()
        self.places = np.flatnonzero(self.kept & self.rewritten[self.rows.shard])
        self.outputs = list(_cuts(self.rows.tokens[self.places]))
        self._check_left_alone(rows, first)

    def _rewritten(self) -> np.ndarray:
        """Shards with rows to drop, and small ones if there is more than one."""
        shard, count = self.rows.shard, len(self.names)
        total = np.bincount(shard, minlength=count)
        kept = np.bincount(shard, weights=self.kept, minlength=count)
        logps = np.bincount(shard, weights=self.kept * self.rows.tokens, minlength=count) * self.kind.per_token
        dropping = kept < total
        rewritten = dropping | ((kept < SHARD_ROWS / 2) & (logps < SHARD_LOGPS / 2))
        return dropping if (rewritten & (kept > 0)).sum() == 1 else rewritten

    def _check_left_alone(self, rows: Rows, first: np.ndarray) -> None:
        """Of a row that stands there twice, the one that stays must be sound."""
        place = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
        holders = np.unique(rows.shard[place[~first]])
        for number in holders[~self.rewritten[holders]].tolist():
            shard = self.path / self.names[number]
            with _sound(shard):
                check_values(shard, self.kind, self.rows.sums[self._range(number)])

    def _range(self, number: int) -> slice:
        return slice(self.borders[number], self.borders[number + 1])

    def dropped_bytes(self) -> int:
        logps = int(self.rows.tokens[~self.kept].sum(dtype=np.int64)) if self.kind.per_token else 0
        return int((~self.kept).sum()) * _ROW_BYTES + logps * 4

    def carry_out(self) -> None:
        old = deque(np.flatnonzero(self.rewritten).tolist())
        groups = self._groups() if self.kind.per_token else None
        for cut in tqdm(self.outputs, desc="prune", unit="shard", disable=None):
            rows = Rows(*(column[self.places[cut]] for column in self.rows))
            keys = join_keys(rows.high, rows.low)
            write = partial(write_shard, kind=self.kind, keys=keys, tokens=rows.tokens, sums=rows.sums, groups=groups)
            write_file(self.path / shard_name(), write)
            # Those go of which all rows, and the first ones of all their doubles, are on disk.
            written = self.places[cut.stop] if cut.stop < len(self.places) else len(self.kept)
            while old and self.borders[old[0] + 1] <= written:
                (self.path / self.names[old.popleft()]).unlink(missing_ok=True)
        for number in old:
            (self.path / self.names[number]).unlink(missing_ok=True)

    def _groups(self) -> Iterator[np.ndarray]:
        """The log-probs of each row group of all outputs."""
        tokens = self.rows.tokens[self.places]
        pieces = self._pieces()
        held = np.empty(0, np.float32)
        for size in np.concatenate([group_tokens(tokens[cut]) for cut in self.outputs]):
            parts, count = [held], len(held)
            while count < size:
                parts.append(next(pieces))
                count += len(parts[-1])
            joined = np.concatenate(parts)
            yield joined[:size]
            held = joined[size:]

    def _pieces(self) -> Iterator[np.ndarray]:
        """The log-probs of the rows to be moved, a group at a time."""
        for number in np.flatnonzero(self.rewritten).tolist():
            shard, kept = self.path / self.names[number], self.kept[self._range(number)]
            for start in range(0, len(kept), GROUP_ROWS):
                rows = kept[start : start + GROUP_ROWS]
                if rows.any():
                    with _sound(shard):
                        flat, ends = read_group(shard, start // GROUP_ROWS)
                    yield flat[np.repeat(rows, np.diff(ends, prepend=0))]


def _cuts(tokens: np.ndarray) -> Iterator[slice]:
    """Slices of at most SHARD_ROWS rows and SHARD_LOGPS tokens."""
    ends = tokens.cumsum(dtype=np.int64)
    start = 0
    while start < len(tokens):
        most = ends[start] - tokens[start] + SHARD_LOGPS
        stop = min(start + SHARD_ROWS, max(start + 1, int(ends.searchsorted(most, side="right"))))
        yield slice(start, min(stop, len(tokens)))
        start = stop


@contextmanager
def _sound(shard: Path) -> Iterator[None]:
    """Damage that is met within ends the work."""
    try:
        yield
    except DamagedShard as error:
        raise UserError(
            f"{shard} is damaged ({error}); fastdpo cache verify {shard.parent} --repair sets it aside."
        ) from None
    except FileNotFoundError:
        raise UserError(f"{shard} is gone: another process works on the folder; prune again.") from None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process prunes the folder: two could each drop the rows that the other keeps."""
    import fcntl  # not on every system

    with ExitStack() as stack:
        try:
            manifest = stack.enter_context(open(path / MANIFEST, "r+b"))
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another process prunes this folder; wait for it.") from None
        except OSError as error:
            raise UserError(f"{path} cannot be pruned ({error.strerror or error}); check its permissions.") from error
        yield
