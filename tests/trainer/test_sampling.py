"""Orders of an epoch: whole, repeatable, fair, and as cheap to run as they are meant to be."""

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from counting import calls
from drawing import draws
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, RandomSampler

from fastdpo.trainer.sampling import BalancedSampler, LengthGroupedSampler, PromptGroupedSampler, prompt_groups

HH_LENGTHS = Path(__file__).resolve().parents[2] / "benchmarks/data/hh_rlhf_harmless_test.csv"
LENGTHS = [5, 1, 9, 9, 2, 7, 3, 30, 4, 6, 8]
GROUPS = [0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 0]


@pytest.fixture(scope="module")
def hh_lengths():
    return np.loadtxt(HH_LENGTHS, delimiter=",", skiprows=2, dtype=np.int64).sum(1)


def by_length(seed=0, batch_size=4, **options):
    return LengthGroupedSampler(LENGTHS, batch_size, seed=seed, **options)


def by_prompt(seed=0):
    return PromptGroupedSampler(GROUPS, seed=seed)


def balanced(seed=0):
    return BalancedSampler(by_prompt(seed), LENGTHS, batch_size=2, processes=2)


SAMPLERS = pytest.mark.parametrize("make", [by_length, by_prompt, balanced])


def epochs(sampler, count):
    for epoch in range(count):
        sampler.set_epoch(epoch)
        yield list(sampler)


@SAMPLERS
def test_an_epoch_holds_each_row_once_and_follows_from_seed_and_epoch(make):
    orders = list(epochs(make(), 20))
    assert all(sorted(order) == list(range(11)) and {type(row) for row in order} == {int} for order in orders)
    assert len(make()) == 11
    assert len(set(map(tuple, orders))) > 15
    assert list(make()) == orders[0] == next(epochs(make(), 1))
    late = make()
    late.set_epoch(7)
    assert list(late) == list(late) == orders[7]
    assert not set(map(tuple, orders)) & set(map(tuple, epochs(make(seed=1), 20)))


@SAMPLERS
def test_global_random_state_is_neither_read_nor_moved(make):
    orders = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        orders.append(list(make()))
        assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert orders[0] == orders[1]


@SAMPLERS
def test_a_loader_that_skips_goes_on_with_the_rest(make):
    sampler = make()
    loader = DataLoader(range(11), batch_size=2, sampler=sampler)
    sampler.set_epoch(3)
    batches = [batch.tolist() for batch in loader]
    assert [row for batch in batches for row in batch] == list(sampler)
    for skipped in (0, 2, 5):
        assert [batch.tolist() for batch in skip_first_batches(loader, skipped)] == batches[skipped:]


@SAMPLERS
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_keeps_the_sampler_and_sets_its_epoch(make, processes):
    """set_sampler is what lets the epoch through to it on several processes when the first batches are skipped."""

    def loader(process):
        plain = DataLoader(range(11), batch_size=2, sampler=make())
        made = prepare_data_loader(
            plain, num_processes=processes, process_index=process, put_on_device=False, use_seedable_sampler=True
        )
        made.set_sampler(plain.sampler)
        return made

    expected = make()
    expected.set_epoch(5)
    order = list(expected)
    dealt = [order[i : i + 2] for i in range(0, 11, 2)]
    if processes > 1:
        dealt[-1].append(order[0])  # accelerate fills up with the first rows
    for process in range(processes):
        whole = loader(process)
        whole.set_epoch(5)
        assert [batch.tolist() for batch in whole] == dealt[process::processes]
        resumed = skip_first_batches(loader(process), 2)
        resumed.set_epoch(5)
        assert [batch.tolist() for batch in resumed] == dealt[process::processes][2:]


# Fairness


def unfairness(make, draws=4000):
    """By how many standard deviations the number of times that a row stood at a place is off, at most."""
    counts = np.zeros((11, 11))
    for seed in range(draws):
        sampler = make(seed)
        sampler.set_epoch(seed % 3)
        counts[list(sampler), range(11)] += 1
    return np.abs(counts - draws / 11).max() / np.sqrt(draws * 1 / 11 * 10 / 11)


@pytest.mark.parametrize("batch_size, megabatch", [(1, 3), (2, 50), (3, 1), (4, 2), (20, 50)])
def test_by_length_every_row_stands_everywhere_equally_often(batch_size, megabatch):
    assert unfairness(lambda seed: by_length(seed, batch_size, megabatch=megabatch)) < 5


