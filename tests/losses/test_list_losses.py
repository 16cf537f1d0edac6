"""The registry as a table."""

import io

import pytest

import fastdpo
from fastdpo.losses import REGISTRY
from fastdpo.losses.catalogue import HEADS, markdown


@pytest.fixture
def table():
    stream = io.StringIO()
    assert fastdpo.list_losses(file=stream) == tuple(REGISTRY)
    return stream.getvalue().splitlines()


def test_one_line_a_loss(table):
    assert len(table) == 1 + len(REGISTRY)
    assert [line.split()[0] for line in table] == ["name", *REGISTRY]
    assert all(line == line.rstrip() for line in table)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_line_tells_what_the_loss_is(table, name):
    spec = REGISTRY[name]
    line = next(line for line in table if line.split()[0] == name)
    starts = [table[0].index(head) for head in HEADS]
    cells = [line[start:end].rstrip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
    assert cells == [name, spec.data, spec.formula, spec.source, ", ".join(spec.needs), ", ".join(spec.honours)]
    assert spec.formula and spec.source


def test_what_needs_and_options_say(table):
    lines = {line.split()[0]: line for line in table}
    assert "reference, KL estimate" in lines["kto"] and lines["kto"].endswith("desirable_weight, undesirable_weight")
    assert "whole batch" in lines["aot"] and "whole batch" not in lines["sigmoid"]
    assert "lengths" in lines["ipo"] and "reference" not in lines["simpo"].split("(2405.14734)")[1]
    assert "discopop_tau" in lines["discopop"] and "f_divergence_type" in lines["discopop"]


def test_goes_to_stdout(capsys):
    names = fastdpo.list_losses()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(names) and "sigmoid" in names


def test_markdown_is_the_same_table():
    lines = markdown().splitlines()
    assert len(lines) == 2 + len(REGISTRY) and lines[0] == "| " + " | ".join(HEADS) + " |"
    assert all(line.count("|") == len(HEADS) + 1 for line in lines)
    assert [line.split("`")[1] for line in lines[2:]] == list(REGISTRY)


def test_a_loss_of_ones_own_is_listed():
    fastdpo.register_loss("own_listed", lambda terms, *, beta: beta * terms.delta**2, formula="β δ²", source="me")
    try:
        stream = io.StringIO()
        assert fastdpo.list_losses(file=stream)[-1] == "own_listed"
        assert "β δ²" in stream.getvalue().splitlines()[-1]
    finally:
        del REGISTRY["own_listed"]
