"""The losses against TRL 1.16's own trainers: the same rows, models and options, loss, gradients and metrics.

Where the two differ on purpose, a test of its own says so and how.
"""

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tiny import random_rows, tiny_model, word_tokenizer
from trainer.trl_runs import float64, rounding, sums_in_dtype_of

import fastdpo

trl = pytest.importorskip("trl", minversion="1.16.0")

BETA, SMOOTHING = 0.3, 0.1
ROWS = random_rows(4, seed=3, prompt=(2, 9), answer=(1, 9))
FREE = {"sft"}  # of TRL's losses, those without a reference
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}  # those for which TRL honours label_smoothing
DIVERGING = ["sigmoid", "ipo", "hinge", "robust", "exo_pair", "discopop", "sigmoid_norm"]
LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
METRICS = [
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
    *("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"),
]


def models(dtype=torch.float64):
    """A policy some way from its reference, and the reference."""
    reference = tiny_model(dtype=dtype)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)  # alike in every dtype
    return policy, reference


def arguments(kind, folder, **options):
    return kind(
        output_dir=str(folder), beta=BETA, bf16=False, gradient_checkpointing=False, report_to=[], use_cpu=True,
        max_length=None, disable_tqdm=True, **options,
    )  # fmt: skip


class Run:
    """A TRL trainer around its own copies of the models, and ours beside it."""

    def __init__(self, trainer, policy, reference, batch):
        self.trainer, self.policy, self.reference, self.batch = trainer, policy, reference, batch
        self.neutral = {name: getattr(trainer, name) for name in self.switches if hasattr(trainer, name)}

    switches = (
        *("loss_types", "loss_weights", "loss_type", "beta", "label_smoothing", "f_divergence_type", "ld_alpha"),
        *("f_alpha_divergence_coef", "use_weighting", "desirable_weight", "undesirable_weight", "calculate_KL"),
    )

    def theirs(self, discopop_tau=0.05, **options):
        """TRL's loss, gradients by name and metrics."""
        for name, value in (self.neutral | options).items():
            assert name in self.neutral, name
            setattr(self.trainer, name, value)
        self.trainer.args.discopop_tau = discopop_tau
        self.trainer._metrics["eval"].clear()
        model = self.trainer.model.eval()
        model.zero_grad()
        with sums_in_dtype_of(model):
            loss = self.trainer.compute_loss(model, dict(self.batch))
            loss.backward()
        metrics = {name: values[0] for name, values in self.trainer._metrics["eval"].items()}
        return loss.detach(), gradients(model), metrics


def gradients(model):
    """By name, detached from the model; what no gradient reaches is left out."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours, theirs, metrics=METRICS, rel=1e-9):
    """Loss, gradients and metrics of both in float64, to 1e-9; gradients to as much of their norm."""
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=rel, abs=rel)
    assert set(ours[1]) == set(theirs[1])
    for name, wanted in theirs[1].items():
        assert (ours[1][name] - wanted).norm() <= rel * wanted.norm(), name
    for name in metrics:
        bound = max(rel, rounding(name))
        assert float(ours[2][name]) == pytest.approx(theirs[2][name], rel=bound, abs=rel), name


def assert_as_near(ours, theirs, truth):
    """Loss and gradients in float32, against float64: neither is much farther off than the other."""

    def errors(found):
        yield abs(found[0].item() - truth[0].item()), abs(truth[0].item())
        for name, wanted in truth[1].items():
            yield (found[1][name] - wanted).norm().item(), wanted.norm().item()

    for (our_error, size), (their_error, _) in zip(errors(ours), errors(theirs), strict=True):
        little = 2**-20 * max(1.0, size)
        assert our_error <= 4 * their_error + little and their_error <= 64 * our_error + 16 * little


@pytest.fixture(scope="module", autouse=True)
def in_float64():
    with float64():
        yield


def finished(model, out):
    out.loss.backward()
    return out.loss.detach(), gradients(model), out.metrics()


# DPOTrainer.


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    return dpo_of(torch.float64, tmp_path_factory)


@pytest.fixture(scope="module")
def dpo_in_float32(tmp_path_factory):
    return dpo_of(torch.float32, tmp_path_factory)


def dpo_of(dtype, tmp_path_factory):
    from datasets import Dataset

    policy, reference = models(dtype)
    trainer = trl.DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=arguments(trl.DPOConfig, tmp_path_factory.mktemp("dpo"), use_weighting=True),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=word_tokenizer(),
    )
    trainer.use_weighting = False  # what WPO needs is now computed
    return Run(trainer, policy, reference, trainer.data_collator(ROWS))


def references(run, ld_alpha):
    """(2B,) TRL's own, of its reference model."""
    run.trainer.ld_alpha = ld_alpha
    return torch.cat(run.trainer.compute_ref_log_probs(run.trainer.ref_model, run.batch))


