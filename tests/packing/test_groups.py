"""Batches of ranked lists and of single answers: sequences and their order, weights, micro-batches, bad input."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from drawing import draws
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_rows, tiny_model

import fastdpo
from fastdpo.packing import MicroBatches, PreferenceBatch, PreferenceCollator

PACKINGS = ["prefix", "varlen", "padded"]
PAIR = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
LIST = {"prompt_ids": [5, 6], "completions_ids": [[7, 8], [9], [10, 11, 12]], "ranks": [2, 1, 3]}
ANSWER = {"prompt_ids": [5, 6], "completion_ids": [7, 8], "label": True}
OTHER = {"prompt_ids": [15], "completion_ids": [17, 18, 3], "label": False}


def list_rows(count, seed=0, prompt=(1, 9), answer=(1, 7), completions=(2, 5)):
    """Ranked lists of random sizes with references; the ranks are no neat 1 to K."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size = draw.randint(*completions)
        answers = [random_rows(1, draw.random(), prompt, answer)[0]["chosen_ids"] for _ in range(size)]
        ranks = draw.sample(range(-3, 20), size)
        refs = [-draw.randrange(8, 300) / 8 for _ in range(size)]  # exact in float32
        prompt_ids = random_rows(1, draw.random(), prompt, answer)[0]["prompt_ids"]
        rows.append({"prompt_ids": prompt_ids, "completions_ids": answers, "ranks": ranks, "ref_logps": refs})
    return rows


def answer_rows(count, seed=0, **lengths):
    """Single answers, about half of them desirable."""
    rows = random_rows(count, seed, **lengths)
    draw = random.Random(seed)
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": draw.random() < 0.5}
        for row in rows
    ]


def ranked(row, name="completions_ids"):
    """The values of a row's column from the best completion to the worst, by repeatedly taking the smallest rank."""
    left = list(zip(row["ranks"], row[name], strict=True))
    taken = []
    while left:
        best = min(left, key=lambda each: each[0])
        left.remove(best)
        taken.append(best[1])
    return taken


def sequences_of(batch):
    """What each sequence of a batch holds: {number: (tokens before its first target, targets)}, from the tensors."""
    found = {}
    for number in range(batch.num_sequences):
        rows = batch.target_rows[batch.sequence_ids == number].tolist()
        targets = batch.target_ids[batch.sequence_ids == number].tolist()
        found[number] = (batch.position_ids.reshape(-1)[rows[0]].item() + 1 if rows else None, targets)
    return found


# What a batch holds


@pytest.mark.parametrize("packing", PACKINGS)
def test_lists_stand_from_best_to_worst_with_their_references(packing):
    rows = list_rows(6, seed=1)
    batch = PreferenceCollator(packing=packing)(rows)
    expected = [ids for row in rows for ids in ranked(row)]
    assert batch.data == "lists" and batch.num_pairs == 6
    assert batch.list_sizes == tuple(len(row["completions_ids"]) for row in rows)
    assert batch.num_sequences == len(expected) == sum(batch.list_sizes)
    assert batch.target_ids.tolist() == [token for ids in expected for token in ids]
    assert batch.sequence_ids.tolist() == [number for number, ids in enumerate(expected) for _ in ids]
    assert batch.tokens_per_pair == tuple(sum(map(len, row["completions_ids"])) for row in rows)
    assert batch.ref_logps.tolist() == [value for row in rows for value in ranked(row, "ref_logps")]
    prompts = [len(row["prompt_ids"]) for row in rows for _ in row["ranks"]]
    assert sequences_of(batch) == {
        number: (prompt, ids) for number, (prompt, ids) in enumerate(zip(prompts, expected, strict=True))
    }
    assert "desirable" not in batch and "pair_weights" not in batch


