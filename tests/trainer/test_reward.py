"""RewardTrainer against a plain loop written from the formula, against TRL's, and what it refuses."""

import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from processes import run_script
from reward_models import own_scores, tiny_reward_model
from tiny import VOCABULARY, random_rows, text_rows, tiny_model, word_tokenizer
from trainer.trl_runs import rounding, sums_in_dtype_of
from trainer_runs import losses_of

from fastdpo import RewardConfig, RewardTrainer
from fastdpo.types import DataError, UserError

METRICS = ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")


def options_of(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "max_steps": 5, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "bf16": False,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.0,
    }  # fmt: skip
    return defaults | options


def trainer(tmp_path, model=None, rows=None, *, eval_dataset=None, tokenizer=None, further=None, **options):
    return RewardTrainer(
        tiny_reward_model() if model is None else model,
        args=RewardConfig(**options_of(tmp_path, **options)),
        train_dataset=random_rows(20) if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer or word_tokenizer(),
        **(further or {}),
    )


def with_margins(rows):
    return [{**row, "margin": 0.25 * (i % 7) - 0.5} for i, row in enumerate(rows)]


def plain_losses(model, rows, centre=0.0):
    chosen, rejected = own_scores(model, rows).chunk(2)
    margins = torch.tensor([row.get("margin", 0.0) for row in rows])
    return -torch.nn.functional.logsigmoid(chosen - rejected - margins) + centre * (chosen + rejected) ** 2


def logs_of(run):
    return [entry for entry in run.state.log_history if "loss" in entry]


# Against a plain loop


@pytest.mark.parametrize("packing", ["auto", "varlen", "padded"])
@pytest.mark.parametrize("margin, centre", [(False, None), (True, 0.05)])
def test_the_curve_is_that_of_a_plain_loop(tmp_path, packing, margin, centre):
    model, rows, seen = tiny_reward_model(), random_rows(20), []
    rows = with_margins(rows) if margin else rows
    start = copy.deepcopy(model)
    run = trainer(
        tmp_path, model, rows, packing=packing, center_rewards_coefficient=centre,
        gradient_checkpointing=packing != "padded",
    )  # fmt: skip
    collate = run.data_collator
    run.data_collator = lambda rows: seen.append(rows) or collate(rows)
    run.train()
    assert run.packing == ("prefix" if packing == "auto" else packing)
    optimizer = torch.optim.AdamW(start.parameters(), lr=1e-3, weight_decay=0.0)
    expected = []
    for batch in seen[:5]:
        loss = plain_losses(start, batch, centre or 0.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses_of(run) == pytest.approx(expected, rel=1e-4, abs=1e-5) and expected[-1] != expected[0]
    for ours, plain in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-5)