def ours(run, way, ref_logps, collator=None, **options):
    """fastdpo's loss, gradients by name and metrics: of all logits, or of a packed batch of the same rows."""
    options = {"beta": BETA} | options
    if way == "logits":
        inputs = {name: run.batch[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(run.batch["completion_mask"] == 0, -100)
        out = fastdpo.loss(run.policy(**inputs, use_cache=False).logits, labels, ref_logps, **options)
    else:
        packed = (collator or fastdpo.PreferenceCollator(packing="prefix"))(ROWS)
        # A budget of 11 rows of logits: the gradient is formed in the forward.
        budget = 11 * run.policy.config.vocab_size * 4
        out = fastdpo.batch_loss(run.policy, packed, ref_logps, memory_budget=budget, **options)
    return finished(run.policy, out)


def compare(run, way, names, loss_weights=None, metrics=METRICS, **options):
    """Both sides with the same options; `names` one loss or several."""
    names = [names] if isinstance(names, str) else names
    smoothing = options.get("label_smoothing", 0.0)
    theirs = run.theirs(loss_types=names, loss_weights=loss_weights or [1.0] * len(names), **options)
    if not SMOOTHED & set(names):
        assert not smoothing
    refs = None if set(names) <= FREE else references(run, options.get("ld_alpha"))
    if not set(names) - FREE:
        metrics = [name for name in metrics if not name.startswith("rewards/")]
    assert_same(ours(run, way, refs, loss_type=names, loss_weights=loss_weights, **options), theirs, metrics)


WAYS = ["logits", "packed"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name, label_smoothing",
    [*((name, 0.0) for name in LOSSES if name != "exo_pair"), *((name, SMOOTHING) for name in sorted(SMOOTHED))],
)
def test_every_loss(dpo, name, label_smoothing, way):
    compare(dpo, way, name, label_smoothing=label_smoothing)


@pytest.mark.parametrize("beta", [0.05, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_beta(dpo, name, beta):
    compare(dpo, "logits", name, beta=beta, label_smoothing=SMOOTHING if name in SMOOTHED else 0.0)


def test_discopop_tau(dpo):
    compare(dpo, "logits", "discopop", discopop_tau=1.5)


EXACT_DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]
# TRL knows no float64 here.
ROUNDED_DIVERGENCES = [
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coef} for coef in (0.5, 2.0)
]


@pytest.mark.parametrize("options", EXACT_DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", DIVERGING)
def test_divergences(dpo, name, options):
    smoothing = SMOOTHING if name in SMOOTHED else 0.0
    metrics = [metric for metric in METRICS if not metric.startswith("rewards/")]
    compare(dpo, "logits", name, metrics=metrics, label_smoothing=smoothing, **options)


@pytest.mark.parametrize("options", ROUNDED_DIVERGENCES, ids=str)
@pytest.mark.parametrize("name", DIVERGING)
def test_divergences_in_float32(dpo, dpo_in_float32, name, options):
    options = {"label_smoothing": SMOOTHING if name in SMOOTHED else 0.0, **options}
    theirs = dpo_in_float32.theirs(loss_types=[name], **options)
    rounded, truth = (
        ours(run, "logits", references(run, None), loss_type=name, **options) for run in (dpo_in_float32, dpo)
    )
    assert_as_near(rounded, theirs, truth)


@pytest.mark.parametrize("options", [*EXACT_DIVERGENCES, *ROUNDED_DIVERGENCES], ids=str)
def test_rewards_of_divergences(dpo_in_float32, options):
    """TRL logs beta * logratio whatever the divergence; ours is beta * score, the reward that the loss is made of."""
    dpo = dpo_in_float32
    refs = references(dpo, None)
    _, _, theirs = dpo.theirs(**options)
    _, _, found = ours(dpo, "logits", refs, **options)
    _, _, plain = ours(dpo, "logits", refs)
    with torch.no_grad():
        sums = fastdpo.sequence_logps(dpo.policy, fastdpo.PreferenceCollator()(ROWS))
    ratios = (sums - refs).double()
    kind, coef = options["f_divergence_type"], options.get("f_alpha_divergence_coef")
    scores = {
        "forward_kl": 1 - torch.exp(-ratios),
        "js_divergence": torch.log(2 / (1 + torch.exp(-ratios))),
        "alpha_divergence": ratios if coef == 1.0 else (torch.exp(((coef or 0) - 1) * ratios) - 1) / ((coef or 0) - 1),
    }[kind]
    for name, rows in (("chosen", scores[: len(ROWS)]), ("rejected", scores[len(ROWS) :])):
        assert plain[f"rewards/{name}"].item() == pytest.approx(theirs[f"rewards/{name}"], rel=1e-4)
        assert found[f"rewards/{name}"].item() == pytest.approx(BETA * rows.mean().item(), rel=1e-4)
        if coef != 1.0:
            assert found[f"rewards/{name}"].item() != pytest.approx(theirs[f"rewards/{name}"], rel=1e-2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ld_alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "names",
    ["sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "aot", "aot_unpaired", "apo_down", "sigmoid_norm",
     ["sigmoid", "sft"]],
    ids=str,
)  # fmt: skip
def test_ld_alpha(dpo, names, ld_alpha, way):
    """LD-DPO; the term of `sft` in a mix counts every token in both."""
    compare(dpo, way, names, ld_alpha=ld_alpha)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("sft", "aot", "aot_unpaired", "hinge")])
def test_use_weighting(dpo, name, way):
    """WPO."""
    compare(dpo, way, name, use_weighting=True, label_smoothing=SMOOTHING if name in SMOOTHED else 0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.5, "use_weighting": True},
        {"ld_alpha": 0.5, "f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5, "use_weighting": True, "f_divergence_type": "forward_kl"},
    ],
    ids=str,
)
def test_options_together(dpo, options, way):
    metrics = [metric for metric in METRICS if not metric.startswith("rewards/")]
    compare(dpo, way, ["sigmoid", "ipo"], [0.7, 0.3], metrics=metrics, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "names, loss_weights",
    [
        (["sigmoid", "sft"], None),
        (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),  # MPO
        (["robust", "aot", "sft"], [1.0, 0.5, 0.25]),
        (["sft", "ipo"], [2.0, -0.5]),
    ],
    ids=str,
)
def test_mixes(dpo, names, loss_weights, way):
    compare(dpo, way, names, loss_weights, label_smoothing=SMOOTHING if "robust" in names else 0.0)


