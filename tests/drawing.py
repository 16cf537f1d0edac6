"""How many cases are drawn, and which are picked where all of them would repeat one another."""

import itertools
import os

from hypothesis import HealthCheck, settings

# `make test-explore`: new cases in every run, and this many times as many. Else every run draws the same.
EXPLORE = int(os.environ.get("FASTDPO_EXPLORE", "0"))
share = 1.0  # of the cases; set before a test's module is imported


def draws(count):
    """Hypothesis settings for `count` examples."""
    return settings(
        max_examples=max(1, round(count * share * max(1, EXPLORE))),
        deadline=None,
        derandomize=not EXPLORE,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def pairwise(*values):
    """Tuples of one value of each list, in which every two values of two lists stand together at least once.

    A fault that needs two options at once is met, by a fraction of the full product. Always the same tuples.
    """
    left = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(values)), 2)
        for a in range(len(values[i]))
        for b in range(len(values[j]))
    }
    every = list(itertools.product(*(range(len(each)) for each in values)))

    def pairs(choice):
        return set(itertools.combinations(enumerate(choice), 2))

    chosen = []
    while left:
        best = max(every, key=lambda choice: len(pairs(choice) & left))
        left -= pairs(best)
        chosen.append(best)
    return [tuple(each[place] for each, place in zip(values, choice, strict=True)) for choice in sorted(chosen)]


def in_turn(values, others):
    """(value, other) of each of `values` with one of `others`, these in turn, and of the first value with all."""
    values, others = list(values), list(others)
    first = [(values[0], other) for other in others]
    return first + [(value, others[i % len(others)]) for i, value in enumerate(values) if i]
