"""Reading rows from every kind of source: what is read, what is said where it cannot be, and how much is held."""

import gzip
import io
import json
import os
import random
import sys
import tempfile
import threading
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdpo.data import open_rows, read, read_rows
from fastdpo.data.validate import row_problem
from fastdpo.run import load_data
from fastdpo.trainer.dataset import PLACE
from fastdpo.types import DataError

TEXT = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(600)]  # several batches
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"q{i}"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for i in range(3)
]
IDS = [{"prompt_ids": [i, 1], "chosen_ids": [2, 3, i], "rejected_ids": [4]} for i in range(600)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, rows):
    """In the kind that the name says."""
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(rows)))
    elif path.suffix:
        path.write_bytes(lines(rows))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def rows_of(source):
    return [row for _, row in source]


def problem(dataset, **options):
    """What is said of a data set, the same whether it is checked or read; one sentence."""
    messages = []
    for use in (lambda source: source.check(), list):
        with pytest.raises(DataError) as error:
            use(open_rows(dataset, **options))
        messages.append(str(error.value))
    assert "\n" not in messages[0] and len(messages[0]) < 700
    assert messages[0].removesuffix(" (1 more rows cannot be used, either.)") == messages[1]
    return messages[1]


# What is read


@pytest.mark.parametrize("rows", [TEXT, CHAT, IDS], ids=["text", "chat", "ids"])
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.jsonl.gz", "a.json", "a.parquet", "saved"])
def test_every_kind(tmp_path, name, rows):
    path = write(tmp_path / name, rows)
    source = open_rows(path)
    assert source.length == (len(rows) if name in ("a.parquet", "saved") else None)
    assert source.check() == source.length == len(rows)
    assert rows_of(source) == rows and rows_of(source) == rows  # again, too
    places = [place for place, _ in source]
    assert places == [f"{path}, row {i}" for i in range(1, len(rows) + 1)] and not source.stream
    assert read_rows(path) == (rows, places)
    placed = [{**row, "row_number": i, PLACE: place} for i, (place, row) in enumerate(zip(places, rows, strict=True))]
    assert load_data(path, path).train == placed


def test_a_file_without_a_suffix_holds_json_lines(tmp_path):
    (tmp_path / "pairs").write_bytes(lines(CHAT))
    assert rows_of(open_rows(tmp_path / "pairs")) == CHAT


def test_values_of_a_table_are_those_that_json_would_give(tmp_path):
    rows = [{**IDS[0], "prompt": None, "note": "x"}, {**IDS[1], "note": None}]
    source = open_rows(write(tmp_path / "a.parquet", rows))
    read = rows_of(source)
    assert read == [{**IDS[0], "note": "x"}, IDS[1]]
    assert all(type(token) is int for row in read for name in row if name != "note" for token in row[name])


def test_what_datasets_keeps_as_json_text_is_decoded(tmp_path):
    rows = [{**CHAT[0], "tools": [{"name": "f", "needs": 1}]}, {**CHAT[1], "tools": [{"name": "g", "needs": "b"}]}]
    data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(data.features)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "a.parquet")
    assert rows_of(open_rows(tmp_path / "saved")) == rows_of(open_rows(tmp_path / "a.parquet")) == rows


def test_rows_of_a_data_set_that_was_shuffled_before_it_was_saved(tmp_path):
    data = datasets.Dataset.from_list(TEXT).shuffle(seed=0).with_format("numpy", columns=["prompt"])
    data.save_to_disk(tmp_path / "saved")
    assert rows_of(open_rows(tmp_path / "saved")) == data.with_format(None).to_list() != TEXT