def test_mixes_of_divergences_and_weighted_ones(dpo):
    metrics = [metric for metric in METRICS if not metric.startswith("rewards/")]
    compare(dpo, "packed", ["sigmoid", "sft"], [1.0, 0.5], metrics=metrics, f_divergence_type="js_divergence")
    compare(dpo, "packed", ["sigmoid", "ipo", "nca_pair"], [1.0, 0.5, 2.0], use_weighting=True)


def test_the_perturbed_policy_has_ratios_to_speak_of(dpo):
    """Otherwise every loss would be tested at 0 alone, and LD-DPO and the answers' lengths would not matter."""
    refs = references(dpo, None)
    with torch.no_grad():
        ratios = fastdpo.sequence_logps(dpo.policy, fastdpo.PreferenceCollator()(ROWS)) - refs
    assert ratios.abs().min() > 0.04 and ratios.abs().max() < 40
    assert (ratios[: len(ROWS)] - ratios[len(ROWS) :]).abs().min() > 0.05
    assert all(len(row["chosen_ids"]) != len(row["rejected_ids"]) for row in ROWS[:3])
    assert (references(dpo, 0.5) - refs).abs().max() > 0.5


def truncated(run, monkeypatch, max_length, mode):
    """The rows cut by both collators: TRL's as the batch of `run`, and ours."""
    for name, value in {"max_length": max_length, "truncation_mode": mode}.items():
        monkeypatch.setattr(run.trainer.data_collator, name, value)
    monkeypatch.setattr(run, "batch", run.trainer.data_collator(ROWS))
    return fastdpo.PreferenceCollator(packing="prefix", max_length=max_length, truncation_mode=mode)


