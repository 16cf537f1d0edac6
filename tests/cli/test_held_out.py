"""The held-out measurement: whole prompts apart, rows with their number in the file, prompts that fit the model."""

import json

import pytest
from tiny import text_rows, tiny_model, word_tokenizer, write_rows

from fastdpo.cli import main
from fastdpo.evaluation import generate
from fastdpo.run import load_data
from fastdpo.types import DataError

pytestmark = pytest.mark.usefixtures("quick_runs")


def prompts_of(rows):
    return {json.dumps(row["prompt"] if "prompt" in row else row["prompt_ids"]) for row in rows}


def several_each(count, each):
    return [{"prompt": f"why {n}", "chosen": f" yes {k}", "rejected": " no"} for k in range(each) for n in range(count)]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("count", "each"), [(100, 4), (30, 3), (7, 5), (200, 1)])
def test_no_held_out_prompt_is_trained_on(tmp_path, count, each, chat):
    rows = several_each(count, each)
    if chat:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{k: [{"role": role, "content": row[k]}] for k, role in roles.items()} for row in rows]
    data = load_data(write_rows(tmp_path / "p.jsonl", rows), None)
    assert not prompts_of(data.train) & prompts_of(data.held_out)
    assert len(data.train) + len(data.held_out) == len(rows)
    wanted = round(len(rows) * 0.1)
    assert wanted <= len(data.held_out) < wanted + each


def test_rows_of_ids_and_rows_without_a_prompt(tmp_path):
    ids = [{"prompt_ids": [5, n], "chosen_ids": [k + 3], "rejected_ids": [90]} for n in range(20) for k in range(3)]
    data = load_data(write_rows(tmp_path / "ids.jsonl", ids), None)
    assert data.held_out and not prompts_of(data.train) & prompts_of(data.held_out)
    rows = [{"chosen": f"question {n} yes {k}", "rejected": f"question {n} no"} for n in range(20) for k in range(3)]
    data = load_data(write_rows(tmp_path / "rows.jsonl", rows), None)
    sides = [{row["rejected"] for row in part} for part in (data.train, data.held_out)]
    assert sides[1] and not sides[0] & sides[1]


def test_prompts_too_few_to_hold_any_out(tmp_path, capsys):
    data = load_data(write_rows(tmp_path / "p.jsonl", several_each(2, 20)), None)
    assert len(data.train) == 40 and not data.held_out
    assert "give --eval_dataset to measure" in capsys.readouterr().err


def test_prompts_that_are_in_both_files(tmp_path, capsys):
    train = write_rows(tmp_path / "train.jsonl", several_each(5, 1))
    load_data(train, write_rows(tmp_path / "eval.jsonl", several_each(8, 1)))
    assert "5 of 8 rows of" in capsys.readouterr().err


def test_rows_keep_their_number_in_the_file(tmp_path):
    rows = several_each(40, 1)
    data = load_data(write_rows(tmp_path / "p.jsonl", rows), None)
    for row in data.train + data.held_out:
        assert row["prompt"] == rows[row["row_number"]]["prompt"]


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_a_row_that_cannot_be_tokenized_is_named_as_in_the_file(tmp_path, model_folder, capfd, part):
    path = tmp_path / "p.jsonl"
    rows = text_rows(30)
    write_rows(path, rows)
    number = getattr(load_data(path, None), part)[-1]["row_number"]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows[number] = {name: [{"role": role, "content": rows[number][name]}] for name, role in roles.items()}
    text = [json.dumps(row) for row in rows]
    path.write_text("\n\n".join(text))  # an empty line before each
    words = ["train", "--model", model_folder, "--dataset", str(path), "--output_dir", str(tmp_path / "out")]
    tokenizer = word_tokenizer()
    assert not tokenizer.chat_template
    assert main(words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fastdpo: ")]
    assert "no chat template" in line or f"row {number + 1} (line {2 * number + 1})" in line


def test_a_row_that_breaks_the_template_is_named_as_in_the_file(tmp_path, capfd):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('bad words') }}{% endif %}" \
        + tokenizer.chat_template  # fmt: skip
    tokenizer.save_pretrained(folder)
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [{k: [{"role": role, "content": row[k]}] for k, role in roles.items()} for row in text_rows(30)]
    path = tmp_path / "p.jsonl"
    data = load_data(write_rows(path, rows), None)
    for number in (data.train[-1]["row_number"], data.held_out[-1]["row_number"]):
        broken = [{**row, "prompt": [{"role": "user", "content": "bad"}]} if n == number else row
                  for n, row in enumerate(rows)]  # fmt: skip
        # The draw is by prompts in their order, so the row stays in its part.
        words = ["train", "--model", str(folder), "--dataset", write_rows(path, broken), "--output_dir",
                 str(tmp_path / "out")]  # fmt: skip
        assert main(words) == 2
        err = capfd.readouterr().err
        assert f"fastdpo: {path}, row {number + 1}: it cannot be tokenized (bad words)" in err


def test_held_out_prompts_that_fill_max_length(tmp_path, model_folder, capfd):
    held_out = [{"prompt": "why " * 30, "chosen": "yes", "rejected": "no"}]
    words = ["train", "--model", model_folder, "--dataset", write_rows(tmp_path / "p.jsonl", text_rows(8)),
             "--eval_dataset", write_rows(tmp_path / "e.jsonl", held_out), "--output_dir", str(tmp_path / "out"),
             "--max_length", "20", "--max_steps", "1"]  # fmt: skip
    assert main(words) == 0
    assert "nothing is measured on held-out pairs: no row of the held-out data set is left" in capfd.readouterr().err


@pytest.fixture
def own_generate():
    """Not the stand-in of `quick_runs`, which this module's import came before."""
    return generate


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_longer_than_the_model_has_positions(own_generate, kind):
    options = {"n_positions": 40} if kind == "gpt2" else {"max_position_embeddings": 40}
    model, tokenizer = tiny_model(kind, **options), word_tokenizer()
    long, short = "why a b c " * 20, " ".join(["why a b c"] * 5)
    answers = own_generate(model, tokenizer, [long, short], progress=False)
    assert answers[0] == answers[1]  # of which the last 20 tokens are the same
    assert own_generate(model, tokenizer, [long], max_length=8, progress=False) == own_generate(
        model, tokenizer, ["why a b c why a b c"], progress=False
    )


def test_the_split_of_either_data_set(tmp_path):
    from datasets import Dataset, DatasetDict

    parts = {"train": several_each(8, 1), "test": several_each(3, 1)}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "data")
    folder = str(tmp_path / "data")
    data = load_data(folder, folder, split="train", eval_split="test")
    assert (len(data.train), len(data.held_out)) == (8, 3)
    with pytest.raises(DataError, match="no split 'valid'"):
        load_data(folder, None, split="valid")


def test_a_cache_in_bfloat16_and_without_max_length(tmp_path, model_folder, scored):
    data, cache = write_rows(tmp_path / "p.jsonl", text_rows(12)), str(tmp_path / "cache")
    both = ["--model", model_folder, "--dataset", data, "--dtype", "bfloat16", "--max_length", "none"]
    assert main(["precompute", *both, "--output", cache]) == 0
    assert sum(scored) > 0
    scored.clear()
    words = [*both, "--output_dir", str(tmp_path / "out"), "--ref_logps", cache, "--max_steps", "1"]
    assert main(["train", *words]) == 0
    assert not scored
