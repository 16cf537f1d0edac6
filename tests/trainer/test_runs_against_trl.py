"""Whole runs against TRL 1.16: "a TRL script with one import changed" logs the same numbers, step by step.

Float64 on the CPU, 6 to 12 steps of AdamW with gradient clipping at a learning rate that moves things; the rows come
in the same order, for both draw the same permutation. Every number that TRL logs must be logged, and be the same to
1e-9, relative or absolute, on any machine. Where something is kept or computed in float32, the error is compared with
that of TRL. Tests of the second half say where the two differ on purpose, and how.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import json
from pathlib import Path

import pytest
import torch
from tiny import in_double_precision, tiny_model, word_tokenizer
from trainer.trl_runs import (
    MAX_LENGTH,
    Runs,
    answer_rows,
    as_dataset,
    assert_moved,
    assert_rounded,
    assert_same,
    chat_rows,
    compared,
    float64,
    named,
    options_named,
    perturbed,
    save,
    text_rows,
)

import fastdpo
import fastdpo.trainer.metrics
from fastdpo.types import DataError

trl = pytest.importorskip("trl", minversion="1.16.0")
peft = pytest.importorskip("peft")

slow = pytest.mark.slow
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # the losses for which TRL honours label_smoothing
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(save(tmp_path_factory.mktemp("model")), lambda: tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def in_float64(request):
    with contextlib.nullcontext() if request.node.get_closest_marker("float32") else float64():
        yield


@pytest.fixture(autouse=True)
def without_side_effects(monkeypatch):
    """No message to TRL's makers."""
    monkeypatch.setenv("CI", "1")


def compare(runs, kind="DPO", *, key=None, rel=1e-9, leave_out=(), tied_at_first=False, **options):
    """Both runs with the same options: (ours, TRL's) logs. References computed ahead are kept in float32."""
    theirs = runs.theirs(trl, key, kind=kind, **options)
    ours = runs.logs(fastdpo, kind, **options)
    assert_moved(theirs)
    if options.pop("precompute_ref_log_probs", False):
        options.pop("precompute_ref_batch_size", None)
        assert_rounded(ours, theirs, runs.logs(trl, kind, **options), leave_out=leave_out)
    else:
        assert_same(ours, theirs, rel=rel, abs=rel, leave_out=leave_out, tied_at_first=tied_at_first)
    return ours, theirs


# Losses and their options.


@pytest.mark.parametrize(
    "name, label_smoothing",
    [
        ("sigmoid", 0.0),
        ("ipo", 0.0),
        *(
            pytest.param(name, smoothing, marks=slow)
            for name, smoothing in [
                *((name, 0.0) for name in ("hinge", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot")),
                *((name, 0.0) for name in ("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")),
                *((name, 0.1) for name in SMOOTHED),
            ]
        ),
    ],
)
def test_every_loss(runs, name, label_smoothing):
    compare(
        runs, loss_type=[name], label_smoothing=label_smoothing, leave_out=REWARDS if name == "sft" else (),
    )  # fmt: skip


@slow
@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, "js_divergence") for name in ("sigmoid", "ipo", "hinge", "exo_pair")),
        *((name, "forward_kl") for name in ("sigmoid", "robust")),
    ],
)
def test_divergences(runs, name, kind):
    """Without rewards: TRL logs those of reverse_kl whatever the divergence (tests/functional/test_against_trl.py)."""
    smoothing = 0.1 if name == "exo_pair" else 0.0
    compare(runs, loss_type=[name], label_smoothing=smoothing, leave_out=REWARDS, f_divergence_type=kind)


FLOAT32 = [
    {},
    {"beta": 1.5},
    {"loss_type": ["discopop"]},
    # TRL knows no float64 here, and its exponentials are float32's.
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "leave_out": REWARDS},
    {
        "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0, "loss_type": ["sigmoid_norm"],
        "leave_out": REWARDS,
    },
    {"peft_config": LORA, "learning_rate": 1e-2},
]  # fmt: skip


@slow
@pytest.mark.float32
@pytest.mark.parametrize("options", FLOAT32, ids=options_named)
def test_float32_is_as_near_to_float64_as_that_of_trl(runs, options):
    """The defaults of both: TRL's fused head, models in float32. The truth is our run in float64, equal to TRL's."""
    options = dict(options)
    leave_out = options.pop("leave_out", ())
    ours, theirs = (runs.logs(library, **options) for library in (fastdpo, trl))
    with float64():
        truth = runs.logs(fastdpo, **options)
    assert_moved(theirs)
    assert_rounded(ours, theirs, truth, leave_out=leave_out)
    assert_rounded(theirs, ours, truth, leave_out=leave_out, times=64)