CUTS = [(8, "keep_start"), (5, "keep_start"), (8, "keep_end"), (5, "keep_end")]
CUT_LOSSES = [
    ("sigmoid", {}),
    ("sigmoid", {"ld_alpha": 0.5}),
    ("sigmoid", {"use_weighting": True}),
    ("nca_pair", {}),
    (["sigmoid", "sft"], {}),
]


@pytest.mark.parametrize(
    "names, options, max_length, mode",
    [
        *((*case, *cut) for case in CUT_LOSSES for cut in CUTS),
        *(("ipo", {}, *cut) for cut in CUTS[:2]),  # the others in test_lengths_of_answers_without_a_prompt
    ],
    ids=str,
)
def test_truncated_rows(dpo, names, options, max_length, mode, monkeypatch):
    """Answers without their end, without a prompt before them, and without a single token."""
    collator = truncated(dpo, monkeypatch, max_length, mode)
    names = [names] if isinstance(names, str) else names
    theirs = dpo.theirs(loss_types=names, loss_weights=[1.0] * len(names), **options)
    refs = references(dpo, options.get("ld_alpha"))
    assert_same(ours(dpo, "packed", refs, collator, loss_type=names, **options), theirs)


# Where the two differ.


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_lengths_of_answers_without_a_prompt(dpo, name, monkeypatch):
    """Nothing predicts the first token of a sequence. TRL counts it in the length, ours only tokens with a log-prob."""
    collator = truncated(dpo, monkeypatch, 8, "keep_end")
    mask = dpo.batch["completion_mask"]
    assert mask[:, 0].any() and not mask[:, 0].all()
    theirs = dpo.theirs(loss_types=[name], loss_weights=[1.0])
    refs = references(dpo, None)
    loss, _, _ = ours(dpo, "packed", refs, collator, loss_type=name)
    with torch.no_grad():
        sums = fastdpo.sequence_logps(dpo.policy, collator(ROWS))
    halves = {"loss_type": name, "beta": BETA}
    for counted, wanted in ((mask, theirs[0]), (mask[:, 1:], loss)):
        lengths = dict(zip(("chosen_lengths", "rejected_lengths"), counted.sum(1).chunk(2), strict=True))
        out = fastdpo.preference_loss(*sums.chunk(2), *refs.chunk(2), **lengths, **halves)
        assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.item() != pytest.approx(theirs[0].item(), rel=1e-3)


def test_label_smoothing_of_sigmoid(dpo):
    """TRL ignores label_smoothing where the loss is "sigmoid"; ours is conservative DPO."""
    refs = references(dpo, None)
    plain, smoothed = dpo.theirs(), dpo.theirs(label_smoothing=SMOOTHING)
    assert plain[0] == smoothed[0]
    loss, _, metrics = ours(dpo, "logits", refs, label_smoothing=SMOOTHING)
    margins = BETA * differences(dpo, refs)
    log_sigmoid = torch.nn.functional.logsigmoid
    wanted = -(1 - SMOOTHING) * log_sigmoid(margins) - SMOOTHING * log_sigmoid(-margins)
    assert loss.item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert loss.item() != pytest.approx(plain[0].item(), rel=1e-3)
    assert float(metrics["rewards/margins"]) == pytest.approx(plain[2]["rewards/margins"], rel=1e-4)


def differences(run, refs):
    """(B,) chosen log-ratio minus rejected."""
    with torch.no_grad():
        ratios = fastdpo.sequence_logps(run.policy, fastdpo.PreferenceCollator()(ROWS)) - refs
    return ratios[: len(ROWS)] - ratios[len(ROWS) :]


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "sft"])
def test_wpo_is_refused_where_it_has_no_meaning(dpo, name):
    """TRL weights the mean NLL of a batch by each pair's weight (and fails beyond one pair); aot it refuses, too."""
    refs = None if name in FREE else references(dpo, None)
    with pytest.raises(ValueError, match=f"use_weighting=True has no meaning for loss_type {name}"):
        ours(dpo, "logits", refs, loss_type=name, use_weighting=True)
    with pytest.raises(ValueError, match=f"use_weighting=True has no meaning for loss_type {name}"):
        ours(dpo, "packed", refs, loss_type=name, use_weighting=True)


