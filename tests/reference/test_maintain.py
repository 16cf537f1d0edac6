"""Folders of log-probs looked after: described, verified, merged, pruned; killed in between, nothing is lost."""

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pyarrow as pa
import pytest
from cache_folders import (
    FINGERPRINT,
    KIND,
    check,
    columns_of,
    contents,
    flip,
    flip_log_prob,
    killed_at,
    prune_into_shards_of_100,
    shard_of,
    shards_of,
    values,
    write_foreign,
)
from counting import calls, memory
from processes import Worker, wait_until

from fastdpo.reference import ReferenceCache
from fastdpo.reference import prune as prune_module
from fastdpo.reference import shard as shard_module
from fastdpo.reference.folder import Kind
from fastdpo.reference.maintain import describe, merge, prune, verify
from fastdpo.types import UserError


def folder_of(path, *shards, kind=KIND, **about):
    cache = ReferenceCache(path, kind.fingerprint, per_token=kind.per_token, about=about)
    for expected in shards:
        cache.add(expected)
    return path


def together(*parts):
    return {key: value for part in parts for key, value in part.items()}


# describe


def test_what_a_folder_holds(tmp_path):
    first, second = values(30), values(20, 1)
    folder = folder_of(tmp_path / "c", first, second, dict(list(first.items())[:7]), model="org/name")
    damaged = shards_of(folder)[1]
    flip(damaged, 60)
    write_foreign(folder / "shard-x.parquet", Kind(False, FINGERPRINT), values(2, 3))
    (folder / "shard-y.parquet").mkdir()
    (folder / ".shard-z.tmp").write_text("half")
    (folder / "old.damaged").write_text("")
    before = contents(folder)
    info = describe(folder)
    assert contents(folder) == before
    total = sum(float(value.sum(dtype=np.float64)) for value in first.values())
    tokens = sum(map(len, first.values()))
    assert (info.sequences, info.duplicates, info.tokens, info.shards) == (30, 7, tokens, 2)
    assert info.mean_logp == pytest.approx(total / tokens)
    assert (info.format, info.per_token, info.fingerprint, info.about) == (3, True, FINGERPRINT, {"model": "org/name"})
    assert info.created.endswith("+00:00")
    assert info.damaged == ["old.damaged"] and info.leftovers == [".shard-z.tmp"]
    assert info.unreadable.keys() == {damaged.name, "shard-x.parquet", "shard-y.parquet"}
    assert "CRC" in info.unreadable[damaged.name] and "sums only there" in info.unreadable["shard-x.parquet"]
    assert info.bytes == sum(path.stat().st_size for path in folder.iterdir())
    json.dumps(info.as_dict(), allow_nan=False)


def test_a_folder_of_nothing(tmp_path):
    ReferenceCache(tmp_path / "c", FINGERPRINT).create()
    info = describe(tmp_path / "c")
    assert (info.sequences, info.duplicates, info.tokens, info.mean_logp, info.shards) == (0, 0, 0, None, 0)
    assert verify(tmp_path / "c").sound
    assert prune(tmp_path / "c").rows_kept == 0
    for look in (describe, verify, prune, lambda path: merge(tmp_path / "c", [path])):
        with pytest.raises(UserError, match=r"nothing is no reference cache: it has no manifest.json"):
            look(tmp_path / "nothing")


# verify


@pytest.mark.parametrize("per_token", [True, False])
def test_a_sound_folder(tmp_path, per_token):
    expected = values(shard_module.GROUP_ROWS + 3)
    folder = folder_of(tmp_path / "c", expected, values(3, 1), kind=Kind(per_token, FINGERPRINT))
    before = contents(folder)
    for repair in (False, True):
        report = verify(folder, repair)
        assert report.sound and (report.shards, report.sequences) == (2, len(expected) + 3)
    assert contents(folder) == before


