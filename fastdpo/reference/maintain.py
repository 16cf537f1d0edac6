"""Looks after folders of reference log-probs: what is in them, whether it is sound, many into one, small into large."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fastdpo.reference.cache import ReferenceCache
from fastdpo.reference.folder import (
    FORMAT,
    MANIFEST,
    SHARDS,
    BrokenManifest,
    Kind,
    OtherFormat,
    differences,
    files_set_aside,
    read_manifest,
    require_manifest,
    set_aside,
    size_of,
    temporary_files,
    write_manifest,
)
from fastdpo.reference.prune import Pruned, prune
from fastdpo.reference.shard import (
    DamagedShard,
    ForeignShard,
    check_values,
    read_index,
    read_index_columns,
    read_kind,
    reason,
    shard_name,
    write_shard,
)
from fastdpo.saving import same_place
from fastdpo.types import UserError

__all__ = ["CacheInfo", "Merged", "Pruned", "Report", "describe", "merge", "prune", "verify"]


@dataclass(frozen=True)
class CacheInfo:
    path: str
    format: int
    per_token: bool
    fingerprint: dict[str, str]
    about: dict[str, str]
    created: str | None
    sequences: int  # different ones
    duplicates: int
    tokens: int
    mean_logp: float | None  # a token
    shards: int
    bytes: int
    unreadable: dict[str, str]  # shard: what is wrong with it
    damaged: list[str]  # set aside
    leftovers: list[str]  # of writers that were killed, or are at work

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(path: str | Path) -> CacheInfo:
    """What a folder holds, from its manifest and the index columns. Changes nothing.

    Raises:
        UserError: the folder is no cache of this format.
    """
    path = Path(path)
    manifest = require_manifest(path)
    index, unreadable = read_index(sorted(path.glob(SHARDS)), manifest.kind)
    rows, first = index.rows()
    tokens, total = int(rows.tokens[first].sum()), float(rows.sums[first].sum())
    return CacheInfo(
        str(path),
        **manifest.kind.as_dict(),
        about=manifest.about,
        created=manifest.created,
        sequences=int(first.sum()),
        duplicates=int((~first).sum()),
        tokens=tokens,
        mean_logp=total / tokens if tokens and math.isfinite(total) else None,
        shards=len(index.shards),
        bytes=size_of(path.iterdir()),
        unreadable=unreadable,
        damaged=[file.name for file in files_set_aside(path)],
        leftovers=[file.name for file in temporary_files(path)],
    )


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    path: str
    shards: int
    sequences: int  # in sound shards, duplicates included
    bad: dict[str, str]  # file: what is wrong with it
    repaired: dict[str, str]  # file: what was done about it

    @property
    def sound(self) -> bool:
        return not self.bad


def verify(path: str | Path, repair: bool = False) -> Report:
    """Reads everything of every shard, and names what is wrong with each.

    Args:
        repair: set damaged files aside, and write a missing manifest anew from the shards. Shards of other caches stay.

    Raises:
        UserError: the folder is no cache of this format, or shards that lack a manifest do not agree.
    """
    path = Path(path)
    bad: dict[str, str] = {}
    repaired: dict[str, str] = {}
    shards = sorted(path.glob(SHARDS))
    try:
        kind = require_manifest(path).kind
    except BrokenManifest:
        kind = _kind_of_all(path, shards)
        bad[MANIFEST] = "it is damaged" if (path / MANIFEST).exists() else "it is missing"
        if repair:
            repaired[MANIFEST] = _restore_manifest(path, kind)
    rows = 0
    for shard in tqdm(shards, desc="verify", unit="shard", disable=None):
        try:
            _, _, sums = read_index_columns(shard, kind)
            check_values(shard, kind, sums)
            rows += len(sums)
        except FileNotFoundError:
            continue
        except (DamagedShard, UserError) as error:
            bad[shard.name] = reason(error)
            if repair and isinstance(error, DamagedShard):
                repaired[shard.name] = set_aside(shard)
    return Report(str(path), len(shards), rows, bad, repaired)


def _kind_of_all(path: Path, shards: Sequence[Path]) -> Kind:
    """The kind of shards without a manifest."""
    first: tuple[Path, Kind] | None = None
    for shard in shards:
        try:
            kind = read_kind(shard)
        except DamagedShard:
            continue
        first = first or (shard, kind)
        differing = first[1].differences(kind)
        if differing:
            raise UserError(
                f"{shard} and {first[0].name} are of different caches ({'; '.join(differing)}), "
                f"so no {MANIFEST} fits both; move one of them out of the folder."
            )
    if first is None:
        raise UserError(f"{path}: neither {MANIFEST} nor a shard can be read; make the cache anew in another folder.")
    if first[1].format != FORMAT:
        raise OtherFormat(path, first[1].format)
    return first[1]


def _restore_manifest(path: Path, kind: Kind) -> str:
    try:
        if (path / MANIFEST).exists():
            set_aside(path / MANIFEST)
        write_manifest(path, kind, {})
    except OSError as error:
        raise UserError(f"{path / MANIFEST} cannot be written ({error.strerror}); check its permissions.") from error
    return "it was written anew from the shards"


@dataclass(frozen=True)
class Merged:
    """What `merge` did."""

    path: str
    sequences: int  # different ones, in the target now
    new: int
    copied: int  # shards
    skipped: int  # shards all of whose sequences were there
    damaged: dict[str, str]  # shards that were left out: what is wrong with them


def merge(target: str | Path, sources: Sequence[str | Path]) -> Merged:
    """Brings what the source folders hold into the target, which may be new and is then of the first source's kind.

    The sources stay as they are. A target that keeps sums only takes no more than sums. Damaged shards are left out and
    named. After a crash, run it again.

    Raises:
        UserError: before anything is written: the folders are not of one model, dtype and format, or a source keeps
            sums only and the target does not; a source is the target.
    """
    target = Path(target)
    found = read_manifest(target)
    named = [(Path(source), require_manifest(Path(source))) for source in sources]
    base, manifest = (target, found) if found else named[0]
    shards = []
    for source, other in named:
        _check_mergeable(source, other.kind, target, base, manifest.kind)
        shards += [(shard, other.kind) for shard in _own_shards(source, other.kind)]
    cache = ReferenceCache(target, manifest.kind.fingerprint, per_token=manifest.kind.per_token, about=manifest.about)
    cache.create()
    before, copied, damaged = len(cache), 0, {}
    for shard, kind in tqdm(shards, desc="merge", unit="shard", disable=None):
        try:
            copied += _take(cache, shard, kind)
        except DamagedShard as error:
            damaged[str(shard)] = str(error)
        except FileNotFoundError:
            damaged[str(shard)] = "it is gone: another process works on the folder; merge again"
    after = len(cache)
    return Merged(str(target), after, after - before, copied, len(shards) - copied - len(damaged), damaged)


def _check_mergeable(source: Path, kind: Kind, target: Path, base: Path, wanted: Kind) -> None:
    if same_place(source, target):
        raise UserError(f"{source} is the folder to merge into; leave it out of the sources.")
    differing = differences(kind.fingerprint, wanted.fingerprint)
    if differing:
        raise UserError(
            f"{source} cannot be merged with {base} ({'; '.join(differing.values())}); "
            "merge folders of one model and dtype."
        )
    if wanted.per_token and not kind.per_token:
        raise UserError(
            f"{source} keeps sums only and {base} the log-prob of each token; "
            "merge it into a folder that keeps sums only."
        )


def _own_shards(folder: Path, kind: Kind) -> list[Path]:
    """The shards of a folder; none of them is of another kind."""
    shards = sorted(folder.glob(SHARDS))
    for shard in shards:
        try:
            own = read_kind(shard)
        except (DamagedShard, FileNotFoundError):
            continue  # named when its turn comes
        differing = kind.differences(own)
        if differing:
            raise ForeignShard(shard, differing)
    return shards


def _take(cache: ReferenceCache, shard: Path, kind: Kind) -> bool:
    """Copies a shard into the cache, unless the cache has all it holds."""
    keys, tokens, sums = read_index_columns(shard, kind)
    if cache.lookup(keys)[0].all():
        return False
    check_values(shard, cache.kind, sums)
    name = shard_name() if (cache.path / shard.name).exists() else shard.name
    if kind == cache.kind:
        with open(shard, "rb") as source:
            cache.add_shard(keys, tokens, sums, partial(shutil.copyfileobj, source), name)
    else:
        cache.add_shard(keys, tokens, sums, lambda file: write_shard(file, cache.kind, keys, tokens, sums), name)
    return True