@pytest.mark.parametrize("way", WAYS)
def test_wpo_with_hinge(dpo, way):
    """TRL's backward fails: it multiplies the result of relu in place, which relu's gradient needs."""
    refs = references(dpo, None)
    for name, value in (dpo.neutral | {"loss_types": ["hinge"], "use_weighting": True}).items():
        setattr(dpo.trainer, name, value)
    theirs = dpo.trainer.compute_loss(dpo.trainer.model.eval(), dict(dpo.batch))
    with pytest.raises(RuntimeError, match="output 0 of Relu"):
        theirs.backward()
    loss, grads, _ = ours(dpo, way, refs, loss_type="hinge", use_weighting=True)
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert all(grad.isfinite().all() and grad.norm() > 0 for grad in grads.values())


def test_wpo_with_sft_in_a_mix(dpo):
    """TRL fails on more than one pair; ours weights the preference loss and leaves the NLL alone: the sum of both."""
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        dpo.theirs(loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5], use_weighting=True)
    weighted, nll = dpo.theirs(use_weighting=True), dpo.theirs(loss_types=["sft"])
    wanted = {name: grad + 0.5 * nll[1][name] for name, grad in weighted[1].items()}
    for way in WAYS:
        found = ours(
            dpo, way, references(dpo, None), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], use_weighting=True
        )
        assert_same(found, (weighted[0] + 0.5 * nll[0], wanted, weighted[2]))


def test_no_overflow_where_trl_has_one(dpo_in_float32):
    """forward_kl's e^(-logratio) leaves float32 at 88 nats: inf - inf in TRL; ours is constant beyond 80."""
    dpo = dpo_in_float32
    refs = references(dpo, None) + 200.0
    batch = dict(dpo.batch)
    dpo.batch = batch | {"ref_chosen_logps": refs[: len(ROWS)], "ref_rejected_logps": refs[len(ROWS) :]}
    dpo.trainer.precompute_ref_logps = True
    try:
        loss, _, _ = dpo.theirs(f_divergence_type="forward_kl")
    finally:
        dpo.batch, dpo.trainer.precompute_ref_logps = batch, False
    assert loss.isnan()
    found, grads, _ = ours(dpo, "packed", refs, f_divergence_type="forward_kl")
    assert found.isfinite() and all(grad.isfinite().all() for grad in grads.values())


# KTOTrainer.


ANSWERS = [
    {"prompt_ids": row["prompt_ids"], "completion_ids": row[side], "KL_completion_ids": other[side], "label": label}
    for row, other, side, label in zip(
        random_rows(5, seed=5, prompt=(2, 9), answer=(1, 9)),
        random_rows(6, seed=6, prompt=(2, 9), answer=(1, 9))[1:],
        ["chosen_ids", "rejected_ids", "chosen_ids", "chosen_ids", "rejected_ids"],
        [True, False, True, False, False],
        strict=True,
    )
]


@pytest.fixture(scope="module")
def kto(tmp_path_factory):
    from datasets import Dataset

    policy, reference = models()
    trainer = trl.KTOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=arguments(trl.KTOConfig, tmp_path_factory.mktemp("kto"), per_device_train_batch_size=2),
        train_dataset=Dataset.from_list(
            [{"prompt": "a", "completion": f" {word}", "label": label} for word, label in (("b", True), ("c", False))]
        ),
        processing_class=word_tokenizer(),
    )
    return Run(trainer, policy, reference, trainer.data_collator(ANSWERS))


def answers_and_mismatched(batch, others):
    """input_ids, attention_mask, labels (S, T) of the answers, then of those to other prompts."""
    parts = [[batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask")]
             for prefix in ("", "KL_")[: 1 + others]]  # fmt: skip
    width = max(part[0].shape[1] for part in parts)
    ids, attended, counted = (
        torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in column])
        for column in zip(*parts, strict=True)
    )
    return {"input_ids": ids, "attention_mask": attended}, ids.masked_fill(counted == 0, -100)


def answer_sums(model, inputs, labels):
    """(S,)"""
    with torch.no_grad():
        logps = fastdpo.token_logps(model(**inputs, use_cache=False).logits[:, :-1], labels[:, 1:])
    return logps.sum(1)


