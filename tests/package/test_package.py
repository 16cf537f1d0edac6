"""What importing costs and touches; who may import whom; what ships."""

import ast
import json
import re
import sys

import pytest
from checkout import ROOT
from processes import run

PACKAGE = ROOT / "fastdpo"

# Each line may import those above it, and itself.
ORDER = [
    {"fastdpo_kernels", "types", "device", "adapters"},
    {"ops", "losses", "data", "saving", "stopping"},
    {"groups"},
    {"packing"},
    {"attention"},
    {"functional", "sums"},
    {"models"},
    {"verify"},
    {"scoring", "score_models"},
    {"reference", "evaluation"},
    {"trainer"},
    {"report", "progress", "demo"},
    {"run"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}


def python(code):
    return run("-c", code)


HEAVY = ("triton", "transformers", "accelerate", "datasets", "pyarrow", "pandas", "matplotlib", "peft")


def test_import_is_light():
    """`import fastdpo` brings not even torch; losses and batches bring torch alone."""
    bare, used = python(
        "import sys, fastdpo\n"
        f"heavy = lambda: print(*(name for name in ('torch', *{HEAVY}) if name in sys.modules))\n"
        "heavy()\n"
        "fastdpo.loss, fastdpo.linear_loss, fastdpo.PreferenceCollator\n"
        "heavy()"
    ).stdout.splitlines()
    assert bare == "" and used == "torch"


@pytest.mark.slow
def test_nothing_is_said_of_the_folder_kernels():
    """In the root, where a folder of that name stands: PyPI has a package `kernels`, which others look for."""
    done = python("import fastdpo, transformers; from transformers import Trainer")
    assert "kernels" not in done.stdout + done.stderr
    said = python(
        "import logging, fastdpo\n"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load x from kernels-community: %s', ImportError('kernels'))\n"
        "log.warning('something else')"
    ).stderr
    assert said.split() == ["something", "else"]


@pytest.mark.slow
def test_fastdpo_loss_stays_a_function():
    python(
        "import fastdpo, fastdpo.losses, fastdpo.functional, fastdpo.reference; from types import FunctionType; "
        "assert isinstance(fastdpo.loss, FunctionType) and isinstance(fastdpo.precompute, FunctionType)"
    )
    assert not (PACKAGE / "loss.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_public_name_is_there():
    import fastdpo

    for name in fastdpo.__all__:
        assert getattr(fastdpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'dpo'"):
        _ = fastdpo.dpo


def imports(path):
    """(part, line) of every fastdpo import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" if node.module == "fastdpo" else node.module for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastdpo_kernels":
                yield "fastdpo_kernels", node.lineno
            elif parts[0] == "fastdpo" and len(parts) > 1:
                yield parts[1], node.lineno


def test_imports_go_one_way():
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) > 30
    for path in files:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for part, line in imports(path):
            where = f"{path.relative_to(ROOT)}:{line} imports {part}"
            assert part in LEVEL and own in LEVEL, where
            assert part == own or LEVEL[part] < LEVEL[own], where
            assert part != "fastdpo_kernels" or own == "ops", where


def test_kernels_need_torch_and_triton_only():
    for path in (ROOT / "kernels" / "fastdpo_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton", "fastdpo_kernels"} or top in sys.stdlib_module_names, (path, name)


def test_extras():
    """flash-attn is built where it is installed: no target of make, and so no CI, brings it."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest needs it there

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"\"\.\[([\w,]+)\]\"", (ROOT / "Makefile").read_text())
    installed = {name for names in installed for name in names.split(",")}
    assert installed == {"demo", "dev", "bench"}
    assert not [each for name in installed for each in extras[name] if "flash" in each]
    assert [each.partition(">")[0] for each in extras["flash"]] == ["flash-attn"]
    named = {}
    for path in (*PACKAGE.rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"fastdpo\[(\w+)\]", path.read_text()):
            named.setdefault(name, []).append(path.name)
    assert named.keys() <= extras.keys(), named
    assert {"README.md", "flash.py"} <= {*named["flash"]}  # what to install, and the message that says so


def test_the_demo_data():
    from fastdpo.data import read_rows, validate_rows
    from fastdpo.demo import HELD_OUT_FILE, TRAIN_FILE

    (train, places), (held_out, more) = read_rows(TRAIN_FILE), read_rows(HELD_OUT_FILE)
    validate_rows(train + held_out, places + more)
    assert len(train) == 160 and len(held_out) == 48
    texts = [json.dumps(row["prompt"]) for row in train + held_out]
    assert len(set(texts)) == 208