def test_every_bad_shard_is_named(tmp_path):
    group = shard_module.GROUP_ROWS
    kept = values(5)
    folder = folder_of(tmp_path / "c", kept, values(4, 1), values(group + 9, 2), values(40, 3), values(40, 4))
    _, keys, late, cut, empty = shards_of(folder)
    flip(keys, 60)
    flip_log_prob(late, group=1)
    cut.write_bytes(cut.read_bytes()[:700])
    empty.write_bytes(b"")
    write_foreign(folder / "shard-foreign.parquet", Kind(True, {**FINGERPRINT, "dtype": "bf"}), values(2, 5))
    names = {keys.name, late.name, cut.name, empty.name, "shard-foreign.parquet"}
    for name, wrong in (("shard-nan.parquet", np.nan), ("shard-positive.parquet", 0.5)):
        write_foreign(folder / name, KIND, values(3, 6) | {bytes(16): np.array([-1, wrong], np.float32)})
        names.add(name)
    (folder / "shard-folder.parquet").mkdir()
    names.add("shard-folder.parquet")
    before = contents(folder)
    report = verify(folder)
    assert contents(folder) == before and report.repaired == {}
    assert not report.sound and report.bad.keys() == names and report.sequences == len(kept)
    assert "dtype bf there, float32 here): move it out of the folder" in report.bad["shard-foreign.parquet"]
    assert report.bad["shard-nan.parquet"] == "row 3 holds a log-prob of nan"
    assert report.bad["shard-positive.parquet"] == "row 3 holds a log-prob of 0.5"
    assert "cannot be opened" in report.bad["shard-folder.parquet"]
    report = verify(folder, repair=True)
    assert report.bad.keys() == names
    stay = {"shard-foreign.parquet", "shard-folder.parquet"}
    assert report.repaired.keys() == names - stay
    assert {path.name for path in folder.iterdir()} == before.keys() - report.repaired.keys() | stay | {
        f"{name}.damaged" for name in report.repaired
    }
    assert verify(folder).bad.keys() == stay
    (folder / "shard-foreign.parquet").unlink()
    (folder / "shard-folder.parquet").rmdir()
    assert verify(folder).sound
    check(ReferenceCache(folder, FINGERPRINT), kept)


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [True, False])
def test_damage_anywhere_in_a_shard_is_found(tmp_path, per_token):
    """Or it changes no value: a byte of the footer's statistics or of a name that nobody reads."""
    folder = folder_of(tmp_path / "c", values(12, seed=5), kind=Kind(per_token, FINGERPRINT))
    shard = shard_of(folder)
    data, found, harmless = shard.read_bytes(), 0, 0
    for position in range(0, len(data), 3):
        flip(shard, position, bits=1 << position % 8)
        if verify(folder).sound:
            check(ReferenceCache(folder), values(12, seed=5))
            harmless += 1
        else:
            found += 1
        shard.write_bytes(data)
    assert found > harmless
    for length in (0, 1, 4, 100, len(data) // 2, len(data) - 9, len(data) - 8, len(data) - 1):
        shard.write_bytes(data[:length])
        assert verify(folder).bad.keys() == {shard.name}


@pytest.mark.parametrize("harm", ["missing", "empty", "garbage"])
def test_a_manifest_is_written_anew(tmp_path, harm):
    folder = folder_of(tmp_path / "c", values(5), values(5, 1), kind=Kind(False, FINGERPRINT))
    flip(shards_of(folder)[0], 60)
    manifest = folder / "manifest.json"
    manifest.unlink() if harm == "missing" else manifest.write_text({"empty": "", "garbage": "{]"}[harm])
    before = contents(folder)
    report = verify(folder)
    assert report.bad.keys() == {"manifest.json", shards_of(folder)[0].name} and contents(folder) == before
    report = verify(folder, repair=True)
    assert report.repaired["manifest.json"] == "it was written anew from the shards"
    assert verify(folder).sound
    cache = ReferenceCache(folder, FINGERPRINT)
    assert cache.kind == Kind(False, FINGERPRINT)
    check(cache, values(5, 1))


def test_a_manifest_cannot_be_written_for_shards_that_differ(tmp_path):
    folder = folder_of(tmp_path / "c", values(5))
    write_foreign(folder / "shard-x.parquet", Kind(True, {**FINGERPRINT, "dtype": "bf"}), values(2, 5))
    (folder / "manifest.json").unlink()
    before = contents(folder)
    with pytest.raises(
        UserError, match=r"shard-x.parquet and shard-.* are of different caches \(dtype bf there, float32"
    ):
        verify(folder, repair=True)
    assert contents(folder) == before
    for shard in shards_of(folder):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match=r"neither manifest.json nor a shard can be read"):
        verify(folder, repair=True)
    write_foreign(shard, Kind(True, FINGERPRINT, 4), values(2))
    with pytest.raises(UserError, match="of format 4, and this fastdpo reads format 3"):
        verify(folder, repair=True)
    assert not (folder / "manifest.json").exists()


