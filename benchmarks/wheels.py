"""Wheels for a GPU machine without network: downloaded here, installed there beside what the machine has.

    python benchmarks/wheels.py download A|B FOLDER     `make gpu-wheels`, with SET=B the second set
    python benchmarks/wheels.py install FOLDER          what `make test-gpu WHEELS=FOLDER` does before it begins

Set A is what fastdpo's trainers need and the peers in pure Python; set B is quack and flash-attn 4. Versions are those
of constraints.txt; no wheel brings what it depends on. A wheel of more than 45 MB is cut, and the set laid into folders
of which each can travel alone: FOLDER/a, FOLDER/b-1, FOLDER/b-2. What is installed, and the pieces that have come so
far, stay in a folder of the machine's for temporary files, so a cut wheel is whole once all its pieces have been there.
"""

from __future__ import annotations

import argparse
import email
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "A": ("trl", "datasets", "dill", "multiprocess", "liger-kernel", "cut-cross-entropy"),
    "B": (
        "quack-kernels", "flash-attn-4", "apache-tvm-ffi", "torch-c-dlpack-ext", "nvidia-cutlass-dsl",
        "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core", "nvidia-cutlass-dsl-libs-cu13",
    ),
}  # fmt: skip
# Of the GPU machine, whatever runs here. pip matches glibc's versions one by one.
PYTHON, GLIBC = "3.12", (39, 38, 35, 34, 31, 28, 27, 24, 17)
PIECE = 45 << 20
LOAD = 50 << 20  # bytes that travel at once, beside the checkout
CUT = ".piece-"  # NAME.whl.piece-1-of-2


def versions() -> dict[str, str]:
    """name -> version, of constraints.txt where no marker says otherwise."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if "==" in line and not line.startswith("#") and ";" not in line]
    return {name.strip(): version.strip() for name, version in pinned}


def download(which: str, folder: Path) -> list[Path]:
    """The folders in which the set now lies."""
    with tempfile.TemporaryDirectory(dir=folder) as fetched:
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
        known = versions()
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON,
             *(word for platform in platforms for word in ("--platform", platform)),
             "--dest", fetched, *(f"{name}=={known[name]}" for name in SETS[which])],
            check=True,
        )  # fmt: skip
        return laid_out(sorted(Path(fetched).iterdir()), folder, which.lower())


def laid_out(wheels: list[Path], folder: Path, name: str, piece: int = PIECE, load: int = LOAD) -> list[Path]:
    """Moves wheels, cut where they are larger than a piece, into folders of no more than a load each."""
    for old in [folder / name, *folder.glob(f"{name}-[0-9]*")]:
        for file in old.glob("*"):
            file.unlink()
    loads: list[list[Path]] = [[]]
    for path in sorted(cut(wheels, piece), key=lambda path: path.stat().st_size, reverse=True):
        fitting = (each for each in loads if sum(one.stat().st_size for one in each) + path.stat().st_size <= load)
        chosen = next(fitting, None)
        if chosen is None:
            loads.append(chosen := [])
        chosen.append(path)
    folders = []
    for number, paths in enumerate(loads, 1):
        folders.append(folder / (name if len(loads) == 1 else f"{name}-{number}"))
        folders[-1].mkdir(parents=True, exist_ok=True)
        for path in paths:
            path.replace(folders[-1] / path.name)
    return folders


def cut(wheels: list[Path], piece: int) -> list[Path]:
    made = []
    for wheel in wheels:
        count = -(-wheel.stat().st_size // piece)
        if count <= 1:
            made.append(wheel)
            continue
        with wheel.open("rb") as file:
            for number in range(1, count + 1):
                made.append(wheel.with_name(f"{wheel.name}{CUT}{number}-of-{count}"))
                made[-1].write_bytes(file.read(piece))
        wheel.unlink()
    return made


def install(folder: Path, scratch: Path | None = None) -> Path:
    """The folder for PYTHONPATH; says what does not fit this machine, and which pieces are missing."""
    scratch = scratch or Path(tempfile.gettempdir()) / f"fastdpo-gpu-wheels-{os.getuid()}"
    site, arrived = scratch / "site", scratch / "arrived"
    arrived.mkdir(parents=True, exist_ok=True)
    for file in [*folder.rglob("*.whl"), *folder.rglob(f"*{CUT}*")]:
        for old in arrived.glob(f"{file.name.partition('-')[0]}-*"):
            if old.name.partition(CUT)[0] != file.name.partition(CUT)[0]:
                old.unlink()  # another version, of an earlier day
        shutil.copyfile(file, arrived / file.name)
    join(arrived)
    wheels = [wheel for wheel in sorted(arrived.glob("*.whl")) if fits(wheel)]
    if not wheels:
        raise SystemExit(f"{folder} holds no wheel for this machine; `make gpu-wheels` downloads them.")
    shutil.rmtree(site, ignore_errors=True)  # all at once and anew: of packages that share a folder pip keeps the last
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
         "--no-compile", "--no-cache-dir", "--target", str(site), *map(str, wheels)],
        check=True,
    )  # fmt: skip
    print(f"installed in {site}:", ", ".join("-".join(wheel.name.split("-")[:2]) for wheel in wheels))
    for line in unmet(wheels, site):
        print(line)
    # Python reads .pth files in its own site-packages alone; one of set B adds a folder to the import path.
    (site / "sitecustomize.py").write_text("import os, site\n\nsite.addsitedir(os.path.dirname(__file__))\n")
    return site


def join(folder: Path) -> None:
    """Puts those wheels together of which all pieces are there."""
    wheels: dict[tuple[str, int], dict[int, Path]] = {}
    for path in folder.glob(f"*{CUT}*"):
        name, _, which = path.name.partition(CUT)
        number, _, count = which.partition("-of-")
        wheels.setdefault((name, int(count)), {})[int(number)] = path
    for (name, count), found in wheels.items():
        if len(found) == count:
            (folder / name).write_bytes(b"".join(found[number].read_bytes() for number in range(1, count + 1)))
        else:
            print(f"{name}: {len(found)} of {count} pieces have come so far.")


def fits(wheel: Path) -> bool:
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    *_, tags = parse_wheel_filename(wheel.name)
    supported = not tags.isdisjoint(sys_tags())
    if not supported:
        print(f"{wheel.name} is not for this Python or machine, and is left out.")
    return supported


def unmet(wheels: list[Path], site: Path) -> list[str]:
    """What these wheels require and neither bring nor find here."""
    from packaging.requirements import Requirement

    lines = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = email.message_from_bytes(archive.read(name))
        for text in metadata.get_all("Requires-Dist") or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            here = _version(requirement.name, site)
            if here is None or not requirement.specifier.contains(here, prereleases=True):
                wanted = f"{metadata['Name']} {metadata['Version']} wants {requirement.name}{requirement.specifier}"
                lines.append(f"{wanted}, and {'there is none' if here is None else f'here is {here}'}.")
    return lines


def _version(name: str, site: Path) -> str | None:
    found = [
        *importlib.metadata.distributions(name=name, path=[str(site)]),
        *importlib.metadata.distributions(name=name),
    ]
    return found[0].version if found else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("download")
    fetching.add_argument("set", choices=SETS)
    fetching.add_argument("folder", type=Path)
    commands.add_parser("install").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "install":
        print(install(options.folder))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for folder in download(options.set, options.folder):
        files = sorted(folder.iterdir())
        print(f"{folder}, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB:")
        for file in files:
            print(f"  {file.stat().st_size / 1e6:6.2f} MB  {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