@slow
@pytest.mark.parametrize(
    "name, ld_alpha",
    [("sigmoid", 0.0), ("sigmoid", 0.4), ("ipo", 0.4), ("sppo_hard", 0.0), ("aot", 0.7), ("apo_down", 0.4)],
)
def test_ld_alpha(runs, name, ld_alpha):
    compare(runs, loss_type=[name], ld_alpha=ld_alpha, tied_at_first=True)


@slow
@pytest.mark.parametrize(
    "names", ["sigmoid", "ipo", "nca_pair", "apo_zero", ["sigmoid", "sppo_hard"]], ids=options_named
)
def test_use_weighting(runs, names):
    compare(runs, loss_type=names, use_weighting=True)


@pytest.mark.parametrize(
    "names, loss_weights",
    [
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # MPO
        pytest.param(["sigmoid", "sft"], None, marks=slow),
        pytest.param(["ipo", "sft"], [1.0, -0.1], marks=slow),
        pytest.param(["sigmoid", "sigmoid"], [1.5, 0.5], marks=slow),
        pytest.param(["hinge"], [2.0], marks=slow),
    ],
    ids=options_named,
)
def test_mixes(runs, names, loss_weights):
    compare(runs, loss_type=names, loss_weights=loss_weights)


@slow
@pytest.mark.parametrize(
    "options",
    [{"beta": 0.02}, {"beta": 1.5}, {"loss_type": "discopop", "discopop_tau": 2.0}],
    ids=["0.02", "1.5", "tau"],
)
def test_other_numbers(runs, options):
    compare(runs, **options)


# Ways to run.


@pytest.mark.parametrize("packing", ["auto", pytest.param("padded", marks=slow), pytest.param("varlen", marks=slow)])
def test_packing(runs, packing):
    ours, _ = compare(runs, key="twelve steps", max_steps=12, own={"packing": packing})
    saved = [entry["perf/saved_tokens_fraction"] for entry in ours if "loss" in entry]
    assert min(saved) > 0.05 if packing == "auto" else max(saved) == 0 if packing == "varlen" else max(saved) < 0


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "max_steps": 3},
        *(
            pytest.param(options, marks=slow)
            for options in [
                {"max_length": None},
                {"truncation_mode": "keep_end"},
                {"seed": 7},
                {"data_seed": 5},
                {"train_sampling_strategy": "sequential"},
                {"logging_steps": 3},
                {"max_steps": -1, "num_train_epochs": 3},
                {"pad_to_multiple_of": 8},
                {"max_grad_norm": 0.0, "weight_decay": 0.1, "adam_beta2": 0.9},
                {"lr_scheduler_type": "cosine", "warmup_steps": 3, "max_grad_norm": 0.3},
                {"optim": "sgd", "learning_rate": 0.03},
                {"dataloader_drop_last": True},
                {"remove_unused_columns": False},
                {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            ]
        ),
    ],
    ids=options_named,
)
def test_arguments_of_training(runs, options):
    compare(runs, **options)


@slow
def test_an_epoch_that_ends_in_a_small_batch(runs):
    """14 rows in batches of 4, without accumulation: each step is the mean of its rows in both."""
    compare(runs, rows=text_rows(14))


@slow
def test_mixed_precision(runs):
    """bfloat16 autocast on the CPU: the same up to bfloat16's own 3 digits, in which accuracies may flip."""
    compare(runs, bf16=True, rel=3e-2, leave_out=("rewards/accuracies", "mean_token_accuracy"))


@slow
def test_going_on_from_a_checkpoint_of_trl(runs):
    """Halfway through a run the import is changed."""
    began = runs.trainer(trl, save_strategy="steps", save_steps=3, max_grad_norm=0.5)
    began.train()
    found = []
    for library in (fastdpo, trl):
        trainer = runs.trainer(library, max_grad_norm=0.5)
        trainer.train(resume_from_checkpoint=f"{began.args.output_dir}/checkpoint-3")
        found.append(trainer.state.log_history)
    assert_same(*found)


# Models and references.


def adapted(runs, learnt):
    """A model with an adapter; `learnt`: one that changes what it says."""
    torch.manual_seed(3)
    model = peft.get_peft_model(runs.load(), copy.deepcopy(LORA))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if learnt and "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"precompute_ref_log_probs": True, "tied_at_first": True}, marks=slow),
        pytest.param({"gradient_checkpointing": True}, marks=slow),
        pytest.param({"own": {"packing": "padded"}}, marks=slow),
        pytest.param({"gradient_accumulation_steps": 2, "max_steps": 3, "loss_type": "ipo"}, marks=slow),
    ],
    ids=options_named,
)
def test_a_new_adapter(runs, options):
    """The same weights are drawn, and the reference is the model without them."""
    compare(runs, peft_config=LORA, learning_rate=1e-2, **options)