# merge


def test_slices_merge_to_what_copying_them_together_gives(tmp_path):
    slices = [folder_of(tmp_path / str(n), values(20, n), values(9, 100 + n % 3), part=str(n)) for n in range(16)]
    before = [contents(part) for part in slices]
    copied = tmp_path / "copied"
    for part in reversed(slices):
        shutil.copytree(part, copied, dirs_exist_ok=True)
    done = merge(tmp_path / "merged", slices)
    assert (done.sequences, done.new, done.copied, done.skipped) == (16 * 20 + 27, 16 * 20 + 27, 19, 13)
    assert [contents(part) for part in slices] == before
    expected = together(*(values(20, n) for n in range(16)), *(values(9, 100 + n) for n in range(3)))
    check(ReferenceCache(copied, FINGERPRINT), expected)
    check(ReferenceCache(tmp_path / "merged", FINGERPRINT), expected)
    merged = contents(tmp_path / "merged")
    assert json.loads(merged.pop("manifest.json"))["about"] == {"part": "0"}
    assert merged.items() <= contents(copied).items()
    again = merge(tmp_path / "merged", slices)
    assert (again.new, again.copied, again.skipped) == (0, 0, 32)


def test_merge_into_a_folder_that_exists(tmp_path):
    target, source = folder_of(tmp_path / "t", values(5)), folder_of(tmp_path / "s", values(9, 1))
    shard = shard_of(source)
    write_foreign(target / shard.name, KIND, values(2, 2))  # another shard of that name
    done = merge(target, [source])
    assert (done.new, done.copied) == (9, 1)
    check(ReferenceCache(target), together(values(5), values(9, 1), values(2, 2)))


def test_sums_only_take_no_more_than_sums(tmp_path):
    sums = folder_of(tmp_path / "sums", values(5), kind=Kind(False, FINGERPRINT))
    tokens = folder_of(tmp_path / "tokens", values(9, 1))
    before = contents(sums), contents(tokens)
    with pytest.raises(UserError, match=rf"{sums} keeps sums only and {tokens} the log-prob of each token; merge it"):
        merge(tokens, [sums])
    with pytest.raises(UserError, match=rf"{sums} keeps sums only and {tokens} the log-prob"):
        merge(tmp_path / "new", [tokens, sums])
    assert (contents(sums), contents(tokens)) == before and not (tmp_path / "new").exists()
    for target, sources in ((tmp_path / "new", [sums, tokens]), (sums, [tokens])):
        merge(target, sources)
        cache = ReferenceCache(target)
        assert not cache.per_token
        check(cache, together(values(5), values(9, 1)))
        assert verify(target).sound
    assert contents(tokens) == before[1]


