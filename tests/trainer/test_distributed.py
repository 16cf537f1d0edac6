"""Two gloo processes give the curve of one at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def curve(folder, processes, reference):
    folder.mkdir()
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    subprocess.run(
        [sys.executable, *launcher, str(HERE / "distributed_run.py"), str(folder), reference],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FASTDPO_CACHE": str(folder / "cache")},
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return json.loads((folder / "curve.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["online", "precompute"])
def test_two_processes_train_as_one(tmp_path, reference):
    one, two = (curve(tmp_path / str(count), count, reference) for count in (1, 2))
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-4)