@slow
def test_adapters_on_every_layer(runs):
    every = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, use_rslora=True)
    compare(runs, peft_config=every, learning_rate=1e-2)


@slow
def test_a_new_adapter_beside_a_reference(runs):
    compare(runs, peft_config=LORA, learning_rate=1e-2, ref_model=lambda: perturbed(runs.load()))


@pytest.mark.parametrize(
    "learnt, options",
    [
        (True, {}),
        pytest.param(True, {"precompute_ref_log_probs": True, "tied_at_first": True}, marks=slow),
        pytest.param(True, {"gradient_checkpointing": True}, marks=slow),
        pytest.param(True, {"eval_strategy": "steps", "eval_steps": 3}, marks=slow),
        pytest.param(False, {}, marks=slow),
    ],
    ids=options_named,
)
def test_an_adapter_of_an_earlier_training(runs, learnt, options):
    """The reference is the adapter as it came (TRL keeps a copy of it), not the base."""
    evaluated = {"eval_rows": text_rows(8, seed=5), "leave_out": ["eval_num_tokens"]} if "eval_steps" in options else {}
    compare(runs, model=lambda: adapted(runs, learnt), learning_rate=1e-2, **options, **evaluated)


@slow
def test_an_adapter_of_an_earlier_training_beside_a_reference(runs):
    ref_model = {"ref_model": lambda: perturbed(runs.load())}
    compare(runs, model=lambda: adapted(runs, True), learning_rate=1e-2, **ref_model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"precompute_ref_log_probs": True}, marks=slow),
        pytest.param({"precompute_ref_log_probs": True, "ld_alpha": 0.5}, marks=slow),
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 3}, marks=slow),
    ],
    ids=options_named,
)
def test_a_reference_of_its_own(runs, options):
    compare(runs, ref_model=lambda: perturbed(runs.load()), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"precompute_ref_log_probs": True},
        pytest.param({"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}, marks=slow),
        pytest.param({"precompute_ref_log_probs": True, "ld_alpha": 0.5}, marks=slow),
    ],
    ids=options_named,
)
def test_references_computed_ahead(runs, options):
    compare(runs, tied_at_first=True, **options)