def test_by_prompt_every_row_stands_everywhere_equally_often():
    assert unfairness(by_prompt) < 5


@pytest.mark.parametrize(
    "make, name", [(by_prompt, "roll"), (by_length, "take_along_axis")], ids=["order unrotated", "batches unrotated"]
)
def test_that_measure_sees_what_the_rotations_are_for(monkeypatch, make, name):
    monkeypatch.setattr(np, name, lambda rows, *_, **__: rows)
    assert unfairness(make) > 8


def test_rows_of_equal_length_are_not_tied_to_one_another():
    together = Counter()
    for order in epochs(LengthGroupedSampler([7] * 6, 2, seed=0), 3000):
        together.update(frozenset(order[i : i + 2]) for i in (0, 2, 4))
    assert len(together) == 15 and max(together.values()) < 1.2 * min(together.values())


# Lengths


def padding_waste(lengths, order, size):
    """Share of a rectangle of `size` rows that would be padding."""
    batches = lengths[np.array(order)[: len(order) // size * size]].reshape(-1, size)
    return 1 - batches.sum() / (batches.max(1).sum() * size)


def test_batches_are_of_like_length(hh_lengths):
    shuffled = np.random.default_rng(0).permutation(len(hh_lengths))
    for batch_size, device_batch in ((32, 4), (32, 32), (8, 8)):
        grouped = list(LengthGroupedSampler(hh_lengths, batch_size, seed=0))
        assert padding_waste(hh_lengths, shuffled, device_batch) > 0.4
        assert padding_waste(hh_lengths, grouped, device_batch) < 0.1
    wastes = [
        padding_waste(hh_lengths, list(LengthGroupedSampler(hh_lengths, 32, seed=0, megabatch=megabatch)), 32)
        for megabatch in (1, 4, 16, 64)
    ]
    assert wastes == sorted(wastes, reverse=True)


def test_the_incomplete_batch_is_the_last_and_the_others_are_cut_from_the_sorted_rows():
    lengths = np.arange(22)
    for order in epochs(LengthGroupedSampler(lengths, 4, seed=0), 50):
        batches = [order[i : i + 4] for i in range(0, 20, 4)]
        in_batches = sorted(set(range(22)) - set(order[20:]))
        expected = [in_batches[i : i + 4] for i in range(0, 20, 4)]
        assert sorted(map(sorted, batches)) == expected
        for batch in batches:  # ascending from some place on
            assert sorted(batch) in [batch[i:] + batch[:i] for i in range(4)]


# Prompts


def test_rows_of_a_group_are_neighbours():
    rng = np.random.default_rng(0)
    groups = rng.integers(-3, 40, size=200) * 10**12
    for order in epochs(PromptGroupedSampler(groups, seed=0), 20):
        changes = np.count_nonzero(groups[order] != np.roll(groups[order], 1))
        assert changes == len(set(groups.tolist()))  # the order as a ring: the rotation may part one group


def test_the_order_of_groups_is_random():
    orders = Counter()
    for order in epochs(PromptGroupedSampler([5, 5, 6, 6, 7, 7, 8, 8], seed=0), 1200):
        begin = order.index(0)
        groups = [row // 2 for row in order[begin:] + order[:begin]]  # as a ring, from row 0 on
        orders[tuple(group for group in dict.fromkeys(groups) if group)] += 1
    assert len(orders) == 6 and min(orders.values()) > 150


def test_the_order_inside_a_group_is_random():
    orders = Counter(tuple(row for row in order if row in (0, 2, 4)) for order in epochs(by_prompt(), 1200))
    assert len(orders) == 6 and min(orders.values()) > 150


SYSTEM = [1, 2]
FIRST = [*SYSTEM, 10, 11, 12, 13]  # 6 tokens
SECOND = [*FIRST, 20, 21, 22, 23]
THIRD = [*SECOND, 30, 31]  # 12 tokens
FOURTH = [*THIRD, 40]
FIFTH = [*FOURTH, *range(50, 63)]  # 26 tokens


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor, tuple])
def test_turns_of_one_conversation_go_together(convert):
    other = [*SYSTEM, 10, 11, 99]
    rows = [FIFTH, FIRST, other, SYSTEM, FOURTH, SECOND, FIRST, THIRD, other, [*FIFTH, 70], [*FIFTH, 70, *range(25)]]
    groups = prompt_groups(convert(row) for row in rows)
    assert groups.dtype == np.int64
    fifth, first, other, system, fourth, second, first_again, third, other_again, sixth, seventh = groups
    assert first == first_again == second == third  # up to twice the first
    assert fourth == fifth  # more than twice; and twice the fourth
    assert sixth == seventh  # more than twice the fourth
    assert other == other_again
    assert len({first, fourth, sixth, other, system}) == 5  # the system prompt alone is too short for a group


@pytest.mark.parametrize(
    "prompts, groups",
    [
        ([[1, 2], [1, 2, 3]], 1),
        ([[1, 2], [1, 3, 2]], 2),
        ([[1, 2], [257, 2, 3]], 2),
        ([[1], [1 << 8], [1 << 16], [1 << 24]], 4),
        ([[0], [0, 0], [0, 0, 0]], 2),
        ([[2, 1], [2, 1, 9, 9, 9], [2, 1, 0], [2, 1, 9, 9, 9, 9], [2, 1, 10]], 2),
        ([[], [], [5]], 2),
    ],
)
def test_what_counts_as_a_continuation(prompts, groups):
    assert len(set(prompt_groups(prompts).tolist())) == groups


def naive_groups(prompts):
    """Shortest first: a prompt joins the founder that it goes on from, or founds a group."""
    founders, groups = [], {}
    for prompt in sorted(map(tuple, prompts), key=len):
        own = [f for f in founders if prompt[: len(f)] == f and len(prompt) <= 2 * len(f)]
        assert len(own) <= 1
        if not own:
            founders.append(prompt)
        groups[prompt] = own[0] if own else prompt
    return [groups[tuple(prompt)] for prompt in prompts]


@draws(200)
@given(st.lists(st.lists(st.integers(0, 1), max_size=9), min_size=1, max_size=30))
def test_groups_are_those_found_by_comparing_all_prompts(prompts):
    groups, naive = prompt_groups(prompts).tolist(), naive_groups(prompts)
    assert len(set(groups)) == len(set(naive)) == len(set(zip(groups, naive, strict=True)))


# Balance


def batch_costs(order, lengths, batch_size, step):
    """(steps, batches): cost of the device batches of each complete step."""
    whole = len(order) // step * step
    return np.asarray(lengths)[order[:whole]].reshape(-1, step // batch_size, batch_size).sum(2)


@pytest.mark.parametrize(
    "batch_size, processes, accumulation, limit", [(8, 8, 1, 1.03), (8, 1, 4, 1.03), (4, 4, 2, 1.1)]
)
def test_device_batches_cost_about_the_same(hh_lengths, batch_size, processes, accumulation, limit):
    base = np.random.default_rng(0).permutation(len(hh_lengths)).tolist()
    order = list(
        BalancedSampler(base, hh_lengths, batch_size=batch_size, processes=processes, accumulation=accumulation)
    )
    step = batch_size * processes * accumulation
    costs = batch_costs(order, hh_lengths, batch_size, step)
    before = batch_costs(base, hh_lengths, batch_size, step)
    assert np.mean(before.max(1) / before.mean(1)) > 1.2
    assert np.mean(costs.max(1) / costs.mean(1)) < limit
    # No step is far from the best that there is: the mean, or where one row is long, that row with the shortest ones.
    rows = np.sort(hh_lengths[order[: costs.size * batch_size]].reshape(len(costs), -1))
    best = np.maximum(costs.mean(1), rows[:, -1] + rows[:, : batch_size - 1].sum(1))
    assert (costs.max(1) / best).max() < 1.1


@pytest.mark.parametrize("accumulation", [4, 8])
def test_single_rows_meet_their_like(hh_lengths, accumulation):
    """At one row a batch, what processes wait for at each batch, and over a step, is all that can be saved."""
    base = np.random.default_rng(0).permutation(len(hh_lengths)).tolist()
    order = list(BalancedSampler(base, hh_lengths, batch_size=1, processes=4, accumulation=accumulation))
    waits = {}
    for name, rows in (("before", base), ("after", order)):
        costs = batch_costs(rows, hh_lengths, 1, 4 * accumulation).reshape(-1, accumulation, 4)
        waits[name] = [costs.max(2).sum() * 4 / costs.sum() - 1, costs.sum(1).max(1).sum() * 4 / costs.sum() - 1]
    assert waits["after"][0] < 0.5 * waits["before"][0]
    assert waits["after"][1] < 0.6 * waits["before"][1]


def test_an_incomplete_step_is_balanced_where_it_can_be():
    lengths = [9, 9, 8, 3, 2, 2, 9, 9, 1, 1, 99]
    order = list(BalancedSampler(range(11), lengths, batch_size=2, processes=3, accumulation=4))
    assert order[:6] == [0, 4, 1, 5, 2, 3]
    assert order[6:10] == [6, 8, 7, 9]
    assert order[10:] == [10]


def test_groups_stay_together_where_there_is_room():
    groups = np.repeat(np.arange(12), 2)
    lengths = np.random.default_rng(0).integers(1, 100, 24)
    base = PromptGroupedSampler(groups, seed=0)
    options = {"batch_size": 4, "processes": 3, "accumulation": 2}

    def parts(order):
        return sum(len(set(groups[order[i : i + 4]])) for i in range(0, 24, 4))

    order = list(BalancedSampler(base, lengths, groups=groups, **options))
    assert parts(order) == 12 < parts(list(BalancedSampler(base, lengths, **options)))
    costs = batch_costs(order, lengths, 4, 24)
    assert costs.max() < 1.25 * costs.mean()


def test_groups_without_room_are_cut():
    one = list(BalancedSampler(range(12), [1] * 12, batch_size=4, processes=3, groups=[0] * 6 + [1] * 6))
    assert sorted(len({row // 6 for row in one[i : i + 4]}) for i in (0, 4, 8)) == [1, 1, 2]
    tight = list(BalancedSampler(range(8), [1] * 8, batch_size=4, processes=2, groups=[0, 0, 0, 1, 1, 1, 2, 2]))
    assert sorted(sorted(tight[i : i + 4]) for i in (0, 4)) == [[0, 1, 2, 6], [3, 4, 5, 7]]
    # Rooms of 1, 2 and 3 are left for the group of five: it is cut once, not twice.
    lengths, groups = [9] * 6 + [1] * 5 + [0], [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 4]
    order = list(BalancedSampler(range(12), lengths, batch_size=4, processes=3, groups=groups))
    assert sorted(sorted(order[i : i + 4]) for i in (0, 4, 8)) == [[0, 1, 2, 11], [3, 4, 9, 10], [5, 6, 7, 8]]


def test_the_first_batch_needs_no_more_than_its_step():
    class Counting(list):
        taken = 0

        def __iter__(self):
            for row in super().__iter__():
                self.taken += 1
                yield row

    base = Counting(range(100))
    rows = iter(BalancedSampler(base, [1] * 100, batch_size=2, processes=3, accumulation=2))
    list(itertools.islice(rows, 12))
    assert base.taken == 12


@draws(300)
@given(st.data())
def test_steps_keep_their_rows(data):
    draw = data.draw
    count = draw(st.integers(1, 70), "rows")
    batch_size = draw(st.integers(1, 5), "batch_size")
    processes, accumulation = draw(st.integers(1, 4), "processes"), draw(st.integers(1, 3), "accumulation")
    lengths = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count), "lengths")
    numbers = draw(st.lists(st.integers(0, draw(st.integers(0, 30))), min_size=count, max_size=count), "groups")
    step = batch_size * processes * accumulation
    base = draw(
        st.sampled_from(
            [
                LengthGroupedSampler(lengths, step, seed=count, megabatch=2),
                PromptGroupedSampler(numbers, seed=count),
                list(range(count))[::-1],
            ]
        ),
        "base",
    )
    groups = draw(st.sampled_from([None, numbers]), "grouped")
    sampler = BalancedSampler(
        base, lengths, batch_size=batch_size, processes=processes, accumulation=accumulation, groups=groups
    )
    sampler.set_epoch(3)
    order, before = list(sampler), list(base)
    assert len(order) == len(sampler) == count and order == list(sampler)
    for begin in range(0, count, step):
        assert sorted(order[begin : begin + step]) == sorted(before[begin : begin + step])
    # What accelerate may drop is the end of the base's order.
    rounds, batches = count - count % (batch_size * processes), count - count % batch_size
    assert sorted(order[rounds:]) == sorted(before[rounds:])
    assert order[batches:] == before[batches:]


def test_an_order_without_epochs_can_be_balanced():
    for base in (RandomSampler(range(9)), np.arange(9), range(9)):
        sampler = BalancedSampler(base, np.ones(9), batch_size=2, processes=2)
        sampler.set_epoch(2)
        assert sorted(sampler) == list(range(9))


# Speed


@pytest.mark.slow
def test_an_epoch_of_a_million_rows_takes_no_step_of_python_for_each():
    rng = np.random.default_rng(0)
    lengths, groups = rng.integers(1, 2000, 10**6), rng.integers(0, 400_000, 10**6)
    for sampler in (LengthGroupedSampler(lengths, 64, seed=0), PromptGroupedSampler(groups, seed=0)):
        assert calls(lambda each=sampler: iter(each)) < 1000
        assert sum(1 for _ in sampler) == 10**6


def test_grouping_prompts_takes_some_steps_for_each():
    """Also where all begin with the same system prompt."""
    rng = np.random.default_rng(0)
    system = np.arange(50)
    prompts = [np.concatenate([system, rng.integers(0, 50_000, 100)]) for _ in range(10_000)]
    prompts += [prompt[:120] for prompt in prompts]
    groups = None

    def work():
        nonlocal groups
        groups = prompt_groups(prompts)

    assert calls(work) < 25 * len(prompts)
    assert np.array_equal(groups[:10_000], groups[10_000:]) and len(set(groups.tolist())) == 10_000


# Bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LengthGroupedSampler([], 2, seed=0), r"lengths has shape \(0,\); .* at least one"),
        (lambda: LengthGroupedSampler([[1, 2]], 2, seed=0), r"lengths has shape \(1, 2\)"),
        (lambda: LengthGroupedSampler(["a"], 2, seed=0), "lengths holds <U1; it must hold the rows' numbers of tokens"),
        (lambda: LengthGroupedSampler([1, -2], 2, seed=0), "lengths holds -2 for row 1; it must be a finite number"),
        (lambda: LengthGroupedSampler([float("nan")], 2, seed=0), "lengths holds nan for row 0"),
        (lambda: LengthGroupedSampler([1], 0, seed=0), "batch_size is 0; it must be 1 or more"),
        (lambda: LengthGroupedSampler([1], 1, seed=0, megabatch=0), "megabatch is 0; it must be 1 or more"),
        (lambda: LengthGroupedSampler([1], 1, seed=-1), "seed is -1; it must be 0 or more"),
        (lambda: by_length().set_epoch(-1), "epoch is -1; it must be 0 or more"),
        (lambda: PromptGroupedSampler([], seed=0), r"groups has shape \(0,\); .* at least one"),
        (lambda: PromptGroupedSampler([0.5], seed=0), "groups holds float64; it must hold integers"),
        (lambda: PromptGroupedSampler([0], seed=-3), "seed is -3; it must be 0 or more"),
        (lambda: prompt_groups([]), "prompts is empty; it must hold one sequence"),
        (lambda: prompt_groups([[1], [[1, 2]]]), r"prompt 1 has shape \(1, 2\); it must be one sequence"),
        (lambda: BalancedSampler([], [], batch_size=1, processes=1), r"lengths has shape \(0,\)"),
        (lambda: BalancedSampler([0, 1], [5], batch_size=1, processes=1), "lengths has 1 values and base has 2 rows"),
        (
            lambda: BalancedSampler([0, 1], [5, 5], batch_size=1, processes=1, groups=[0]),
            "groups has 1 values and base has 2 rows; give groups one value a row",
        ),
        (lambda: BalancedSampler([0], [5], batch_size=0, processes=1), "batch_size is 0"),
        (lambda: BalancedSampler([0], [5], batch_size=1, processes=0), "processes is 0"),
        (lambda: BalancedSampler([0], [5], batch_size=1, processes=1, accumulation=0), "accumulation is 0"),
        (
            lambda: list(BalancedSampler([0, 2], [5, 5], batch_size=2, processes=1)),
            "base holds row 2, and lengths are given for rows 0 to 1; give base and lengths of the same data",
        ),
        (lambda: list(BalancedSampler([0, -1], [5, 5], batch_size=2, processes=1)), "base holds row -1"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