@pytest.mark.parametrize("packing", PACKINGS)
def test_answers_stand_before_their_prompts_with_the_answers_of_the_rows_before(packing):
    rows = answer_rows(5, seed=2)
    batch = PreferenceCollator(packing=packing)(rows)
    own = [row["completion_ids"] for row in rows]
    expected = own + own[-1:] + own[:-1]
    assert batch.data == "answers" and batch.num_pairs == 5 and batch.num_sequences == 10
    assert batch.desirable.dtype == torch.bool and batch.desirable.tolist() == [row["label"] for row in rows]
    assert batch.tokens_per_pair == tuple(map(len, own))
    assert batch.sequence_ids.tolist() == [number for number, ids in enumerate(expected) for _ in ids]
    prompts = [len(row["prompt_ids"]) for row in rows] * 2
    assert sequences_of(batch) == {
        number: (prompt, ids) for number, (prompt, ids) in enumerate(zip(prompts, expected, strict=True))
    }
    alone = PreferenceCollator(packing=packing, mismatched=False)(rows)
    assert alone.num_sequences == 5 and alone.target_ids.tolist() == [token for ids in own for token in ids]
    assert alone.desirable.tolist() == batch.desirable.tolist() and alone.tokens_per_pair == batch.tokens_per_pair


@pytest.mark.parametrize("packing", PACKINGS)
def test_answers_to_other_prompts_may_be_given(packing):
    rows = [{**row, "KL_completion_ids": [40 + i, 50 + i]} for i, row in enumerate(answer_rows(3, seed=3))]
    rows = [{**row, "ref_logps": -1.0 - i, "ref_KL_logps": -5.0 - i} for i, row in enumerate(rows)]
    batch = PreferenceCollator(packing=packing)(rows)
    assert batch.target_ids[-6:].tolist() == [40, 50, 41, 51, 42, 52]
    assert batch.ref_logps.tolist() == [-1.0, -2.0, -3.0, -5.0, -6.0, -7.0]
    single = PreferenceCollator(packing=packing)(rows[1:2])
    assert single.num_sequences == 2 and single.target_ids[-2:].tolist() == [41, 51]


@pytest.mark.parametrize("packing", PACKINGS)
def test_tokens_are_counted_with_every_prompt_once_or_again(packing):
    rows = list_rows(4, seed=4, prompt=(6, 12), answer=(1, 4))
    for i, row in enumerate(rows):  # no two begin alike, so that prompts alone are shared
        row["prompt_ids"][0] = 10 + i
        row["completions_ids"] = [[20 + k, *ids] for k, ids in enumerate(row["completions_ids"])]
    batch = PreferenceCollator(packing=packing)(rows)
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    again = sum(len(row["prompt_ids"]) * len(row["ranks"]) for row in rows)
    answers = sum(len(ids) for row in rows for ids in row["completions_ids"])
    assert batch.unshared_tokens == again + answers
    longest = max(len(row["prompt_ids"]) + len(ids) for row in rows for ids in row["completions_ids"])
    tokens = {"prefix": prompts + answers, "varlen": again + answers, "padded": batch.num_sequences * longest}[packing]
    assert batch.num_tokens == tokens
    assert batch.saved_tokens_fraction == pytest.approx(1 - tokens / (again + answers))
    singles = answer_rows(3, seed=5)
    for i, row in enumerate(singles):
        row["prompt_ids"], row["completion_ids"] = [10 + i] * 9, [20 + i, 3]
    batch = PreferenceCollator(packing=packing)(singles)
    assert batch.unshared_tokens == 6 * 11
    assert batch.num_tokens == (3 * 9 + 6 * 2 if packing == "prefix" else 6 * 11)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_truncation(packing, mode):
    collator = PreferenceCollator(packing=packing, max_length=5, truncation_mode=mode)
    row = {"prompt_ids": [1, 2, 3, 4], "completions_ids": [[5, 6, 7], [8], [30, 31, 32, 33, 34, 35]]}
    batch = collator([row])
    kept = [[5], [8], [30]] if mode == "keep_start" else [[5, 6, 7], [8], [32, 33, 34, 35]]
    # What is left of the third begins in the answer, and nothing predicts a first token.
    assert [targets for _, targets in sequences_of(batch).values()] == kept
    rows = [{**ANSWER, "prompt_ids": [1, 2, 3], "completion_ids": [5, 6, 7, 8]}, {**OTHER, "completion_ids": [9] * 6}]
    batch = collator(rows)
    targets = [targets for _, targets in sequences_of(batch).values()]
    first, third = ([5, 6], [9, 9]) if mode == "keep_start" else ([5, 6, 7, 8], [9] * 4)
    assert targets == [first, [9] * 4, third, [5, 6, 7, 8]]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("data", ["lists", "answers"])