ANSWER_METRICS = [name for name in METRICS if name not in ("rewards/accuracies", "mean_token_accuracy")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3), (0.0, 2.0)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto(kto, name, swapped, weights, way):
    """`swapped`: policy and reference change places, so that one of the two KL estimates is negative, taken as 0."""
    policy, reference = (kto.reference, kto.policy) if swapped else (kto.policy, kto.reference)
    others = name == "kto"
    options = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    inputs, labels = answers_and_mismatched(kto.batch, others)
    refs = answer_sums(reference, inputs, labels)
    load(kto.trainer, policy, reference)
    theirs = kto.theirs(loss_type=name, calculate_KL=others, **options)
    desirable = kto.batch["label"]
    common = {"loss_type": name, "beta": BETA, **options}
    if way == "logits":
        out = fastdpo.loss(policy(**inputs, use_cache=False).logits, labels, refs, desirable=desirable, **common)
    else:
        packed = fastdpo.PreferenceCollator(packing="prefix", mismatched=others)(ANSWERS)
        out = fastdpo.batch_loss(policy, packed, refs, memory_budget=11 * policy.config.vocab_size * 4, **common)
    metrics = [*ANSWER_METRICS, "kl"] if others else ANSWER_METRICS
    assert_same(finished(policy, out), theirs, metrics)
    if others:
        assert (theirs[2]["kl"] == 0) != (sum_of_differences(policy, reference, inputs, labels) > 0)


def load(trainer, policy, reference):
    trainer.model.load_state_dict(policy.state_dict())
    trainer.ref_model.load_state_dict(reference.state_dict())


def sum_of_differences(policy, reference, inputs, labels):
    """Of the answers to other prompts."""
    ratios = answer_sums(policy, inputs, labels) - answer_sums(reference, inputs, labels)
    return ratios[len(ratios) // 2 :].sum().item()


# CPOTrainer and ORPOTrainer: their own code on trainers that were never built.


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda values: values, gather=lambda x: x)


def unbuilt(kind, **attributes):
    trainer = kind.__new__(kind)
    vars(trainer).update(
        accelerator=ACCELERATOR, beta=BETA, aux_loss_enabled=False, is_encoder_decoder=False, **attributes
    )
    return trainer


def cpo_batch():
    batch = {}
    for side in ("chosen", "rejected"):
        sequences = [row["prompt_ids"] + row[f"{side}_ids"] for row in ROWS]
        width = max(map(len, sequences))
        spans = [(len(row["prompt_ids"]), len(ids)) for row, ids in zip(ROWS, sequences, strict=True)]
        batch[f"{side}_input_ids"] = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences])
        batch[f"{side}_attention_mask"] = torch.tensor([[int(t < end) for t in range(width)] for _, end in spans])
        batch[f"{side}_labels"] = torch.tensor(
            [[ids[t] if start <= t < end else -100 for t in range(width)]
             for ids, (start, end) in zip(sequences, spans, strict=True)]
        )  # fmt: skip
    return batch


def run_unbuilt(trainer, model):
    loss, metrics = trainer.get_batch_loss_metrics(model, cpo_batch())
    loss.backward()
    return loss.detach(), gradients(model), metrics


def ours_packed(model, **options):
    batch = fastdpo.PreferenceCollator(packing="prefix")(ROWS)
    return fastdpo.batch_loss(model, batch, None, beta=BETA, memory_budget=11 * model.config.vocab_size * 4, **options)


@pytest.fixture(scope="module")
def policy():
    return models()[0]


FREE_METRICS = [name for name in METRICS if name.startswith(("rewards/", "logps/"))]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0, 0.3])
def test_cpo(policy, cpo_alpha, label_smoothing):
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = unbuilt(
        cpo.CPOTrainer, alpha=0.0, loss_type="sigmoid", cpo_alpha=cpo_alpha, label_smoothing=label_smoothing,
        pad_token_id=0,
    )  # fmt: skip
    out = ours_packed(policy, loss_type="cpo", cpo_alpha=cpo_alpha, label_smoothing=label_smoothing)
    assert_same(finished(policy, out), run_unbuilt(trainer, policy), FREE_METRICS)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0])