def test_metrics_have_their_names_and_values(tmp_path):
    model, rows = tiny_reward_model(), random_rows(8, seed=5)
    run = trainer(tmp_path, model, rows, max_steps=2, learning_rate=0.0, logging_steps=2,
                  train_sampling_strategy="sequential")  # fmt: skip
    with torch.no_grad():
        batches = [own_scores(model, rows[:4]), own_scores(model, rows[4:])]
    run.train()
    (logs,) = logs_of(run)
    scores = torch.stack(batches).view(2, 2, 4)  # batch, side, pair
    differences = scores[:, 0] - scores[:, 1]
    assert logs["min_reward"] == pytest.approx(scores.amin((1, 2)).mean().item(), rel=1e-5)
    assert logs["max_reward"] == pytest.approx(scores.amax((1, 2)).mean().item(), rel=1e-5)
    assert logs["mean_reward"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert logs["accuracy"] == pytest.approx((differences > 0).float().mean().item())
    assert logs["margin"] == pytest.approx(differences.mean().item(), rel=1e-5)
    assert logs["num_tokens"] == sum(
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows
    )
    assert {"perf/tokens_per_second", "perf/pairs_per_second", "perf/mfu", "perf/peak_memory_gb"} <= set(logs)
    shared = 1 - sum(sum(map(len, r.values())) for r in rows) / logs["num_tokens"]
    assert logs["perf/saved_tokens_fraction"] == pytest.approx(shared)


def test_accumulated_and_cut_batches_equal_whole_ones(tmp_path):
    """In passes of few tokens the least and the greatest score are still those of the batch."""
    rows, runs = with_margins(random_rows(16, seed=3)), {}
    for name, options in {
        "whole": {"per_device_train_batch_size": 8},
        "cut": {"per_device_train_batch_size": 8, "max_tokens_per_microbatch": 40},
        "accumulated": {"gradient_accumulation_steps": 2},
    }.items():
        model = tiny_reward_model()
        options["train_sampling_strategy"] = "sequential"
        runs[name] = trainer(tmp_path, model, rows, max_steps=2, **options), model
        runs[name][0].train()
    whole, weights = logs_of(runs["whole"][0]), list(runs["whole"][1].parameters())
    for name in ("cut", "accumulated"):
        run, model = runs[name]
        same = METRICS if name == "cut" else ("mean_reward", "accuracy", "margin")
        for ours, wanted in zip(logs_of(run), whole, strict=True):
            for metric in ("loss", *same):
                assert ours[metric] == pytest.approx(wanted[metric], rel=1e-4, abs=1e-6), (name, metric)
        for a, b in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_rows_weigh_what_they_say(tmp_path):
    rows = random_rows(4)
    weights = [0.0, 1.0, 2.0, 5.0]
    model = tiny_reward_model()
    with torch.no_grad():
        wanted = (plain_losses(model, rows) * torch.tensor(weights)).sum() / 8
    weighted = [{**row, "pair_weight": weight} for row, weight in zip(rows, weights, strict=True)]
    run = trainer(tmp_path, model, weighted, max_steps=1)
    run.train()
    assert losses_of(run) == pytest.approx([wanted.item()], rel=1e-5)


# Evaluation


def test_evaluation(tmp_path):
    """Means over pairs, also where the last batch is small; several data sets; a function of one's own."""
    rows = with_margins(random_rows(6, seed=8))
    model = tiny_reward_model()
    taken = []

    def compute_metrics(prediction):
        taken.append(prediction.predictions)
        return {"own": float((prediction.predictions[:, 0] > 0).mean())}

    run = trainer(tmp_path, model, eval_dataset={"one": rows, "two": rows[:2]}, max_steps=1,
                  further={"compute_metrics": compute_metrics}, learning_rate=0.0)  # fmt: skip
    run.train()
    results = run.evaluate()
    with torch.no_grad():
        scores, losses = own_scores(model, rows).view(2, -1), plain_losses(model, rows)
    assert results["eval_one_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert results["eval_two_loss"] == pytest.approx(losses[:2].mean().item(), rel=1e-5)
    assert results["eval_one_margin"] == pytest.approx((scores[0] - scores[1]).mean().item(), rel=1e-5)
    assert results["eval_one_accuracy"] == pytest.approx((scores[0] > scores[1]).float().mean().item())
    least = torch.stack([scores[:, :4].min(), scores[:, 4:].min()]).mean()
    assert results["eval_one_min_reward"] == pytest.approx(least.item(), rel=1e-5)
    np.testing.assert_allclose(taken[0], scores.T.numpy(), rtol=1e-5, atol=1e-6)
    assert "eval_one_own" in results
    assert run.evaluate(rows[2:5])["eval_loss"] == pytest.approx(losses[2:5].mean().item(), rel=1e-5)


# What a run leaves behind


def test_a_saved_model_gives_the_same_scores(tmp_path):
    from transformers import AutoModelForSequenceClassification

    rows = random_rows(6)
    run = trainer(tmp_path, rows=rows, max_steps=2)
    run.train()
    run.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.num_labels == 1 and loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        ours, theirs = own_scores(run.model.eval(), rows), own_scores(loaded.eval(), rows)
        torch.testing.assert_close(ours, theirs)
        tokenizer = word_tokenizer()
        texts = ["why a b c", "hello"]
        alone = [loaded(**tokenizer(text, return_tensors="pt")).logits for text in texts]
        together = loaded(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"nan_loss": "skip"},
                                     {"max_tokens_per_microbatch": 40}], ids=str)  # fmt: skip
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, options):
    """Stopped between two logs, whose means cover steps before and after."""
    given = {"max_steps": 6, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3, **options}
    rows = with_margins(random_rows(20))
    whole = trainer(tmp_path / "whole", rows=rows, **given)
    whole.train()
    stopped = trainer(tmp_path / "stopped", rows=rows, **given)
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    (first, second) = logs_of(whole)[0], logs_of(stopped)[0]
    for name in ("loss", "num_tokens", *METRICS):
        assert first[name] == second[name], name
    for a, b in zip(whole.model.parameters(), stopped.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_is_no_number_is_skipped(tmp_path):
    rows = random_rows(16)
    model = tiny_reward_model()
    run = trainer(tmp_path, model, rows, nan_loss="skip", logging_steps=4, max_steps=4,
                  train_sampling_strategy="sequential", learning_rate=0.0)  # fmt: skip
    compute, calls = run.compute_loss, []

    def broken(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs) * (torch.nan if len(calls) == 2 else 1.0)

    run.compute_loss = broken
    run.train()
    (logs,) = logs_of(run)
    with torch.no_grad():
        least = [own_scores(model, rows[at : at + 4]).min().item() for at in (0, 8, 12)]
    assert logs["min_reward"] == pytest.approx(sum(least) / 3, rel=1e-5)


# Models


def test_lora_with_the_score_head_trained_whole(tmp_path):
    peft = pytest.importorskip("peft")
    model, rows = tiny_reward_model(), random_rows(8)
    base = copy.deepcopy(model)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    run = trainer(tmp_path, model, rows, further={"peft_config": lora}, max_steps=3)
    run.train()
    inner = run.model.get_base_model()
    assert not torch.equal(inner.score.weight, base.score.weight)  # the copy that is trained
    assert torch.equal(inner.model.embed_tokens.weight, base.model.embed_tokens.weight)
    run.save_model(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(own_scores(loaded, rows), own_scores(run.model.eval(), rows))


def test_an_adapter_that_leaves_the_head_alone_is_told(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    for head, told in ({"task_type": "SEQ_CLS"}, False), ({}, True):
        caplog.clear()
        trainer(tmp_path, further={"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj"], **head)})
        assert ("the score head is not trained, and not saved" in caplog.text) == told


def test_a_language_model_by_name_gets_a_head(tmp_path, model_folder):
    run = trainer(tmp_path, model_folder, text_rows(8), max_steps=1)
    assert type(run.model).__name__ == "LlamaForSequenceClassification"
    assert run.model.score.weight.shape == (1, 32) and run.model.config.pad_token_id == 2
    again = trainer(tmp_path, model_folder, text_rows(8), max_steps=1)
    assert torch.equal(run.model.score.weight, again.model.score.weight)  # drawn by the seed
    run.train()
    assert run.packing == "prefix"


def test_what_cannot_pack_trains_padded(tmp_path):
    run = trainer(tmp_path, tiny_reward_model("bert"), random_rows(16), max_steps=4)
    run.train()
    assert run.packing == "padded" and losses_of(run)[-1] != losses_of(run)[0]


def test_a_model_in_bfloat16_learns(tmp_path):
    run = trainer(tmp_path, tiny_reward_model().bfloat16(), random_rows(4), max_steps=8, learning_rate=3e-3)
    run.train()
    assert losses_of(run)[-1] < 0.5 * losses_of(run)[0] and run.packing == "prefix"


# Data


def ids_of(tmp_path, rows, **options):
    """Whole sequences of token ids that the trainer makes of rows, (chosen, rejected) of each."""
    dataset = trainer(tmp_path, rows=rows, **options).train_dataset
    return [tuple(row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")) for row in dataset]


def test_text_behind_a_prompt_or_whole(tmp_path):
    """Ended by the end of the text, once; where the answer begins makes no difference."""
    words = word_tokenizer()
    prompted = [{"prompt": "why a", "chosen": " yes b", "rejected": " no </s>"}]
    whole = [{"chosen": "why a yes b", "rejected": "why a no </s>"}]
    wanted = [tuple(words(text)["input_ids"] for text in ("why a yes b </s>", "why a no </s>"))]
    spaced = {"tokenizer": _ending_in_a_word(word_tokenizer())}
    assert ids_of(tmp_path, prompted, **spaced) == ids_of(tmp_path, whole, **spaced) == wanted
    assert ids_of(tmp_path, [{"chosen": "a b", "rejected": "a b c"}], **spaced) == [
        (words("a b </s>")["input_ids"], words("a b c </s>")["input_ids"])
    ]


def _ending_in_a_word(tokenizer):
    """`word_tokenizer` parts at white space, and would take "b</s>" for a word that it does not know."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("</s>", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    return tokenizer


def test_messages_behind_a_prompt_or_whole(tmp_path):
    question, good, bad = ({"role": role, "content": text} for role, text in
                           (("user", "why a"), ("assistant", "yes"), ("assistant", "no")))  # fmt: skip
    chat = {"tokenizer": word_tokenizer(chat=True)}
    prompted = ids_of(tmp_path, [{"prompt": [question], "chosen": [good], "rejected": [bad]}], **chat)
    whole = ids_of(tmp_path, [{"chosen": [question, good], "rejected": [question, bad]}], **chat)
    text = "user : why a </s> assistant : {} </s>"
    assert prompted == whole == [tuple(word_tokenizer()(text.format(word))["input_ids"] for word in ("yes", "no"))]


def test_token_ids_behind_a_prompt_or_whole(tmp_path):
    prompted = [{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}]
    whole = {"chosen_ids": [5, 6, 7, 2], "rejected_ids": [5, 6, 8]}
    assert ids_of(tmp_path, prompted) == ids_of(tmp_path, [whole]) == [([5, 6, 7, 2], [5, 6, 8])]
    (row,) = trainer(tmp_path, rows=[whole]).train_dataset
    assert row["prompt_ids"] == [5, 6]  # what both begin with
    with pytest.warns(FutureWarning, match="chosen_input_ids is deprecated"):
        assert ids_of(tmp_path, [{f"{key[:-3]}input_ids": ids for key, ids in whole.items()}]) == [
            ([5, 6, 7, 2], [5, 6, 8])
        ]


def test_tables_and_streams(tmp_path):
    rows = with_margins(random_rows(12))
    runs = [
        trainer(tmp_path, tiny_reward_model(), each, max_steps=3, train_sampling_strategy="sequential")
        for each in (rows, Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows)))
    ]
    curves = []
    for run in runs:
        run.train()
        curves.append(losses_of(run))
    assert curves[0] == curves[1] == curves[2]


def test_rows_beyond_max_length_are_left_out(tmp_path, caplog):
    rows = random_rows(20, prompt=(2, 12))
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    fitting = sum(length <= 12 for length in lengths)
    assert 0 < fitting < 20
    run = trainer(tmp_path, rows=rows, max_length=12)
    assert len(run.train_dataset) == fitting
    assert f"{20 - fitting} of 20 rows of the train data set are left out" in caplog.text
    with pytest.raises(DataError, match="no row of the train data set is left"):
        trainer(tmp_path, rows=rows, max_length=2)


@pytest.mark.parametrize("row, message", [
    ({"margin": float("nan")}, "row 1 .* 'margin' is nan; it must be a finite number"),
    ({"margin": "much"}, "row 1 .* 'margin' is 'much'"),
    ({"margin": None}, "1 of 2 rows of the train data set have no margin"),
    ({"chosen_ids": None}, "row 1 .* 'chosen_ids' is missing"),
    ({"chosen_ids": []}, "row 1 .* 'chosen_ids' is empty"),
    ({"image": "cat.png"}, "row 1 .* it has images"),
])  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path, row, message):
    rows = [{**each, "margin": 0.5} for each in random_rows(2)]
    with pytest.raises(DataError, match=message):
        trainer(tmp_path, rows=[rows[0], {**rows[1], **row}])


def test_rows_of_another_kind(tmp_path):
    with pytest.raises(DataError, match="it is one of answers, and a reward model trains on pairs"):
        trainer(tmp_path, rows=[{"prompt": "why a", "completion": "yes", "label": True}])
    with pytest.raises(DataError, match="the train data set is empty"):
        trainer(tmp_path, rows=[])
    with pytest.raises(DataError, match="'chosen' and 'rejected' are the same"):
        trainer(tmp_path, rows=[{"chosen": "why a", "rejected": "why a"}])


def test_end_of_text_and_template(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
             "rejected": [{"role": "assistant", "content": "c"}]}]  # fmt: skip
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    run = trainer(tmp_path, rows=rows, eos_token="hello", chat_template_path=str(template))
    assert run.processing_class.eos_token == "hello" and run.model.config.eos_token_id == 14
    (row,) = run.train_dataset
    assert run.processing_class.decode(row["prompt_ids"] + row["chosen_ids"]) == "a b"
    with pytest.raises(UserError, match="eos_token is '<end>', which the tokenizer does not know"):
        trainer(tmp_path, eos_token="<end>")


def teacher_of_a_template(folder, template="{% for m in messages %}{{ m['content'] + ' <turn> ' }}{% endfor %}"):
    """A folder with a tokenizer that writes `<turn>` behind each message and ends texts with `<end>`."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<turn>"], special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


MESSAGES = [
    {"prompt": [{"role": "user", "content": asked}], "chosen": [{"role": "assistant", "content": "b"}],
     "rejected": [{"role": "assistant", "content": "c"}]}
    for asked in "abcde"
]  # fmt: skip


@pytest.mark.parametrize("adapter", [False, True])
def test_template_of_another_tokenizer(tmp_path, adapter):
    """Its tokens come with it: `<turn>` and `<end>`, for which this model has no embeddings yet."""
    path = teacher_of_a_template(tmp_path / "teacher")
    model = tiny_reward_model(vocab_size=15)
    before = model.get_input_embeddings().weight.detach().clone()
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    further = {"peft_config": config} if adapter else {}
    run = trainer(tmp_path, model, MESSAGES, further=further, chat_template_path=path, max_steps=3, learning_rate=0.1)
    tokenizer = run.processing_class
    assert tokenizer.convert_tokens_to_ids(["<turn>", "<end>"]) == [15, 16]
    assert tokenizer.eos_token == "<end>" and run.model.config.eos_token_id == 16
    row = run.train_dataset[0]
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "a <turn> b <turn>"
    assert not adapter or config.trainable_token_indices is None  # a copy was changed
    weights = {name: value for name, value in run.model.named_parameters() if "embed_tokens" in name}
    start = {name: value.detach().clone() for name, value in weights.items()}
    run.train()
    if adapter:  # which trains the new tokens alone
        whole, new = weights
        assert torch.equal(weights[whole], start[whole]) and torch.equal(start[whole][:15], before)
        assert len(weights[new]) == 2 and not torch.equal(weights[new][0], start[new][0])
    else:
        (whole,) = weights
        assert torch.equal(start[whole][:15], before) and not torch.equal(weights[whole][15], start[whole][15])
    assert weights[whole].shape == (64, 32)


def test_what_is_kept_beside_another_tokenizers_template(tmp_path):
    path = teacher_of_a_template(tmp_path / "teacher")
    run = trainer(tmp_path, rows=MESSAGES, chat_template_path=path, eos_token="</s>")
    assert run.processing_class.eos_token == "</s>" and run.model.config.eos_token_id == 2
    assert len(run.model.get_input_embeddings().weight) == VOCABULARY  # has room for them


def test_templates_that_cannot_be_taken_over(tmp_path):
    with pytest.raises(UserError, match="chat_template_path is 'no/such/tokenizer', and no tokenizer can be loaded"):
        trainer(tmp_path, chat_template_path="no/such/tokenizer")
    bare = teacher_of_a_template(tmp_path / "bare", template=None)
    with pytest.raises(UserError, match="bare', whose tokenizer has no chat template"):
        trainer(tmp_path, chat_template_path=bare)
    path = teacher_of_a_template(tmp_path / "teacher")
    adapted = get_peft_model(tiny_reward_model(), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"'<turn>' and 1 more.*and it has adapters"):
        trainer(tmp_path, adapted, chat_template_path=path)


# What is refused


@pytest.mark.parametrize("options, message", [
    ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' has no meaning for RewardTrainer"),
    ({"max_prompt_length": 5}, "max_prompt_length=5 has no meaning"),
    ({"memory_budget": 100}, "memory_budget=100 has no meaning"),
    ({"show_generations": 1}, "show_generations=1 has no meaning"),
    ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1 has no meaning"),
    ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient is -0.1"),
    ({"chat_template_path": "missing.jinja"}, "chat_template_path is 'missing.jinja', and there is no such file"),
])  # fmt: skip
def test_options_that_cannot_be_honoured(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options_of(tmp_path, **options))


def test_there_is_no_reference(tmp_path):
    for option in ("ref_logps", "sync_ref_model", "beta"):
        with pytest.raises(TypeError, match=option):
            RewardConfig(output_dir=str(tmp_path), **{option: 1})
    with pytest.raises(TypeError, match="ref_model"):
        trainer(tmp_path, further={"ref_model": tiny_reward_model()})
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in random_rows(8)]
    for each in (rows, Dataset.from_list(rows)):  # columns of another method are let be
        run = trainer(tmp_path, rows=each, max_steps=1)
        run.train()
        assert "ref_chosen_logps" not in run.train_dataset.column_names


def test_models_that_give_no_score(tmp_path):
    with pytest.raises(UserError, match="LlamaForCausalLM is a language model"):
        trainer(tmp_path, tiny_model())
    with pytest.raises(UserError, match="num_labels=2, and a reward is one score"):
        trainer(tmp_path, tiny_reward_model(num_labels=2))
    with pytest.raises(ValueError, match="model_init_kwargs is for a model given by name"):
        trainer(tmp_path, model_init_kwargs={"dtype": "float32"})


# Several processes


def curve(folder, processes, **options):
    folder.mkdir()
    run_script("tests/trainer/reward_run.py", folder, json.dumps(options), processes=processes, folder=folder)
    return json.loads((folder / "curve.json").read_text())


FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("system, options", [
    ("DistributedDataParallel", {}),
    ("DistributedDataParallel", {"max_tokens_per_microbatch": 70}),
    ("fsdp2", FSDP | {"max_tokens_per_microbatch": 70}),
])  # fmt: skip
def test_two_processes_train_as_one(tmp_path, system, options):
    cut = "max_tokens_per_microbatch" in options  # then rows come in an order of their own
    one = curve(tmp_path / "1", 1, **({"max_tokens_per_microbatch": 10**6} if cut else {}))
    two = curve(tmp_path / "2", 2, **options)
    assert two["system"] == system and len(one["logs"]) == 3
    for a, b in zip(one["logs"], two["logs"], strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-4)


# Against TRL


def drawn_text(count, seed=0):
    draw = random.Random(seed)

    def words(low, high):
        return " ".join(draw.choice(["a", "b", "c", "d", "e", "yes", "no"]) for _ in range(draw.randint(low, high)))

    return [
        {"prompt": words(1, 8), "chosen": f" {words(1, 9)} c ", "rejected": f" {words(1, 9)} d "} for _ in range(count)
    ]


def as_chat(rows):
    def message(role, text):
        return [{"role": role, "content": text.strip()}]

    return [
        {"prompt": message("user", row["prompt"]), "chosen": message("assistant", row["chosen"]),
         "rejected": message("assistant", row["rejected"])}
        for row in rows
    ]  # fmt: skip


def whole(rows):
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


# Others stand in test_runs_against_trl.
SAME = {
    "text without prompts": {"rows": whole},
    "messages without prompts": {"rows": lambda rows: whole(as_chat(rows))},
    "token ids": {"rows": lambda rows: [
        {f"{side}_ids": word_tokenizer()(row[side])["input_ids"] for side in ("chosen", "rejected")}
        for row in whole(rows)
    ]},
    "padding of its own": {"pad_token": "<unk>"},
    # Its last bias moves all scores alike and has no gradient but rounding, which Adam would blow up.
    "gpt2": {"kind": "gpt2", "optim": "sgd"},
    "padded": {"own": {"packing": "padded"}},
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_the_run_is_that_of_trl(tmp_path, case):
    """10 steps and an evaluation in float64: the loss, its gradient and all metrics."""
    trl = pytest.importorskip("trl")
    options = {"rows": list, "kind": "llama", "lora": False, "own": {}, **SAME[case]}
    make_rows, kind, lora, own = (options.pop(name) for name in ("rows", "kind", "lora", "own"))
    rows = make_rows(drawn_text(40))
    histories = []
    for library in (trl, SimpleNamespace(RewardConfig=RewardConfig, RewardTrainer=RewardTrainer)):
        further = {}
        if lora:
            peft = pytest.importorskip("peft")
            further["peft_config"] = peft.LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
            )
        given = options_of(tmp_path, max_steps=10, per_device_eval_batch_size=8, **options)
        run = library.RewardTrainer(
            model=tiny_reward_model(kind, torch.float64),
            args=library.RewardConfig(**given, **({} if library is trl else own)),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:8]),
            processing_class=word_tokenizer(chat=True),
            **further,
        )
        with sums_in_dtype_of(run.model):
            run.train()
            run.evaluate()
        histories.append(run.state.log_history)
    theirs, ours = histories
    assert len(ours) == len(theirs) == 12
    names = ["loss", "grad_norm", "learning_rate", "num_tokens", *METRICS]
    steps = [{name: entry[name] for name in names} for entry in theirs[:10]]
    evaluation = {f"eval_{name}": theirs[11][f"eval_{name}"] for name in ("loss", *METRICS)}
    for number, wanted in {**dict(enumerate(steps)), 11: evaluation}.items():
        for name, value in wanted.items():
            rel = max(1e-9, rounding(name))
            assert ours[number][name] == pytest.approx(value, rel=rel, abs=1e-9), (number, name)


def test_options_have_the_defaults_of_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from dataclasses import fields

    theirs = trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    ours = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    missing = [each.name for each in fields(theirs) if not hasattr(ours, each.name)]
    assert not missing
    for name in ("learning_rate", "logging_steps", "gradient_checkpointing", "max_length", "disable_dropout",
                 "center_rewards_coefficient", "dataset_num_proc", "eos_token", "chat_template_path", "pad_token",
                 "activation_offloading", "model_init_kwargs", "trust_remote_code"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
