"""The kernels compile for Ampere, Hopper and Blackwell without spilling registers, and load 128 bits at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_spills_and_with_wide_loads(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_ahead.py")
    run = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 12  # forward with and without stats and backward, each in two dtypes with and without softcap
    for row in rows:
        print("sm_{sm} {kernel} {variant}: {REG} registers, {memory}".format(**row))
        assert row["STACK"] == row["LOCAL"] == 0, row
        wide = [name for name in row["memory"] if name.startswith("LDG") and name.endswith((".128", ".256"))]
        narrow = sum(n for name, n in row["memory"].items() if name.startswith("LDG") and name not in wide)
        # Label, its logit, lse, gradient: a row's. A loop over V that loads narrowly would have dozens.
        assert wide and narrow <= 3, row
        if row["kernel"] == "backward":
            assert all(name.endswith((".128", ".256")) for name in row["memory"] if name.startswith("STG")), row
