"""Ranked lists and single answers through a model: as separate sequences give them, in float64, and the formulas."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from drawing import draws
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import VOCABULARY, naive_sequence_logps, random_rows, tiny_model

import fastdpo
from fastdpo.packing import PreferenceCollator
from fastdpo.scoring import completion_logps

PACKINGS = ["prefix", "varlen", "padded"]
SMALL = 4 * VOCABULARY * 8  # bytes: a few rows of logits, so that gradients are formed a chunk of groups at a time


def draw_ids(draw, low, high):
    return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high))]


def list_rows(count=4, seed=0, prompt=(1, 9), answer=(1, 7), weights=False):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size = draw.randint(2, 5)
        row = {
            "prompt_ids": draw_ids(draw, *prompt),
            "completions_ids": [draw_ids(draw, *answer) for _ in range(size)],
            "ranks": draw.sample(range(1, 30), size),
            "ref_logps": [-draw.randrange(8, 300) / 8 for _ in range(size)],  # exact in float32
        }
        rows.append({**row, "pair_weight": draw.choice([0.0, 0.25, 1.0, 3.0])} if weights else row)
    return rows


def answer_rows(count=5, seed=0, prompt=(1, 9), answer=(1, 7), given=False, weights=False):
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        row = {
            "prompt_ids": draw_ids(draw, *prompt),
            "completion_ids": draw_ids(draw, *answer),
            "label": number % 3 != 1,
            "ref_logps": -draw.randrange(8, 300) / 8,
        }
        if given:
            row |= {"KL_completion_ids": draw_ids(draw, *answer), "ref_KL_logps": -draw.randrange(200, 500) / 8}
        rows.append({**row, "pair_weight": draw.choice([0.25, 1.0, 3.0])} if weights else row)
    return rows


def alone(model, sequences):
    """The sum of each completion's log-probs, every sequence run alone."""
    sums = []
    for prompt, completion in sequences:
        rows = [{"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion}]
        sums.append(naive_sequence_logps(model, rows)[0])
    return torch.stack(sums)


def list_sequences(rows):
    """(prompt, completion), references and sizes, from the best of each list to its worst."""
    sequences, refs = [], []
    for row in rows:
        order = np.argsort(row["ranks"])
        sequences += [(row["prompt_ids"], row["completions_ids"][place]) for place in order]
        refs += [row["ref_logps"][place] for place in order]
    return sequences, torch.tensor(refs, dtype=torch.float64), [len(row["ranks"]) for row in rows]


def answer_sequences(rows):
    """The answers, then for each prompt the answer to another; and references, those that rows carry among them."""
    others = [row.get("KL_completion_ids", rows[number - 1]["completion_ids"]) for number, row in enumerate(rows)]
    sequences = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
    sequences += [(row["prompt_ids"], other) for row, other in zip(rows, others, strict=True)]
    refs = [row["ref_logps"] for row in rows]
    refs += [row.get("ref_KL_logps", -30.0 - number) for number, row in enumerate(rows)]
    return sequences, torch.tensor(refs, dtype=torch.float64)


def plackett_luce(logps, refs, sizes, beta):
    """(B,): -log of the chance to draw the completions in their order, each from those that are left."""
    losses, start = [], 0
    for size in sizes:
        worth = (beta * (logps - refs)[start : start + size]).exp()
        losses.append(-sum((worth[k] / worth[k:].sum()).log() for k in range(size)))
        start += size
    return torch.stack(losses)


def kto(logps, refs, labels, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """(B,) losses and the estimate of the KL divergence, from the answers to other prompts in the second half."""
    (own, others), (ref_own, ref_others) = logps.chunk(2), refs.chunk(2)
    kl = max(0.0, (others.detach() - ref_others).mean().item())
    losses = []
    for ratio, label in zip(own - ref_own, labels, strict=True):
        value = 1 / (1 + torch.exp(-beta * (ratio - kl) * (1 if label else -1)))
        losses.append((desirable_weight if label else undesirable_weight) * (1 - value))
    return torch.stack(losses), kl


def weighted_mean(losses, rows):
    weights = torch.tensor([row.get("pair_weight", 1.0) for row in rows], dtype=torch.float64)
    return (weights * losses).sum() / (weights.sum() or 1.0)


def gradients(loss, model):
    """Of every parameter that has one, by name."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def assert_equal(ours, exact, model):
    """Loss to 1e-9, all gradients to 1e-8 of their largest value."""
    assert abs(ours.item() - exact.item()) <= 1e-9 * max(1.0, abs(exact.item()))
    expected = gradients(exact, model)
    found = gradients(ours, model)
    assert any(grad.abs().max() > 0 for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-8 * max(1.0, grad.abs().max()), name


# Lists


@pytest.mark.parametrize("budget", [None, SMALL])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_lists(kind, packing, weights, budget):
    model, rows = tiny_model(kind, torch.float64), list_rows(seed=3, weights=weights)
    sequences, refs, sizes = list_sequences(rows)
    batch = PreferenceCollator(packing=packing)(rows)
    exact = alone(model, sequences)
    torch.testing.assert_close(fastdpo.sequence_logps(model, batch), exact, rtol=1e-9, atol=1e-9)
    output = fastdpo.batch_loss(model, batch, loss_type="listwise", beta=0.3, memory_budget=budget)
    losses = plackett_luce(exact, refs, sizes, 0.3)
    scale = torch.tensor([row.get("pair_weight", 1.0) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(output.losses.detach(), scale * losses.detach(), rtol=1e-9, atol=1e-9)
    assert_equal(output.loss, weighted_mean(losses, rows), model)
    rewards, parts = 0.3 * (exact.detach() - refs), [0, *np.cumsum(sizes)]
    lists = [rewards[first:end] for first, end in pairwise(parts)]
    torch.testing.assert_close(output.chosen_rewards, torch.stack([values[0] for values in lists]))
    torch.testing.assert_close(output.rejected_rewards, torch.stack([values[1:].mean() for values in lists]))
    ordered = [np.mean([a > b for i, a in enumerate(own) for b in own[i + 1 :]]) for own in (v.tolist() for v in lists)]
    assert output.accuracies.tolist() == pytest.approx(ordered)
    assert output.metrics()["rewards/accuracies"].item() == pytest.approx(np.mean(ordered))


@pytest.mark.parametrize("packing", PACKINGS)
def test_lists_against_a_reference_that_is_passed(packing):
    """`ref_logps` in the batch's order, as `sequence_logps` gives them; they go before the rows' own."""
    model, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64, seed=5)
    rows = list_rows(seed=4)
    sequences, _, sizes = list_sequences(rows)
    batch = PreferenceCollator(packing=packing)(rows)
    with torch.no_grad():
        refs = fastdpo.sequence_logps(reference, batch)
        exact_refs = alone(reference, sequences)
    torch.testing.assert_close(refs, exact_refs, rtol=1e-9, atol=1e-9)
    output = fastdpo.batch_loss(model, batch, refs, loss_type=["listwise"])
    assert_equal(output.loss, plackett_luce(alone(model, sequences), exact_refs, sizes, 0.1).mean(), model)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("budget", [None, SMALL])
def test_lists_with_other_divergences(divergence, budget):
    model, rows = tiny_model(dtype=torch.float64), list_rows(seed=6, answer=(1, 3))
    sequences, _, sizes = list_sequences(rows)
    with torch.no_grad():
        refs = alone(tiny_model(dtype=torch.float64, seed=1), sequences)
    batch = PreferenceCollator()(rows)
    ratios = alone(model, sequences) - refs
    score = {
        "forward_kl": 1 - torch.exp(-ratios),
        "js_divergence": torch.log(2 * ratios.exp() / (1 + ratios.exp())),
        "alpha_divergence": (torch.exp(-0.5 * ratios) - 1) / -0.5,
    }[divergence]
    output = fastdpo.batch_loss(
        model, batch, refs, loss_type="listwise", beta=0.05, f_divergence_type=divergence, memory_budget=budget
    )
    assert_equal(output.loss, plackett_luce(score, torch.zeros_like(score), sizes, 0.05).mean(), model)


def test_a_list_of_two_is_a_pair():
    model, pairs = tiny_model(dtype=torch.float64), random_rows(4, seed=7)
    lists = [
        {"prompt_ids": row["prompt_ids"], "completions_ids": [row["rejected_ids"], row["chosen_ids"]], "ranks": [2, 1]}
        for row in pairs
    ]
    refs = -8 * torch.rand(8, dtype=torch.float64)
    of_pairs = fastdpo.batch_loss(model, PreferenceCollator()(pairs), refs, loss_type="sigmoid")
    of_lists = fastdpo.batch_loss(model, PreferenceCollator()(lists), refs.view(2, 4).T.flatten(), loss_type="listwise")
    assert_equal(of_lists.loss, of_pairs.loss, model)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "entropy",
    ):
        torch.testing.assert_close(of_lists.metrics()[name], of_pairs.metrics()[name], rtol=1e-9, atol=1e-9)


@draws(25)
@given(
    sizes=st.lists(st.integers(2, 4), min_size=1, max_size=3), seed=st.integers(0, 10**6),
    shortest=st.integers(0, 1), max_length=st.sampled_from([None, 2, 5, 9]), packing=st.sampled_from(PACKINGS),
    mode=st.sampled_from(["keep_start", "keep_end"]), budget=st.sampled_from([None, 1, SMALL]),
    letters=st.integers(1, 3),
)  # fmt: skip
def test_drawn_lists(sizes, seed, shortest, max_length, packing, mode, budget, letters):
    """Empty prompts, empty answers, few different tokens (so that all begin alike), truncation of everything."""
    draw = random.Random(seed)

    def ids(low):
        return [draw.randrange(3, 3 + letters) for _ in range(draw.randint(low, 5))]

    rows = [{"prompt_ids": ids(0), "completions_ids": [ids(shortest) for _ in range(size)]} for size in sizes]

    def cut(prompt, completion):
        whole = prompt + completion
        if max_length is None or len(whole) <= max_length:
            return prompt, completion
        kept = whole[-max_length:] if mode == "keep_end" else whole[:max_length]
        dropped = len(whole) - len(kept) if mode == "keep_end" else 0
        border = max(0, len(prompt) - dropped)
        return kept[:border], kept[border:]

    sequences = [cut(row["prompt_ids"], completion) for row in rows for completion in row["completions_ids"]]
    assume(any(prompt + completion for prompt, completion in sequences))
    batch = PreferenceCollator(packing=packing, max_length=max_length, truncation_mode=mode)(rows)
    some = [number for number, (prompt, completion) in enumerate(sequences) if len(prompt) + len(completion) > 1]
    exact = torch.zeros(len(sequences), dtype=torch.float64)
    if some:
        exact = exact.index_add(0, torch.tensor(some), alone(MODEL, [sequences[number] for number in some]))
    torch.testing.assert_close(fastdpo.sequence_logps(MODEL, batch), exact, rtol=1e-9, atol=1e-9)
    refs = -torch.arange(len(sequences), dtype=torch.float64)
    output = fastdpo.batch_loss(MODEL, batch, refs, loss_type="listwise", memory_budget=budget)
    expected = plackett_luce(exact, refs, sizes, 0.1).mean()
    assert abs(output.loss.item() - expected.item()) <= 1e-9 * max(1.0, expected.item())
    output.loss.backward()
    MODEL.zero_grad()


MODEL = tiny_model(dtype=torch.float64)


# Answers


@pytest.mark.parametrize("budget", [None, SMALL])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_answers(kind, packing, given, budget):
    model, rows = tiny_model(kind, torch.float64), answer_rows(seed=8, given=given, weights=given)
    sequences, refs = answer_sequences(rows)
    labels = [row["label"] for row in rows]
    batch = PreferenceCollator(packing=packing)(rows)
    exact = alone(model, sequences)
    torch.testing.assert_close(fastdpo.sequence_logps(model, batch), exact, rtol=1e-9, atol=1e-9)
    options = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    passed = None if given else refs
    output = fastdpo.batch_loss(model, batch, passed, loss_type="kto", memory_budget=budget, **options)
    losses, kl = kto(exact, refs, labels, 0.1, **options)
    assert kl > 0.1 and output.kl.item() == pytest.approx(kl, rel=1e-9)
    assert_equal(output.loss, weighted_mean(losses, rows), model)
    good = torch.tensor(labels)
    rewards = 0.1 * (exact.detach() - refs)[: len(rows)]
    torch.testing.assert_close(output.chosen_rewards[good], rewards[good])
    torch.testing.assert_close(output.rejected_rewards[~good], rewards[~good])
    assert output.chosen_rewards[~good].isnan().all() and output.rejected_rewards[good].isnan().all()
    metrics = output.metrics()
    assert metrics["rewards/chosen"].item() == pytest.approx(rewards[good].mean().item())
    assert metrics["kl"].item() == pytest.approx(kl) and "rewards/accuracies" not in metrics


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_estimate_of_the_divergence_is_not_below_zero(packing):
    model, rows = tiny_model(dtype=torch.float64), answer_rows(seed=9)
    rows = [{**row, "ref_KL_logps": 0.0} for row in rows]  # a reference that gives every token the probability 1
    sequences, refs = answer_sequences(rows)
    output = fastdpo.batch_loss(model, PreferenceCollator(packing=packing)(rows), refs, loss_type="kto")
    losses, kl = kto(alone(model, sequences), refs, [row["label"] for row in rows], 0.1)
    assert kl == 0.0 == output.kl.item()
    assert_equal(output.loss, losses.mean(), model)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("budget", [None, SMALL])
def test_answers_without_the_estimate(given, budget):
    """With answers to other prompts in the batch, which such a loss passes over, and without."""
    model, rows = tiny_model(dtype=torch.float64), answer_rows(seed=10, given=given)
    batch = PreferenceCollator(mismatched=given)(rows)
    output = fastdpo.batch_loss(model, batch, loss_type="apo_zero_unpaired", memory_budget=budget)
    own = alone(model, [(row["prompt_ids"], row["completion_ids"]) for row in rows])
    ratios = own - torch.tensor([row["ref_logps"] for row in rows], dtype=torch.float64)
    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in rows], dtype=torch.float64)
    assert_equal(output.loss, (1 - 1 / (1 + torch.exp(-0.1 * signs * ratios))).mean(), model)
    assert "kl" not in output.metrics()


def test_a_number_in_the_place_of_the_estimate():
    model, rows = tiny_model(dtype=torch.float64), answer_rows(seed=11)
    batch = PreferenceCollator(mismatched=False)(rows)
    with pytest.raises(ValueError, match="kl is missing"):
        fastdpo.batch_loss(model, batch, loss_type="kto")
    output = fastdpo.batch_loss(model, batch, loss_type="kto", kl=0.75)
    ratios = alone(model, [(row["prompt_ids"], row["completion_ids"]) for row in rows])
    ratios = ratios - torch.tensor([row["ref_logps"] for row in rows], dtype=torch.float64)
    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in rows], dtype=torch.float64)
    assert_equal(output.loss, (1 - 1 / (1 + torch.exp(-0.1 * signs * (ratios - 0.75)))).mean(), model)


@pytest.mark.parametrize("packing", PACKINGS)
def test_answers_of_which_nothing_is_left(packing):
    """One-token answers behind empty prompts, and truncation of all answers: losses at the reference point."""
    model = tiny_model(dtype=torch.float64)
    rows = [{"prompt_ids": [], "completion_ids": [7 + i], "label": i == 0} for i in range(3)]
    cut = [{"prompt_ids": [4, 5, 6 + i], "completion_ids": [7, 8], "label": i == 0} for i in range(3)]
    for batch in (
        PreferenceCollator(packing=packing)(rows),
        PreferenceCollator(packing=packing, max_length=3)(cut),
        PreferenceCollator(packing=packing, max_length=2)(cut),
    ):
        assert fastdpo.sequence_logps(model, batch).tolist() == [0.0] * 6
        output = fastdpo.batch_loss(model, batch, torch.zeros(6, dtype=torch.float64), loss_type="kto")
        assert output.loss.item() == pytest.approx(0.5) and output.kl.item() == 0.0
        output.loss.backward()


@pytest.mark.parametrize("passed", [False, True])
def test_references_of_other_prompts_answers_without_them_are_no_divergence(passed):
    """A batch without answers to other prompts has no estimate, whatever references come with it."""
    batch = PreferenceCollator(mismatched=False)(answer_rows(seed=12, given=True))
    refs = torch.full((10,), -50.0, dtype=torch.float64) if passed else None
    with pytest.raises(ValueError):
        fastdpo.batch_loss(MODEL, batch, refs, loss_type="kto")


def test_references_that_lack_the_other_prompts_answers_are_told_so():
    with pytest.raises(ValueError, match=r"ref_KL_logps|answers to other prompts"):
        fastdpo.batch_loss(MODEL, PreferenceCollator()(answer_rows(seed=12)), loss_type="kto")


# Models of other kinds


@pytest.mark.parametrize("budget", [None, SMALL])
@pytest.mark.parametrize("data", ["lists", "answers"])
def test_adapters_with_a_frozen_head(data, budget):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(dtype=torch.float64), lora).double()
    assert not model.get_output_embeddings().weight.requires_grad
    rows = list_rows(seed=13) if data == "lists" else answer_rows(seed=13, given=True)
    output = fastdpo.batch_loss(
        model, PreferenceCollator()(rows), loss_type="listwise" if data == "lists" else "kto", memory_budget=budget
    )
    if data == "lists":
        sequences, refs, sizes = list_sequences(rows)
        exact = plackett_luce(alone(model, sequences), refs, sizes, 0.1).mean()
    else:
        sequences, refs = answer_sequences(rows)
        exact = kto(alone(model, sequences), refs, [row["label"] for row in rows], 0.1)[0].mean()
    assert_equal(output.loss, exact, model)


@pytest.mark.parametrize("budget", [None, SMALL])
@pytest.mark.parametrize("data", ["lists", "answers"])
def test_a_head_in_another_dtype(data, budget):
    """Hidden states in bfloat16 through a head in float32: as the same numbers in float64."""
    model = tiny_model().bfloat16()
    rows = list_rows(seed=14) if data == "lists" else answer_rows(seed=14, given=True)
    batch = PreferenceCollator()(rows)
    options = {"loss_type": "listwise" if data == "lists" else "kto", "head_dtype": torch.float32}
    output = fastdpo.batch_loss(model, batch, memory_budget=budget, **options)
    whole = fastdpo.batch_loss(model, batch, memory_budget=10**9, **options)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, whole.loss, rtol=1e-5, atol=1e-5)
    for name, grad in gradients(whole.loss, model).items():
        assert grad.dtype == torch.bfloat16 and grad.isfinite().all(), name
    from fastdpo.models import target_hidden_states

    hidden = target_hidden_states(model, batch).double().detach()
    logits = hidden @ model.lm_head.weight.double().detach().T
    logps = torch.log_softmax(logits, -1).gather(1, batch.target_ids[:, None]).squeeze(1)
    sums = torch.zeros(batch.num_sequences, dtype=torch.float64).index_add(0, batch.sequence_ids, logps)
    if data == "lists":
        _, refs, sizes = list_sequences(rows)
        exact = plackett_luce(sums, refs, sizes, 0.1).mean()
    else:
        _, refs = answer_sequences(rows)
        exact = kto(sums, refs, [row["label"] for row in rows], 0.1)[0].mean()
    assert output.loss.item() == pytest.approx(exact.item(), rel=2e-5)


# Pairs


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("packing", PACKINGS)
def test_length_desensitized_sums(packing, alpha):
    model, rows = tiny_model(dtype=torch.float64), random_rows(6, seed=15, answer=(1, 12))
    rows += [{"prompt_ids": [], "chosen_ids": [7, 8, 9], "rejected_ids": [4]}]  # whose rejected answer has no target
    batch = PreferenceCollator(packing=packing)(rows)
    ours = fastdpo.sequence_logps(model, batch, ld_alpha=alpha)
    expected = []
    for side, other in (("chosen_ids", "rejected_ids"), ("rejected_ids", "chosen_ids")):
        for row in rows:
            (logps,) = completion_logps(model, [(row["prompt_ids"], row[side])], packing="padded")
            shared = max(0, min(len(row[side]), len(row[other])) - (not row["prompt_ids"]))
            expected.append(logps[:shared].sum() + alpha * logps[shared:].sum())
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-9, atol=1e-9)
    refs = torch.zeros(14, dtype=torch.float64)
    output = fastdpo.batch_loss(model, batch, refs, ld_alpha=alpha)
    margins = 0.1 * (ours.view(2, -1)[0] - ours.view(2, -1)[1])
    assert_equal(output.loss, -torch.log(1 / (1 + torch.exp(-margins))).mean(), model)


@pytest.mark.parametrize("budget", [None, SMALL])
@pytest.mark.parametrize("packing", PACKINGS)
def test_weighted_pairs_of_a_mix(packing, budget):
    """Weights come from the rows; sft is the weighted mean over the tokens of chosen answers."""
    model, rows = tiny_model(dtype=torch.float64), random_rows(5, seed=16)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25], dtype=torch.float64)
    rows = [{**row, "pair_weight": weight} for row, weight in zip(rows, weights.tolist(), strict=True)]
    rows = [{**row, "ref_chosen_logps": -20.0, "ref_rejected_logps": -18.5} for row in rows]
    output = fastdpo.batch_loss(
        model, PreferenceCollator(packing=packing)(rows), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5],
        memory_budget=budget,
    )  # fmt: skip
    chosen, rejected = naive_sequence_logps(model, rows).view(2, -1)
    preference = -torch.log(1 / (1 + torch.exp(-0.1 * ((chosen + 20.0) - (rejected + 18.5)))))
    tokens = torch.tensor([len(row["chosen_ids"]) for row in rows], dtype=torch.float64)
    exact = (weights * preference).sum() / weights.sum() - 0.5 * (weights * chosen).sum() / (weights * tokens).sum()
    assert_equal(output.loss, exact, model)
    kept = [row for row in rows if row["pair_weight"]]
    without = fastdpo.batch_loss(
        model, PreferenceCollator(packing=packing)(kept), loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]
    )
    assert without.loss.item() == pytest.approx(exact.item(), rel=1e-9)


# Refusals


@pytest.mark.parametrize(
    "rows, loss_type, message",
    [
        (list_rows(2), "sigmoid", "holds lists, and loss_type sigmoid is a loss of pairs; take a loss of lists"),
        (list_rows(2), ["kto"], "the batch holds lists, and loss_type .'kto'. is a loss of answers"),
        (answer_rows(2), "listwise", "the batch holds answers, and loss_type listwise is a loss of lists"),
        (random_rows(2), "listwise", "the batch holds pairs, and loss_type listwise is a loss of lists"),
        (random_rows(2), ["kto"], "the batch holds pairs, and loss_type .'kto'. is a loss of answers"),
        (random_rows(2), "reward", "the batch holds pairs, and loss_type reward is a loss of scores"),
        (list_rows(2), ["listwise", "sigmoid"], "mixes listwise .of lists. and sigmoid .of pairs."),
        (list_rows(2), "listwize", "Did you mean 'listwise'"),
        (list_rows(2), [], "loss_type is .."),
    ],
)  # fmt: skip
def test_a_loss_of_other_data_is_refused(rows, loss_type, message):
    with pytest.raises(ValueError, match=message):
        fastdpo.batch_loss(MODEL, PreferenceCollator()(rows), loss_type=loss_type)


@pytest.mark.parametrize("rows", [list_rows(2), answer_rows(2)])
def test_length_desensitization_is_for_pairs(rows):
    batch = PreferenceCollator()(rows)
    with pytest.raises(ValueError, match=r"ld_alpha=0.5 compares the two answers of a pair, and the batch holds"):
        fastdpo.sequence_logps(MODEL, batch, ld_alpha=0.5)
    with pytest.raises(ValueError, match=r"ld_alpha=0.5 has no meaning"):
        fastdpo.batch_loss(MODEL, batch, loss_type="listwise" if batch.data == "lists" else "kto", ld_alpha=0.5)


def test_a_missing_reference_is_refused():
    for rows, loss_type in ((list_rows(2), "listwise"), (answer_rows(2), "apo_zero_unpaired")):
        bare = [{name: value for name, value in row.items() if not name.startswith("ref_")} for row in rows]
        batch = PreferenceCollator()(bare)
        with pytest.raises(ValueError, match="ref_logps is missing"):
            fastdpo.batch_loss(MODEL, batch, loss_type=loss_type)
        if loss_type == "listwise":
            sequences, refs, sizes = list_sequences(rows)
            exact = plackett_luce(alone(MODEL, sequences), torch.zeros_like(refs), sizes, 0.1).mean()
            assert_equal(fastdpo.batch_loss(MODEL, batch, loss_type=loss_type, reference_free=True).loss, exact, MODEL)