def test_nothing_is_left_to_predict(packing, data):
    """Truncation that leaves no token of an answer, one-token answers behind an empty prompt, and no token at all."""
    if data == "lists":
        cut = [{"prompt_ids": [4, 5, 6], "completions_ids": [[7, 8], [9]]}]
        short = [
            {"prompt_ids": [], "completions_ids": [[7], [8], [9, 3]]},
            {"prompt_ids": [], "completions_ids": [[], []]},
        ]
        counts = [0, 0, 1, 0, 0]
    else:
        cut = [{**ANSWER, "prompt_ids": [4, 5, 6]}, {**OTHER, "prompt_ids": [4, 5]}]
        short = [{**ANSWER, "prompt_ids": [], "completion_ids": [7]}, {**OTHER, "prompt_ids": []}]
        counts = [0, 2, 2, 0]
    batch = PreferenceCollator(packing=packing, max_length=2)(cut)
    assert batch.target_ids.shape == batch.target_rows.shape == batch.sequence_ids.shape == (0,)
    assert batch.tokens_per_pair == (0,) * len(cut)
    batch = PreferenceCollator(packing=packing)(short)
    assert torch.bincount(batch.sequence_ids, minlength=batch.num_sequences).tolist() == counts


@pytest.mark.parametrize("packing", PACKINGS)
def test_ids_ranks_and_references_may_be_arrays(packing):
    rows = list_rows(3, seed=6)
    arrays = [
        {
            "prompt_ids": np.array(row["prompt_ids"], np.int32),
            "completions_ids": [np.array(ids) for ids in row["completions_ids"]],
            "ranks": np.array(row["ranks"]),
            "ref_logps": np.array(row["ref_logps"]) if i else torch.tensor(row["ref_logps"]),
            "pair_weight": np.float32(0.5),
        }
        for i, row in enumerate(rows)
    ]
    collator = PreferenceCollator(packing=packing)
    plain, batch = collator([{**row, "pair_weight": 0.5} for row in rows]), collator(arrays)
    assert set(plain) == set(batch)
    for name in ("input_ids", "target_ids", "target_rows", "sequence_ids", "ref_logps", "pair_weights"):
        assert torch.equal(plain[name], batch[name]), name
    square = {**LIST, "completions_ids": np.array([[7, 8], [9, 4], [3, 5]])}
    assert collator([square]).target_ids.tolist() == [9, 4, 7, 8, 3, 5]
    label = {**ANSWER, "label": np.bool_(True), "completion_ids": np.array([7, 8])}
    assert collator([label, OTHER]).desirable.tolist() == [True, False]


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_of_a_table(packing):
    """With a column that some rows lack, and a table fills with None."""
    from datasets import Dataset

    rows = list_rows(4, seed=7)
    del rows[2]["ranks"]
    for row in rows:
        row["pair_weight"] = 2.0
    collator = PreferenceCollator(packing=packing)
    batch, plain = collator(list(Dataset.from_list(rows))), collator(rows)
    assert torch.equal(batch.target_ids, plain.target_ids) and batch.list_sizes == plain.list_sizes
    assert batch.pair_weights.tolist() == [2.0] * 4


def test_lists_without_ranks_come_best_first_and_any_numbers_rank():
    bare = {name: LIST[name] for name in ("prompt_ids", "completions_ids")}
    in_order = [7, 8, 9, 10, 11, 12]
    assert PreferenceCollator()([bare]).target_ids.tolist() == in_order
    assert PreferenceCollator()([{**bare, "ranks": None}]).target_ids.tolist() == in_order
    batch = PreferenceCollator()([{**bare, "ranks": (0.5, -3, np.float32(-7.5))}])
    assert batch.target_ids.tolist() == [10, 11, 12, 9, 7, 8]


# Weights


@pytest.mark.parametrize("rows", [[PAIR] * 3, [LIST] * 3, [ANSWER, OTHER, ANSWER]])
def test_weights_of_rows(rows):
    collator = PreferenceCollator()
    assert collator(rows).total_weight == 3.0 and "pair_weights" not in collator(rows)
    weighted = [{**row, "pair_weight": weight} for row, weight in zip(rows, (0.5, 0, 2), strict=True)]
    batch = collator(weighted)
    assert batch.pair_weights.tolist() == [0.5, 0.0, 2.0] and batch.pair_weights.dtype == torch.float32
    assert batch.total_weight == batch["total_weight"] == 2.5
    del weighted[1]["pair_weight"]
    assert collator(weighted).pair_weights.tolist() == [0.5, 1.0, 2.0]
    assert collator([{**row, "pair_weight": 0} for row in rows]).total_weight == 0.0


