"""The kernels compile for NVIDIA and AMD GPUs without spilling registers, move 128 bits at a time for any V, leave no
two threads to race for an address, and execute no more instructions an element than memory leaves time for.
"""

import json
from collections import Counter

import pytest
import torch
from checkout import load
from processes import environment, run

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the GPU that is here compiles what it runs", allow_module_level=True)
from fastdpo_kernels import gather_kv, row, token_logprobs

page = load("docs/kernels.py")
GATHER_TILE = {"gather": gather_kv.FORWARD_TILE, "gather backward": gather_kv.BACKWARD_TILE}
# Of which of the eight combinations (see compile_ahead.variants) all variants are made: most of them for Hopper, those
# of bfloat16 without edges for Blackwell, and those that need the most registers for every target; and how many kernels
# that is.
TARGETS = {
    "sm_90": ((0, 1, 4, 6), 25 + 4),
    "sm_100": ((0, 1), 14 + 4),
    "sm_120": ((), 4 + 4),
    "gfx950": ((), 4 + 4),
    "sm_80": ((), 4 + 4),
    "sm_86": ((), 4 + 4),
    "sm_89": ((), 4 + 4),
    "gfx942": ((2, 5), 11 + 4),
}
# Those that one process compiles for.
TOGETHER = (("sm_90",), ("sm_100", "sm_120", "gfx950"), ("sm_80", "sm_86", "sm_89", "gfx942"))
# Instructions an element of the main loop in bfloat16, by kernel, statistics and softcap. While the memory of an H200
# reads one element, its multiprocessors issue 15 (4.3 TB/s; 132 of them, 128 a cycle each, at 1.98 GHz), 31 for a read
# and a write; an exponential or a division takes the place of 8.
INSTRUCTIONS = {
    ("forward", False, False): 6.5,
    ("forward", True, False): 10.0,
    ("forward", False, True): 16.0,
    ("forward", True, True): 20.0,
    ("one pass", False, False): 8.5,
    ("one pass", True, False): 12.5,
    ("one pass", False, True): 20.0,
    ("one pass", True, True): 27.0,
    ("backward", False, False): 14.0,
    ("backward", False, True): 27.0,
}


def split_by_width(counts: dict[str, int]) -> tuple[int, int]:
    """How many accesses are of 128 bits, and how many narrower."""
    wide = sum(n for name, n in counts.items() if name.endswith((".128", "_dwordx4")))
    return wide, sum(counts.values()) - wide


@pytest.mark.slow
@pytest.mark.parametrize("gpus", TOGETHER, ids=" ".join)
def test_no_spills_no_races_and_wide_access(gpus, tmp_path):
    env = environment(TRITON_INTERPRET=None, TRITON_CACHE_DIR=tmp_path)
    words = [f"{gpu}:{','.join(map(str, TARGETS[gpu][0]))}" for gpu in gpus]
    done = run("tests/kernels/compile_ahead.py", *words, env=env)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert Counter(found["gpu"] for found in rows) == {gpu: TARGETS[gpu][1] for gpu in gpus}
    for found in rows:
        gpu = found["gpu"]
        lanes = 64 if gpu.startswith("gfx") else 32
        print("{gpu} {kernel} {variant}: {registers} registers, {loads}, {stores}".format(**found))
        assert found["spills"] == 0, found
        assert found.get("races", []) == [], found  # see tests/ptx.py; of PTX, so on NVIDIA's targets
        assert found["kernels"] == 1, found  # whatever V, row stride, ignore_index, alignment of labels; T, K, layout

        size = 2 if "bfloat16" in found["variant"] else 4
        if found["kernel"] in GATHER_TILE:
            check_gather(found, GATHER_TILE[found["kernel"]] * size // (gather_kv.NUM_WARPS * lanes))
            continue
        check_row_kernel(found, size, gpu)


def check_row_kernel(found, size, gpu):
    """`size` bytes a logit; `found` is what compile_ahead has printed."""
    stats, softcap = "stats" in found["variant"], "softcap" in found["variant"]
    # The least that a thread holds of a block; twice as much where registers allow.
    columns = row.COLUMNS_OF_THREAD // 2
    if found["kernel"] == "backward":
        columns = token_logprobs.BACKWARD_BLOCK // row.THREADS
    vectors = columns * size // 16
    wide, narrow = split_by_width(found["loads"])
    if "other rows" not in found["variant"]:  # aligned as `out`, or narrow
        # Label, its logit or two norms and the gradient, edges: once a row. A loop that loads narrowly has dozens.
        assert wide >= vectors and narrow <= 5, found
    if found["kernel"] != "forward":
        wide, narrow = split_by_width(found["stores"])
        assert wide >= 2 * vectors, found  # gradients, and zeros of ignored rows
        once = 2 if found["kernel"] == "backward" else 17  # edges; of the one pass also results, the label's, zeros
        assert narrow <= once, found
    if "instructions" in found:
        assert found["barriers"] <= (3 if found["kernel"] == "one pass" else 0), found
        assert found["special"] <= (3.2 if softcap else 1.1), found
    if gpu in ("sm_90", "sm_100") and "bfloat16" in found["variant"] and "other rows" not in found["variant"]:
        assert found["instructions"] <= INSTRUCTIONS[found["kernel"], stats, softcap], found
    if (documented := page.documented(gpu, found["kernel"], found["variant"])) is not None:
        assert f"{found['instructions']:.1f}" == documented, "run: python docs/kernels.py"


def check_gather(found, bytes_of_thread):
    """Keys and values move in vectors of 16 bytes; of less, only where a thread has no more of a tile."""
    vector = min(16, bytes_of_thread)

    def of_vectors(counts):
        return sum(n for name, n in counts.items() if name.endswith({16: (".128", "x4"), 8: (".64", "x2")}[vector]))

    backward = found["kernel"] == "gather backward"
    copies = gather_kv.FIRST_COPIES.value + gather_kv.COPIES_A_ROUND.value if backward else 1
    stores = 2 * bytes_of_thread // vector  # of keys and values
    loads, places = copies * stores, sum(found["loads"].values()) - copies * stores
    assert of_vectors(found["loads"]) >= loads, found
    # A thread has up to eight rows of a tile forward, two backward. Each has an index a copy, and two offsets.
    assert 0 < places <= (2 * (copies + 4) if backward else 8), found
    assert of_vectors(found["stores"]) == sum(found["stores"].values()) == stores, found
