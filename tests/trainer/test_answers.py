"""KTOTrainer, ORPOTrainer and CPOTrainer against plain loops written from the formulas."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from loss_oracle import answer_losses, pair_losses
from tiny import naive_sequence_logps, random_rows, tiny_model, word_tokenizer

from fastdpo import CPOConfig, CPOTrainer, KTOConfig, KTOTrainer, ORPOConfig, ORPOTrainer
from fastdpo.types import DataError

sys.path.insert(0, str(Path(__file__).parent))
interrupted_run = importlib.import_module("interrupted_run")

STEPS = 4
RUN = {
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "max_steps": STEPS,
    "gradient_checkpointing": False, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 4,
    "logging_steps": 1, "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
MADE = {"kto": (KTOTrainer, KTOConfig), "orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}


def run_of(tmp_path, what, rows, model=None, **options):
    Trainer, Config = MADE[what]
    arguments = {name: options.pop(name) for name in ("ref_model", "eval_dataset", "peft_config") if name in options}
    return Trainer(
        tiny_model() if model is None else model, args=Config(str(tmp_path / "out"), **(RUN | options)),
        train_dataset=rows, processing_class=word_tokenizer(), **arguments,
    )  # fmt: skip


def answers(count=16, seed=1, labels=None):
    rows = random_rows(count, seed=seed, prompt=(2, 12))
    labels = [number % 3 != 1 for number in range(count)] if labels is None else labels
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": bool(label)}
        for row, label in zip(rows, labels, strict=True)
    ]


def logps_of(model, prompts, completions):
    rows = [
        {"prompt_ids": prompt, "chosen_ids": ids, "rejected_ids": ids}
        for prompt, ids in zip(prompts, completions, strict=True)
    ]
    return naive_sequence_logps(model, rows)[: len(rows)]


def mismatched(batch):
    """The answer of the row before, the first row's that of the last."""
    return [batch[number - 1]["completion_ids"] for number in range(len(batch))]


def answer_loss(model, frozen, batch, name="kto", others=None, beta=0.1, **weights):
    """(B,) losses of a batch of answers and its KL estimate, everything run alone."""
    prompts, completions = ([row[name] for row in batch] for name in ("prompt_ids", "completion_ids"))
    with torch.no_grad():
        refs = logps_of(frozen, prompts, completions)
        others = mismatched(batch) if others is None else others
        kl = (logps_of(model, prompts, others) - logps_of(frozen, prompts, others)).mean().item()
    labels = torch.tensor([row["label"] for row in batch])
    losses = answer_losses(name, logps_of(model, prompts, completions), refs, labels, beta, kl=kl, **weights)
    return losses, max(0.0, kl)


def plain_loop(model, batches, losses):
    optimizer = torch.optim.SGD(model.parameters(), lr=RUN["learning_rate"])
    values, kls = [], []
    for batch in batches:
        each, kl = losses(model, batch)
        weights = torch.tensor([row.get("pair_weight", 1.0) for row in batch])
        loss = (weights * each).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RUN["max_grad_norm"])
        optimizer.step()
        values.append(loss.item())
        kls.append(kl)
    return values, kls


def logged(run, name):
    return [entry[name] for entry in run.state.log_history if "loss" in entry and name in entry]


def assert_same_run(run, rows, losses, size=4, steps=STEPS):
    """The run's losses, KL estimates and the way its weights went, against the plain loop's."""
    plain, start = tiny_model(), tiny_model()
    run.train()
    batches = [rows[first : first + size] for first in range(0, size * steps, size)]
    values, kls = plain_loop(plain, batches, losses)
    assert logged(run, "loss") == pytest.approx(values, rel=1e-4, abs=1e-5)
    if kls[0] is not None:
        assert logged(run, "kl") == pytest.approx(kls, rel=1e-3, abs=1e-5)
    expected = torch.cat([(a - b).flatten() for a, b in zip(plain.parameters(), start.parameters(), strict=True)])
    ours = torch.cat([(a - b).flatten() for a, b in zip(run.model.parameters(), start.parameters(), strict=True)])
    assert expected.norm() > 1e-3
    assert (ours - expected).norm() <= 1e-3 * expected.norm()
    return kls