def test_a_table_fills_missing_weights_with_none():
    from datasets import Dataset

    rows = [{**PAIR, "pair_weight": 2.0}, PAIR]
    assert PreferenceCollator()(rows).pair_weights.tolist() == [2.0, 1.0]
    assert PreferenceCollator()(list(Dataset.from_list(rows))).pair_weights.tolist() == [2.0, 1.0]


# Travelling


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("data", ["lists", "answers"])
def test_batches_move_and_pickle(packing, data):
    rows = [{**row, "pair_weight": 0.25} for row in (list_rows(3) if data == "lists" else answer_rows(3))]
    batch = PreferenceCollator(packing=packing)(rows)
    for other in (batch.to("cpu"), pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        assert isinstance(other, PreferenceBatch) and set(other) == set(batch)
        assert (other.data, other.num_pairs, other.total_weight) == (data, 3, 0.75)
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(other[name], value), name
    moved = batch.to("meta")
    kind = "desirable" if data == "answers" else "pair_weights"
    assert moved[kind].device.type == moved.input_ids.device.type == "meta"
    assert moved.tokens_per_pair == batch.tokens_per_pair and moved.data == data
    with pytest.raises(AttributeError, match="no field 'labels'"):
        _ = batch.labels


@pytest.mark.parametrize("data", ["lists", "answers"])
def test_every_tensor_is_pinned(monkeypatch, data):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(id(tensor)) or tensor)
    rows = [{**row, "pair_weight": 0.25} for row in (list_rows(3) if data == "lists" else answer_rows(3))]
    batch = PreferenceCollator(mismatched=True)(rows)
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    tensors += [value for value in vars(batch.layout).values() if isinstance(value, torch.Tensor)]
    again = batch.pin_memory()
    assert sorted(pinned) == sorted(map(id, tensors)) and again.data == data and again.total_weight == 0.75


@pytest.mark.parametrize("data", ["lists", "answers"])
def test_batches_come_out_of_a_loader_with_workers(data):
    rows = list_rows(5) if data == "lists" else answer_rows(5)
    collator = PreferenceCollator()
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=2, drop_last=True)
    batches = list(loader)
    assert [(batch.data, batch.num_pairs) for batch in batches] == [(data, 2)] * 2
    for batch, direct in zip(batches, (collator(rows[:2]), collator(rows[2:4])), strict=True):
        assert torch.equal(batch.target_ids, direct.target_ids) and torch.equal(batch.sequence_ids, direct.sequence_ids)
        assert torch.equal(batch.layout.cu_seqlens_k, direct.layout.cu_seqlens_k)
        assert batch.get("list_sizes") == direct.get("list_sizes")


