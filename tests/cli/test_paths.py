"""Nothing that is read is written over, however its path is spelt; nor another run, without being asked to."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
from cache_folders import FINGERPRINT, contents, flip, shard_of, values
from tiny import text_rows, write_rows

from fastdpo.cli import main
from fastdpo.cli.paths import check_is_free, is_demo
from fastdpo.reference.cache import ReferenceCache
from fastdpo.saving import lies_in, run_in, same_place
from fastdpo.types import UserError

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch):
    """A working folder with a model, data (a file and a folder of files) and links to them."""
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "pairs.jsonl", text_rows(12))
    write_rows(tmp_path / "pairs.jsonl", text_rows(12))
    os.symlink("model", tmp_path / "linked")
    os.symlink("pairs.jsonl", tmp_path / "linked.jsonl")
    os.link(tmp_path / "pairs.jsonl", tmp_path / "hard.jsonl")
    shutil.copytree(model_folder, tmp_path / "run" / "checkpoint-3")
    write_rows(tmp_path / "run" / "nan_rows.jsonl", text_rows(12))
    os.link(tmp_path / "run" / "nan_rows.jsonl", tmp_path / "other.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder):
    """Content and time of each file beneath a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(capfd, *words):
    assert main(list(words)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastdpo: ")]
    return line


@pytest.mark.parametrize(
    ("model", "dataset", "output"),
    [
        ("model", "pairs.jsonl", "model"),
        ("model", "pairs.jsonl", "model/"),
        ("./model", "pairs.jsonl", "data/../model/."),
        ("model", "pairs.jsonl", "linked"),
        ("linked", "pairs.jsonl", "model"),
        ("linked/", "pairs.jsonl", "./linked"),
        ("model", "pairs.jsonl", "model/dpo"),
        ("model", "data", "data"),
        ("model", "data", "data/out"),
        ("run/checkpoint-3", "pairs.jsonl", "run"),
        ("model", "run/nan_rows.jsonl", "run"),
        ("model", "other.jsonl", "run"),
        ("model", "data/*.jsonl", "data/pairs.jsonl"),
    ],
)
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_train(place, capfd, model, dataset, output, overwrite):
    before = snapshot(place)
    words = ["train", "--model", model, "--dataset", dataset, "--output_dir", output, "--overwrite", overwrite]
    said = refused(capfd, *words)
    assert said.startswith(f"fastdpo: --output_dir {output} ") and "--output_dir." in said
    assert snapshot(place) == before


def test_what_may_lie_in_the_output_folder(place):
    """Data beside the model to be: nothing is written over it."""
    words = ["train", "--model", "model", "--dataset", "pairs.jsonl", "--output_dir", ".", "--max_steps", "1"]
    before = snapshot(place)
    assert main(words) == 0
    after = snapshot(place)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize(
    ("option", "written"),
    [
        ("--columns", "pairs.jsonl"),
        ("--columns", "./pairs.jsonl"),
        ("--columns", "linked.jsonl"),
        ("--columns", "hard.jsonl"),
        ("--columns", "model/config.json"),
        ("--columns", "linked/rows.jsonl"),
        ("--columns", "cache/manifest.json"),
        ("--output", "model"),
        ("--output", "linked/"),
        ("--output", "pairs.jsonl"),
    ],
)
def test_precompute(place, capfd, option, written):
    (place / "cache").mkdir()
    before = snapshot(place)
    words = ["precompute", "--model", "model", "--dataset", "pairs.jsonl", option, written]
    said = refused(capfd, *words, *(["--output", "cache"] if option == "--columns" else []))
    assert said.startswith(f"fastdpo: {option} {written} ")
    assert snapshot(place) == before


@pytest.mark.parametrize(("dataset", "columns"), [("data", "data/pairs.jsonl"), ("data", "data/new.jsonl"),
                                                  ("data/*.jsonl", "data/new.jsonl")])  # fmt: skip
def test_columns_among_the_data(place, capfd, dataset, columns):
    before = snapshot(place)
    words = ["precompute", "--model", "model", "--dataset", dataset, "--columns", columns, "--output", "cache"]
    assert refused(capfd, *words).startswith(f"fastdpo: --columns {columns} ")
    assert snapshot(place) == before


def test_links_to_what_is_read_are_parted(place):
    """An output folder made of hard links to the model: its files are replaced, the model's stay."""
    shutil.copytree("model", "copy", copy_function=os.link)
    (place / "model" / "README.md").write_text("the model's own")
    os.link(place / "model" / "README.md", place / "copy" / "README.md")
    before = snapshot(place / "model")
    words = ["train", "--model", "model", "--dataset", "pairs.jsonl", "--output_dir", "copy", "--max_steps", "1"]
    assert main([*words, "--overwrite", "true"]) == 0
    assert snapshot(place / "model") == before
    assert (place / "copy" / "summary.json").exists()


def test_another_run(place, capfd):
    words = ["train", "--model", "model", "--dataset", "pairs.jsonl", "--output_dir", "out", "--max_steps", "2"]
    assert main(words) == 0
    (place / "out" / "pytorch_model.bin").write_bytes(b"of an older run")
    (place / "out" / "checkpoint-90").mkdir()
    (place / "out" / "mine.txt").write_text("kept")
    before = snapshot(place / "out")
    said = refused(capfd, *words)
    assert "out holds checkpoints (checkpoint-90) already" in said and "--overwrite true" in said
    assert snapshot(place / "out") == before
    assert main([*words, "--overwrite", "true"]) == 0
    names = {path.name for path in (place / "out").iterdir()}
    assert {"checkpoint-1", "checkpoint-2", "mine.txt", "model.safetensors"} <= names
    assert not {"checkpoint-90", "pytorch_model.bin"} & names


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "config.json",
                                  "summary.json", "report.png"])  # fmt: skip
