"""Programs that take turns: one works at a time, step by step, and what became of each is told."""

import sys

import pytest
from checkout import ROOT

sys.path[:0] = [str(ROOT / "benchmarks")]

from turns import Spread, contestants, take_turns  # noqa: E402

PROGRAM = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from pathlib import Path
from turns import Turns

name, steps, log, code = sys.argv[1:5]
turns = Turns(*sys.argv[sys.argv.index("--turns") + 1:][:2])
for step in range(int(steps)):
    turns.wait()
    with open(log, "a") as file:
        file.write(f"{{name}} begins {{step}}\\n")
        file.flush()
        sum(range(10**5))
        file.write(f"{{name}} ends {{step}}\\n")
Path(sys.argv[-1]).write_text(json.dumps(name))
sys.exit(int(code))
"""


def commands(log, **steps):
    return {name: ["-c", PROGRAM, name, str(count), str(log), "0"] for name, count in steps.items()}


def test_one_works_at_a_time_and_each_round_another_begins(tmp_path):
    log = tmp_path / "log"
    with contestants(commands(log, a=3, b=3)) as started:
        assert take_turns(started) == {"a": "a", "b": "b"}
    lines = log.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["begins", "ends"] * 6  # nobody's turn lies within another's
    assert [line.split()[0] for line in lines[::2]] == ["a", "b", "b", "a", "a", "b"]


def test_one_that_has_fewer_steps_ends_alone(tmp_path):
    log = tmp_path / "log"
    with contestants(commands(log, a=1, b=4)) as started:
        assert take_turns(started) == {"a": "a", "b": "b"}
    assert sum(line.startswith("b begins") for line in log.read_text().splitlines()) == 4


def test_one_that_fails_is_named_and_the_others_are_ended(tmp_path):
    words = commands(tmp_path / "log", a=2, b=2)
    words["b"][-1] = "3"
    with contestants(words) as started, pytest.raises(RuntimeError, match="b ended with exit code 3"):
        take_turns(started)
    assert all(each._process.poll() is not None for each in started.values())


def test_spread():
    spread = Spread.of([0.2, 0.4, 0.1])
    assert spread == (0.2, 0.1, 0.4) and str(spread) == "0.200 (0.100 to 0.400)"