@pytest.mark.parametrize("data", ["pairs", "lists", "answers"])
def test_accelerate_trains_as_a_plain_loop(data):
    from accelerate import Accelerator

    if data == "pairs":
        rows, loss_type = (
            [{**row, "ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in random_rows(4)],
            "ipo",
        )
    elif data == "lists":
        rows, loss_type = list_rows(4), "listwise"
    else:
        refs = {"KL_completion_ids": [5, 6], "ref_logps": -9.0, "ref_KL_logps": -25.0}
        rows, loss_type = [{**row, **refs} for row in answer_rows(4)], "kto"
    rows = [{**row, "pair_weight": 1.0 + i} for i, row in enumerate(rows)]

    def run(prepared):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=PreferenceCollator())
        backward = torch.Tensor.backward
        if prepared:
            accelerator = Accelerator(cpu=True)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            backward = accelerator.backward
        losses = []
        for batch in loader:
            output = fastdpo.batch_loss(model, batch, loss_type=loss_type)
            backward(output.loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(output.loss.item())
        return losses, [parameter.detach().clone() for parameter in model.parameters()]

    (losses, parameters), (theirs, prepared) = run(False), run(True)
    assert losses == theirs and len(losses) == 2
    assert all(map(torch.equal, parameters, prepared))
    assert not all(map(torch.equal, parameters, tiny_model().parameters()))


# Micro-batches


MODEL = None


def model():
    """One for all examples."""
    global MODEL
    MODEL = MODEL or tiny_model(dtype=torch.float64)
    return MODEL


def assert_parts_equal_whole(collator, rows, **options):
    """Losses and gradient of the parts, added up, are those of one batch."""
    whole = PreferenceCollator(packing=collator.packing)(rows)
    expected = fastdpo.batch_loss(model(), whole, reduction="sum", **options)
    gradient = torch.autograd.grad(expected.loss, list(model().parameters()))
    parts = collator(rows)
    assert isinstance(parts, MicroBatches)
    assert (parts.num_pairs, parts.total_weight) == (len(rows), pytest.approx(whole.total_weight))
    assert torch.equal(torch.cat([part.target_ids for part in parts]), whole.target_ids)
    assert sum((part.tokens_per_pair for part in parts), ()) == whole.tokens_per_pair
    outputs = [fastdpo.batch_loss(model(), part, reduction="sum", **options) for part in parts]
    losses = torch.cat([output.losses for output in outputs])
    torch.testing.assert_close(losses, expected.losses, rtol=1e-10, atol=1e-10)
    sums = [torch.autograd.grad(output.loss, list(model().parameters())) for output in outputs]
    for theirs, ours in zip(gradient, zip(*sums, strict=True), strict=True):
        torch.testing.assert_close(sum(ours), theirs, rtol=1e-9, atol=1e-9)
    return parts


@draws(20)
@given(
    count=st.integers(1, 6), seed=st.integers(0, 10**6), budget=st.integers(1, 200), packing=st.sampled_from(PACKINGS),
    weights=st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=6, max_size=6), weighted=st.booleans(),
)  # fmt: skip
def test_lists_in_parts(count, seed, budget, packing, weights, weighted):
    rows = list_rows(count, seed)
    if weighted:
        rows = [{**row, "pair_weight": weight} for row, weight in zip(rows, weights, strict=False)]
    collator = PreferenceCollator(packing=packing, max_tokens_per_microbatch=budget)
    parts = assert_parts_equal_whole(collator, rows, loss_type="listwise", beta=0.3)
    assert all(part.num_tokens <= budget or part.num_pairs == 1 for part in parts)
    assert sum((part.list_sizes for part in parts), ()) == tuple(len(row["ranks"]) for row in rows)


@draws(25)
@given(
    count=st.integers(1, 6), seed=st.integers(0, 10**6), budget=st.integers(1, 200), packing=st.sampled_from(PACKINGS),
    weights=st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=6, max_size=6), weighted=st.booleans(),
    loss_type=st.sampled_from([["sigmoid", "sft"], "sft", "cpo", "orpo", "simpo", "ipo"]),
)  # fmt: skip
def test_pairs_in_parts_with_weights_and_mean_lengths(count, seed, budget, packing, weights, weighted, loss_type):
    rows = random_rows(count, seed, answer=(1, 15))
    rows = [{**row, "ref_chosen_logps": -20.0 - i, "ref_rejected_logps": -21.0} for i, row in enumerate(rows)]
    if weighted:
        rows = [{**row, "pair_weight": weight} for row, weight in zip(rows, weights, strict=False)]
    collator = PreferenceCollator(packing=packing, max_tokens_per_microbatch=budget)
    parts = assert_parts_equal_whole(collator, rows, loss_type=loss_type)
    if len(parts) > 1:
        total = sum(row.get("pair_weight", 1.0) for row in rows)
        mean = sum(row.get("pair_weight", 1.0) * len(row["chosen_ids"]) for row in rows) / (total or 1.0)
        assert [part.mean_chosen_length for part in parts] == [pytest.approx(mean)] * len(parts)
    for wanted in range(1, count + 2):
        again = parts.into(wanted)
        assert again.passes == wanted and again.total_weight == pytest.approx(parts.total_weight)
        assert len({part.get("mean_chosen_length") for part in again}) == 1


