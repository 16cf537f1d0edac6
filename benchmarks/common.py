"""What every benchmark shares: the machine and versions that stand in a result file, and where it goes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "datasets", "trl", "liger-kernel", "cut-cross-entropy",
    "quack-kernels", "flash-attn", "flash-attn-4",
)  # fmt: skip


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Device, versions, commit (with a + where files differ from it) and date."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def in_a_process(arguments: Sequence[str]) -> Any:
    """What Python with these arguments writes as JSON to the file that it is given behind `--out`.

    With empty caches, so that whoever keeps a reference computes it afresh; and offline.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        print("running", " ".join(arguments[1:]), flush=True)
        subprocess.run([sys.executable, *arguments, "--out", str(out)], env=process_environment(folder), check=True)
        return json.loads(out.read_text())


def process_environment(folder: str) -> dict[str, str]:
    """Of a contestant in a process of its own: this checkout, then what is on the path, caches in `folder`, offline."""
    paths = (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "FASTDPO_CACHE": f"{folder}/fastdpo",
        "HF_HOME": f"{folder}/hf",
        "HF_HUB_OFFLINE": "1",
    }


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """<folder>/<device>/<name>.json; whole or not at all."""
    record = {"benchmark": name, **environment(), **result}
    slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    path = folder / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.replace(path)
    return path