def test_a_folder_and_a_pattern_in_the_order_of_the_names(tmp_path):
    write(tmp_path / "b.jsonl", TEXT[2:4])
    write(tmp_path / "c.parquet", TEXT[4:6])
    write(tmp_path / "a.jsonl.gz", TEXT[:2])
    (tmp_path / "empty.jsonl").write_text("")  # a part may be empty
    (tmp_path / "info.json").write_text("{}")  # not data
    (tmp_path / ".b.jsonl").write_text("not read")
    (tmp_path / "below.jsonl").mkdir()
    source = open_rows(tmp_path)
    assert source.length is None and source.check() == 6 and rows_of(source) == TEXT[:6]
    assert [place for place, _ in source][3] == f"{tmp_path / 'b.jsonl'}, row 2"
    assert rows_of(open_rows(f"{tmp_path}/*[bc].*")) == TEXT[2:6]
    write(tmp_path / "below.jsonl" / "d.jsonl", TEXT[:1])
    assert rows_of(open_rows(f"{tmp_path}/**/[cd].*")) == TEXT[:1] + TEXT[4:6]
    assert open_rows(f"{tmp_path}/c.*").length == 2


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    assert rows_of(open_rows(write(tmp_path / "a[1].jsonl", CHAT))) == CHAT


def test_splits(tmp_path):
    parts = {"train": datasets.Dataset.from_list(TEXT[:5]), "test": datasets.Dataset.from_list(TEXT[5:7])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path)
    assert rows_of(open_rows(tmp_path)) == TEXT[:5] and open_rows(tmp_path).length == 5
    assert rows_of(open_rows(tmp_path, split="test")) == rows_of(open_rows(tmp_path / "test")) == TEXT[5:7]
    assert "has no split 'tset'; it has train, test" in problem(tmp_path, split="tset")
    for other in (tmp_path / "train", "-", "a.jsonl"):
        assert "has no splits to take 'test' from" in problem(other, split="test")


# Streams


def standard_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input(monkeypatch):
    standard_input(monkeypatch, b"\xef\xbb\xbf" + lines(TEXT))
    source = open_rows("-")
    assert source.stream and source.length is None and source.check() is None
    assert list(source)[2] == ("standard input, row 3", TEXT[2])
    with pytest.raises(DataError, match="standard input is a stream and can be read once only"):
        next(iter(source))
    with pytest.raises(DataError, match="standard input holds no rows"):
        list(open_rows("-"))
    standard_input(monkeypatch, lines([TEXT[0], {"prompt": "a"}]))
    with pytest.raises(DataError, match="standard input, row 2: the field 'chosen' is missing"):
        list(open_rows("-"))


def test_train_reads_standard_input(monkeypatch):
    standard_input(monkeypatch, lines(TEXT[:20]))
    data = load_data("-", None)
    assert len(data.train) == 18 and len(data.held_out) == 2
    standard_input(monkeypatch, lines([TEXT[0], {"prompt": "a"}, {}]))
    with pytest.raises(DataError, match=r"standard input, row 2: .*\(1 more rows"):
        load_data("-", None)


