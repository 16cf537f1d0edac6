"""The kernels compile for NVIDIA and AMD GPUs without spilling registers, move 128 bits at a time for any V, and leave
no two threads to race for an address.
"""

import json

import pytest
import torch
from processes import environment, run

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the GPU that is here compiles what it runs", allow_module_level=True)
from fastdpo_kernels import gather_kv, token_logprobs

BLOCK = {
    "forward": token_logprobs.FORWARD_BLOCK,
    "backward": token_logprobs.BACKWARD_BLOCK,
    "one pass": token_logprobs.BACKWARD_BLOCK,
}
GATHER_TILE = {"gather": gather_kv.FORWARD_TILE, "gather backward": gather_kv.BACKWARD_TILE}
# Of which of the eight combinations (see compile_ahead.variants) all variants are made: all of them for Hopper, and
# those that need the most registers for every target. With it, how many kernels that makes.
TARGETS = {
    "sm_90": (range(8), 42 + 12),
    "sm_80": ((), 7 + 4),
    "sm_100": ((), 7 + 4),
    "gfx942": ((2, 5), 26),
    "sm_86": ((), 7 + 4),
    "sm_89": ((), 7 + 4),
    "sm_120": ((), 7 + 4),
}


def split_by_width(counts: dict[str, int]) -> tuple[int, int]:
    """How many accesses are of 128 bits, and how many narrower."""
    wide = sum(n for name, n in counts.items() if name.endswith((".128", "_dwordx4")))
    return wide, sum(counts.values()) - wide


@pytest.mark.slow
@pytest.mark.parametrize("gpu", TARGETS)
def test_no_spills_no_races_and_wide_access(gpu, tmp_path):
    env = environment(TRITON_INTERPRET=None, TRITON_CACHE_DIR=tmp_path)
    whole, count = TARGETS[gpu]
    done = run("tests/kernels/compile_ahead.py", gpu, "--whole", *whole, env=env)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == count
    lanes = 64 if gpu.startswith("gfx") else 32
    for row in rows:
        print("{gpu} {kernel} {variant}: {registers} registers, {loads}, {stores}".format(**row))
        assert row["spills"] == 0, row
        assert row.get("races", []) == [], row  # see tests/ptx.py; of PTX, so on NVIDIA's targets
        assert row["kernels"] == 1, row  # whatever V, row stride, ignore_index, alignment of the labels; T, K, layout

        size = 2 if "bfloat16" in row["variant"] else 4
        if row["kernel"] in GATHER_TILE:
            check_gather(row, GATHER_TILE[row["kernel"]] * size // (gather_kv.NUM_WARPS * lanes))
            continue
        bytes_of_thread = BLOCK[row["kernel"]] * size // (token_logprobs.NUM_WARPS * lanes)
        wide, narrow = split_by_width(row["loads"])
        if "other rows" not in row["variant"]:  # aligned as `out`, or narrow
            # Label, its logit or two norms and the gradient, edges: once a row. A loop over V that loads narrowly has
            # dozens.
            assert wide >= bytes_of_thread // 16 and narrow <= 5, row
        if row["kernel"] == "backward":
            wide, narrow = split_by_width(row["stores"])
            assert wide >= 2 * bytes_of_thread // 16, row  # gradients, and zeros of ignored rows
            assert narrow <= 2 * ("edges" in row["variant"]), row


def check_gather(row, bytes_of_thread):
    """Keys and values move in vectors of 16 bytes; of less, only where a thread has no more of a tile."""
    vector = min(16, bytes_of_thread)

    def of_vectors(counts):
        return sum(n for name, n in counts.items() if name.endswith({16: (".128", "x4"), 8: (".64", "x2")}[vector]))

    backward = row["kernel"] == "gather backward"
    copies = gather_kv.FIRST_COPIES.value + gather_kv.COPIES_A_ROUND.value if backward else 1
    stores = 2 * bytes_of_thread // vector  # of keys and values
    loads, places = copies * stores, sum(row["loads"].values()) - copies * stores
    assert of_vectors(row["loads"]) >= loads, row
    # A thread has up to eight rows of a tile forward, two backward. Each has an index a copy, and two offsets.
    assert 0 < places <= (2 * (copies + 4) if backward else 8), row
    assert of_vectors(row["stores"]) == sum(row["stores"].values()) == stores, row
