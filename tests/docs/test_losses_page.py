"""What the documentation of the losses says is what the registry holds, and its code runs."""

import re

import pytest
import torch
from checkout import load

import fastdpo
from fastdpo.losses import REGISTRY


@pytest.fixture
def losses_page():
    return load("docs/losses.py")


def test_the_table_of_losses_is_that_of_the_registry(losses_page, capsys):
    assert losses_page.main(["--check"]) == 0
    before = dict(REGISTRY)
    try:
        del REGISTRY["hinge"]
        assert losses_page.main(["--check"]) == 1 and "run: python docs/losses.py" in capsys.readouterr().out
    finally:  # in its order, which others rely on
        REGISTRY.clear()
        REGISTRY.update(before)


def test_the_loss_of_ones_own(losses_page):
    (block,) = re.findall(r"```python\n(.*?)```", losses_page.PAGE.read_text(), flags=re.DOTALL)
    try:
        exec(compile(block, "docs/losses.md", "exec"), {})
        chosen, rejected = torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -2.0])
        zeros = torch.zeros(2)
        out = fastdpo.preference_loss(chosen, rejected, zeros, zeros, beta=0.5, loss_type="squared")
        assert out.losses.tolist() == [0.25, 4.0]
    finally:
        REGISTRY.pop("squared", None)
