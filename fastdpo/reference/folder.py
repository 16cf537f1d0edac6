"""The folder of a reference cache: its manifest, which says what it holds, and how files are written there."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from fastdpo.types import UserError

FORMAT = 3
MANIFEST = "manifest.json"
SHARDS = "shard-*.parquet"
DAMAGED = ".damaged"  # what a damaged file's name is given as an end


@dataclass(frozen=True)
class Kind:
    """What two folders, or a shard and its folder, must have in common for their values to stand side by side."""

    per_token: bool
    fingerprint: dict[str, str]
    format: int = FORMAT

    def as_dict(self) -> dict[str, Any]:
        return {"format": self.format, "per_token": self.per_token, "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Kind:
        """From `as_dict`; of another format's values that format alone, since the rest may mean something else there.

        Raises:
            ValueError, KeyError, TypeError: the values are no such.
        """
        if values["format"] != FORMAT:
            return cls(True, {}, values["format"])
        kind = cls(values["per_token"], dict(values["fingerprint"]))
        if not isinstance(kind.per_token, bool) or not all(isinstance(part, str) for part in kind.fingerprint.values()):
            raise ValueError("per_token or fingerprint are of another type")
        return kind

    def differences(self, there: Kind) -> list[str]:
        """What differs, as "dtype float32 there, bfloat16 here" where this is the kind here."""
        if there.format != self.format:
            return [f"format {there.format} there, {self.format} here"]
        kinds = [] if there.per_token == self.per_token else [f"{_kept(there)} there, {_kept(self)} here"]
        return [*kinds, *differences(there.fingerprint, self.fingerprint).values()]


def _kept(kind: Kind) -> str:
    return "the log-prob of each token" if kind.per_token else "sums only"


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> dict[str, str]:
    """For each part in which two fingerprints differ, "dtype float32 there, bfloat16 here"."""
    return {
        part: f"{part} {there.get(part, _absent(part))} there, {here.get(part, _absent(part))} here"
        for part in {**there, **here}
        if there.get(part) != here.get(part)
    }


def _absent(part: str) -> str:
    """Some parts are only in the fingerprint of a model that is not what its config makes of its weights."""
    return "as the config says" if part in ("buffers", "attributes", "quantization") else "unknown"


@dataclass(frozen=True)
class Manifest:
    kind: Kind
    about: dict[str, str] = field(default_factory=dict)  # for people; never compared
    created: str | None = None  # UTC, ISO 8601


class OtherFormat(UserError):
    """A folder of a format that this fastdpo does not read."""

    def __init__(self, folder: Path, number: Any) -> None:
        super().__init__(
            f"{folder} is a reference cache of format {number}, and this fastdpo reads format {FORMAT}; "
            "name another folder."
        )
        self.format = number


class BrokenManifest(UserError):
    """The manifest is missing beside shards, or damaged; the shards know what it said."""


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where nothing was written yet.

    Raises:
        BrokenManifest, OtherFormat: see there.
        UserError: the folder is a file, or the manifest cannot be read.
    """
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a reference cache is a folder. Name another path.")
    remedy = f"fastdpo cache verify {folder} --repair writes it anew."
    try:
        # A manifest comes before the first shard, so it is looked for once more after shards were seen.
        if not path.exists() and any(folder.glob(SHARDS)) and not path.exists():
            raise BrokenManifest(f"{folder} holds shards but no {MANIFEST} to say which model they are of; {remedy}")
        values = json.loads(path.read_bytes())
        manifest = Manifest(Kind.from_dict(values), dict(values.get("about") or {}), values.get("created"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise BrokenManifest(f"{path} is damaged; {remedy}") from None
    if manifest.kind.format != FORMAT:
        raise OtherFormat(folder, manifest.kind.format)
    return manifest


def require_manifest(folder: Path) -> Manifest:
    """`read_manifest` of a folder that must be a cache."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} is no reference cache: it has no {MANIFEST}.")
    return manifest


def write_manifest(folder: Path, kind: Kind, about: Mapping[str, str]) -> None:
    """Gives the folder a manifest, unless another process has done so meanwhile."""
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({**kind.as_dict(), "about": dict(about), "created": created}, indent=2)
    write_file(folder / MANIFEST, lambda file: file.write(text.encode()), exclusive=True)


def write_file(path: Path, write: Callable[[BinaryIO], object], *, exclusive: bool = False) -> None:
    """Writes a file that is there whole or not at all, and on disk when this returns.

    Args:
        exclusive: leave a file alone that has this name.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename, too, must survive a power cut
    finally:
        os.close(folder)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(temporary, path)


def set_aside(path: Path) -> str:
    """Renames a damaged file, where the folder can be written to, and says so."""
    aside = path.with_name(path.name + DAMAGED)
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return "another process has set it aside"
    except OSError as error:
        return f"it could not be set aside ({error.strerror or error}): delete it"
    return f"it was set aside as {aside.name}"


def files_set_aside(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{DAMAGED}"))


def temporary_files(folder: Path, seconds: float = 0) -> list[Path]:
    """Those nobody has written to for so long."""
    return sorted(file for file in folder.glob(".*.tmp") if _stat(file).st_mtime <= time.time() - seconds)


def size_of(files: Iterable[Path]) -> int:
    """Bytes."""
    return sum(_stat(file).st_size for file in files)


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except FileNotFoundError:  # a temporary file that has its name by now
        return os.stat_result([0] * 10)