@pytest.mark.parametrize(
    "options",
    [{"ref_model_sync_steps": 3}, pytest.param({"ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.25}, marks=slow)],
    ids=options_named,
)
def test_a_moving_reference(runs, options):
    compare(runs, sync_ref_model=True, **options)


@slow
def test_a_model_given_by_name(runs):
    compare(runs, key="plain", model=lambda: runs.folder)


@slow
def test_a_model_with_dropout_of_its_own(runs):
    """gpt2 comes with dropout of 0.1, which both switch off."""
    gpt2 = functools.partial(tiny_model, "gpt2", torch.float64)
    compare(runs, model=gpt2, ref_model=gpt2)


@slow
def test_an_optimizer_that_is_passed(runs):
    def optimizers(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    ours, _ = compare(runs, optimizers=optimizers)
    assert ours[3]["learning_rate"] == 1e-3


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        experts_implementation="eager",  # others know no float64
    )  # fmt: skip
    return in_double_precision(MixtralForCausalLM(config)).eval()


@slow
@pytest.mark.parametrize(
    "options",
    [
        {"own": {"packing": "padded"}},
        {"own": {"packing": "varlen"}, "router_aux_loss_coef": 0.1},
        {"router_aux_loss_coef": 0.0},
    ],
    ids=options_named,
)
def test_a_mixture_of_experts(runs, options):
    """Also its load-balancing loss, which TRL takes over each sequence with its prompt (see test_aux_loss...). Routing
    is float32 in transformers: the mean over at most 8 sequences of 16 tokens is, too."""
    rel = 8 * MAX_LENGTH * 2**-24 if options.get("router_aux_loss_coef") else 1e-9
    compare(runs, model=mixtral, ref_model=mixtral, rel=rel, **options)


# Data.


def with_special_tokens(template):
    """A tokenizer that puts special tokens around every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer(chat=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def beginning():
    return with_special_tokens("<s> $A")


def unpadded():
    tokenizer = word_tokenizer(chat=True)
    tokenizer.pad_token = None
    return tokenizer


def thinking():
    """Its template renders a prompt otherwise alone than before an answer."""
    tokenizer = word_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant : '", "'assistant : hello hello '")
    return tokenizer


def merged(rows):
    """The prompt's last word and the answer's first are one token, of which the tokenizer knows none."""
    told_apart = [row for row in rows if row["chosen"].split()[1:] != row["rejected"].split()[1:]]
    return [{**row, **{side: row[side].strip() for side in ("chosen", "rejected")}} for row in told_apart]


def implicit(rows):
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


@pytest.mark.parametrize(
    "rows, options",
    [
        (chat_rows(20), {}),
        pytest.param(implicit(chat_rows(20)), {}, marks=slow),
        pytest.param([{**row, "chat_template_kwargs": {"x": 1}} for row in chat_rows(20)], {}, marks=slow),
        pytest.param(chat_rows(16, prompt=(1, 3)), {"tokenizer": beginning}, marks=slow),
        pytest.param(text_rows(16), {"tokenizer": beginning}, marks=slow),
        pytest.param(text_rows(16), {"tokenizer": unpadded}, marks=slow),
        pytest.param([{**row, "chosen": f"{row['chosen']} </s>", "id": 1} for row in text_rows(16)], {}, marks=slow),
        pytest.param(text_rows(24, prompt=(6, 20)), {}, marks=slow),
        pytest.param(chat_rows(16, prompt=(1, 3)), {"tokenizer": thinking}, marks=slow),
        pytest.param(merged(text_rows(24))[:16], {}, marks=slow),
    ],
    ids=[
        *("chat", "implicit", "template", "chat-begin", "begin", "unpadded", "ended", "too-long", "thinking"),
        "merged",
    ],
)
def test_data(runs, rows, options):
    compare(runs, rows=rows, **options)


def test_rows_without_room_for_an_answer_are_the_same(runs):
    """What the test above trains on: both leave out the same rows."""
    for rows in (chat_rows(20), text_rows(24, prompt=(6, 20))):
        theirs, ours = (runs.trainer(library, rows=rows).train_dataset for library in (trl, fastdpo))
        assert 0 < len(ours) < len(rows)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert list(ours[name]) == list(theirs[name])
        assert max(len(ids) for ids in ours["prompt_ids"]) < MAX_LENGTH


def test_plain_text_with_its_prompt_in_both_answers(runs):
    """As in Anthropic's hh-rlhf: chosen and rejected share a beginning, which is the prompt."""
    compare(runs, rows=implicit(text_rows(16)))


@slow
def test_streamed_data(runs):
    compare(runs, rows=as_dataset(text_rows(18)).to_iterable_dataset())


# Evaluation.

# TRL logs eval_num_tokens, the tokens trained on so far; test_names_of_metrics asks for it.
NOT_EVALUATED = ["eval_num_tokens"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"precompute_ref_log_probs": True, "tied_at_first": True}, marks=slow),
        pytest.param({"peft_config": LORA}, marks=slow),
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 3}, marks=slow),
        pytest.param({"loss_type": ["ipo", "sft"], "own": {"packing": "padded"}}, marks=slow),
    ],
    ids=options_named,
)
def test_evaluation(runs, options):
    ours, _ = compare(
        runs, eval_rows=text_rows(8, seed=5), eval_strategy="steps", eval_steps=2, leave_out=NOT_EVALUATED, **options
    )
    assert sum("eval_loss" in entry for entry in ours) == 3


@slow
def test_the_best_checkpoint_by_a_metric(runs):
    """load_best_model_at_end by what both call eval_rewards/margins."""
    options = {
        "eval_rows": text_rows(8, seed=5), "eval_strategy": "steps", "eval_steps": 4, "max_steps": 12,
        "save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rewards/margins", "greater_is_better": True, "learning_rate": 5e-3,
    }  # fmt: skip
    trainers = [runs.trainer(library, **options) for library in (fastdpo, trl)]
    for trainer in trainers:
        trainer.train()
    ours, theirs = (trainer.state for trainer in trainers)
    assert ours.best_global_step == theirs.best_global_step
    assert ours.best_metric == pytest.approx(theirs.best_metric, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"precompute_ref_log_probs": True}, marks=slow)], ids=options_named
)
def test_several_evaluation_sets(runs, options):
    """TRL names the loss after the set, and calls every other metric eval_*, so that sets overwrite each other in the
    result of evaluate(); ours are all eval_<set>_*."""
    sets = {"near": text_rows(8, seed=5), "far": text_rows(4, seed=6)}
    found = []
    for library in (fastdpo, trl):
        trainer = runs.trainer(library, eval_rows=sets, eval_strategy="steps", eval_steps=3, **options)
        trainer.train()
        found.append([entry for entry in trainer.state.log_history if any(name.startswith("eval") for name in entry)])
    assert len(found[0]) == len(found[1]) == 4
    for ours, theirs in zip(*found, strict=True):
        (own,) = [name for name in sets if f"eval_{name}_loss" in theirs]
        for name in compared(theirs, NOT_EVALUATED):
            metric = name.removeprefix(f"eval_{own}_").removeprefix("eval_")
            assert ours[f"eval_{own}_{metric}" if name not in ("epoch", "step") else name] == pytest.approx(
                theirs[name], rel=1e-5, abs=1e-5
            )