def test_answers_stay_in_one_pass():
    collator = PreferenceCollator(max_tokens_per_microbatch=4)
    with pytest.raises(ValueError, match="single answers cannot be cut into micro-batches"):
        collator([ANSWER, OTHER])
    whole = PreferenceCollator(max_tokens_per_microbatch=100)([ANSWER, OTHER])
    assert len(whole) == 1 and whole.total_weight == 2.0
    with pytest.raises(ValueError, match="single answers cannot be cut into micro-batches"):
        whole.into(2)
    parts = PreferenceCollator(max_tokens_per_microbatch=4, mismatched=False)([ANSWER, OTHER])
    assert [part.desirable.tolist() for part in parts] == [[True], [False]]
    rows = [{**row, "ref_logps": -9.0} for row in answer_rows(5, seed=3)]
    alone = PreferenceCollator(mismatched=False)(rows)
    expected = fastdpo.batch_loss(model(), alone, loss_type="apo_zero_unpaired", reduction="sum")
    parts = PreferenceCollator(max_tokens_per_microbatch=15, mismatched=False)(rows)
    losses = [
        fastdpo.batch_loss(model(), part, loss_type="apo_zero_unpaired", reduction="sum").losses for part in parts
    ]
    torch.testing.assert_close(torch.cat(losses), expected.losses, rtol=1e-10, atol=1e-10)


# Bad input