def test_folders_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    first, second = folder_of(tmp_path / "a", values(5)), folder_of(tmp_path / "b", values(9, 1))
    other = folder_of(tmp_path / "o", values(5, 2), kind=Kind(True, {**FINGERPRINT, "weights": "c" * 32}))
    old = tmp_path / "old"
    old.mkdir()
    (old / "manifest.json").write_text('{"format": 2, "per_token": true, "fingerprint": {}}')
    mixed = folder_of(tmp_path / "mixed", values(3, 3))
    write_foreign(mixed / "shard-x.parquet", Kind(True, {**FINGERPRINT, "dtype": "bf"}), values(2, 5))
    before = contents(first)
    for wrong, sentence in (
        (other, rf"{other} cannot be merged with .* \(weights c+ there, a+ here\); merge folders of one model"),
        (old, rf"{old} is a reference cache of format 2"),
        (mixed, "shard-x.parquet cannot be used: .*dtype bf there, float32 here"),
        (tmp_path / "none", "none is no reference cache"),
    ):
        for target in (first, tmp_path / "new"):
            with pytest.raises(UserError, match=sentence):
                merge(target, [second, wrong])
    with pytest.raises(UserError, match="is the folder to merge into"):
        merge(first, [second, tmp_path / "b" / ".." / "a"])
    assert contents(first) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_shard_of_a_source_is_left_out(tmp_path, monkeypatch, gone):
    source = folder_of(tmp_path / "s", values(5), values(40, 1), values(5, 2))
    index, logps, _ = shards_of(source)
    flip(index, 60)
    flip_log_prob(logps)
    if gone:  # as after a prune that another process does
        original = shard_module.read_kind
        monkeypatch.setattr(
            "fastdpo.reference.maintain.read_kind",
            lambda shard: (original(shard), shard.unlink()) and KIND if shard == logps else original(shard),
        )
    done = merge(tmp_path / "t", [source])
    assert done.damaged.keys() == {str(index), str(logps)} and (done.copied, done.skipped) == (1, 0)
    assert ("is gone" in done.damaged[str(logps)]) is gone
    check(ReferenceCache(tmp_path / "t"), values(5, 2))
    assert index.exists() and verify(tmp_path / "t").sound
    assert len(contents(tmp_path / "t")) == 2  # nothing is left of it


# prune


@pytest.fixture
def small(monkeypatch):
    """Limits at which a few hundred rows make several large shards of several groups each."""
    for module in (shard_module, prune_module):
        monkeypatch.setattr(module, "GROUP_ROWS", 16)
    monkeypatch.setattr("fastdpo.reference.cache.GROUP_ROWS", 16)
    monkeypatch.setattr(prune_module, "SHARD_ROWS", 100)