def test_an_evaluation_set_that_comes_later(runs):
    results = []
    for library in (fastdpo, trl):
        trainer = runs.trainer(library, max_steps=5)
        trainer.train()
        results.append(
            [
                trainer.evaluate(as_dataset(text_rows(8, seed=5))),
                trainer.evaluate(as_dataset(text_rows(8, seed=6)), metric_key_prefix="eval_later"),
            ]
        )
    for ours, theirs in zip(*results, strict=True):
        for name in compared(theirs, NOT_EVALUATED):
            same_set = name in ours and (name.startswith("eval_later") or "eval_later_loss" not in theirs)
            if same_set:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert results[0][1]["eval_later_rewards/margins"] == pytest.approx(
        results[1][1]["eval_rewards/margins"], rel=1e-5, abs=1e-5
    )


# The same script.


def metric_names(runs, library, kind, **options):
    logs = runs.logs(library, kind, max_steps=2, eval_strategy="steps", eval_steps=2, **options)
    return {name for entry in logs for name in entry}


@pytest.mark.parametrize(
    "kind, options",
    [
        ("DPO", {}),
        ("DPO", {"model": mixtral, "ref_model": mixtral}),
        ("DPO", {"loss_type": ["sft"]}),
        ("KTO", {}),
        ("KTO", {"loss_type": "apo_zero_unpaired"}),
        ("CPO", {}),
        ("CPO", {"loss_type": "simpo"}),
        ("CPO", {"loss_type": "hinge", "cpo_alpha": 0.0}),
        ("ORPO", {}),
        ("Reward", {}),
    ],
    ids=options_named,
)
def test_names_of_metrics(runs, kind, options):
    """All that TRL logs, ours log, too, in training and in evaluation."""
    if kind == "Reward":
        options = {"model": lambda: reward_model(runs), "max_length": 64}
    rows = {side: answer_rows(8, seed) if kind == "KTO" else text_rows(8, seed, prompt=(1, 6)) for side, seed in
            (("rows", 0), ("eval_rows", 5))}  # fmt: skip
    ours, theirs = (metric_names(runs, library, kind, **rows, **options) for library in (fastdpo, trl))
    assert "eval_loss" in theirs
    assert sorted(theirs - ours) == []


def files_of(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"peft_config": LORA}, marks=slow),
        pytest.param({"learnt": True}, marks=slow),
        pytest.param({"sync_ref_model": True, "ref_model_sync_steps": 1}, marks=slow),
        pytest.param({"precompute_ref_log_probs": True}, marks=slow),
    ],
    ids=options_named,
)
def test_files(runs, options):
    """Of a run with checkpoints, then save_model(): weights, adapters, tokenizer, states, model card."""
    if "learnt" in options:
        options = {"model": lambda: adapted(runs, True)}
    found = []
    for library in (fastdpo, trl):
        trainer = runs.trainer(library, max_steps=4, save_strategy="steps", save_steps=2, **options)
        trainer.train()
        trainer.save_model()
        found.append(files_of(trainer.args.output_dir))
    ours, theirs = found
    # TRL also saves the frozen copy of an adapter, in ref/: half of a checkpoint, which the constructor makes anew.
    theirs = {name for name in theirs if "ref" not in name.split("/")[:-1]}
    assert not theirs - ours
    assert {"README.md", "checkpoint-2/trainer_state.json", "checkpoint-4/optimizer.pt"} <= theirs
    assert not {name for name in ours - theirs if "fastdpo_state.json" not in name and "reference.safe" not in name}


KINDS = ["DPO", "KTO", "Reward", "CPO", "ORPO"]


def present(kind):
    if not hasattr(fastdpo.trainer, f"{kind}Trainer"):
        pytest.skip(f"there is no {kind}Trainer yet")
    return kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_constructor(kind):
    """TRL's parameters, in its order, with its defaults; further ones only by name."""
    ours, theirs = (
        list(inspect.signature(named(library, f"{present(kind)}Trainer").__init__).parameters.values())
        for library in (fastdpo, trl)
    )
    assert [(each.name, each.default) for each in ours[: len(theirs)]] == [(each.name, each.default) for each in theirs]
    further = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    assert all(each.kind in further for each in ours[len(theirs) :])


