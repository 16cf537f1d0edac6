"""Values that no training can use are told before it, with the row: in lists, tables, streams and without a trainer."""

import logging
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from reward_models import tiny_reward_model
from tiny import VOCABULARY, random_rows, text_rows, tiny_model, word_tokenizer, write_rows

import fastdpo
from fastdpo.run import load_data
from fastdpo.types import DataError, UserError

RUN = {
    "bf16": False, "use_cpu": True, "report_to": [], "max_steps": 1, "per_device_train_batch_size": 2,
    "packing": "padded", "disable_tqdm": True,
}  # fmt: skip


def answers(count):
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 2 == 0}
        for number, row in enumerate(random_rows(count))
    ]


def ranked(count):
    return [
        {"prompt_ids": row["prompt_ids"], "completions_ids": [row["chosen_ids"], row["rejected_ids"], [7, 8]]}
        for row in random_rows(count)
    ]


def made(tmp_path, method, rows, model=None, tokenizer=None, eval_dataset=None, ref_model=None, **options):
    if method == "lists":
        method, options = "DPO", {"loss_type": "listwise", **options}
    args = getattr(fastdpo, f"{method}Config")(output_dir=str(tmp_path / "out"), **(RUN | options))
    own = tiny_reward_model() if method == "Reward" else tiny_model()
    reference = {"ref_model": ref_model} if ref_model is not None else {}
    return getattr(fastdpo, f"{method}Trainer")(
        own if model is None else model, args=args, train_dataset=rows, eval_dataset=eval_dataset,
        processing_class=tokenizer or word_tokenizer(), **reference,
    )  # fmt: skip


def as_kind(rows, kind):
    if kind == "stream":
        return IterableDataset.from_generator(lambda: iter(rows))
    return rows if kind == "list" else Dataset.from_list(rows)


def refused(tmp_path, method, rows, kind="list", **options):
    """What is said; of a stream, as its rows come."""
    with pytest.raises(DataError) as caught:
        run = made(tmp_path, method, as_kind(rows, kind), **options)
        assert kind == "stream"
        list(run.train_dataset)
    return str(caught.value)


def of_tokens(count):
    model = tiny_model()
    model.resize_token_embeddings(count)
    return model


def changed(rows, number, **values):
    return [{**row, **values} if place == number else row for place, row in enumerate(rows)]


# Token ids

KINDS = ["list", "table", "stream"]
BEYOND = [
    ("DPO", random_rows(6), {"rejected_ids": [5, VOCABULARY]}, "rejected_ids"),
    ("DPO", random_rows(6), {"prompt_ids": [VOCABULARY]}, "prompt_ids"),
    ("lists", ranked(6), {"completions_ids": [[5], [6, 7], [8, VOCABULARY]]}, "completions_ids"),
    ("KTO", answers(6), {"completion_ids": [VOCABULARY]}, "completion_ids"),
    ("CPO", random_rows(6), {"chosen_ids": [VOCABULARY, 4]}, "chosen_ids"),
    ("ORPO", random_rows(6), {"chosen_ids": [VOCABULARY, 4]}, "chosen_ids"),
    ("Reward", random_rows(6), {"rejected_ids": [VOCABULARY, 4]}, "rejected_ids"),
]


@pytest.mark.parametrize(
    "method, rows, values, column, kind",
    [(*case, kind) for case in BEYOND for kind in (KINDS if case[0] in ("DPO", "lists", "Reward") else KINDS[:1])],
)
def test_a_token_beyond_the_embeddings(tmp_path, method, rows, values, column, kind):
    said = refused(tmp_path, method, changed(rows, 4, **values), kind)
    assert f"train data set, row 4 (counted from 0): {column} hold the token id 97" in said
    assert "the model has embeddings for 97 tokens, 0 to 96" in said
    assert "resize_token_embeddings" in said and "the tokenizer of this model" in said


