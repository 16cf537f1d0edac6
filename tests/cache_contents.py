"""What a reference cache holds, whichever shards it stands in."""

import numpy as np
import pyarrow.parquet as pq

from fastdpo.reference import ReferenceCache


def contents(folder):
    """key -> log-probs of everything in a cache."""
    cache = ReferenceCache(folder)
    keys = {key for shard in folder.glob("shard-*.parquet") for key in pq.read_table(shard)["key"].to_pylist()}
    return {key: cache[key] for key in keys}


def assert_same(a, b, exactly=False):
    assert a.keys() == b.keys()
    for key, value in a.items():
        np.testing.assert_allclose(value, b[key], rtol=0, atol=0 if exactly else 1e-5)
