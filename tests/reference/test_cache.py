"""The reference cache at size: an index in memory, log-probs on disk, damage found wherever it is."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_folders import (
    FINGERPRINT,
    KIND,
    check,
    columns_of,
    contents,
    flip,
    flip_log_prob,
    run_python,
    shard_of,
    shards_of,
    values,
    write_foreign,
)
from counting import calls, memory
from drawing import draws
from hypothesis import given
from hypothesis import strategies as st
from processes import Worker, end_all, wait_until

from fastdpo.reference import ReferenceCache
from fastdpo.reference import cache as cache_module
from fastdpo.reference import folder as folder_module
from fastdpo.reference import shard as shard_module
from fastdpo.reference.cache import default_cache_dir
from fastdpo.reference.folder import Kind
from fastdpo.reference.index import ShardIndex, key_array
from fastdpo.reference.shard import GROUP_ROWS, group_tokens, row_sums, write_shard
from fastdpo.types import UserError

# Keys of few different bytes: shared halves, trailing zeros, and high bits, which a signed order would misplace.
KEYS = st.lists(st.sampled_from([0, 1, 127, 128, 255]), min_size=4, max_size=4).map(
    lambda b: bytes([b[0], *[0] * 6, b[1], b[2], *[0] * 6, b[3]])
)
LOGPS = st.lists(st.floats(width=32, allow_nan=False, min_value=-1e4, max_value=0), max_size=5)
STEPS = st.lists(
    st.tuples(st.sampled_from(["first", "second", "older"]), st.dictionaries(KEYS, LOGPS, max_size=6)), max_size=8
)


@draws(60)
@given(steps=STEPS, absent=st.sets(KEYS, max_size=10))
def test_equals_a_dict(steps, absent):
    with tempfile.TemporaryDirectory() as folder:
        clock = 10**18
        ReferenceCache(folder, FINGERPRINT).add({b"\x7f" * 16: np.zeros(1, np.float32)})
        writers = {"first": ReferenceCache(folder), "second": ReferenceCache(folder)}
        shards = {"9": {b"\x7f" * 16: np.zeros(1, np.float32)}}  # by what their names begin with
        for number, (who, added) in enumerate(steps):
            added = {key: np.array(value, np.float32) for key, value in added.items()}
            if not added:
                continue
            # A writer whose clock is late gives its shards names before all others.
            name = f"{clock - number if who == 'older' else clock + number:020d}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shard_module.time, "time_ns", lambda name=name: int(name))
                writers.get(who, writers["second"]).add(added)
            shards[name] = added
        expected = {}
        for name in sorted(shards):
            for key, value in shards[name].items():
                expected.setdefault(key, value)
        for cache in (*writers.values(), ReferenceCache(folder, FINGERPRINT)):
            cache.reload()
            check(cache, expected, absent - expected.keys())


@draws(100)
@given(parts=st.lists(st.lists(KEYS, min_size=1, max_size=6), max_size=6), dropped=st.integers(0, 5), order=st.data())
def test_dropping_a_shard_uncovers_the_next(parts, dropped, order):
    index = ShardIndex()
    names = order.draw(st.permutations("abcdef"))[: len(parts)]
    for number, (name, keys) in enumerate(zip(names, parts, strict=True)):
        count = len(keys)
        index.add([(name, key_array(keys), np.full(count, number), np.full(count, 10.0 * number) + np.arange(count))])
    if dropped < len(parts):
        index.drop([dropped])
    expected = {}
    for number in sorted(range(len(parts)), key=lambda number: names[number]):
        for row, key in enumerate(parts[number] if number != dropped else []):
            expected.setdefault(key, (number, row, number, 10.0 * number + row))
    asked = sorted({key for keys in parts for key in keys})
    for _ in range(2):  # in several runs, then in one
        found = index.find(key_array(asked))
        for at, key in enumerate(asked):
            assert index.has(key) == (key in expected)
            if key in expected:
                assert tuple(column[at] for column in found) == expected[key]
            else:
                assert found.shard[at] == -1
        assert len(index) == len(expected)


def test_the_first_name_wins_over_several_runs():
    index = ShardIndex()
    keys = np.arange(64, dtype=np.uint8).reshape(4, 16)
    for name, part in (("b", keys), ("c", keys[:1]), ("a", keys[1:2])):
        index.add([(name, part, np.ones(len(part)), np.ones(len(part)))])
    assert len(index._runs) == 2
    assert index.find(keys).shard.tolist() == [0, 2, 0, 0] and len(index) == 4


def test_many_small_shards_are_merged_cheaply(monkeypatch):
    index, draw, count = ShardIndex(), np.random.default_rng(0), 2000
    sorted_rows, original = [], ShardIndex._sorted

    def counting(self, parts):
        sorted_rows.append(sum(len(part.high) for part in parts))
        return original(self, parts)

    monkeypatch.setattr(ShardIndex, "_sorted", counting)
    keys = np.frombuffer(draw.bytes(16 * 5 * count), np.uint8).reshape(count, 5, 16)
    for number, part in enumerate(keys):
        index.add([(f"{number:05d}", part, np.full(5, number), np.arange(5.0))])
        assert len(index._runs) <= 12  # log2(count) and 1
    assert sum(sorted_rows) < 5 * count * 14
    found = index.find(keys.reshape(-1, 16))
    assert found.shard.tolist() == np.repeat(np.arange(count), 5).tolist()
    assert found.row.tolist() == list(range(5)) * count
    assert len(index) == 5 * count and len(index._runs) == 1


def test_sums_are_those_of_float64():
    tokens = np.array([0, 3, 0, 0, 20_000, 1, 0])
    flat = -np.random.default_rng(0).exponential(size=tokens.sum()).astype(np.float32)
    rows = np.split(flat, np.cumsum(tokens)[:-1])
    exact = [float(row.sum(dtype=np.float64)) for row in rows]
    np.testing.assert_allclose(row_sums(flat, tokens), exact, rtol=1e-12)
    assert row_sums(flat[:0], np.zeros(2, int)).tolist() == [0, 0]


def test_rows_of_several_groups_are_read_a_group_at_a_time(tmp_path, monkeypatch):
    expected = values(2 * GROUP_ROWS + 5)
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(expected)
    cache = ReferenceCache(tmp_path / "c")
    reads, original = [], cache_module.read_group
    monkeypatch.setattr(cache_module, "read_group", lambda shard, group: reads.append(group) or original(shard, group))
    keys = list(expected)
    assert cache[keys[GROUP_ROWS]].tobytes() == expected[keys[GROUP_ROWS]].tobytes()
    assert reads == [1]
    mixed = keys[::-1] + keys[:5]
    for key, value in zip(mixed, cache.logps(mixed), strict=True):
        assert value.tobytes() == expected[key].tobytes()
    assert sorted(reads) == [0, 1, 2]
    monkeypatch.setattr(cache_module, "OPEN_BYTES", 0)  # one group is kept, so each other one is read again
    cache = ReferenceCache(tmp_path / "c")
    reads.clear()
    for key in (keys[0], keys[1], keys[-1], keys[0]):
        cache[key]
    assert reads == [0, 2, 0]


def test_a_value_is_the_callers_own(tmp_path):
    ((key, value),) = values(1, seed=2).items()
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    cache.add({key: value})
    cache[key][:] = 7
    assert cache[key].tobytes() == value.tobytes() and cache[key].base is None


def test_wrong_keys_are_refused(tmp_path):
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    cache.add({bytes(7) + b"\x01" + bytes(8): np.zeros(1, np.float32)})
    assert b"\x01" not in cache and b"" not in cache
    with pytest.raises(ValueError, match=r"keys\[1\] is b'short'"):
        cache.lookup([bytes(16), b"short"])
    with pytest.raises(ValueError, match=r"an array \(n, 16\) of uint8 is wanted, not \(2, 8\)"):
        cache.lookup(np.zeros((2, 8), np.uint8))
    with pytest.raises(ValueError, match="of int64"):
        cache.lookup(np.zeros((2, 16), np.int64))
    with pytest.raises(KeyError):
        cache[bytes(16)]
    assert [part.shape for part in cache.lookup([])] == [(0,)] * 3 and cache.logps([]) == []


def test_sums_only(tmp_path):
    expected = values(40)
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT, per_token=False)
    cache.add(expected)
    assert pq.read_schema(shard_of(tmp_path / "c")).names == ["key", "tokens", "sum"]
    for one in (cache, ReferenceCache(tmp_path / "c", FINGERPRINT), ReferenceCache(tmp_path / "c", per_token=False)):
        check(one, expected, [bytes(16)])
        with pytest.raises(UserError, match="keeps only the sums of log-probs"):
            one[next(iter(expected))]
    with pytest.raises(UserError, match="keeps only the sums of log-probs"):
        ReferenceCache(tmp_path / "c", FINGERPRINT, per_token=True)


def test_a_folder_of_values_stays_one(tmp_path):
    first, second = values(3, 1), values(3, 2)
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(first)
    ReferenceCache(tmp_path / "c", FINGERPRINT, per_token=False).add(second)
    check(ReferenceCache(tmp_path / "c", per_token=True), first | second)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_folders_of_other_formats_are_refused(tmp_path, number):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": number, "fingerprint": FINGERPRINT}))
    with pytest.raises(UserError, match=f"of format {number}, and this fastdpo reads format 3; name another folder"):
        ReferenceCache(tmp_path, FINGERPRINT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 3}',
        '{"format": 3, "per_token": 1, "fingerprint": {}}',
        '{"format": 3, "per_token": true, "fingerprint": {"dtype": 5}}',
        "\xff\xfe",
    ],
)
def test_a_manifest_that_is_none(tmp_path, text):
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(values(2))
    (tmp_path / "c" / "manifest.json").write_bytes(text.encode("latin-1"))
    before = contents(tmp_path / "c")
    with pytest.raises(
        UserError, match=rf"manifest.json is damaged; fastdpo cache verify {tmp_path}/c --repair writes"
    ):
        ReferenceCache(tmp_path / "c", FINGERPRINT)
    assert contents(tmp_path / "c") == before


def test_a_missing_manifest(tmp_path):
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(values(2))
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=rf"holds shards but no manifest.json .*; fastdpo cache verify {tmp_path}/c --repair"
    ):
        ReferenceCache(tmp_path / "c", FINGERPRINT)


def test_what_a_manifest_tells_people(tmp_path):
    about = {"model": "org/name", "torch": "2.11"}
    ReferenceCache(tmp_path / "c", FINGERPRINT, about=about).add(values(2))
    ReferenceCache(tmp_path / "c", FINGERPRINT, about={"model": "another"}).add(values(2, 1))
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    created = datetime.fromisoformat(manifest.pop("created"))
    assert manifest == {"format": 3, "per_token": True, "fingerprint": FINGERPRINT, "about": about}
    assert abs((datetime.now(timezone.utc) - created).total_seconds()) < 60


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "bfloat16"}, "computed in float32, and they are wanted in bfloat16; .* load the model in float32"),
        ({"weights": "c" * 32}, f"another reference model \\(weights {'a' * 32} there, {'c' * 32} here\\)"),
        ({"adapter": "d" * 32, "dtype": "bf"}, f"adapter none there, {'d' * 32} here; dtype float32 there, bf here"),
        ({"more": "x"}, "more unknown there, x here"),
        ({"adapter": None}, "adapter none there, unknown here"),
    ],
)
def test_another_fingerprint_is_refused(tmp_path, change, sentence):
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(values(2))
    wanted = {part: value for part, value in {**FINGERPRINT, **change}.items() if value is not None}
    with pytest.raises(UserError, match=sentence):
        ReferenceCache(tmp_path / "c", wanted)
    assert default_cache_dir(wanted) != default_cache_dir(FINGERPRINT)


FOREIGN = {
    "model": (Kind(True, {**FINGERPRINT, "weights": "c" * 32}), f"weights {'c' * 32} there, {'a' * 32} here"),
    "dtype": (Kind(True, {**FINGERPRINT, "dtype": "bfloat16"}), "dtype bfloat16 there, float32 here"),
    "adapter": (Kind(True, {**FINGERPRINT, "adapter": "e" * 32}), f"adapter {'e' * 32} there, none here"),
    "kind": (Kind(False, FINGERPRINT), "sums only there, the log-prob of each token here"),
    "format": (Kind(True, FINGERPRINT, 4), "format 4 there, 3 here"),
}


@pytest.mark.parametrize(("kind", "sentence"), FOREIGN.values(), ids=FOREIGN)
def test_a_shard_of_another_cache_is_refused(tmp_path, kind, sentence):
    kept = values(3)
    reader = ReferenceCache(tmp_path / "c", FINGERPRINT)
    reader.add(kept)
    foreign = tmp_path / "c" / "shard-0.parquet"
    write_foreign(foreign, kind, values(3, seed=1))
    before = contents(tmp_path / "c")
    for read in (
        reader.reload,
        lambda: ReferenceCache(tmp_path / "c"),
        lambda: ReferenceCache(tmp_path / "c", FINGERPRINT),
    ):
        with pytest.raises(UserError) as refused:
            read()
        said = f"{foreign} cannot be used: it is of another cache ({sentence}): move it out of the folder."
        assert str(refused.value) == said
    assert contents(tmp_path / "c") == before
    check(reader, kept, values(3, seed=1))
    foreign.unlink()
    check(ReferenceCache(tmp_path / "c"), kept)


@pytest.mark.parametrize("number", [1, 2])
def test_a_shard_of_an_older_format_is_refused(tmp_path, number):
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(values(3))
    shard = shard_of(tmp_path / "c")
    table, old = pq.read_table(shard), tmp_path / "c" / "shard-0.parquet"
    if number == 1:
        pq.write_table(table.select(["key", "logps"]).replace_schema_metadata(None), old)
    else:
        digest = shard_module._digest(*columns_of(values(3))[:3])
        pq.write_table(table.replace_schema_metadata({"fastdpo.digest": digest}), old)
    with pytest.raises(
        UserError, match=rf"shard-0.parquet cannot be used: .*\(format {number} there, 3 here\): move it"
    ):
        ReferenceCache(tmp_path / "c")
    assert old.exists()


def test_folders_copied_together_are_one(tmp_path):
    for number in range(3):
        ReferenceCache(tmp_path / str(number), FINGERPRINT, about={"part": str(number)}).add(values(20, number))
        shutil.copytree(tmp_path / str(number), tmp_path / "all", dirs_exist_ok=True)
    check(ReferenceCache(tmp_path / "all", FINGERPRINT), values(20, 0) | values(20, 1) | values(20, 2))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_second_to_make_a_folder_must_agree(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links here")))
    kept, more = values(3), values(3, 1)
    first, same = (ReferenceCache(tmp_path / "c", FINGERPRINT) for _ in range(2))
    others = [
        (
            ReferenceCache(tmp_path / "c", FINGERPRINT, per_token=False),
            "the log-prob of each token there, sums only here",
        ),
        (ReferenceCache(tmp_path / "c", {**FINGERPRINT, "dtype": "bf"}), "dtype float32 there, bf here"),
    ]
    first.add(kept)
    before = contents(tmp_path / "c")
    for other, what in others:
        for call in (lambda: other.add(more), other.reload):  # noqa: B023
            with pytest.raises(UserError, match=rf"was made by another process meanwhile \({what}\); name another"):
                call()
    assert contents(tmp_path / "c") == before
    same.add(more)
    same.reload()
    check(same, kept | more)
    check(ReferenceCache(tmp_path / "c"), kept | more)


def test_a_manifest_that_came_between_is_not_overwritten(tmp_path, monkeypatch):
    """The folder is looked at, another process makes it, and only then does this one write."""
    first, late = (
        ReferenceCache(tmp_path / "c", FINGERPRINT),
        ReferenceCache(tmp_path / "c", FINGERPRINT, per_token=False),
    )
    original = folder_module.write_file

    def slow(path, write, **options):
        monkeypatch.setattr(folder_module, "write_file", original)
        first.add(values(2))
        original(path, write, **options)

    monkeypatch.setattr(folder_module, "write_file", slow)
    with pytest.raises(UserError, match="made by another process meanwhile"):
        late.add(values(2, 1))
    check(ReferenceCache(tmp_path / "c", FINGERPRINT, per_token=True), values(2))


def _make(folder, per_token, meeting):
    """Adds to a folder that another process is about to make, too: exit code 1, and the message, if it is refused."""
    cache = ReferenceCache(folder, FINGERPRINT, per_token=per_token)
    _meet(meeting, str(per_token))
    try:
        cache.add(values(5, seed=per_token))
    except UserError as error:
        sys.exit(str(error))


def _meet(folder, name, count=2):
    """Returns when so many processes have come."""
    (folder / name).touch()
    wait_until(lambda: len(list(folder.iterdir())) == count)


@pytest.mark.slow
def test_two_processes_make_one_folder(tmp_path):
    for attempt in range(3):
        folder, meeting = tmp_path / str(attempt), tmp_path / f"meeting-{attempt}"
        meeting.mkdir()
        workers = [Worker(tmp_path, _make, folder, kept, meeting) for kept in (True, False)]
        codes = end_all(*workers, codes=(0, 1))
        assert sorted(codes) == [0, 1]
        assert "made by another process meanwhile" in workers[codes.index(1)].printed()
        cache, winner = ReferenceCache(folder, FINGERPRINT), codes[0] == 0
        assert cache.per_token is winner
        check(cache, values(5, seed=winner))
        assert len(shards_of(folder)) == 1


def test_sums_alone_are_added(tmp_path):
    expected = values(GROUP_ROWS + 3)
    keys, tokens, sums, _ = columns_of(expected)
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT, per_token=False)
    cache.add_sums(keys[:0], tokens[:0], sums[:0])
    assert not (tmp_path / "c").exists()
    cache.add_sums(keys, tokens, sums)
    for one in (cache, ReferenceCache(tmp_path / "c")):
        check(one, expected, [bytes(16)])
        np.testing.assert_array_equal(one.lookup(keys)[1], sums)
    shard_of(tmp_path / "c")  # one
    more = values(2, seed=1)
    cache.add_sums(list(more), *(part.tolist() for part in columns_of(more)[1:3]))
    check(ReferenceCache(tmp_path / "c"), expected | more)


def test_wrong_sums_are_refused(tmp_path):
    keys, tokens, sums, _ = columns_of(values(3))
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT, per_token=False)
    for wrong, what in ((np.nan, "nan"), (0.5, "0.5")):
        with pytest.raises(UserError, match=rf"sums\[1\] is a log-prob of {what}, which no model gives"):
            cache.add_sums(keys, tokens, np.array([-1, wrong, -1]))
    with pytest.raises(ValueError, match=r"3 keys, tokens \(3,\) and sums \(2,\) are not of one length"):
        cache.add_sums(keys, tokens, sums[:2])
    with pytest.raises(UserError, match="keeps the log-prob of each token, which sums do not tell"):
        ReferenceCache(tmp_path / "c", FINGERPRINT).add_sums(keys, tokens, sums)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("harm", ["log-prob", "gone"])
def test_a_lost_shard_is_survived_where_others_hold_the_values(tmp_path, recwarn, harm):
    """The others are known already, or came after the cache was opened."""
    expected = values(40)
    known, late = dict(list(expected.items())[:20]), dict(list(expected.items())[20:])
    writer = ReferenceCache(tmp_path / "c", FINGERPRINT)
    writer.add(expected)
    writer.add(known)
    reader = ReferenceCache(tmp_path / "c")
    writer.add(late)
    shard = shards_of(tmp_path / "c")[0]
    if harm == "gone":
        shard.unlink()
    else:
        flip_log_prob(shard)
    check(reader, expected)
    said = [str(warning.message) for warning in recwarn]
    if harm == "gone":
        assert not said
    else:
        assert len(said) == 1 and f"{shard} is damaged" in said[0]
        assert said[0].endswith(
            f"set aside as {shard.name}.damaged, and what was asked for was read from other shards."
        )
    check(reader, expected)
    check(ReferenceCache(tmp_path / "c"), expected)


def test_shards_that_are_gone_are_forgotten(tmp_path):
    kept, lost = values(4), values(4, 1)
    writer = ReferenceCache(tmp_path / "c", FINGERPRINT)
    writer.add(lost)
    shard = shard_of(tmp_path / "c")
    writer.add(kept)
    reader = ReferenceCache(tmp_path / "c")
    shard.rename(tmp_path / "elsewhere")
    reader.reload()
    check(reader, kept, lost)
    (tmp_path / "elsewhere").rename(shard)
    reader.reload()
    check(reader, kept | lost)


@pytest.mark.parametrize("column", ["key", "tokens", "sum"])
@pytest.mark.parametrize("group", [0, 1])
def test_damage_in_a_column_of_the_index_is_found_at_once(tmp_path, column, group):
    expected = values(GROUP_ROWS + 3)
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    cache.add(expected)
    shard = shard_of(tmp_path / "c")
    kept = values(2, seed=9)
    cache.add(kept)
    place = pq.read_metadata(shard).row_group(group).column(["key", "tokens", "sum"].index(column))
    flip(shard, place.data_page_offset + place.total_compressed_size - 2)
    with pytest.warns(UserWarning, match=rf"{shard.name} is damaged \(.*CRC.*\); it was set aside as .*\.damaged, and"):
        again = ReferenceCache(tmp_path / "c", FINGERPRINT)
    check(again, kept, expected)
    assert not shard.exists() and shard.with_name(shard.name + ".damaged").exists()


def test_damage_in_log_probs_is_found_when_they_are_read(tmp_path):
    expected, kept = values(GROUP_ROWS + 3), values(2, seed=9)
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    cache.add(expected)
    shard = shard_of(tmp_path / "c")
    cache.add(kept | dict([next(iter(expected.items()))]))
    flip_log_prob(shard, group=1)
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    first, *_, last = expected
    assert cache[first].tobytes() == expected[first].tobytes()
    with pytest.raises(UserError, match=rf"{shard.name} is damaged \(.*CRC.*set aside as .*\.damaged\. Run again"):
        cache[last]
    assert not shard.exists() and shard.with_name(shard.name + ".damaged").exists()
    left = kept | {first: expected[first]}  # that row stands in the other shard, too
    check(cache, left, expected.keys() - left)
    check(ReferenceCache(tmp_path / "c"), left, expected.keys() - left)
    cache.add(expected)
    check(cache, expected | kept)


@pytest.mark.slow
def test_no_flipped_bit_gives_wrong_values(tmp_path):
    """Headers and the footer have no checksum of their own; a digest, the counts and the sums stand in."""
    expected = values(12, seed=5)
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(expected)
    shard = shard_of(tmp_path / "c")
    data = shard.read_bytes()
    exact = (*shard_module.read_index_columns(shard, KIND), *shard_module.read_group(shard, 0))
    found = 0
    readers = (
        (lambda shard: shard_module.read_index_columns(shard, KIND), exact[:3]),
        (lambda shard: shard_module.read_group(shard, 0), exact[3:]),
    )
    for position in range(len(data)):
        flip(shard, position, bits=8 << position % 2)
        for read, wanted in readers:
            try:
                assert all(map(np.array_equal, read(shard), wanted)), position
            except shard_module.DamagedShard:
                found += 1
        shard.write_bytes(data)
    assert found > len(data)


@pytest.mark.parametrize("harm", ["truncated", "empty", "text", "columns"])
def test_what_is_no_shard_is_set_aside(tmp_path, harm):
    kept = values(3, seed=1)
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    cache.add(values(300))
    shard = shard_of(tmp_path / "c")
    cache.add(kept)
    if harm == "columns":  # the header is whole
        pq.write_table(pq.read_table(shard, columns=["key", "logps"]), shard)
    else:
        shard.write_bytes({"truncated": shard.read_bytes()[:-300], "empty": b"", "text": b"PAR1 no PAR1"}[harm])
    with pytest.warns(UserWarning, match=rf"{shard.name} is damaged"):
        check(ReferenceCache(tmp_path / "c"), kept)
    assert shard.with_name(shard.name + ".damaged").exists()


def test_a_shard_cut_off_or_gone_after_the_start(tmp_path):
    expected = values(300)
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(expected)
    shard = shard_of(tmp_path / "c")
    cut, gone = ReferenceCache(tmp_path / "c"), ReferenceCache(tmp_path / "c")
    shard.write_bytes(shard.read_bytes()[:2000])
    for cache, message in ((cut, "is damaged"), (gone, "is gone; run again")):
        with pytest.raises(UserError, match=rf"{shard.name} {message}"):
            cache[next(iter(expected))]
        check(cache, {}, expected)


def test_a_shard_that_may_not_be_opened_is_left_alone(tmp_path):
    kept = values(3)
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    cache.add(kept)
    reader = ReferenceCache(tmp_path / "c", FINGERPRINT)
    later = values(3, seed=1)
    cache.add(later)
    closed = tmp_path / "c" / "shard-zzz.parquet"
    closed.mkdir()  # root may open any file, but no folder
    with pytest.raises(UserError, match=rf"{closed.name} cannot be opened \(.*\); check its permissions"):
        ReferenceCache(tmp_path / "c", FINGERPRINT)
    with pytest.raises(UserError, match="cannot be opened"):
        reader.reload()
    check(reader, kept, later)
    assert closed.exists()
    closed.rmdir()
    reader.reload()
    check(reader, kept | later)


def test_a_folder_that_may_only_be_read(tmp_path, monkeypatch):
    expected, lost = values(5), values(5, seed=1)
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    cache.add(lost)
    shard = shard_of(tmp_path / "c")
    cache.add(expected)

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    (tmp_path / "c").chmod(0o500)
    check(ReferenceCache(tmp_path / "c", FINGERPRINT), expected | lost)
    reader = ReferenceCache(tmp_path / "c")
    flip_log_prob(shard)
    with pytest.raises(UserError, match=r"could not be set aside \(Read-only file system\): delete it\. Run again"):
        reader[next(iter(lost))]
    check(reader, expected, lost)
    flip(shard, 60)
    with pytest.warns(UserWarning, match=r"could not be set aside \(Read-only file system\): delete it, and"):
        reader = ReferenceCache(tmp_path / "c")
    reader.reload()  # does not warn a second time: the suite shows warnings
    check(reader, expected, lost)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        reader.add(values(1, seed=3))
    check(reader, expected)
    assert not list((tmp_path / "c").glob(".*.tmp"))
    (tmp_path / "c").chmod(0o700)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on the size of files fails in the midst of a shard, as a full disk does."""
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    kept = values(5)
    cache.add(kept)
    script = """
        import resource, sys, numpy as np
        from fastdpo.reference import ReferenceCache
        from fastdpo.types import UserError
        cache = ReferenceCache(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        new = {number.to_bytes(16, "big"): np.zeros(100, np.float32) for number in range(1000)}
        try:
            cache.add(new)
        except UserError as error:
            print(error, len(cache))
    """
    said = run_python(script, tmp_path / "c")
    assert said.endswith("(File too large); free space or name another folder. What was written before is kept. 5\n")
    assert sorted(path.suffix for path in (tmp_path / "c").iterdir()) == [".json", ".parquet"]
    check(ReferenceCache(tmp_path / "c"), kept)