# KTO


@pytest.mark.parametrize("packing", ["prefix", pytest.param("varlen", marks=pytest.mark.slow), "padded"])
@pytest.mark.parametrize("reference", ["online", "cache", "explicit"])
def test_kto_is_a_plain_loop(tmp_path, packing, reference):
    rows = answers()
    frozen = tiny_model(seed=5) if reference == "explicit" else tiny_model()
    run = run_of(
        tmp_path, "kto", rows, packing=packing, precompute_ref_log_probs=reference == "cache",
        ref_model=tiny_model(seed=5) if reference == "explicit" else None, beta=0.3,
    )  # fmt: skip
    kls = assert_same_run(run, rows, lambda model, batch: answer_loss(model, frozen, batch, beta=0.3))
    assert len(set(kls)) > 1


@pytest.mark.parametrize("kl", ["above 0", "below 0"])
def test_the_kl_estimate_is_never_below_0(tmp_path, kl):
    """Its sign is that of the reference's answers to other prompts, which the rows carry here."""
    rows = answers(4)
    prompts, completions = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    with torch.no_grad():
        refs = logps_of(tiny_model(), prompts, completions)
        others = logps_of(tiny_model(), prompts, mismatched(rows))
    shift = -3.0 if kl == "above 0" else -others.max().item() / 2  # no sum of log-probs is above 0
    given = [
        {**row, "KL_completion_ids": other, "ref_logps": ref, "ref_KL_logps": ref_kl + shift}
        for row, other, ref, ref_kl in zip(rows, mismatched(rows), refs.tolist(), others.tolist(), strict=True)
    ]
    run = run_of(tmp_path, "kto", given, max_steps=1)
    assert run.ref_model is None
    run.train()
    point = 3.0 if kl == "above 0" else 0.0
    assert logged(run, "kl") == pytest.approx([point], abs=1e-4)
    labels = torch.tensor([row["label"] for row in rows])
    exact = answer_losses("kto", refs, refs, labels, 0.1, kl=point).mean().item()
    assert logged(run, "loss") == pytest.approx([exact], rel=1e-4)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_weights_of_the_kinds_and_of_rows(tmp_path, name):
    weights = {"desirable_weight": 0.5, "undesirable_weight": 2.0}
    rows = [{**row, "pair_weight": 0.5 + number % 3} for number, row in enumerate(answers())]
    run = run_of(tmp_path, "kto", rows, loss_type=name, **weights)
    frozen = tiny_model()

    def losses(model, batch):
        each, kl = answer_loss(model, frozen, batch, name, **weights)
        return each, kl if name == "kto" else None

    assert_same_run(run, rows, losses)
    if name != "kto":
        assert set(logged(run, "kl")) <= {0.0}


def test_apo_needs_no_other_answers(tmp_path):
    rows = answers()
    run = run_of(
        tmp_path, "kto", rows, loss_type="apo_zero_unpaired", max_tokens_per_microbatch=40,
        per_device_train_batch_size=4,
    )  # fmt: skip
    assert "KL_completion_ids" not in run.train_dataset.column_names
    frozen = tiny_model()
    assert_same_run(run, rows, lambda model, batch: (answer_loss(model, frozen, batch, "apo_zero_unpaired")[0], None))
    one = run_of(tmp_path, "kto", rows, loss_type="apo_zero_unpaired", per_device_train_batch_size=1, max_steps=1)
    one.train()
    assert logged(one, "loss") == pytest.approx([0.5], abs=1e-5)


def test_answers_to_other_prompts_are_those_of_the_batch(tmp_path):
    rows = answers(11)
    run = run_of(tmp_path, "kto", rows)
    others = run.train_dataset["KL_completion_ids"][:]
    expected = [other for first in (0, 4, 8) for other in mismatched(rows[first : first + 4])]
    assert others == expected
    left_over = run_of(tmp_path, "kto", answers(9)).train_dataset["KL_completion_ids"][:]
    assert left_over[8] == answers(9)[7]["completion_ids"]  # not its own