def default_of(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# Ours keeps losses that are no numbers in the logged mean, for nan_loss is there to tell of them; TRL's default, which
# is that of TrainingArguments, hides them and waits for the device in every pass.
OTHER_DEFAULTS = {"logging_nan_inf_filter": False}


@pytest.mark.parametrize("kind", KINDS)
def test_fields_of_the_config(kind):
    """Every field of TRL's, with its default."""
    ours, theirs = (
        {field.name: default_of(field) for field in dataclasses.fields(named(library, f"{present(kind)}Config"))}
        for library in (fastdpo, trl)
    )
    assert not set(theirs) - set(ours)
    assert {name: ours[name] for name, value in theirs.items() if ours[name] != value} == OTHER_DEFAULTS


@pytest.mark.parametrize("kind", KINDS)
def test_dictionaries_from_a_command_line(kind, tmp_path):
    """transformers' parser hands over dictionaries as JSON; TRL's configs make them dictionaries again."""
    text = '{"dtype": "bfloat16", "use_cache": false}'
    configs = [
        named(library, f"{present(kind)}Config")(str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs=text)
        for library in (fastdpo, trl)
    ]
    assert configs[1].model_init_kwargs == json.loads(text)
    assert configs[0].model_init_kwargs == configs[1].model_init_kwargs


@pytest.mark.parametrize(
    "line",
    [
        "--loss_type sigmoid sft --loss_weights 1.0 0.5 --max_length 8 --ld_alpha 0.5 --beta 0.3",
        "--precompute_ref_log_probs --pad_to_multiple_of 8 --truncation_mode keep_start --learning_rate 5e-7",
        "--loss_type ipo --sync_ref_model true --ref_model_sync_steps 64 --no_disable_dropout --dataset_num_proc 2",
        "--f_divergence_type alpha_divergence --f_alpha_divergence_coef 0.7 --use_weighting --bf16 false",
    ],
)
def test_a_command_line(line, tmp_path):
    """TRL's own parser reads our config as it reads its own."""
    words = f"--output_dir {tmp_path} --use_cpu --bf16 false {line}".split()
    ours, theirs = (
        trl.TrlParser((library.DPOConfig,)).parse_args_and_config(args=words)[0] for library in (fastdpo, trl)
    )
    fields = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    own = {field.name for field in dataclasses.fields(trl.DPOConfig)} & {
        word.removeprefix("--").removeprefix("no_") for word in words if word.startswith("--")
    }
    assert len(own) >= 6
    # transformers pads no further than it must on a CPU, and TRL has read that out of "auto" by now.
    for name in fields - {"logging_dir", "logging_nan_inf_filter", "accelerator_config", "pad_to_multiple_of"}:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_the_model_card(runs):
    """TRL's scripts end in trainer.push_to_hub(dataset_name=...), which hands it to create_model_card."""
    for library in (trl, fastdpo):
        trainer = runs.trainer(library, max_steps=1)
        trainer.create_model_card(model_name="my-model", dataset_name="my/data", tags=["mine"])
        card = Path(trainer.args.output_dir, "README.md").read_text()
        assert "my-model" in card and "my/data" in card and "mine" in card, library.__name__


def data_folder(folder, rows):
    folder.mkdir()
    for name, part in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(folder)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("dpo", ""),
        *(
            pytest.param(script, flags, marks=slow)
            for script, flags in [("dpo", "--use_peft --lora_r 4"), ("kto", ""), ("reward", "")]
        ),
    ],
)
def test_a_script_of_trl_with_its_import_changed(runs, script, flags, tmp_path, monkeypatch):
    """trl/scripts/dpo.py itself, from the command line to the saved weights."""
    from importlib import import_module

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = script.capitalize() if script == "reward" else script.upper()
    auto_class = AutoModelForSequenceClassification if script == "reward" else AutoModelForCausalLM
    module = import_module(f"trl.scripts.{script}")
    make = answer_rows if script == "kto" else text_rows
    data = data_folder(tmp_path / "data", {"train": make(16), "test": make(8, seed=5)})
    found = []
    for library in (trl, fastdpo):
        for part in ("Trainer", "Config"):
            name = f"{kind}{part}"
            monkeypatch.setattr(trl, name, named(library, name))
        out = tmp_path / library.__name__
        words = (
            f"--model_name_or_path {runs.folder} --dtype float32 --dataset_name {data} --output_dir {out} --use_cpu "
            f"--bf16 false --report_to none --max_steps 6 --per_device_train_batch_size 4 --learning_rate 1e-3 "
            f"--logging_steps 1 --eval_strategy steps --eval_steps 3 --save_steps 6 --max_length 16 {flags}"
        ).split()
        script_args, training_args, model_args, dataset_args = module.make_parser().parse_args_and_config(args=words)
        module.main(script_args, training_args, model_args, dataset_args)
        logs = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
        model = auto_class.from_pretrained(runs.folder if flags else out, dtype="float64")
        if flags:
            model = peft.PeftModel.from_pretrained(model, out).merge_and_unload()
        found.append((logs, model.state_dict()))
    (their_logs, theirs), (our_logs, ours) = found
    assert_same(our_logs, their_logs, leave_out=[*NOT_EVALUATED, *(["num_tokens"] if script == "kto" else [])])
    start = runs.load().state_dict()  # a reward model's head is new
    assert set(ours) == set(theirs)
    moved = 0
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-8, atol=1e-9)
        moved += int(name in start and (wanted - start[name]).abs().max() > 1e-3)
    assert moved >= 4