@pytest.mark.parametrize("fd", [False, True])
def test_a_named_pipe_is_read_as_it_arrives(tmp_path, fd):
    if fd:
        read_end, write_end = os.pipe()
        path = f"/dev/fd/{read_end}"
    else:
        path = str(tmp_path / "pipe.jsonl")
        os.mkfifo(path)
    source = open_rows(path)
    assert source.stream and source.check() is None
    more = threading.Event()

    def send():
        with open(write_end if fd else path, "wb", buffering=0) as pipe:
            pipe.write(lines(TEXT[:1]))
            more.wait()
            pipe.write(lines(TEXT[1:2]))

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    rows = iter(source)
    first = next(rows)  # before the second is sent
    more.set()
    assert [first, *rows] == [(f"{path}, row 1", TEXT[0]), (f"{path}, row 2", TEXT[1])]
    thread.join()
    with pytest.raises(DataError, match="is a stream and can be read once only"):
        list(source)
    if fd:
        os.close(read_end)


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """load_dataset_builder of files in a folder, as if owner/name were there; the names asked for."""
    folder, asked = tmp_path / "hub", []
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    real = datasets.load_dataset_builder

    def load(name, **options):
        asked.append(name)
        return real(str(folder), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return folder, asked


def test_a_data_set_of_the_hub(hub):
    folder, asked = hub
    write(folder / "train.parquet", [{**row, "score": None} for row in TEXT])
    write(folder / "test.parquet", TEXT[:4])
    source = open_rows("owner/name_v0.1")
    assert source.length == source.check() == 600 and not source.stream and rows_of(source) == TEXT
    assert next(iter(source))[0] == "owner/name_v0.1, row 1"
    assert rows_of(open_rows("owner/name", split="test")) == TEXT[:4]
    streamed = open_rows("owner/name", split="test", streaming=True)
    assert streamed.stream and streamed.length is None and streamed.check() is None
    assert rows_of(streamed) == rows_of(streamed) == TEXT[:4]
    assert 'Unknown split "dev"' in problem("owner/name", split="dev")
    assert "Bad split: dev" in problem("owner/name", split="dev", streaming=True)
    assert asked[0] == "owner/name_v0.1"


def test_a_data_set_of_the_hub_that_could_hold_anything(hub):
    folder, _ = hub
    (folder / "train.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    assert "kept on the hub as csv; only json, parquet, arrow are read" in problem("owner/name")


def test_a_hub_that_does_not_answer(monkeypatch):
    def fail(name):
        raise ConnectionError("no way\nout")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    message = problem("owner/name")
    assert message.startswith("owner/name: there is no such file") and "(no way out); check the name" in message


def test_a_hub_that_breaks_off(hub):
    def breaks_off():
        yield TEXT[0]
        raise ConnectionError("gone")

    folder, _ = hub
    write(folder / "train.jsonl", TEXT)
    source = open_rows("owner/name", streaming=True)
    source.parts[0].dataset = breaks_off()
    with pytest.raises(DataError, match=r"owner/name cannot be read on \(gone\); try again"):
        list(source)


@pytest.mark.parametrize(
    "path",
    ["pairs", "data/pairs.jsonl", "data/pairs.CSV", "./pairs", "../pairs", "/pairs", "~/pairs", "a/b/c", "a/", ""],
)
def test_a_mistyped_path_is_not_asked_for_over_the_network(hub, path):
    assert "there is no such file" in problem(path)
    assert not hub[1]


# What cannot be read

GOOD = lines(TEXT[:1])


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("a.jsonl", b"", ["a.jsonl holds no rows; it needs one JSON object a line"]),
        ("a.jsonl", b"\n \n", ["a.jsonl holds no rows"]),
        ("a.jsonl.gz", b"", ["a.jsonl.gz holds no rows"]),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), ["a.jsonl.gz holds no rows"]),
        ("a.json", b"[]", ["a.json holds no rows"]),
        ("a.jsonl.gz", GOOD, ["a.jsonl.gz, after row 0: the gzip file is damaged", "compress it again"]),
        ("a.jsonl", gzip.compress(GOOD, mtime=0), ["a.jsonl, row 1: this is not UTF-8 text (byte 2 of the line)"]),
        ("a.jsonl", b'{"prompt": ', ["a.jsonl, row 1: this is no JSON (Expecting value", "one JSON object"]),
        ("a.jsonl", GOOD + b"\n\n[1]\n", ["a.jsonl, row 2 (line 4): this is a JSON list", "must be an object"]),
        ("a.jsonl", b"\n" + GOOD + b"{}\n", ["a.jsonl, row 2 (line 3): the field 'chosen' is missing"]),
        ("a.jsonl", GOOD + b'{"prompt": "\xe9"}\n', ["a.jsonl, row 2: this is not UTF-8 text (byte 13 of the line)"]),
        ("a.jsonl", b"\xef\xbb\xbf" * 2 + GOOD, ["a.jsonl, row 1: this is no JSON (it begins with a byte order mark"]),
        ("a.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, ["a.jsonl, row 2: this is no JSON (it begins with a byte order"]),
        ("a.jsonl", GOOD + b"\0" * 9, ["a.jsonl, row 2: this is no JSON (it holds NUL bytes"]),
        ("a.jsonl", GOOD.decode().encode("utf-16"), ["a.jsonl, row 1: this is not UTF-8 text"]),
        ("a.jsonl", GOOD.decode().encode("utf-16-le"), ["row 1: this is no JSON (it holds NUL bytes", "UTF-16"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl, row 1: this is no JSON (maximum recursion depth"]),
        ("a.jsonl", b"1" * 5_000, ["a.jsonl, row 1: this is no JSON (Exceeds the limit (4300 digits)"]),
        ("a.json", b"[\n[}", ["a.json, line 2: this is no JSON", "one array of objects"]),
        ("a.json", b"[1]", ["a.json: a .json file must hold one array of objects"]),
        ("a.json", b"\xff", ["a.json is not UTF-8 text (byte 0)"]),
        ("a.json", b"[" * 100_000, ["a.json, line 1: this is no JSON (maximum recursion depth"]),
        ("a.parquet", b"", ["a.parquet cannot be read", "write or download it again"]),
        ("a.parquet", b"PAR1" + b"x" * 99 + b"PAR1", ["a.parquet cannot be read", "the file is damaged"]),
        ("a.csv", b"prompt,chosen,rejected\n", ["a.csv: files of this kind", ".jsonl, .jsonl.gz, .json or .parquet"]),
        ("a.jsonl/nothing", None, ["a.jsonl/nothing: there is no such file"]),
        ("*.jsonl", None, ["*.jsonl: no file matches this pattern"]),
    ],
)
def test_unreadable_files(tmp_path, name, content, parts):
    (tmp_path / "a.txt").write_text("")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif "/" in name:
        (tmp_path / "a.jsonl").write_text("")
    message = problem(tmp_path / name)
    for part in parts:
        assert part in message, message


def test_what_a_pattern_names_must_be_readable(tmp_path):
    write(tmp_path / "a.jsonl", TEXT)
    (tmp_path / "a.txt").write_text("")
    assert "a.txt: files of this kind cannot be read" in problem(f"{tmp_path}/a.*")


def test_a_gzip_file_that_was_cut_short(tmp_path):
    rng = random.Random(0)
    rows = [{**row, "noise": rng.getrandbits(4000)} for row in TEXT]  # does not compress away
    path = write(tmp_path / "a.jsonl.gz", rows)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = problem(path)
    number = int(message.split("after row ")[1].split(":")[0])
    assert "damaged or cut short" in message and 200 < number < 400
    path.write_bytes(path.read_bytes()[:10] + b"\xff" * 9)
    assert "after row 0: the gzip file is damaged or cut short (Error -3" in problem(path)


def test_a_parquet_file_with_damaged_pages(tmp_path):
    rng = random.Random(0)
    rows = [{**row, "prompt": str(rng.getrandbits(4000))} for row in TEXT]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=300)
    content = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content[second.data_page_offset : second.data_page_offset + 200] = b"\xff" * 200
    path.write_bytes(content)
    message = problem(path)
    assert "a.parquet cannot be read from row 301 on" in message or "from row 257 on" in message
    path.write_bytes(content[: len(content) // 2])
    assert "a.parquet cannot be read" in problem(path)


def test_text_in_a_table_that_is_no_text(tmp_path):
    columns = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    table = pa.table(columns)
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
    )
    pq.write_table(table.set_column(1, "chosen", broken), tmp_path / "a.parquet")
    assert "a.parquet cannot be read from row 1 on ('utf-8' codec" in problem(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "columns, missing",
    [(("question", "good", "bad"), "chosen"), (("prompt", "chosen"), "rejected"), (("chosen_ids",), "prompt_ids")],
)
@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_tables_without_the_columns(tmp_path, columns, missing, name):
    path = write(tmp_path / name, [dict.fromkeys(columns, "x")])
    with pytest.raises(DataError, match=f"{name} has no column '{missing}' \\(its columns: {', '.join(columns)}\\)"):
        open_rows(path)


def test_a_table_without_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(TEXT[:1])[:0], tmp_path / "a.parquet")
    assert "a.parquet holds no rows; it needs rows with prompt" in problem(tmp_path / "a.parquet")


def test_folders_with_nothing_to_read(tmp_path):
    assert "is a folder without data files (found: nothing)" in problem(tmp_path)
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "data").mkdir()
    assert "(found: data, notes.md); give a .jsonl, .jsonl.gz, .json or .parquet file" in problem(tmp_path)


def test_damaged_saved_folders(tmp_path):
    saved = write(tmp_path / "saved", TEXT)
    (file,) = saved.glob("*.arrow")
    content = file.read_bytes()
    for damage in (
        lambda: file.write_bytes(content[:100]),
        lambda: file.unlink(),
        lambda: (saved / "state.json").write_text("{"),
        lambda: (saved / "dataset_info.json").unlink(),
        lambda: (saved / "dataset_dict.json").write_text("[]"),
    ):
        damage()
        message = problem(saved)
        assert "saved cannot be read" in message and "not as save_to_disk wrote it" in message


@contextmanager
def without_privileges():
    """root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "folder", "closed/a.jsonl"])
def test_permission_denied(name):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, name)
        closed = path if path.parent == Path(folder) else path.parent
        if name == "folder":
            path.mkdir()
        else:
            path.parent.mkdir(exist_ok=True)
            write(path, TEXT)
        mode = closed.stat().st_mode
        closed.chmod(0)
        with without_privileges():
            assert f"{path} cannot be read (Permission denied); check its permissions." in problem(path)
        closed.chmod(mode)


@pytest.mark.slow
def test_long_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    long = b"x" * 100_000_000
    path.write_bytes(lines(TEXT[:1]).replace(b"yes 0", long))
    assert len(rows_of(open_rows(path))[0]["chosen"]) == len(long)
    path.write_bytes(GOOD + b'{"prompt": "' + long)
    assert "a.jsonl, row 2: this is no JSON (Unterminated string" in problem(path)
    monkeypatch.setattr(read, "LONGEST_LINE", len(GOOD))
    path.write_bytes(GOOD)
    assert rows_of(open_rows(path)) == TEXT[:1]
    path.write_bytes(GOOD + b" " + GOOD)
    assert f"a.jsonl, row 2: the line is longer than {len(GOOD)} bytes" in problem(path)


# Checking


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "saved"])
def test_the_first_bad_row_and_how_many_more(tmp_path, name):
    rows = [dict(row) for row in TEXT]
    rows[299]["chosen"] = ""
    assert f"{name}, row 300: 'chosen' is empty" in problem(write(tmp_path / name, rows))
    rows[411]["rejected"] = rows[412]["prompt"] = " "
    path = write(tmp_path / f"b{name}", rows)
    with pytest.raises(
        DataError, match=rf"b{name}, row 300: 'chosen' is empty.* \(2 more rows cannot be used"
    ) as checked:
        open_rows(path).check()
    with pytest.raises(DataError) as loaded:
        load_data(path, None)
    assert str(loaded.value) == str(checked.value)


def test_a_bad_row_is_named_before_a_line_that_is_no_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + GOOD + b"no\n")
    assert "row 1: the field 'chosen' is missing" in problem(path)


LISTS = [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64()), pa.list_(pa.float32())]


def test_ids_are_checked_alike_in_bulk_and_one_by_one(tmp_path):
    """Tables drawn at random, most with something wrong: what check() refuses is what row_problem refuses."""
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        kinds = rng.choices(LISTS, [6, 1, 1, 1], k=2)
        types = {"prompt_ids": rng.choice(kinds), "chosen_ids": rng.choice(kinds), "rejected_ids": rng.choice(kinds)}

        def ids(kind):
            signed = not pa.types.is_unsigned_integer(kind.value_type)
            part = [rng.randrange(3) for _ in range(rng.choices([0, 1, 2, 9], [1, 9, 9, 9])[0])]
            return rng.choices([part, [*part, -1] if signed else part, [*part, None], None], [60, 1, 1, 1])[0]

        columns = {name: pa.array([ids(kind) for _ in range(4)], kind) for name, kind in types.items()}
        table = pa.table(columns).slice(rng.randrange(2))
        rows = [{name: value for name, value in row.items() if value is not None} for row in table.to_pylist()]
        bad = [number for number, row in enumerate(rows, start=1) if row_problem(row)]
        assert not (read._are_good_ids(table) and bad)
        pq.write_table(table, tmp_path / "a.parquet")
        source = open_rows(tmp_path / "a.parquet")
        if bad:
            refused += 1
            with pytest.raises(DataError, match=f", row {bad[0]}: "):
                source.check()
        else:
            assert source.check() == len(rows)
    assert 100 < refused < 250


def test_good_ids_are_checked_without_an_object_a_token(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", IDS)
    monkeypatch.setattr(read, "row_problem", None)
    assert open_rows(path).check() == len(IDS)


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_memory_stays_flat_however_long_the_file(tmp_path, name):
    row = lines([{**TEXT[0], "chosen": "yes " * 2500}])
    path, count = tmp_path / name, 20_000
    with gzip.open(path, "wb", compresslevel=1) if name.endswith("gz") else open(path, "wb") as file:
        for _ in range(count // 100):
            file.write(row * 100)
    source = open_rows(path)
    tracemalloc.start()
    assert source.check() == count
    assert sum(1 for _ in source) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_memory_stays_flat_however_large_the_row_group(tmp_path):
    count, length = 20_000, 1_000
    ids = pa.array(np.random.default_rng(0).integers(0, 1 << 30, count * length, np.int32))

    def column(begin, end):
        return pa.ListArray.from_arrays(
            pa.array(np.arange(count + 1, dtype=np.int32) * (end - begin)), ids[: count * (end - begin)]
        )

    path = tmp_path / "a.parquet"
    columns = {"prompt_ids": column(0, 500), "chosen_ids": column(0, 300), "rejected_ids": column(0, 200)}
    pq.write_table(pa.table(columns), path, row_group_size=count)
    assert path.stat().st_size > 60e6
    before = peak = pa.total_allocated_bytes()
    for part in open_rows(path).parts:
        for _ in part.problems():
            peak = max(peak, pa.total_allocated_bytes())
    for number, _ in enumerate(open_rows(path)):
        peak = max(peak, pa.total_allocated_bytes())
        if number == 2_000:
            break
    assert peak - before < 20e6


@pytest.mark.parametrize(
    "column, values, told",
    [
        ("pair_weight", [1.0, None, -1.0, 2.0], "'pair_weight' is -1.0"),
        ("pair_weight", [1.0, None, 1e38, 2.0], "'pair_weight' is 1e+38"),
        ("pair_weight", [1.0, None, float("nan"), 2.0], "'pair_weight' is nan"),
        ("chosen_ids", [[4], [5], [2**40], [6]], "'chosen_ids' must be a list of token ids"),
    ],
)
def test_tables_of_ids_are_looked_at_whole(tmp_path, column, values, told):
    """Where no Python object is made of a token, too."""
    rows = [{"prompt_ids": [3], "chosen_ids": [4 + number], "rejected_ids": [9, 9]} for number in range(4)]
    good = datasets.Dataset.from_list(rows).add_column("pair_weight", [1.0, None, 0.0, 2.0])
    good.to_parquet(tmp_path / "good.parquet")
    assert open_rows(tmp_path / "good.parquet").check() == 4
    bad = good.remove_columns(column).add_column(column, values)
    bad.to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DataError) as caught:
        open_rows(tmp_path / "bad.parquet").check()
    assert "bad.parquet, row 3: " + told in str(caught.value)
