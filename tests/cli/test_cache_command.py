"""fastdpo cache: what it prints, and its exit codes."""

import json
import re

import numpy as np
import pytest
from cache_folders import FINGERPRINT, check, contents, flip, shard_of, shards_of, values

from fastdpo.cli import main
from fastdpo.reference.cache import ReferenceCache, default_cache_dir, user_cache_dir


@pytest.fixture
def call(capsys):
    """Runs `fastdpo cache`; returns exit code, stdout and stderr."""

    def run(*arguments):
        code = main(["cache", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path):
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT, about={"model": "org/name", "torch": "2.11"})
    cache.add({number.to_bytes(16, "big"): -np.ones(number % 3, np.float32) for number in range(1200)})
    return cache.path


def test_info(call, folder):
    before = contents(folder)
    code, out, err = call("info", folder)
    assert (code, err) == (0, "") and contents(folder) == before
    first, *lines = out.splitlines()
    assert first == str(folder)
    assert {line.index(line.split(maxsplit=1)[1].strip(), 12) for line in lines} == {13}  # aligned
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["model"] == "org/name" and facts["torch"] == "2.11" and facts["dtype"] == "float32"
    assert facts["sequences"] == "1,200" and facts["tokens"] == "1,200"
    assert facts["log-prob"] == "-1.0000 a token on average" and facts["format"] == "3, log-prob of each token"
    assert re.fullmatch(r"\d\d\.\d kB in 1 shard", facts["size"])
    shard = shard_of(folder)
    ReferenceCache(folder).add({bytes(16): np.zeros(0, np.float32)})
    flip(shard, 60)
    (folder / "x.damaged").write_text("")
    (folder / ".y.tmp").write_text("")
    out = call("info", folder, folder)[1]
    assert (
        out.count(f"{shard.name}: ") == 2
        and "1 damaged file (fastdpo cache prune" in out
        and "1 file of writers" in out
    )


def test_info_as_json(call, folder):
    code, out, _ = call("info", "--json", folder)
    (info,) = json.loads(out)
    assert code == 0
    assert (info["path"], info["sequences"], info["mean_logp"], info["shards"]) == (str(folder), 1200, -1, 1)
    assert info["fingerprint"] == FINGERPRINT and info["about"]["model"] == "org/name"


def test_the_folders_of_the_user(call):
    root = user_cache_dir()
    assert call("info") == (0, f"no reference caches in {root}\n", "")
    assert call("info", "--json")[1] == "[]\n"
    new = default_cache_dir(FINGERPRINT)
    ReferenceCache(new, FINGERPRINT, about={"model": "org/name"}).add(values(1200))
    nameless = default_cache_dir({**FINGERPRINT, "dtype": "bfloat16"})
    ReferenceCache(nameless, {**FINGERPRINT, "dtype": "bfloat16"}).add(values(3))
    old = root / "reference-2" / "some"
    old.mkdir(parents=True)
    (old / "manifest.json").write_text('{"format": 2, "per_token": true, "fingerprint": {}}')
    (root / "reference-3" / "empty").mkdir()
    (root / "models").mkdir()
    code, out, err = call("info")
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    assert header.split() == ["size", "sequences", "model", "folder"] and len(lines) == 4
    column = header.index("folder")
    by_folder = {line[column:]: line[:column].split() for line in lines}
    assert by_folder.pop(str(new))[2:] == ["1,200", "org/name,", "float32"]
    assert by_folder.pop(str(nameless))[2:] == ["3", "weights", "aaaaaaaa,", "bfloat16"]
    assert by_folder.pop(str(old))[2:] == ["format", "2,", "no", "longer", "read"]
    assert "no reference cache" in " ".join(by_folder.pop(str(root / "reference-3" / "empty")))
    listed = {one["path"]: one for one in json.loads(call("info", "--json")[1])}
    assert listed[str(new)]["sequences"] == 1200 and "of format 2" in listed[str(old)]["error"]


def test_verify(call, folder):
    assert call("verify", folder) == (0, f"{folder}: 1 shard, 1,200 sequences: sound\n", "")
    shard = shard_of(folder)
    flip(shard, 60)
    code, out, _ = call("verify", folder)
    assert code == 1 and shard.exists()
    assert out.splitlines()[0].startswith(f"{shard.name}: ") and out.splitlines()[1].endswith("1 file not sound")
    code, out, _ = call("verify", folder, "--repair")
    assert code == 1 and f"; it was set aside as {shard.name}.damaged" in out
    assert call("verify", folder)[0] == 0


def test_verify_writes_the_manifest_that_an_error_tells_of(call, folder):
    (folder / "manifest.json").unlink()
    code, out, err = call("info", folder)
    assert (code, out) == (2, "") and err.count("\n") == 1
    remedy = re.search(r"fastdpo cache (verify \S+ --repair) writes it anew", err)[1]
    assert call(*remedy.split())[0] == 1
    assert call("verify", folder)[0] == 0
    assert len(ReferenceCache(folder, FINGERPRINT)) == 1200


def test_merge(call, tmp_path, folder):
    more = tmp_path / "more"
    ReferenceCache(more, FINGERPRINT).add(values(5))
    out = tmp_path / "out"
    assert call("merge", out, folder, more) == (
        0, f"{out}: 1,205 sequences, 1,205 of them new; 2 shards copied, 0 there already\n", "",
    )  # fmt: skip
    assert call("merge", out, folder, more)[1].endswith("0 of them new; 0 shards copied, 2 there already\n")
    flip(shard_of(more), 60)
    code, printed, _ = call("merge", tmp_path / "other", folder, more)
    assert code == 1 and printed.startswith(f"left out: {shard_of(more)} (")
    code, printed, err = call("merge", out, out)
    assert (code, printed) == (2, "") and err.startswith("fastdpo: ") and err.count("\n") == 1


def test_prune(call, folder):
    cache = ReferenceCache(folder)
    cache.add(values(5) | {bytes(16): np.zeros(0, np.float32)})
    (folder / "x.damaged").write_text("x" * 5000)
    before = contents(folder)
    code, out, _ = call("prune", folder, "--dry_run")
    assert code == 0 and contents(folder) == before
    assert "(dry run: nothing was changed)" in out and re.search(r"freed +about 5\.\d kB", out)
    code, out, _ = call("prune", folder)
    assert code == 0 and "dry run" not in out
    assert re.search(r"rows +1,205 kept, 1 dropped\n +shards +2 -> 1\n +files removed +1 set aside", out)
    assert len(shards_of(folder)) == 1
    check(
        ReferenceCache(folder),
        {number.to_bytes(16, "big"): -np.ones(number % 3, np.float32) for number in range(1200)} | values(5),
    )


@pytest.mark.parametrize("action", ["info", "verify", "merge", "prune"])
def test_what_it_does_not_know(call, folder, action):
    paths = [folder] * (2 if action == "merge" else 1)
    code, out, err = call(action, *paths, "--what", "5")
    assert (code, out) == (2, "") and err.startswith(f"fastdpo: fastdpo cache {action} does not know --what; see")
    code, out, err = call(action, *(f"{path}-none" for path in paths))
    assert (code, out) == (2, "") and "no reference cache" in err and err.count("\n") == 1


def test_without_a_command(call):
    code, out, err = call()
    assert (code, out) == (2, "") and "COMMAND" in err and err.count("\n") == 1