@pytest.mark.parametrize(
    "rows, message",
    [
        ([PAIR, LIST], "row 0 of the batch is of pairs and row 1 of lists"),
        ([LIST, LIST, ANSWER], "row 0 of the batch is of lists and row 2 of answers"),
        ([ANSWER, PAIR], "row 0 of the batch is of answers and row 1 of pairs"),
        ([{**LIST, "completions_ids": [[7]], "ranks": [1]}], "at least two completions, and there are 1"),
        ([{**LIST, "completions_ids": []}], "at least two completions, and there are 0"),
        ([{**LIST, "ranks": [1, 1, 2]}], r"the ranks are \[1, 1, 2\], and no two may be alike"),
        ([{**LIST, "ranks": [1, 1.0, 2]}], "no two may be alike"),
        ([{**LIST, "ranks": [1, 2]}], "there are 2 ranks for 3 completions"),
        ([{**LIST, "ranks": []}], "there are 0 ranks for 3 completions"),
        ([{**LIST, "ranks": "123"}], "must be a list"),
        ([{**LIST, "ranks": [1, 2, None]}], "must be numbers"),
        ([{**LIST, "ranks": [True, 2, 3]}], "must be numbers"),
        ([{**LIST, "ranks": [1, 2, float("nan")]}], "must be numbers"),
        ([{**LIST, "ref_logps": [1.0, 2.0]}], "row 0 of the batch has 2 ref_logps and 3 completions"),
        ([{**LIST, "ref_logps": [1.0, 2.0, 3.0]}, LIST], "row 1 of the batch has no ref_logps, and others have"),
        ([{**LIST, "ref_logps": [1.0, float("nan"), 3.0]}], "row 0 of the batch: ref_logps is nan"),
        ([{**LIST, "ref_logps": [1.0, None, 3.0]}], "row 0 of the batch: ref_logps is None"),
        ([{**ANSWER, "label": 1}, OTHER], "row 0 of the batch has the label 1; it must be True"),
        ([ANSWER, {**OTHER, "label": None}], "row 1 of the batch has the label None"),
        ([{**ANSWER, "label": "true"}, OTHER], "has the label 'true'"),
        ([ANSWER], "the batch holds a single row, and the KL estimate needs the answer to another prompt"),
        ([{**ANSWER, "KL_completion_ids": [4]}, OTHER], "row 1 of the batch has no KL_completion_ids, and others have"),
        ([ANSWER, {**OTHER, "KL_completion_ids": [4]}], "row 0 of the batch has no KL_completion_ids, and others have"),
        ([{**ANSWER, "ref_logps": -1.0}, OTHER], "row 1 of the batch has no ref_logps"),
        ([{**ANSWER, "ref_logps": [-1.0]}, {**OTHER, "ref_logps": -1.0}], "ref_logps is .-1.0.; it must be a finite"),
        ([{**PAIR, "ref_chosen_logps": -1.0}], "not the other one"),
        ([{**PAIR, "ref_chosen_logps": -1.0, "ref_rejected_logps": float("inf")}], "ref_rejected_logps is inf"),
        ([{**PAIR, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}, PAIR], "row 1 .* has no ref_chosen"),
        ([PAIR, {**PAIR, "pair_weight": -0.5}], "row 1 of the batch has the pair_weight -0.5, below 0"),
        ([{**LIST, "pair_weight": float("nan")}], "row 0 of the batch: pair_weight is nan"),
        ([{**LIST, "pair_weight": float("inf")}], "row 0 of the batch: pair_weight is inf"),
        ([ANSWER, {**OTHER, "pair_weight": "2"}], "row 1 of the batch: pair_weight is '2'"),
        ([{"completions_ids": [[1], [2]]}], "row 0 of the batch has no prompt_ids; the collator takes tokenized rows"),
        ([{"prompt": "a", "completions": ["b", "c"]}], "has no prompt_ids; the collator takes tokenized rows"),
        ([{"prompt_ids": [1], "completion": "b", "label": True}, OTHER], "row 0 of the batch has no completion_ids"),
        ([{"prompt_ids": [1]}], "row 0 of the batch has no chosen_ids"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["prefix", "padded"])
def test_what_is_refused(packing, rows, message):
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(packing=packing)(rows)


@pytest.mark.parametrize("bad", [{"ranks": [1, 1, 2]}, {"ranks": [1, 2]}, {"completions_ids": [[7]], "ranks": [1]}])
def test_what_is_wrong_with_a_ranking_is_told_with_its_row(bad):
    with pytest.raises(ValueError, match="row 1 of the batch"):
        PreferenceCollator()([LIST, {**LIST, **bad}])


@pytest.mark.parametrize(
    "rows",
    [
        [{name: ANSWER[name] for name in ("prompt_ids", "completion_ids")}, OTHER],
        [{**LIST, "ranks": 3}],
        [{**LIST, "ref_logps": -5.0}],
        [{**LIST, "completions_ids": None}],
        [{**LIST, "completions_ids": [7, 8, 9]}],
        [{**PAIR, "chosen_ids": None}],
        [{**ANSWER, "KL_completion_ids": [3]}, {**OTHER, "KL_completion_ids": None}],
    ],
    ids=["no-label", "ranks-number", "refs-number", "completions-none", "completions-flat", "chosen-none",
         "kl-none"],
)  # fmt: skip
def test_what_cannot_be_used_is_a_value_error_with_its_row(rows):
    """Not a TypeError or KeyError of the code that stumbles over it: tables fill missing columns with None."""
    with pytest.raises(ValueError, match=r"row [01] of the batch"):
        PreferenceCollator()(rows)


def test_a_column_of_none_is_one_that_is_not_there():
    """As everywhere else: two tables of different kinds joined have every column of both."""
    others = {"completions_ids": None, "ranks": None, "completion_ids": None, "label": None, "ref_logps": None}
    batch, plain = PreferenceCollator()([PAIR, {**PAIR, **others}]), PreferenceCollator()([PAIR, PAIR])
    assert batch.data == "pairs" and torch.equal(batch.target_ids, plain.target_ids)


@pytest.mark.parametrize(
    "without, refs",
    [
        (PAIR, {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}),
        (LIST, {"ref_logps": [1.0, 2.0, 3.0]}),
        (ANSWER, {"ref_logps": -1.0}),
    ],
)
def test_references_of_some_rows_only_are_refused_whichever_row_comes_first(without, refs):
    with pytest.raises(ValueError, match="row 0 of the batch has no ref_"):
        PreferenceCollator()([without, {**without, **refs}])


def test_references_of_answers_that_are_not_in_the_batch_are_no_reference():
    """ref_KL_logps are of the answers to other prompts: where there are none, they must not pass for anything else."""
    refs = {"KL_completion_ids": [4], "ref_logps": -5.0, "ref_KL_logps": -100.0}
    rows = [{**row, **refs} for row in (ANSWER, OTHER)]
    batch = PreferenceCollator(mismatched=False)(rows)
    assert batch.ref_logps.tolist() == [-5.0, -5.0]


def test_references_of_answers_to_other_prompts_alone_are_refused():
    rows = [{**row, "KL_completion_ids": [4], "ref_KL_logps": -100.0} for row in (ANSWER, OTHER)]
    with pytest.raises(ValueError, match="ref_logps"):
        PreferenceCollator()(rows)
    assert "ref_logps" not in PreferenceCollator(mismatched=False)(rows)  # which leaves those answers out