def stored(folder):
    """All rows of all shards: key -> list of (tokens, sum, bytes of the log-probs)."""
    rows = {}
    kind = ReferenceCache(folder).kind
    for shard in shards_of(folder):
        keys, tokens, sums = shard_module.read_index_columns(shard, kind)
        groups = -(-len(keys) // shard_module.GROUP_ROWS) if kind.per_token else 0
        flats = [shard_module.read_group(shard, group)[0] for group in range(groups)]
        parts = np.split(np.concatenate(flats), tokens.cumsum()[:-1]) if flats else [np.empty(0)] * len(keys)
        for key, count, total, part in zip(keys, tokens, sums, parts, strict=True):
            rows.setdefault(key.tobytes(), []).append((int(count), float(total), part.tobytes()))
    return rows


@pytest.mark.parametrize("per_token", [True, False])
def test_small_shards_become_large_ones(tmp_path, small, per_token):
    parts = [values(17, n) for n in range(20)]
    folder = folder_of(tmp_path / "c", *parts, kind=Kind(per_token, FINGERPRINT), model="name")
    before, manifest = stored(folder), (folder / "manifest.json").read_bytes()
    dry = prune(folder, dry_run=True)
    assert (dry.rows_kept, dry.rows_dropped, dry.shards_before, dry.shards_after) == (340, 0, 20, 4)
    assert len(shards_of(folder)) == 20
    done = prune(folder)
    assert (done.rows_kept, done.rows_dropped, done.shards_before, done.shards_after) == (340, 0, 20, 4)
    counts = [
        len(shard_module.read_index_columns(shard, Kind(per_token, FINGERPRINT))[0]) for shard in shards_of(folder)
    ]
    assert counts == [100, 100, 100, 40]
    assert stored(folder) == before and (folder / "manifest.json").read_bytes() == manifest
    check(ReferenceCache(folder, FINGERPRINT), together(*parts))
    after = contents(folder)
    assert prune(folder).shards_after == 4 and contents(folder) == after  # there is nothing left to do
    ReferenceCache(folder).add(values(3, 99))
    assert prune(folder).shards_after == 4
    check(ReferenceCache(folder), together(*parts, values(3, 99)))


def test_large_shards_are_left_alone(tmp_path, small, monkeypatch):
    large, some = values(70), [values(9, n) for n in range(1, 4)]
    folder = folder_of(tmp_path / "c", large, *some)
    first = shards_of(folder)[0]
    before = first.stat()
    done = prune(folder)
    assert (done.shards_before, done.shards_after, first.stat().st_ino) == (4, 2, before.st_ino)
    monkeypatch.setattr(prune_module, "SHARD_LOGPS", 2 * sum(map(len, values(9, 1).values())))
    folder = folder_of(tmp_path / "d", values(9, 1), values(9, 1, most=3))  # large by its log-probs
    assert prune(folder).shards_after == 2


def test_shards_hold_no_more_log_probs_than_the_limit(tmp_path, small, monkeypatch):
    monkeypatch.setattr(prune_module, "SHARD_LOGPS", 50)
    folder = folder_of(tmp_path / "c", *(values(5, n) for n in range(20)), {bytes(16): -np.ones(70, np.float32)})
    before = stored(folder)
    prune(folder)
    assert stored(folder) == before
    tokens = [shard_module.read_index_columns(shard, KIND)[1] for shard in shards_of(folder)]
    assert all(part.sum() <= 50 or len(part) == 1 for part in tokens) and len(tokens) < 21


def test_rows_that_stand_there_twice_are_dropped(tmp_path, small):
    first = values(70)
    changed = {key: value - 1 for key, value in first.items()}  # the first shard's values are those that readers see
    some = dict(list(changed.items())[10:20])
    folder = folder_of(tmp_path / "c", first, values(3, 1) | some, some, values(70, 2) | some)
    done = prune(folder)
    assert (done.rows_kept, done.rows_dropped, done.shards_before, done.shards_after) == (143, 30, 4, 2)
    assert all(len(rows) == 1 for rows in stored(folder).values())
    check(ReferenceCache(folder), together(first, values(3, 1), values(70, 2)))


@pytest.mark.parametrize("per_token", [True, False])
def test_only_the_keys_to_keep_are_kept(tmp_path, small, per_token):
    expected = values(200)
    folder = folder_of(tmp_path / "c", expected, values(9, 1), kind=Kind(per_token, FINGERPRINT))
    keep = dict(list(expected.items())[50:150:2])
    keys = columns_of(keep | values(3, 7))[0]  # keys that the folder lacks, and one given twice
    done = prune(folder, np.concatenate([keys, keys[:1]]))
    assert (done.rows_kept, done.rows_dropped, done.shards_after) == (50, 159, 1)
    check(ReferenceCache(folder), keep, expected.keys() - keep)
    estimate = prune(folder, keys[:1], dry_run=True)
    assert (estimate.rows_kept, estimate.rows_dropped) == (1, 49) and estimate.bytes_freed > 49 * 28 - 1
    with pytest.raises(ValueError, match="of uint8 is wanted"):
        prune(folder, np.zeros((2, 8), np.uint8))
    prune(folder, keys[:0])
    assert len(ReferenceCache(folder)) == 0 and not shards_of(folder)


def test_files_of_no_use_are_removed(tmp_path):
    folder = folder_of(tmp_path / "c", values(5))
    for name in ("shard-1.parquet.damaged", ".old.tmp", ".new.tmp", "notes.txt"):
        (folder / name).write_text("x" * 100)
    hours_ago = time.time() - 2 * 3600
    os.utime(folder / ".old.tmp", (hours_ago, hours_ago))
    before = contents(folder)
    dry = prune(folder, dry_run=True)
    assert contents(folder) == before
    done = prune(folder)
    assert done == dry and done.bytes_freed == 200
    assert set(done.removed) == {"shard-1.parquet.damaged", ".old.tmp"} == before.keys() - contents(folder).keys()


def test_a_reader_keeps_reading(tmp_path, small):
    parts = [values(17, n) for n in range(20)]
    folder = folder_of(tmp_path / "c", *parts)
    reader = ReferenceCache(folder)
    reader.logps(list(parts[0]))
    prune(folder)
    check(reader, together(*parts))
    check(reader, together(*parts))


def test_damage_stops_it(tmp_path, small):
    parts = [values(17, n, most=30) for n in range(20)]
    folder = folder_of(tmp_path / "c", *parts)
    hurt = shards_of(folder)[12]
    flip_log_prob(hurt)  # found when some shards are rewritten
    with pytest.raises(UserError, match=rf"{hurt.name} is damaged \(.*CRC.*; fastdpo cache verify {folder} --repair"):
        prune(folder)
    assert hurt.exists()
    rest = together(*parts[:12], *parts[13:])
    assert stored_keys(folder) == rest.keys() | parts[12].keys()
    verify(folder, repair=True)
    prune(folder)
    check(ReferenceCache(folder), rest)


def stored_keys(folder):
    shards = shards_of(folder)
    return {key.tobytes() for shard in shards for key in shard_module.read_index_columns(shard, KIND)[0]}


@pytest.mark.parametrize("harm", ["index", "foreign"])
def test_what_cannot_be_read_stops_it_before_it_begins(tmp_path, small, harm):
    folder = folder_of(tmp_path / "c", values(17), values(17, 1))
    (folder / "shard-1.parquet.damaged").write_text("")
    shard = shards_of(folder)[1]
    if harm == "index":
        flip(shard, 60)
    else:
        write_foreign(shard, Kind(False, FINGERPRINT), values(2, 5))
    before = contents(folder)
    with pytest.raises(UserError, match=rf"{shard.name} cannot be used: .*; see fastdpo cache verify {folder}"):
        prune(folder)
    assert contents(folder) == before


def test_a_double_does_not_go_for_a_row_that_is_damaged(tmp_path, small):
    first = values(70, most=30)
    folder = folder_of(tmp_path / "c", first, dict(list(first.items())[-20:]))
    flip_log_prob(shards_of(folder)[0], group=4)
    before = contents(folder)
    with pytest.raises(UserError, match=r"is damaged .*CRC"):
        prune(folder)
    assert contents(folder) == before


def test_one_prune_at_a_time(tmp_path):
    folder = folder_of(tmp_path / "c", values(5), values(5, 1))
    with open(folder / "manifest.json", "r+b") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process prunes this folder; wait for it"):
            prune(folder)
        assert prune(folder, dry_run=True).shards_after == 1
    assert prune(folder).shards_after == 1


def test_a_folder_that_cannot_be_written(tmp_path, small, monkeypatch):
    parts = [values(17, n) for n in range(20)]
    folder = folder_of(tmp_path / "c", *parts)
    calls, original = [], os.replace

    def refuse(*paths):
        calls.append(paths)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\).*Nothing is lost"):
            prune(folder)
    assert not list(folder.glob(".*.tmp"))
    check(ReferenceCache(folder), together(*parts))
    assert prune(folder).shards_after == 4
    check(ReferenceCache(folder), together(*parts))