def test_what_is_another_run(tmp_path, name):
    check_is_free(str(tmp_path / "new"), overwrite=False, resume=None)
    (tmp_path / "pairs.jsonl").write_text("")
    assert run_in(tmp_path) is None
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="already; go on with"):
        check_is_free(str(tmp_path), overwrite=False, resume=None)
    check_is_free(str(tmp_path), overwrite=True, resume=None)
    check_is_free(str(tmp_path), overwrite=False, resume="true")


def test_the_demo_writes_over_an_earlier_demo(tmp_path):
    assert not is_demo(str(tmp_path))
    for title, own in (("fastdpo demo: x", True), ("fastdpo train: x", False), (5, False)):
        (tmp_path / "summary.json").write_text(json.dumps({"title": title}))
        assert is_demo(str(tmp_path)) is own


def test_places(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.symlink(tmp_path / "a", tmp_path / "l")
    assert same_place(tmp_path / "a", f"{tmp_path}/l/../a/") and same_place(tmp_path / "l" / "x", tmp_path / "a" / "x")
    assert lies_in(tmp_path / "l" / "b" / "new", tmp_path / "a") and not lies_in(tmp_path / "a", tmp_path / "a")


def test_merge_into_a_link_to_a_source(tmp_path, capfd):
    ReferenceCache(tmp_path / "c", FINGERPRINT).add(values(5))
    os.symlink("c", tmp_path / "link")
    assert "is the folder to merge into" in refused(
        capfd, "cache", "merge", str(tmp_path / "link"), str(tmp_path / "c")
    )


def test_verify_against_a_model_changes_nothing(tmp_path, model_folder, capfd):
    data, cache = write_rows(tmp_path / "pairs.jsonl", text_rows(12)), tmp_path / "cache"
    words = ["--model", model_folder, "--dataset", data]
    assert main(["precompute", *words, "--output", str(cache)]) == 0
    flip(shard_of(cache), 60)
    ReferenceCache(cache, set_aside_damaged=False)
    before, files = contents(cache), snapshot(Path(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["cache", "verify", str(cache), *words])
    assert code in (1, 2)
    assert contents(cache) == before and snapshot(Path(tmp_path)) == files
