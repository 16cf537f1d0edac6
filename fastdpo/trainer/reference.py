"""The reference's log-probs as columns of a run's data sets: from the cache, the rest computed by all processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import IterableDataset

from fastdpo.data.validate import reference_names
from fastdpo.reference import ReferenceCache, fill_cache, reference_columns
from fastdpo.reference.columns import cached_columns, row_keys
from fastdpo.reference.folder import SHARDS
from fastdpo.trainer.dataset import columns_of
from fastdpo.trainer.passes import HostCounts


def has_reference(dataset: Any) -> bool:
    names = columns_of(dataset)
    return all(name in names for name in reference_names(names))


def with_reference(
    dataset: Any, cache: ReferenceCache, model: Any, args: Any, counts: HostCounts, *,
    lost: Callable[[], Exception] | None, lent: Any, ld_alpha: float | None, **options: Any,
) -> Any:  # fmt: skip
    """The data set with the reference's sums, as `reference_columns` has them; `options` go to `fill_cache`.

    `lent()` is the context in which the model is where it can run: it is only moved if something has to be computed.
    `lost` makes what is raised in place of that, where the reference is not there any more.
    What the cache lacks is divided among the processes by content. They wait for each other at the end alone, and need
    not share a file system: then each node computes for itself what it cannot see.

    Raises:
        UserError: as `fill_cache`.
    """
    cut = {"max_length": args.max_length, "truncation_mode": args.truncation_mode}
    show = args.process_index == 0 and not args.disable_tqdm
    options |= {**cut, "batch_size": args.precompute_ref_batch_size, "progress": show}
    if isinstance(dataset, IterableDataset):
        cache.reload()
        if lost is not None and _stream_lacks(dataset, cache, cut, counts):
            raise lost()
        with lent():
            return _streamed(dataset, cache, model, args, counts, {**cut, "ld_alpha": ld_alpha}, options)
    rows = row_keys(dataset, **cut)
    for index, number in _divisions(args):
        cache.reload()
        if not _lacking(cache, rows.keys, counts):
            break
        if lost is not None:
            raise lost()
        with lent():
            fill_cache(model, dataset, cache, shard_index=index, num_shards=number, **options)
    counts.gather([0])
    cache.reload()
    for name, values in cached_columns(cache, rows, ld_alpha).items():
        dataset = dataset.add_column(name, values)
    return dataset


def _stream_lacks(dataset: Any, cache: ReferenceCache, cut: dict[str, Any], counts: HostCounts) -> bool:
    """Whether any process needs something that its cache does not hold: then nothing is read but the beginning."""
    lacking = False
    for rows in dataset.batch(64):
        each = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        found, _, _ = cache.lookup(row_keys(each, **cut).keys)
        if not found.all():
            lacking = True
            break
    return any(own for (own,) in counts.gather([int(lacking)]))


def _streamed(
    dataset: Any, cache: ReferenceCache, model: Any, args: Any, counts: HostCounts, summed: Any, options: Any
) -> Any:
    """Read to fill the cache, and again with every epoch, when sums are looked up batch by batch."""
    for index, number in _divisions(args):
        fill_cache(model, dataset, cache, shard_index=index, num_shards=number, **options)
        counts.gather([0])
        cache.reload()
        if len({seen for (seen,) in counts.gather([_shards_seen(cache)])}) == 1:
            break  # all see one folder, and what all have computed

    def look_up(batch: dict[str, list[Any]]) -> dict[str, list[float]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return reference_columns(cache, rows, **summed)

    return dataset.map(look_up, batched=True, batch_size=64)


def _divisions(args: Any) -> Iterator[tuple[int, int]]:
    """(slice, slices) for this process: of all processes; of those of its node, which see one disk; alone.

    As many on every process, whatever its node is like: they meet after each.
    """
    yield args.process_index, args.world_size
    if args.world_size > 1:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
        yield args.local_process_index % local_size, local_size
        yield 0, 1


def _shards_seen(cache: ReferenceCache) -> int:
    """A number that two processes have in common if they see the same files: names of shards are drawn."""
    names = "".join(sorted(shard.name for shard in cache.path.glob(SHARDS)))
    return int.from_bytes(hashlib.blake2b(names.encode(), digest_size=7).digest(), "little")


def _lacking(cache: ReferenceCache, keys: np.ndarray, counts: HostCounts) -> int:
    """How many sequences any process cannot find."""
    found, _, _ = cache.lookup(keys)
    return sum(lacking for (lacking,) in counts.gather([int((~found).sum())]))