def test_a_disk_too_small_for_both(tmp_path, monkeypatch):
    """Old shards go while new ones come, so that little more than one shard of room is needed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        parts = [values(100, n, most=100) for n in range(30)]  # 700 kB
        folder = folder_of(disk / "c", *parts)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            prune(folder)
        check(ReferenceCache(folder), together(*parts))
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            merge(disk / "d", [folder])
        shutil.rmtree(disk / "d")
        monkeypatch.setattr(prune_module, "SHARD_ROWS", 500)
        assert prune(folder).shards_after == 6
        check(ReferenceCache(folder), together(*parts))
    finally:
        subprocess.run(["umount", disk], check=True)


# kill -9


def run_until_killed(tmp_path, prepare, work, settled):
    """Kills the work at its first step, its second and so on, until it comes to its end; returns how often.

    Args:
        prepare: makes a fresh folder and gives the arguments of the work.
        settled: of the arguments: looks at what was left, then finishes the work.
    """
    for step in itertools.count(1):
        arguments = prepare(step)
        code = Worker(tmp_path, killed_at, step, work, *arguments).end(0, -signal.SIGKILL)
        settled(*arguments)
        if code == 0:
            return step - 1


@pytest.mark.slow
@pytest.mark.parametrize("kept_tokens", [True, False])
def test_a_merge_that_is_killed_is_finished_by_the_next(tmp_path, kept_tokens):
    parts = [values(20, n) for n in range(6)]
    sources = [folder_of(tmp_path / f"s{n}", *parts[n : n + 2]) for n in range(0, 6, 2)]
    before = [contents(source) for source in sources]

    def prepare(step):
        return folder_of(tmp_path / str(step), values(3, 50), kind=Kind(kept_tokens, FINGERPRINT)), sources

    def settled(target, sources):
        held = ReferenceCache(target)
        check(held, {key: value for key, value in together(values(3, 50), *parts).items() if key in held})
        assert not list(target.glob("*.damaged"))
        merge(target, sources)
        check(ReferenceCache(target), together(values(3, 50), *parts))
        assert len(shards_of(target)) == 7 and verify(target).sound
        assert [contents(source) for source in sources] == before

    assert run_until_killed(tmp_path, prepare, merge, settled) >= 18


@pytest.mark.slow
def test_a_merge_into_a_new_folder_that_is_killed(tmp_path):
    source = folder_of(tmp_path / "s", values(20), values(20, 1))

    def settled(target, sources):
        merge(target, sources)
        check(ReferenceCache(target, FINGERPRINT), together(values(20), values(20, 1)))
        assert contents(target).items() >= {shard.name: shard.read_bytes() for shard in shards_of(source)}.items()

    assert run_until_killed(tmp_path, lambda step: (tmp_path / str(step), [source]), merge, settled) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [True, False])
def test_a_prune_that_is_killed_loses_nothing(tmp_path, monkeypatch, per_token):
    monkeypatch.setattr(prune_module, "SHARD_ROWS", 100)
    parts = [values(25, n) for n in range(12)]
    parts.append(dict(list(together(*parts).items())[::7]))  # doubles
    origin = folder_of(tmp_path / "origin", *parts, kind=Kind(per_token, FINGERPRINT))
    exact = {key: rows[:1] for key, rows in stored(origin).items()}

    def prepare(step):
        folder = tmp_path / str(step)
        shutil.copytree(origin, folder)
        return (folder,)

    def settled(folder):
        check(ReferenceCache(folder), together(*parts))
        prune(folder)
        assert stored(folder) == exact
        assert len(shards_of(folder)) == 3
        check(ReferenceCache(folder), together(*parts))
        assert verify(folder).sound

    assert run_until_killed(tmp_path, prepare, prune_into_shards_of_100, settled) >= 22


def prune_step_by_step(folder, steps):
    """Prunes, and before each change of a file asks for a look (`steps`/asked-N) and waits for it (`steps`/seen-N)."""
    numbers = itertools.count(1)

    def asking(call):
        def wrapped(*args, **options):
            number = next(numbers)
            (steps / f"asked-{number}").touch()
            wait_until((steps / f"seen-{number}").exists)
            return call(*args, **options)

        return wrapped

    os.replace, os.link, os.unlink = asking(os.replace), asking(os.link), asking(os.unlink)
    prune_into_shards_of_100(folder)


@pytest.mark.slow
def test_readers_while_another_process_prunes(tmp_path):
    """Between any two changes of files, a cache that was open before and one that is opened now hold every value."""
    parts = [values(10, n) for n in range(30)]
    expected, steps = together(*parts), tmp_path / "steps"
    steps.mkdir()
    folder = folder_of(tmp_path / "c", *parts)
    reader = ReferenceCache(folder)
    process = Worker(tmp_path, prune_step_by_step, folder, steps)
    for looks in itertools.count(1):
        wait_until(lambda n=looks: (steps / f"asked-{n}").exists() or process.poll() is not None)
        for cache in (reader, ReferenceCache(folder)):
            assert [value.tobytes() for value in cache.logps(list(expected))] == [
                v.tobytes() for v in expected.values()
            ]
        if not (steps / f"asked-{looks}").exists():
            break
        (steps / f"seen-{looks}").touch()
    process.end()
    assert len(shards_of(folder)) == 3 and looks > 30
    check(reader, expected)


@pytest.mark.slow
def test_a_million_rows_are_pruned_without_a_step_of_python_for_each(tmp_path):
    """200 shards of 5,000 rows, every tenth row twice."""
    draw = np.random.default_rng(3)
    keys = np.frombuffer(draw.bytes(16 * 1_000_000), np.uint8).reshape(200, 5000, 16).copy()
    keys[1:, ::10] = keys[:-1, ::10]
    folder = tmp_path / "c"
    cache = ReferenceCache(folder, FINGERPRINT, per_token=False)
    cache.create()
    for number, part in enumerate(keys):
        sums, tokens = -draw.exponential(size=5000), np.full(5000, 7)
        with open(folder / f"shard-{number:020d}-0.parquet", "wb") as file:
            shard_module.write_shard(file, cache.kind, part, tokens, sums)
    different = len(np.unique(keys.reshape(-1, 16), axis=0))
    done = None

    def work():
        nonlocal done
        done = prune(folder)

    assert calls(work) < 2000 * len(keys)  # of a shard: far below one a row for its three columns
    assert done.rows_kept == different and done.rows_kept + done.rows_dropped == 1_000_000 and done.shards_after == 4


@pytest.mark.slow
def test_log_probs_pass_through_memory_a_group_at_a_time(tmp_path, monkeypatch):
    """As much for 30 shards as for 10: some groups, not all that there are."""
    group, tokens_each = 256, 1000
    monkeypatch.setattr(shard_module, "GROUP_ROWS", group)
    draw = np.random.default_rng(0)

    def peak_of(count):
        folder = tmp_path / str(count)
        ReferenceCache(folder, FINGERPRINT).create()
        for number in range(count):
            flat = -draw.exponential(size=group * tokens_each).astype(np.float32)
            tokens = np.full(group, tokens_each)
            keys = np.frombuffer(draw.bytes(16 * group), np.uint8).reshape(-1, 16)
            with open(folder / f"shard-{number}.parquet", "wb") as file:
                shard_module.write_shard(file, KIND, keys, tokens, shard_module.row_sums(flat, tokens), [flat])
        pool = pa.default_memory_pool()
        arrow = pa.proxy_memory_pool(pool)  # counts from 0
        pa.set_memory_pool(arrow)
        try:
            with memory() as used:
                assert prune(folder).shards_after == 1
        finally:
            pa.set_memory_pool(pool)
        return used.peak + arrow.max_memory()

    peak_of(1)  # what is loaded on the first use is not counted
    few, many = peak_of(10), peak_of(30)
    assert many < 1.3 * few and many < 15 * 4 * group * tokens_each