def test_answers_to_other_prompts_that_the_rows_bring(tmp_path):
    rows = [{**row, "KL_completion_ids": [5 + number, 6, 7]} for number, row in enumerate(answers())]
    run = run_of(tmp_path, "kto", rows)
    frozen = tiny_model()

    def losses(model, batch):
        return answer_loss(model, frozen, batch, others=[row["KL_completion_ids"] for row in batch])

    assert_same_run(run, rows, losses)


def test_shuffled_rows_keep_their_other_answers(tmp_path):
    rows = answers()
    run = run_of(tmp_path, "kto", rows, train_sampling_strategy="random", precompute_ref_log_probs=True)
    online = run_of(tmp_path, "kto", rows, train_sampling_strategy="random")
    run.train()
    online.train()
    for name in ("loss", "kl", "rewards/chosen"):
        assert logged(run, name) == pytest.approx(logged(online, name), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_evaluation_of_answers(tmp_path, accumulate):
    rows = answers(12)
    run = run_of(
        tmp_path, "kto", rows, eval_dataset=answers(6, seed=9), per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulate, max_steps=2,
    )  # fmt: skip
    run.train()
    results = run.evaluate()
    held = [dict(row) for row in answers(6, seed=9)]
    losses = []
    with torch.no_grad():
        for first in (0, 4):
            batch = held[first : first + 4]
            losses += answer_loss(run.model, tiny_model(), batch)[0].tolist()
    assert results["eval_loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert {"eval_kl", "eval_rewards/chosen", "eval_rewards/rejected", "eval_logps/chosen"} <= set(results)
    assert all(math.isfinite(value) for value in results.values())


@pytest.mark.parametrize("label", [True, False])
def test_what_there_is_no_answer_for_is_not_logged(tmp_path, label):
    rows = answers(8, labels=[label] * 4 + [not label] * 4)
    run = run_of(tmp_path, "kto", rows, max_steps=2, eval_dataset=rows[:4])
    run.train()
    first, second = [entry for entry in run.state.log_history if "loss" in entry]
    there, not_there = ("chosen", "rejected") if label else ("rejected", "chosen")
    for entry, one, other in ((first, there, not_there), (second, not_there, there)):
        assert {f"rewards/{one}", f"logps/{one}", f"logits/{one}"} <= set(entry)
        assert not {f"rewards/{other}", f"logps/{other}", f"logits/{other}", "rewards/margins"} & set(entry)
        assert all(math.isfinite(value) for value in entry.values())
    results = run.evaluate()
    assert f"eval_rewards/{there}" in results and f"eval_rewards/{not_there}" not in results
    assert all(math.isfinite(value) for value in results.values())


def test_means_of_each_kind_count_its_answers(tmp_path):
    """Over two batches of a log, one with three desirable answers, one with a single one."""
    labels = [True, True, True, False, True, False, False, False]
    rows = answers(8, labels=labels)
    run = run_of(tmp_path, "kto", rows, max_steps=2, logging_steps=2, learning_rate=0.0)
    run.train()
    with torch.no_grad():
        logps = logps_of(tiny_model(), [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows])
    marked = torch.tensor(labels)
    (entry,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert entry["logps/chosen"] == pytest.approx(logps[marked].mean().item(), rel=1e-5)
    assert entry["logps/rejected"] == pytest.approx(logps[~marked].mean().item(), rel=1e-5)


# Pairs that are parted


TEXT = [{"prompt": f"why {word}", "chosen": f" yes {word}", "rejected": " no no"} for word in ("a", "b", "c", "d", "e")]


def said(role, text):
    return {"role": role, "content": text}


IMPLICIT = [
    {
        side: [said("user", f"why {word}"), said("assistant", answer)]
        for side, answer in (("chosen", f"yes {word}"), ("rejected", "no no"))
    }
    for word in ("a", "b", "c", "d")
]


@pytest.mark.parametrize("made", ["list", "table", "stream"])
@pytest.mark.parametrize("kind", ["text", "implicit", "tokenized", "weighted"])
def test_pairs_are_parted(tmp_path, kind, made):
    from datasets import Dataset, IterableDataset

    rows = {
        "text": TEXT, "implicit": IMPLICIT, "tokenized": random_rows(5),
        "weighted": [{**row, "pair_weight": 0.5 + number} for number, row in enumerate(random_rows(5))],
    }[kind]  # fmt: skip
    given = {"list": rows, "table": Dataset.from_list(rows)}.get(made)
    if given is None:
        given = IterableDataset.from_generator(lambda: iter(rows))
    Trainer, Config = MADE["kto"]
    run = Trainer(
        tiny_model(), args=Config(str(tmp_path), **(RUN | {"max_steps": 1})), train_dataset=given,
        processing_class=word_tokenizer(chat=True),
    )  # fmt: skip
    parted = list(run.train_dataset)
    assert [row["label"] for row in parted] == [True] * len(rows) + [False] * len(rows)
    tokenizer = word_tokenizer(chat=True)
    for row, pair in zip(parted, [*rows, *rows], strict=True):
        side = "chosen" if row["label"] else "rejected"
        if kind in ("tokenized", "weighted"):
            assert (row["prompt_ids"], row["completion_ids"]) == (pair["prompt_ids"], pair[f"{side}_ids"])
            assert row.get("pair_weight") == pair.get("pair_weight")
        elif kind == "text":
            whole = tokenizer(pair["prompt"] + pair[side] + "</s>")["input_ids"]
            assert row["prompt_ids"] + row["completion_ids"] == whole
            assert row["prompt_ids"] == tokenizer(pair["prompt"])["input_ids"]
        else:
            whole = tokenizer.apply_chat_template(pair[side], tokenize=True, return_dict=True)["input_ids"]
            assert row["prompt_ids"] + row["completion_ids"] == list(whole)
            assert tokenizer.decode(row["prompt_ids"]).endswith("assistant :")
    run.train()
    assert logged(run, "loss") == pytest.approx([0.5], abs=1e-5)


def test_many_pairs_are_parted_in_chunks(tmp_path):
    rows = random_rows(1203, prompt=(1, 2), answer=(4, 5))
    run = run_of(tmp_path, "kto", rows)
    labels = run.train_dataset["label"][:]
    assert labels == [True] * 1000 + [False] * 1000 + [True] * 203 + [False] * 203
    assert len(run.train_dataset) == 2406


def test_columns_of_parted_pairs(tmp_path):
    """The reference's sums go with their answers."""
    rows = [
        {**row, "ref_chosen_logps": -1.0 - number, "ref_rejected_logps": -9.0 - number}
        for number, row in enumerate(random_rows(4))
    ]
    run = run_of(tmp_path, "kto", rows, loss_type="apo_zero_unpaired", max_steps=1)
    assert run.ref_model is None
    assert run.train_dataset["ref_logps"][:] == [-1.0, -2.0, -3.0, -4.0, -9.0, -10.0, -11.0, -12.0]


def test_pairs_of_text_without_a_prompt_are_parted_where_others_part_them(tmp_path):
    rows = [{"chosen": f"why {word} yes b", "rejected": f"why {word} yes c"} for word in "abcd"]
    parted = list(run_of(tmp_path, "kto", rows).train_dataset)
    pairs = list(run_of(tmp_path, "orpo", rows).train_dataset)
    for row, pair in zip(parted, [*pairs, *pairs], strict=True):
        side = "chosen" if row["label"] else "rejected"
        assert (row["prompt_ids"], row["completion_ids"]) == (pair["prompt_ids"], pair[f"{side}_ids"])
    with pytest.raises(DataError, match="share no beginning to take it from; add 'prompt'"):
        run_of(tmp_path, "orpo", [{"chosen": "yes a", "rejected": "no b"}] * 4)
    with pytest.raises(DataError, match=r"(share no beginning to take it from; add 'prompt'|'prompt' is empty)"):
        run_of(tmp_path, "kto", [{"chosen": "yes a", "rejected": "no b"}] * 4)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "a", "completion": " b"}] * 4, "row 0.*'label' is None; it must be true"),
        ([{"prompt": "a", "completion": " b", "label": 1}] * 4, "row 0.*'label' is 1; it must be true"),
        ([{"prompt": "a", "completion": " ", "label": True}] * 4, "row 0.*'completion' is empty"),
        ([{"prompt_ids": [4], "completions_ids": [[5], [6]], "ranks": [1, 2]}] * 4, "holds lists, and loss_type kto"),
        ([], "is empty"),
    ],
)
def test_answers_that_cannot_be_used(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        run_of(tmp_path, "kto", rows)


def test_a_single_answer_has_no_other(tmp_path):
    """Of one row alone there is no answer to another prompt."""
    with pytest.raises(ValueError, match=r"(row|answer|one|two)"):
        run_of(tmp_path, "kto", answers(1), max_steps=1).train()


def test_adapters_take_their_base_as_reference(tmp_path):
    peft = pytest.importorskip("peft")
    rows = answers(4)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    run = run_of(tmp_path, "kto", rows, peft_config=lora, max_steps=1)
    with torch.no_grad():
        exact = answer_loss(run.model, tiny_model(), rows)
    run.train()
    assert logged(run, "loss") == pytest.approx([exact[0].mean().item()], rel=1e-4)
    assert logged(run, "kl") == pytest.approx([exact[1]], rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_estimate_one_kl(tmp_path, accumulate):
    """The mean over both, so that they train as one that has both their answers."""
    options = {
        "trainer": "kto", "gradient_accumulation_steps": accumulate, "rows": 16, "max_steps": 3, "kl_ids": True,
        "learning_rate": 0.05, "optim": "sgd",
    }  # fmt: skip
    one = interrupted_run.start(tmp_path / "one", per_device_train_batch_size=4, **options).result()
    two = interrupted_run.start(tmp_path / "two", processes=2, per_device_train_batch_size=2, **options)
    ended = [two.result(rank) for rank in (0, 1)]
    assert ended[0]["weights"] == ended[1]["weights"]
    assert sum(entry.get("kl", 0.0) for entry in one["history"]) > 0
    for ours, theirs in zip(ended[0]["history"][:3], one["history"][:3], strict=True):
        for name in ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


# ORPO and CPO


def pair_loss(name, model, batch, **options):
    logps = naive_sequence_logps(model, batch).view(2, -1)
    lengths = torch.tensor([[len(row[side]) for row in batch] for side in ("chosen_ids", "rejected_ids")])
    beta = options.pop("beta", 0.1)
    return pair_losses(name, *logps, None, None, beta, lengths=lengths, **options)


PAIRS = random_rows(16, seed=2)


@pytest.mark.parametrize("packing", ["prefix", "padded"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_is_a_plain_loop(tmp_path, packing, beta):
    run = run_of(tmp_path, "orpo", PAIRS, packing=packing, beta=beta)
    assert run.ref_model is None
    assert_same_run(run, PAIRS, lambda model, batch: (pair_loss("orpo", model, batch, beta=beta), None))


def test_orpo_logs_what_its_authors_log(tmp_path):
    run = run_of(tmp_path, "orpo", PAIRS, max_steps=1, eval_dataset=PAIRS[:4])
    run.train()
    entry = run.state.log_history[0]
    with torch.no_grad():
        chosen, rejected = naive_sequence_logps(tiny_model(), PAIRS[:4]).double().view(2, -1)
    lengths = torch.tensor([[len(row[side]) for row in PAIRS[:4]] for side in ("chosen_ids", "rejected_ids")])
    odds = [(logp / length).exp() / (1 - (logp / length).exp()) for logp, length in zip((chosen, rejected), lengths)]  # noqa: B905
    ratio = (odds[0] / odds[1]).log()
    assert entry["log_odds_chosen"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert entry["log_odds_ratio"] == pytest.approx((ratio.exp() / (1 + ratio.exp())).log().mean().item(), rel=1e-4)
    assert entry["nll_loss"] == pytest.approx(-(chosen.sum() / lengths[0].sum()).item(), rel=1e-4)
    assert {"eval_nll_loss", "eval_log_odds_chosen", "eval_log_odds_ratio"} <= set(run.evaluate())


@pytest.mark.parametrize("options", [{"max_tokens_per_microbatch": 40}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("what", ["orpo", "cpo"])
def test_parts_of_a_step_make_the_whole_one(tmp_path, what, options):
    """The mean over the chosen answers' tokens is that of the whole step."""
    size = 4 // options.get("gradient_accumulation_steps", 1)
    run = run_of(tmp_path, what, PAIRS, **options, per_device_train_batch_size=size)
    assert_same_run(run, PAIRS, lambda model, batch: (pair_loss(what, model, batch), None))


def cpo_parts(loss_type, cpo_alpha):
    """(name, options, weight) of what adds up to a loss of CPOTrainer's."""
    if loss_type == "sigmoid":
        return [("cpo", {"cpo_alpha": cpo_alpha}, 1.0)]
    return [(loss_type, {}, 1.0), ("sft", {}, cpo_alpha)]


@pytest.mark.parametrize("cpo_alpha", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "hinge", "ipo"])
def test_cpo_is_a_plain_loop(tmp_path, loss_type, cpo_alpha):
    run = run_of(tmp_path, "cpo", PAIRS, loss_type=loss_type, cpo_alpha=cpo_alpha, beta=0.5)
    assert run.ref_model is None
    parts = cpo_parts(loss_type, cpo_alpha)

    def losses(model, batch):
        return sum(weight * pair_loss(name, model, batch, beta=0.5, **own) for name, own, weight in parts), None

    assert_same_run(run, PAIRS, losses)


@pytest.mark.parametrize("loss_type, options", [("sigmoid", {"label_smoothing": 0.1}),
                                                ("simpo", {"label_smoothing": 0.1, "simpo_gamma": 1.2})])  # fmt: skip
def test_options_of_cpo(tmp_path, loss_type, options):
    run = run_of(tmp_path, "cpo", PAIRS, loss_type=loss_type, cpo_alpha=0.5, **options)
    parts = cpo_parts(loss_type, 0.5)

    def losses(model, batch):
        own = options if loss_type != "sigmoid" else {"label_smoothing": 0.1}
        first, second = parts[0], parts[1:]
        total = pair_loss(first[0], model, batch, **(first[1] | own))
        return total + sum(weight * pair_loss(name, model, batch) for name, _, weight in second), None

    assert_same_run(run, PAIRS, losses)


@pytest.mark.parametrize("loss_type, cpo_alpha", [("alphapo", 0.0), ("simpo", 0.5)])
def test_alphapo_of_cpo(tmp_path, loss_type, cpo_alpha):
    """loss_type="alphapo" is simpo with cpo_alpha=0, as TRL has it; alpha bends its rewards."""
    given = {"cpo_alpha": cpo_alpha} if loss_type == "simpo" else {}
    run = run_of(tmp_path, "cpo", PAIRS, loss_type=loss_type, alpha=0.3, beta=2.0, simpo_gamma=0.8, **given)
    own = {"alphapo_alpha": 0.3, "simpo_gamma": 0.8, "beta": 2.0}

    def losses(model, batch):
        own_loss = pair_loss("alphapo", model, batch, **own)
        return own_loss + (cpo_alpha * pair_loss("sft", model, batch) if cpo_alpha else 0.0), None

    assert_same_run(run, PAIRS, losses)
    plain = run_of(tmp_path, "cpo", PAIRS, loss_type="alphapo")
    assert plain.args.loss_arguments() == {"loss_type": ["simpo"], "beta": 0.1, "label_smoothing": 0.0,
                                           "simpo_gamma": 0.5}  # fmt: skip


@pytest.mark.parametrize("what", ["orpo", "cpo"])
def test_constructors_without_reference(tmp_path, what):
    Trainer, Config = MADE[what]
    made = []
    run = Trainer(
        model_init=lambda: made.append(1) or tiny_model(), args=Config(str(tmp_path), **RUN), train_dataset=PAIRS,
        processing_class=word_tokenizer(),
    )  # fmt: skip
    run.train()
    assert made == [1, 1] and len(logged(run, "loss")) == STEPS
    with pytest.raises(ValueError, match="give either model or model_init"):
        Trainer(args=Config(str(tmp_path), **RUN), train_dataset=PAIRS, processing_class=word_tokenizer())
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics"):
        Trainer(tiny_model(), args=Config(str(tmp_path), **RUN), train_dataset=PAIRS,
                processing_class=word_tokenizer(), preprocess_logits_for_metrics=lambda *of: of)  # fmt: skip
    with pytest.raises(DataError, match="holds answers"):
        run_of(tmp_path, what, answers(4))