# KTO.


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=slow)
            for options in [
                {"desirable_weight": 0.7, "undesirable_weight": 1.3},
                {"loss_type": "apo_zero_unpaired", "train_sampling_strategy": "random", "leave_out": ["kl"]},
                {"precompute_ref_log_probs": True},
                {"own": {"packing": "padded"}},
                {"rows": text_rows(16)},  # pairs, which both part into single answers
                {"rows": chat_rows(16, prompt=(1, 3))},
                {"rows": answer_rows(18)},  # ends in a batch of two
                {"peft_config": LORA, "learning_rate": 1e-2},
                {"sync_ref_model": True, "ref_model_sync_steps": 3},
                {"gradient_checkpointing": True},
            ]
        ),
    ],
    ids=options_named,
)
def test_kto(runs, options):
    """`num_tokens` has a test of its own."""
    options = {"rows": answer_rows(16), **options}
    leave_out = [*options.pop("leave_out", ()), "num_tokens"]
    ours, _ = compare(runs, "KTO", leave_out=leave_out, **options)
    if "kl" not in leave_out:
        assert max(entry["kl"] for entry in ours if "kl" in entry) > 0.1


@slow
def test_kto_with_a_reference_of_its_own_and_evaluation(runs):
    compare(
        runs, "KTO", rows=answer_rows(16), ref_model=lambda: perturbed(runs.load()), eval_rows=answer_rows(8, seed=5),
        eval_strategy="steps", eval_steps=3, leave_out=["num_tokens", *NOT_EVALUATED],
    )  # fmt: skip


def test_tokens_that_kto_counts(runs):
    """Those of the rows: of prompts and answers, not of the answers to other prompts that estimate the divergence."""
    theirs, ours = (
        [entry["num_tokens"] for entry in runs.logs(library, "KTO", rows=answer_rows(8), max_steps=2)[:2]]
        for library in (trl, fastdpo)
    )
    assert ours == theirs


# CPO and ORPO, which TRL calls experimental.

# Their tokenizer puts a beginning-of-text token before a prompt, whatever the tokenizer does; so `beginning`.
# Their logits/* are means over all positions, prompts and padding too, ours over the answers' tokens.
LOGITS = ("logits/chosen", "logits/rejected")


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=slow)
            for options in [
                {"cpo_alpha": 0.3, "label_smoothing": 0.1},
                {"max_length": MAX_LENGTH},
                {"loss_type": "hinge"},
                {"loss_type": "hinge", "cpo_alpha": 0.0},
                {"loss_type": "simpo"},
                {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.4, "beta": 2.0},
                {"loss_type": "ipo"},
                {"loss_type": "ipo", "cpo_alpha": 0.0},
            ]
        ),
    ],
    ids=options_named,
)
def test_cpo(runs, options):
    leave_out = list(LOGITS)
    name = options.get("loss_type", "sigmoid")
    if name in ("simpo", "ipo"):  # TRL's logps/* are means over tokens there
        leave_out += ["logps/chosen", "logps/rejected"]
    if name == "ipo":  # and so are its rewards; ours are beta times the sum, as of ipo with a reference
        leave_out += REWARDS
    if name != "sigmoid":  # see test_names_of_metrics
        leave_out += ["nll_loss"]
    compare(runs, "CPO", tokenizer=beginning, leave_out=leave_out, **({"max_length": 64} | options))


@slow
def test_cpo_with_a_new_adapter(runs):
    compare(
        runs, "CPO", tokenizer=beginning, leave_out=LOGITS, max_length=64, peft_config=LORA, learning_rate=1e-2,
    )  # fmt: skip


