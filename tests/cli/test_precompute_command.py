"""fastdpo precompute: alone, in slices, in several processes; one sentence for each mistake."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path

import processes
import pyarrow.parquet as pq
import pytest
import torch
from cache_contents import assert_same, contents
from tiny import naive_sequence_logps, random_rows, text_rows, tiny_model, word_tokenizer, write_rows

from fastdpo.cli import main
from fastdpo.data import tokenize_row
from fastdpo.reference import ReferenceCache, fill, precompute, reference_columns, work
from fastdpo.run import _with_adapter


@pytest.fixture
def run(tmp_path, model_folder, capfd):
    """Runs `fastdpo precompute` with a good command line but for the changes; exit code, stdout and stderr."""

    def call(*extra, rows=None, **changes):
        options = {"model": model_folder, "output": str(tmp_path / "cache")}
        if "dataset" not in changes:
            options["dataset"] = write_rows(tmp_path / "pairs.jsonl", text_rows(30) if rows is None else rows)
        options |= changes
        words = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
        try:
            code = main(["precompute", *words, *extra])
        except SystemExit as exit:  # argparse's own
            code = exit.code
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = capfd.readouterr()
        return code, out.out, out.err

    return call


def test_a_cache_from_one_command(run, tmp_path):
    code, out, err = run()
    assert code == 0, err
    assert "sequences   60: 0 found, 60 computed" in out and "30/30 rows" in err
    rows = [tokenize_row(row, word_tokenizer()) for row in text_rows(30)]
    columns = reference_columns(ReferenceCache(tmp_path / "cache"), rows)
    exact = naive_sequence_logps(tiny_model(), rows).view(2, -1)
    torch.testing.assert_close(torch.tensor([*columns.values()]), exact, rtol=1e-5, atol=1e-4)
    code, out, err = run(rows=text_rows(33)[::-1])
    assert code == 0 and "66: 60 found, 6 computed" in out
    code, out, err = run()
    assert "60 found, 0 computed" in out and "100% found in the cache" in err


def test_what_it_computes_the_trainer_takes(run, tmp_path, model_folder, capfd):
    assert run()[0] == 0
    (tmp_path / "cache" / "manifest.json").chmod(0o444)
    before = sorted((tmp_path / "cache").iterdir())
    arguments = ["train", "--model", model_folder, "--dataset", str(tmp_path / "pairs.jsonl"), "--max_steps", "1"]
    code = main([*arguments, "--output_dir", str(tmp_path / "out"), "--ref_logps", str(tmp_path / "cache")])
    assert code == 0, capfd.readouterr().err
    assert sorted((tmp_path / "cache").iterdir()) == before


def test_without_output_it_fills_the_cache_that_training_looks_into(run, tmp_path, monkeypatch, model_folder, capfd):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "user"))
    code, out, _ = run(output=None)
    assert code == 0 and str(tmp_path / "user") in out
    before = sorted((tmp_path / "user").rglob("*"))
    arguments = ["train", "--model", model_folder, "--dataset", str(tmp_path / "pairs.jsonl"), "--max_steps", "1"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    assert sorted((tmp_path / "user").rglob("*")) == before


def test_slices_copied_together(run, tmp_path):
    assert run(output=str(tmp_path / "whole"))[0] == 0
    merged = tmp_path / "merged"
    merged.mkdir()
    total = 0
    for part in ("1/3", "2/3", "3/3"):
        code, out, _ = run(output=str(tmp_path / part.replace("/", "of")), shard=part)
        assert code == 0 and f"slice {part[0]} of 3" in out
        total += len(ReferenceCache(tmp_path / part.replace("/", "of")))
        for file in (tmp_path / part.replace("/", "of")).iterdir():
            (merged / file.name).write_bytes(file.read_bytes())
    assert total == 60
    assert_same(contents(tmp_path / "whole"), contents(merged))


def test_slices_fit_together_whatever_the_number_of_processes(run, tmp_path, monkeypatch):
    """The first of two machines has three processes, the second has one."""
    from fastdpo.cli import precompute as command

    monkeypatch.setattr(command, "_wait_for_all", lambda filled: filled)
    for part, world in (("1/2", 3), ("2/2", 1)):
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            code, _, err = run(shard=part)
            assert code == 0, err
    cache = ReferenceCache(tmp_path / "cache")
    assert len(cache) == sum(pq.read_metadata(shard).num_rows for shard in cache.path.glob("shard-*")) == 60


@pytest.mark.slow
def test_two_processes_give_the_cache_of_one(tmp_path, model_folder):
    rows = write_rows(tmp_path / "pairs.jsonl", random_rows(80, seed=3))
    command = ["precompute", "--model", model_folder, "--dataset", rows, "--output"]
    one, two = tmp_path / "one", tmp_path / "two"
    processes.run_fastdpo(*command, one, folder=tmp_path)
    said = processes.run_fastdpo(*command, two, folder=tmp_path, processes=2)
    assert said.count("160: 0 found, 160 computed") == 1  # one summary, of both
    assert_same(contents(one), contents(two))
    assert len(list(two.glob("shard-*"))) == 2


def precompute_until_told(folder, command):
    """`fastdpo precompute` on rows from a pipe; stops after its fifth pass, says so, and waits for a signal."""
    fill.PASSES_PER_SHARD, work.WINDOW_ROWS = 2, 200
    sys.stdin = (folder / "pipe").open()
    passes, add = itertools.count(1), fill._ShardWriter.add

    def adding(*of):
        add(*of)
        if next(passes) == 5:
            (folder / "stopped").touch()
            signal.pause()

    fill._ShardWriter.add = adding
    sys.exit(main(["precompute", *command]))


@pytest.mark.slow
def test_a_terminated_run_keeps_what_it_has(tmp_path, model_folder):
    """SIGTERM, as a batch system sends it before it kills; and rows from a pipe, whose number nobody knows."""
    os.mkfifo(tmp_path / "pipe")
    command = ["--model", model_folder, "--dataset", "-", "--max_tokens", "40", "--output", str(tmp_path / "cache")]
    process = processes.Worker(tmp_path, precompute_until_told, tmp_path, command)
    rows = [row for row in random_rows(260, seed=4) if row["chosen_ids"] != row["rejected_ids"]]
    assert len(rows) > 220  # more than a window; what is beyond fits into the pipe
    with open(tmp_path / "pipe", "w") as pipe:
        for row in rows:
            pipe.write(json.dumps(row) + "\n")
        pipe.flush()
        processes.wait_until((tmp_path / "stopped").exists, process, lambda: {"precompute": process.printed()})
        os.kill(process.process.pid, signal.SIGTERM)
        process.end(130)
    assert process.printed().splitlines()[-1] == "fastdpo: interrupted"
    cache = ReferenceCache(tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("shard-*"))) == 3 and len(cache) > 5  # the last with a single pass
    assert not list((tmp_path / "cache").glob(".*.tmp"))
    before = len(cache)
    assert len(precompute(tiny_model(), rows[:100], cache, progress=False)) <= before + 200
    assert len(cache) > before


def test_sums_only_and_columns(run, tmp_path):
    columns = tmp_path / "columns.jsonl"
    code, _, err = run("--sums_only", "true", "--columns", str(columns))
    assert code == 0, err
    cache = ReferenceCache(tmp_path / "cache")
    assert not cache.per_token
    written = [json.loads(line) for line in columns.read_text().splitlines()]
    rows = [tokenize_row(row, word_tokenizer()) for row in text_rows(30)]
    sums = reference_columns(cache, rows)
    for number, row in enumerate(text_rows(30)):
        assert written[number] == {**row, **{name: values[number] for name, values in sums.items()}}


def test_an_adapter(run, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(), lora)
    model.save_pretrained(tmp_path / "adapter")
    code, _, err = run(adapter=str(tmp_path / "adapter"))
    assert code == 0, err
    rows = [tokenize_row(row, word_tokenizer()) for row in text_rows(30)]
    columns = reference_columns(ReferenceCache(tmp_path / "cache"), rows)
    exact = naive_sequence_logps(model.merge_and_unload(), rows).view(2, -1)
    torch.testing.assert_close(torch.tensor([*columns.values()]), exact, rtol=1e-4, atol=1e-3)
    code, _, err = run()
    assert code == 2 and "adapter" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "layers, rename, said",
    [
        (2, lambda name: name.replace("model.model.", "model.model.model."), "8 of the weights"),  # 4 pairs of A and B
        (1, str, "4 of the weights that the adapter has on this model are not in it"),
        (3, str, "4 of its weights have no place in this model (base_model.model.model.layers.2.self_attn.q_proj.lora"),
    ],
    ids=["other names", "fewer layers", "more layers"],
)
def test_an_adapter_of_another_model_is_refused(run, tmp_path, layers, rename, said):
    """PEFT warns, or says nothing, and computes with an adapter that does nothing."""
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file

    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(tiny_model(num_hidden_layers=layers), lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({rename(name): value for name, value in load_file(file).items()}, file)
    code, _, err = run(adapter=str(tmp_path / "adapter"))
    assert code == 2
    assert said in err.splitlines()[-1]
    assert not list((tmp_path / "cache").glob("shard-*"))


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
        {"use_dora": True},
        {"bias": "all"},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_that_fit(tmp_path, options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
    model.save_pretrained(tmp_path / "adapter")
    loaded = _with_adapter(tiny_model(), str(tmp_path / "adapter"), allow_pickle=False)
    for name, value in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), value, rtol=0, atol=0)


def test_damage_is_told_in_one_line(run, tmp_path):
    assert run()[0] == 0
    (shard,) = (tmp_path / "cache").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:500])
    code, out, err = run()
    assert code == 0 and "60 computed" in out
    told = [line for line in err.splitlines() if "damaged" in line]
    assert len(told) == 1 and told[0].startswith(f"fastdpo: {shard} is damaged (")


def test_a_folder_that_may_only_be_read_is_enough_where_it_has_everything(run, tmp_path, monkeypatch):
    assert run()[0] == 0

    def never(*args, **kwargs):
        raise AssertionError("the folder is written to")

    monkeypatch.setattr("fastdpo.reference.cache.write_file", never)
    monkeypatch.setattr("fastdpo.run.check_output_dir", never)
    code, out, _ = run()
    assert code == 0 and "60 found, 0 computed" in out


def test_values_are_verified_against_the_model(run, tmp_path, model_folder, capfd):
    assert run()[0] == 0
    data = ["--model", model_folder, "--dataset", str(tmp_path / "pairs.jsonl")]
    assert main(["cache", "verify", str(tmp_path / "cache"), *data, "--rows", "4"]) == 0
    assert "8 sequences against the model: they agree" in capfd.readouterr().out
    cache = ReferenceCache(tmp_path / "cache")
    wrong = ReferenceCache(tmp_path / "wrong", cache.fingerprint)
    wrong.add({key: value - 1 for key, value in contents(tmp_path / "cache").items()})
    assert main(["cache", "verify", str(tmp_path / "wrong"), *data]) == 1
    assert "60 sequences against the model: they DO NOT AGREE" in capfd.readouterr().out
    assert main(["cache", "verify", str(tmp_path / "cache"), *data[:2]]) == 2
    assert "give both --model and --dataset" in capfd.readouterr().err


def test_another_dtype(run, tmp_path):
    assert run(dtype="bfloat16")[0] == 0
    assert ReferenceCache(tmp_path / "cache").fingerprint["dtype"] == "bfloat16"
    code, _, err = run()
    assert code == 2 and "bfloat16" in err.splitlines()[-1] and "float32" in err.splitlines()[-1]
    assert run("--bf16", "true", output=str(tmp_path / "other"))[0] == 0
    assert ReferenceCache(tmp_path / "other").fingerprint["dtype"] == "float32 in bfloat16 autocast"


def test_pickled_weights_only_on_request(run, tmp_path, model_folder):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in Path(model_folder).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    code, _, err = run(model=str(folder))
    assert code == 2 and "can run code when they are read" in err and "--allow_pickle true" in err
    code, _, err = run("--allow_pickle", "true", model=str(folder))
    assert code == 0, err


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": "/nowhere"}, "there is no such model folder"),
        ({"adapter": "/nowhere"}, "there is no such model folder; check the path given with --adapter"),
        ({"dataset": "/nowhere.jsonl"}, "there is no such file"),
        ({"rows": []}, "holds no rows"),
        ({"rows": [*text_rows(2), {"prompt": "why", "chosen": " a"}]}, "pairs.jsonl, row 3: the field 'rejected'"),
        (
            {"rows": [{"prompt_ids": [1], "chosen_ids": [500], "rejected_ids": [3]}]},
            "the id 500, and the model knows 97",
        ),
        ({"shard": "0/3"}, "no slice; give I/N with I from 1 to N"),
        ({"shard": "4/3"}, "no slice; give I/N with I from 1 to N"),
        ({"max_length": "one"}, "no number of tokens"),
        ({"sums_only": "perhaps"}, "neither true nor false"),
        ({"max_tokens": "0"}, "must be above 0"),
        ({"batch_size": "some"}, "must be above 0"),
        ({"attention_backend": "nothing"}, "attention_backend is 'nothing'"),
        ({"columns": "/proc/none/x.jsonl"}, "--columns"),
        ({"colour": "red"}, "does not know --colour"),
        ({"rows": [{"prompt_ids": 5, "chosen_ids": [2], "rejected_ids": [3]}]}, "row 1: 'prompt_ids' must be a list"),
        ({"dataset": "-", "columns": "x.jsonl"}, "standard input comes once"),
        ({"shard": "1/2", "columns": "x.jsonl"}, "--columns needs what all slices compute"),
    ],
)
def test_mistakes(run, tmp_path, changes, problem):
    code, _, err = run(**changes)
    assert code == 2
    assert problem in err and "Traceback" not in err
    assert not list(tmp_path.rglob("shard-*"))


def test_a_pipe_is_for_one_process(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(dataset="-")
    assert code == 2 and "2 processes would each get some rows of standard input" in err


@pytest.mark.parametrize("text", ["[]", "null", '{"model_type": "llama", "vocab_size": "abc"}'])
def test_malformed_models(run, tmp_path, model_folder, text):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(model_folder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(text)
    code, _, err = run(model=str(folder))
    assert code == 2 and "Traceback" not in err and err.splitlines()[-1].startswith(f"fastdpo: {folder}")


def test_an_output_that_cannot_be_one(run, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "cache"):
        code, _, err = run(output=str(output))
        assert code == 2 and len(err.splitlines()) == 1 and "--output" in err
