"""The checkout that is tested: where it stands, and its scripts as modules."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORT_PATH = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "tests"))


def load(path):
    """A script of the checkout as a module. Its folder stays off the import path: docs/losses.py is no `losses`."""
    name = f"checkout_{Path(path).with_suffix('').as_posix().replace('/', '_')}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