@pytest.mark.parametrize("simpo_gamma", [0.5, 1.4])
def test_simpo(policy, simpo_gamma, cpo_alpha, label_smoothing):
    """TRL's CPO-SimPO, with an NLL beside the loss, is a mix with `sft`. Its logps/* are means over tokens."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = unbuilt(
        cpo.CPOTrainer, alpha=0.0, loss_type="simpo", cpo_alpha=cpo_alpha, label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma, pad_token_id=0,
    )  # fmt: skip
    mix = {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, cpo_alpha]} if cpo_alpha else {"loss_type": "simpo"}
    out = ours_packed(policy, simpo_gamma=simpo_gamma, label_smoothing=label_smoothing, **mix)
    rewards = [name for name in FREE_METRICS if name.startswith("rewards/")]
    assert_same(finished(policy, out), run_unbuilt(trainer, policy), rewards)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [0.25, -0.3])
@pytest.mark.parametrize("simpo_gamma", [0.5, 1.4])
def test_alphapo(policy, simpo_gamma, alpha, label_smoothing):
    """TRL takes AlphaPO for SimPO with other rewards."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = unbuilt(
        cpo.CPOTrainer, alpha=alpha, loss_type="simpo", cpo_alpha=0.0, label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma, pad_token_id=0,
    )  # fmt: skip
    out = ours_packed(
        policy, loss_type="alphapo", alphapo_alpha=alpha, simpo_gamma=simpo_gamma, label_smoothing=label_smoothing
    )
    rewards = [name for name in FREE_METRICS if name.startswith("rewards/")]
    assert_same(finished(policy, out), run_unbuilt(trainer, policy), rewards)


def test_orpo(policy, monkeypatch):
    """TRL's NLL is that of prompt and answer, ours of the answer: with the answer's in the place of TRL's, the same."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = unbuilt(orpo.ORPOTrainer, padding_value=0)
    out = ours_packed(policy, loss_type="orpo")
    nll = ours_packed(policy, loss_type="sft").loss
    original = trainer.concatenated_forward

    def with_our_nll(model, batch):
        *rest, over_all = original(model, batch)
        assert not torch.isclose(over_all, nll, rtol=1e-2)
        return (*rest, nll)

    monkeypatch.setattr(trainer, "concatenated_forward", with_our_nll, raising=False)
    rewards = [name for name in FREE_METRICS if name.startswith("rewards/")]
    # TRL rounds its mean log-probs to float32.
    assert_same(finished(policy, out), run_unbuilt(trainer, policy), rewards, rel=2**-20)


@pytest.mark.parametrize("mean_logp", [-1e-6, -1e-3, -0.5, -0.6931472, -0.7, -5.0, -60.0])
def test_odds_of_orpo_over_their_range(mean_logp):
    orpo = pytest.importorskip("trl.experimental.orpo")
    logps = [torch.tensor([mean_logp], requires_grad=True), torch.tensor([-1.5], requires_grad=True)]
    losses, *_ = unbuilt(orpo.ORPOTrainer).odds_ratio_loss(*logps)
    lengths = {"chosen_lengths": torch.ones(1), "rejected_lengths": torch.ones(1)}
    found = fastdpo.preference_loss(*logps, loss_type="orpo", beta=BETA, **lengths).loss + logps[0].sum()
    assert found.item() == pytest.approx(-losses.item(), rel=1e-5, abs=1e-9)
    for got, wanted in zip(torch.autograd.grad(found, logps), torch.autograd.grad(-losses.sum(), logps), strict=True):
        assert got.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)


# RewardTrainer.


@pytest.mark.parametrize("margins", [None, torch.tensor([0.5, 0.0, -1.0, 2.0])], ids=["plain", "margins"])
@pytest.mark.parametrize("coefficient", [None, 0.01, 1.0])
def test_reward(coefficient, margins):
    scores = torch.tensor([[1.2], [-0.3], [4.0], [0.1], [0.9], [0.4], [-2.0], [3.0]], requires_grad=True)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=ACCELERATOR,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {} if margins is None else {"margin": margins}

    def model(**_):
        return SimpleNamespace(logits=scores)

    theirs = trl.RewardTrainer.compute_loss(trainer, model, inputs)
    out = fastdpo.preference_loss(
        *scores.squeeze(1).chunk(2), loss_type="reward", margins=margins, center_rewards_coefficient=coefficient or 0.0
    )
    assert out.loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    (got,), (wanted,) = torch.autograd.grad(out.loss, scores), torch.autograd.grad(theirs, scores)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    metrics = out.metrics()
    assert metrics["rewards/accuracies"].item() == trainer._metrics["eval"]["accuracy"][0]
    assert metrics["rewards/margins"].item() == pytest.approx(trainer._metrics["eval"]["margin"][0], rel=1e-6)