def test_orpo(runs):
    """TRL's NLL counts the prompts' tokens, too: the runs part after a step, but that one's odds are the same."""
    ours, theirs = (
        runs.logs(library, "ORPO", tokenizer=beginning, max_length=64, max_steps=1)[0] for library in (fastdpo, trl)
    )
    for name in (*REWARDS, "log_odds_ratio", "log_odds_chosen", "learning_rate", "epoch"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    assert ours["nll_loss"] != pytest.approx(theirs["nll_loss"], rel=1e-2)
    for entry in (ours, theirs):
        assert entry["loss"] == pytest.approx(entry["nll_loss"] - 0.1 * entry["log_odds_ratio"], rel=1e-5)


# Where the two differ on purpose.


@slow
def test_a_step_of_unequal_batches(runs):
    """14 rows, 4 a batch, 2 batches a step: the second step has 4 + 2 rows, and is in TRL the mean of the batches'
    means; in ours the mean over the rows."""
    options = {"rows": text_rows(14), "gradient_accumulation_steps": 2, "max_steps": 2}
    ours, theirs = (runs.logs(library, **options) for library in (fastdpo, trl))
    assert_same(ours[:1] * 2, theirs[:1] * 2)
    assert ours[1]["grad_norm"] != pytest.approx(theirs[1]["grad_norm"], rel=1e-2)


@slow
def test_the_mean_over_tokens_of_an_accumulated_step(runs):
    """The NLL of `sft` is a mean over tokens. TRL's is the mean of the batches' means, so that accumulation changes it;
    ours is that of all tokens of the step: what TRL's is in one batch of as many rows."""
    options = {"loss_type": ["sigmoid", "sft"], "max_steps": 6}
    in_halves = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    ours, theirs = (runs.logs(library, **in_halves, **options) for library in (fastdpo, trl))
    at_once = runs.logs(trl, per_device_train_batch_size=8, **options)
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        for a, b in zip(ours[:-1], at_once[:-1], strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
    assert ours[0]["grad_norm"] != pytest.approx(theirs[0]["grad_norm"], rel=1e-3)


@slow
def test_the_last_batch_of_an_evaluation(runs):
    """6 rows in batches of 4: TRL counts the last two twice, ours every row once."""
    rows = text_rows(6, seed=5)
    reference = {"ref_model": lambda: perturbed(runs.load())}
    ours, theirs = (runs.trainer(library, eval_rows=rows, **reference).evaluate() for library in (fastdpo, trl))
    one_by_one = runs.trainer(trl, eval_rows=rows, per_device_eval_batch_size=1, **reference).evaluate()
    for name in ("eval_loss", *(f"eval_{name}" for name in REWARDS), "eval_logps/chosen"):
        assert ours[name] == pytest.approx(one_by_one[name], rel=1e-5, abs=1e-5), name
    assert theirs["eval_rewards/chosen"] != pytest.approx(one_by_one["eval_rewards/chosen"], rel=1e-3)


@slow
def test_rewards_of_sft_alone(runs):
    """It has no reference, so ours runs none and its rewards are beta times the log-probs; TRL runs one for the log."""
    ours, theirs = (runs.logs(library, loss_type=["sft"], max_steps=2)[0] for library in (fastdpo, trl))
    assert ours["rewards/chosen"] == pytest.approx(0.1 * ours["logps/chosen"], rel=1e-6)
    assert theirs["rewards/chosen"] == 0.0


@slow
def test_aux_loss_of_shared_prompts(runs):
    """Every token that runs counts once in the balance of experts, and a shared prompt runs once."""
    options = {"model": mixtral, "ref_model": mixtral, "max_steps": 2, "router_aux_loss_coef": 0.1}
    ours = runs.logs(fastdpo, own={"packing": "prefix"}, **options)[0]
    theirs = runs.logs(trl, **options)[0]
    assert ours["aux_loss"] == pytest.approx(theirs["aux_loss"], rel=1e-2)
    assert ours["loss"] - theirs["loss"] == pytest.approx(0.1 * (ours["aux_loss"] - theirs["aux_loss"]), abs=2e-6)


def test_rows_that_teach_nothing_are_refused(runs):
    """TRL trains on them."""
    rows = text_rows(8)
    for fields in ({"rejected": rows[3]["chosen"]}, {"rejected": " "}, {"prompt": ""}):
        changed = [{**row, **fields} if number == 3 else row for number, row in enumerate(rows)]
        with pytest.raises(DataError, match="row 3"):
            runs.trainer(fastdpo, rows=changed)
        runs.trainer(trl, rows=changed)


# Reward models.


def reward_model(runs):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(runs.folder, num_labels=1, dtype="float32")


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=slow)
            for options in [
                {"rows": text_rows(20), "max_length": MAX_LENGTH},  # both leave out what is longer
                {"rows": chat_rows(16, prompt=(1, 3))},
                {"center_rewards_coefficient": 0.01},
                {"rows": [{**row, "margin": 0.25 * number} for number, row in enumerate(text_rows(16))]},
                {"gradient_checkpointing": True},
                {"gradient_accumulation_steps": 2, "max_steps": 3},
                {
                    "peft_config": peft.LoraConfig(r=4, task_type="SEQ_CLS", modules_to_save=["score"]),
                    "learning_rate": 1e-2,
                },
                {"named": True},
                {"eval_rows": text_rows(8, seed=5), "eval_strategy": "steps", "eval_steps": 3},
            ]
        ),
    ],
    ids=options_named,
)
def test_reward(runs, options):
    present("Reward")
    options = {"max_length": 64, **options}
    if options.pop("named", False):  # the seed draws the head
        options["model"] = lambda: runs.folder
    compare(runs, "Reward", leave_out=NOT_EVALUATED, **({"model": lambda: reward_model(runs)} | options))
