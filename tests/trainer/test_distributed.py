"""Two gloo processes give the curve of one at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def curve(folder, processes, **options):
    """The logged figures of a run, and how many passes each process took."""
    folder.mkdir()
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    subprocess.run(
        [sys.executable, *launcher, str(HERE / "distributed_run.py"), str(folder), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FASTDPO_CACHE": str(folder / "cache")},
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    passes = [json.loads((folder / f"passes-{i}.json").read_text()) for i in range(processes)]
    return json.loads((folder / "curve.json").read_text()), passes


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["online", "precompute"])
def test_two_processes_train_as_one(tmp_path, reference):
    precompute = reference == "precompute"
    (one, _), (two, _) = (curve(tmp_path / str(n), n, precompute_ref_log_probs=precompute) for n in (1, 2))
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_processes_take_as_many_passes_and_train_as_one(tmp_path, strategy):
    options = {"train_sampling_strategy": strategy, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    runs = {}
    for name, processes, budget in (("whole", 1, None if strategy != "random" else 10**6), ("cut", 2, 70)):
        runs[name] = curve(tmp_path / name, processes, max_tokens_per_microbatch=budget, **options)
    (whole, _), (cut, passes) = runs["whole"], runs["cut"]
    assert len(whole) == 4
    for a, b in zip(whole, cut, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-4)
    assert passes[0] == passes[1] > 4 * 2
