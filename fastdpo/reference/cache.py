"""A folder of reference log-probs, keyed by content.

    manifest.json                   format version and the fingerprint of the model that all values come from
    shard-<time>-<random>.parquet   key (16 bytes), logps (float32 of each completion token), one row a sequence

A shard is written under a temporary name, flushed to disk, then renamed: it is there whole or not at all. Nobody ever
writes to a finished shard, so several processes may add shards at once. Pages carry checksums; a shard that cannot be
read is named, set aside as <name>.damaged, and what it held is computed again.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.types import UserError

FORMAT = 1
MANIFEST = "manifest.json"


def user_cache_dir() -> Path:
    """$FASTDPO_CACHE, or fastdpo under $XDG_CACHE_HOME (~/.cache)."""
    given = os.environ.get("FASTDPO_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastdpo"


def default_cache_dir(fingerprint: Mapping[str, str]) -> Path:
    """The folder, in the user's cache, of the reference with this fingerprint."""
    return user_cache_dir() / "reference" / "-".join(fingerprint[part] for part in ("weights", "config", "dtype"))


class ReferenceCache:
    """Per-token log-probs by sequence key.

    Args:
        path: the folder; made when the first values are added.
        fingerprint: of the model the values are for (`model_fingerprint`). Without it, the folder must exist, and the
            fingerprint is taken from its manifest.

    Raises:
        UserError: the folder belongs to another model, dtype or format, or is no cache, or cannot be used.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._values: dict[bytes, np.ndarray] = {}
        self._read_shards: set[str] = set()
        manifest = self._manifest()
        if manifest is None:
            if fingerprint is None:
                raise UserError(f"{self.path} is no reference cache: it has no {MANIFEST}.")
            self.fingerprint = dict(fingerprint)
        else:
            self.fingerprint = dict(manifest["fingerprint"])
            self._check_fingerprint(fingerprint)
        self.reload()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def __getitem__(self, key: bytes) -> np.ndarray:
        """The log-probs (completion tokens,) float32."""
        return self._values[key]

    def reload(self) -> None:
        """Reads the shards that have appeared since the last look."""
        if not self.path.is_dir():
            return
        for shard in sorted(self.path.glob("shard-*.parquet")):
            if shard.name not in self._read_shards:
                self._read(shard)

    def add(self, values: Mapping[bytes, np.ndarray]) -> None:
        """Writes one shard with these log-probs; on disk when it returns."""
        if not values:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [np.asarray(value, dtype=np.float32) for value in values.values()]
        table = pa.table(
            {
                "key": pa.array(list(values), type=pa.binary(16)),
                "logps": pa.array(rows, type=pa.list_(pa.float32())),
            }
        )
        name = f"shard-{time.time_ns():020d}-{secrets.token_hex(4)}.parquet"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / MANIFEST).exists():
                manifest = {"format": FORMAT, "fingerprint": self.fingerprint}
                self._write(MANIFEST, lambda file: file.write(json.dumps(manifest, indent=2).encode()))
            self._write(name, lambda file: pq.write_table(table, file, write_page_checksum=True))
        except OSError as error:
            raise UserError(
                f"{self.path}: the reference cache cannot be written ({error.strerror or error}); "
                "free space or name another folder. What was written before is kept."
            ) from error
        self._read_shards.add(name)
        self._values.update(zip(values, rows, strict=True))

    def _write(self, name: str, write: Any) -> None:
        temporary = self.path / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename, too, must survive a power cut
        finally:
            os.close(folder)

    def _read(self, shard: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(shard, columns=["key", "logps"], page_checksum_verification=True)
            keys = table.column("key").to_pylist()
            logps = table.column("logps").combine_chunks()
            flat, offsets = logps.values.to_numpy(), logps.offsets.to_numpy()
        except (OSError, pa.ArrowException, KeyError) as error:
            aside = shard.with_name(shard.name + ".damaged")
            with suppress(OSError):  # a folder that we may only read: the shard is passed over all the same
                os.replace(shard, aside)
            warnings.warn(
                f"{shard} is damaged ({str(error).splitlines()[0]}); it was set aside as {aside.name}, and the values "
                "it held will be computed again.",
                stacklevel=3,
            )
            return
        self._values.update((key, flat[offsets[i] : offsets[i + 1]]) for i, key in enumerate(keys))
        self._read_shards.add(shard.name)

    def _manifest(self) -> dict[str, Any] | None:
        path = self.path / MANIFEST
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; a reference cache is a folder. Name another path.")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            if self.path.is_dir() and any(self.path.glob("shard-*.parquet")):
                raise UserError(
                    f"{self.path} holds shards but no {MANIFEST}, so nobody knows which model they are of; "
                    "restore the manifest or name another folder."
                ) from None
            return None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
        try:
            manifest = json.loads(text)
            version, _ = manifest["format"], dict(manifest["fingerprint"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; restore it or name another folder.") from None
        if version != FORMAT:
            raise UserError(
                f"{self.path} is a reference cache of format {version}, and this fastdpo reads format {FORMAT}; "
                "name another folder."
            )
        return manifest

    def _check_fingerprint(self, wanted: Mapping[str, str] | None) -> None:
        if wanted is None:
            return
        differing = [part for part in wanted if self.fingerprint.get(part) != wanted[part]]
        if differing:
            what = "; ".join(f"{part} {self.fingerprint.get(part)} there, {wanted[part]} here" for part in differing)
            raise UserError(
                f"{self.path} holds log-probs of another reference model ({what}); "
                "name another folder or load the model it was made with."
            )