@pytest.fixture
def full_disk(tmp_path):
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full(full_disk):
    cache = ReferenceCache(full_disk / "c", FINGERPRINT)
    kept, big = values(50), values(2000, seed=1, most=200)
    cache.add(kept)
    before = contents(full_disk / "c")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free space or name another"):
        cache.add(big)
    assert contents(full_disk / "c") == before
    check(cache, kept, big)
    check(ReferenceCache(full_disk / "c"), kept, big)


def test_no_space_for_a_manifest(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match="No space left on device"):
            cache.add(values(2))
    assert contents(tmp_path / "c") == {}
    cache.add(values(2))
    check(ReferenceCache(tmp_path / "c"), values(2))


def _add(folder, seeds, meeting):
    cache = ReferenceCache(folder, FINGERPRINT)
    _meet(meeting, str(seeds))
    for seed in seeds:
        cache.add(values(20, seed))


@pytest.mark.slow
def test_two_processes_add_at_once(tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    seeds = [range(0, 40), range(20, 60)]  # half of them are the same
    end_all(*(Worker(tmp_path, _add, tmp_path / "c", part, meeting) for part in seeds))
    assert len(list((tmp_path / "c").glob("shard-*.parquet"))) == 80
    expected = {}
    for seed in range(60):
        expected |= values(20, seed)
    check(ReferenceCache(tmp_path / "c", FINGERPRINT), expected, values(20, seed=99))


@pytest.mark.slow
def test_a_million_sequences(tmp_path):
    """What the index holds for each, and that opening a cache and looking up take no step of Python for each."""
    count, folder = 1_000_000, tmp_path / "c"
    cache = ReferenceCache(folder, FINGERPRINT)
    cache.create()
    draw = np.random.default_rng(7)
    keys = np.frombuffer(draw.bytes(16 * count), np.uint8).reshape(20, -1, 16)
    total = 0.0
    for number, part in enumerate(keys):
        tokens = draw.integers(0, 6, len(part))
        flat = -draw.exponential(size=tokens.sum()).astype(np.float32)
        total += flat.sum(dtype=np.float64)
        with open(folder / f"shard-{number:020d}-00000000.parquet", "wb") as file:
            groups = np.split(flat, group_tokens(tokens).cumsum()[:-1])
            write_shard(file, KIND, part, tokens, row_sums(flat, tokens), groups)
    keys = keys.reshape(-1, 16)[draw.permutation(count)]
    with memory() as used:
        cache = ReferenceCache(folder)
        assert len(cache) == count
    held = 16 + 8 + 4 + 8  # bytes a sequence: key, sum, tokens, place
    assert used.held < 1.2 * held * count and used.peak < 4.5 * held * count
    found, sums, tokens = cache.lookup(keys)
    assert found.all() and sums.sum() == pytest.approx(total, rel=1e-9)
    assert calls(lambda: ReferenceCache(folder)) < 20_000  # of 20 shards
    assert calls(lambda: cache.lookup(keys)) < 1000
    assert not cache.lookup(keys ^ np.uint8(255))[0].any()
    some = slice(None, None, 5000)
    for key, wanted, length in zip(keys[some], sums[some], tokens[some], strict=True):
        value = cache[key.tobytes()]
        assert len(value) == length and float(value.sum(dtype=np.float64)) == pytest.approx(wanted, rel=1e-6)