@pytest.mark.parametrize("kind", KINDS)
def test_answers_to_other_prompts(tmp_path, kind):
    rows = [{**row, "KL_completion_ids": [3, 4]} for row in answers(4)]
    said = refused(tmp_path, "KTO", changed(rows, 2, KL_completion_ids=[3, 200]), kind)
    assert "row 2 (counted from 0): KL_completion_ids hold the token id 200" in said
    said = refused(tmp_path, "KTO", changed(rows, 2, KL_completion_ids=[3, -1]), kind)
    assert "row 2 (counted from 0): 'KL_completion_ids' must be a list of token ids" in said


def test_more_embeddings_than_tokens_and_the_last_token(tmp_path):
    rows = changed(random_rows(4), 1, chosen_ids=[VOCABULARY - 1])
    assert len(made(tmp_path, "DPO", rows).train_dataset) == 4


def test_a_reference_with_fewer_tokens(tmp_path):
    rows = changed(random_rows(4), 1, prompt_ids=[3], chosen_ids=[96])
    said = refused(tmp_path, "DPO", rows, ref_model=of_tokens(96))
    assert "row 1 (counted from 0): chosen_ids hold the token id 96, and ref_model has embeddings for 96" in said


def test_text_of_another_tokenizer(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        said = refused(tmp_path, "DPO", text_rows(4), model=of_tokens(12))
    assert "row 0 (counted from 0): prompt_ids hold the token id 13" in said
    assert "tokenizer knows 15 tokens, and the model has embeddings for 12" in caplog.text


def test_a_padding_token_beyond_the_embeddings(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(UserError, match=r"padding token '<pad>' has the id 15, and the model has embeddings for 15"):
        made(tmp_path, "DPO", random_rows(4), model=of_tokens(15), tokenizer=tokenizer)


def test_evaluation_sets(tmp_path):
    bad = changed(random_rows(4), 3, chosen_ids=[500])
    with pytest.raises(DataError, match=r"eval data set, row 3 .* the token id 500"):
        made(tmp_path, "DPO", random_rows(4), eval_dataset=bad)
    with pytest.raises(DataError, match=r"eval data set, row 3 .* the token id 500"):
        made(tmp_path, "DPO", random_rows(4)).evaluate(bad)


@pytest.mark.parametrize(
    "wrong, kind", [*((wrong, "list") for wrong in (-1, True, 1.5, "7", None, 2**63)), (-1, "table"), (True, "stream")]
)
def test_what_is_no_token_id(tmp_path, wrong, kind):
    said = refused(tmp_path, "DPO", changed(random_rows(4), 2, chosen_ids=[5, wrong]), kind)
    assert "row 2 (counted from 0): 'chosen_ids' must be a list of token ids (integers from 0)" in said
    with pytest.raises(UserError, match="row 2 of the data set"):
        fastdpo.precompute(tiny_model(), changed(random_rows(4), 2, chosen_ids=[5, wrong]), tmp_path / "cache")


@pytest.mark.parametrize("row", [{"chosen_ids": [VOCABULARY]}, {"rejected_ids": [-1]}])
def test_ids_without_a_trainer(tmp_path, row):
    with pytest.raises(DataError, match=r"row 2 of the data set .* the model knows 97 tokens"):
        fastdpo.precompute(tiny_model(), changed(random_rows(4), 2, **row), tmp_path / "cache")


# Templates that lose what was said


def chat_rows(count):
    return [
        {
            "prompt": [{"role": "user", "content": f"why {['a', 'b', 'c', 'd', 'e'][number % 5]}"}],
            "chosen": [{"role": "assistant", "content": "yes a"}],
            "rejected": [{"role": "assistant", "content": "no b"}],
        }
        for number in range(count)
    ]


def template(of_assistant):
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + of_assistant + "{% else %}"
        "{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    return tokenizer


def singly(rows):
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(rows)]


def listed(rows):
    return [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in rows]


LOST = {
    "nothing": ("{{ 'assistant : ' }}", "the chat template leaves nothing of what"),
    "an end": ("{{ 'assistant : </s>' }}", "the chat template leaves nothing of what"),
}


@pytest.mark.parametrize("of_assistant, told", LOST.values(), ids=LOST)
@pytest.mark.parametrize("method, kind", [("DPO", "list"), ("lists", "list"), ("KTO", "stream"), ("Reward", "table")])
def test_a_template_that_drops_the_answer(tmp_path, method, kind, of_assistant, told):
    rows = {"lists": listed, "KTO": singly}.get(method, list)(chat_rows(4))
    said = refused(tmp_path, method, rows, kind, tokenizer=template(of_assistant))
    assert said.startswith("train data set, row 0 (counted from 0): ")
    assert told in said


@pytest.mark.parametrize("rows, names", [(chat_rows(4), "'chosen' and 'rejected'"), (listed(chat_rows(4)), "'comple")])
def test_a_template_that_cuts_the_answer(tmp_path, rows, names):
    """To its first letter, which no word of the tokenizer is: both answers become the unknown token."""
    tokenizer = template("{{ 'assistant : ' + m['content'][:1] + ' </s>' }}")
    said = refused(tmp_path, "DPO" if "chosen" in rows[0] else "lists", rows, tokenizer=tokenizer)
    assert "row 0 (counted from 0): the chat template makes the same tokens of " + names in said


def test_a_dropped_answer_without_a_trainer(tmp_path):
    with pytest.raises(DataError, match=r"row 0 of the data set .*: the chat template leaves nothing of what 'chosen'"):
        fastdpo.precompute(tiny_model(), chat_rows(2), tmp_path, tokenizer=template("{{ 'assistant : ' }}"))


def test_templates_that_keep_it(tmp_path):
    """Short answers, and answers that are a call of a tool and no text."""
    call = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    tokenizer = template("{{ 'assistant : ' + m['content'] + (' a b' if m.get('tool_calls') else '') + ' </s>' }}")
    run = made(tmp_path, "DPO", changed(chat_rows(3), 1, chosen=call), tokenizer=tokenizer)
    assert run.train_dataset["chosen_ids"][:] == [[11, 6, 2], [6, 7, 2], [11, 6, 2]]


# References, weights, margins, labels, roles

BAD_SUMS = [
    (0.5, "none is above 0"),
    (-1e7, "which no model gives"),
    (-900.0, "which no model gives a completion of 3"),
]
PLACES = [
    ("DPO", random_rows(4), {"ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}, "ref_rejected_logps"),
    ("KTO", answers(4), {"ref_logps": -3.0, "ref_KL_logps": -4.0, "KL_completion_ids": [3, 4, 5]}, "ref_KL_logps"),
    ("KTO", answers(4), {"ref_logps": -3.0}, "ref_logps"),
    ("lists", ranked(4), {"ref_logps": [-3.0, -3.0, -3.0]}, "ref_logps"),
]


@pytest.mark.parametrize("value, told", BAD_SUMS)
@pytest.mark.parametrize(
    "method, rows, columns, name, kind",
    [(*case, "list") for case in PLACES] + [(*PLACES[place], kind) for place in (0, 3) for kind in KINDS[1:]],
)
def test_references_beyond_reason(tmp_path, method, rows, columns, name, value, told, kind):
    three = {column: [5, 6, 7] for column in ("rejected_ids", "completion_ids") if column in rows[0]}
    if method == "lists":
        three["completions_ids"] = [[5, 6, 7], [6, 7, 8], [7, 8, 9]]
    rows = [{**row, **columns} for row in rows]
    wrong = {**three, name: [-1.0, value, -1.0] if method == "lists" else value}
    said = refused(tmp_path, method, changed(rows, 2, **wrong), kind)
    assert f"row 2 (counted from 0): '{name}' is {value}" in said
    assert told in said


def test_sums_that_may_be(tmp_path):
    """0 for an answer that is certain, give or take rounding; and the sum of a model that has learnt nothing."""
    sums = {"ref_chosen_logps": 5e-4, "ref_rejected_logps": -150.0 * 2}
    rows = [{**row, "rejected_ids": [4, 5], **sums} for row in random_rows(4)]
    run = made(tmp_path, "DPO", rows)
    assert run.train_dataset["ref_rejected_logps"][:] == [-300.0] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method, weight", [("DPO", 1e38), ("DPO", math.inf), ("Reward", 1e10), ("Reward", -1.0)])
def test_weights_beyond_reason(tmp_path, method, weight, kind):
    rows = [{**row, "pair_weight": 1.0} for row in random_rows(4)]
    said = refused(tmp_path, method, changed(rows, 2, pair_weight=weight), kind)
    assert f"row 2 (counted from 0): 'pair_weight' is {weight}" in said


@pytest.mark.parametrize(
    "method, kind, weight", [("DPO", "list", 1e-30), ("KTO", "list", 0.0), ("Reward", "table", 0.0)]
)
def test_weights_that_are_all_0(tmp_path, method, kind, weight):
    rows = [{**row, "pair_weight": weight} for row in (answers(4) if method == "KTO" else random_rows(4))]
    said = refused(tmp_path, method, rows, kind)
    assert "no row of the train data set weighs anything: pair_weight is 0 in all 4 rows" in said


@pytest.mark.parametrize("weight", [1.0, None])
def test_one_weight_above_0(tmp_path, weight):
    """A row without one weighs 1."""
    rows = changed([{**row, "pair_weight": 0.0} for row in random_rows(4)], 3, pair_weight=weight)
    assert len(made(tmp_path, "DPO", rows).train_dataset) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [1e38, math.nan])
def test_margins_beyond_reason(tmp_path, margin, kind):
    rows = [{**row, "margin": 1.0} for row in random_rows(4)]
    said = refused(tmp_path, "Reward", changed(rows, 2, margin=margin), kind)
    assert f"row 2 (counted from 0): 'margin' is {margin}" in said


@pytest.mark.parametrize(
    "label, what, other", [(True, "desirable", "undesirable"), (False, "undesirable", "desirable")]
)
def test_answers_of_one_label(tmp_path, caplog, label, what, other):
    rows = [{**row, "label": label} for row in answers(4)]
    with caplog.at_level(logging.WARNING):
        made(tmp_path, "KTO", rows)
    assert f"All 4 rows of the train data set are {what}" in caplog.text
    with pytest.raises(DataError, match=f"all 4 rows of the train data set are {what} .* {what}_weight is 0"):
        made(tmp_path, "KTO", rows, **{f"{what}_weight": 0.0})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        made(tmp_path, "KTO", answers(4), eval_dataset=rows)
    assert "train data set are" not in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_that_contradict_themselves(tmp_path, kind):
    said = refused(tmp_path, "KTO", changed(random_rows(4), 1, chosen_ids=[5], rejected_ids=[5]), kind)
    assert "row 1 (counted from 0): 'chosen_ids' and 'rejected_ids' are the same" in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method, name", [("DPO", "prompt"), ("DPO", "rejected"), ("Reward", "chosen")])
def test_a_role_that_no_template_knows(tmp_path, method, name, kind):
    rows = changed(chat_rows(4), 2, **{name: [{"role": "banana", "content": "yes a b"}]})
    said = refused(tmp_path, method, rows, kind, tokenizer=word_tokenizer(chat=True))
    assert f"row 2 (counted from 0): '{name}' has a message of the role 'banana'" in said


@pytest.mark.parametrize(
    "row, told",
    [
        ({"chosen": [{"role": "banana", "content": "yes"}]}, "the role 'banana'"),
        ({"ref_chosen_logps": 3.0, "ref_rejected_logps": -1.0}, "'ref_chosen_logps' is 3.0"),
        ({"pair_weight": 1e38}, "'pair_weight' is 1e+38"),
    ],
)
def test_with_the_file_and_the_row(tmp_path, row, told):
    path = write_rows(tmp_path / "rows.jsonl", changed(chat_rows(4), 2, **row))
    with pytest.raises(DataError) as caught:
        load_data(path, None)
    assert str(caught.value).startswith(f"{path}, row 3: ")
    assert told in str(caught.value)


def test_a_run_with_all_of_it_right(tmp_path):
    rows = [{**row, "pair_weight": 2.0, "ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in random_rows(4)]
    run = made(tmp_path, "DPO", rows)
    run.train()
    assert torch.isfinite(run.model.get_input_embeddings().weight).all()
