"""Every architecture of the zoo, packed, against each sequence alone and unpadded."""

from contextlib import nullcontext

import pytest
import torch
import zoo
from checkout import load
from tiny import naive_sequence_logps

import fastdpo
from fastdpo.packing import PreferenceCollator
from fastdpo.types import UserError
from fastdpo.verify import verify_packing

architectures = load("docs/architectures.py")

PACKINGS = ("padded", "prefix", "varlen")
ROWS = zoo.rows()
BETA = 0.3


def each(packing=None):
    chosen = [a for a in zoo.ARCHITECTURES if packing in (None, a.packing)]
    return pytest.mark.parametrize("architecture", chosen, ids=lambda a: a.name)


def make(architecture, dtype=torch.float32):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if architecture.model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {architecture.model_type}")
    return zoo.make(architecture, dtype)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def separate(model, rows):
    """Log-probs of each sequence run alone, the loss, and its gradients; and the reference that these are for."""
    logps = naive_sequence_logps(model, rows)
    refs = logps.detach() + torch.randn(len(logps), dtype=logps.dtype)  # so that no pair is decided
    chosen, rejected = (logps - refs).view(2, -1)
    loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    return (logps.detach(), loss.detach(), gradients(model, loss)), refs


def packed(model, rows, packing, refs):
    """The same as one batch."""
    out = fastdpo.batch_loss(model, PreferenceCollator(packing=packing)(rows), refs, beta=BETA)
    return torch.cat([out.chosen_logps, out.rejected_logps]), out.loss.detach(), gradients(model, out.loss)


def assert_equal(ours, theirs, tolerance, note):
    """Each log-prob, loss and gradient to `tolerance`, of its size and of the largest gradient's."""
    (logps, loss, grads), (exact_logps, exact_loss, exact_grads) = ours, theirs
    assert ((logps - exact_logps).abs() <= tolerance * exact_logps.abs().clamp(min=1)).all(), note
    assert abs(loss - exact_loss) <= tolerance * exact_loss.abs().clamp(min=1), note
    scale = max(grad.abs().max() for grad in exact_grads.values())
    wrong = [name for name, grad in exact_grads.items() if not (grads[name] - grad).abs().max() <= tolerance * scale]
    assert not wrong, note


# Measured over the whole zoo: at most 6e-15 in float64, 4e-6 in float32.
@pytest.mark.parametrize(
    "architecture, dtype, tolerance",
    [
        *(pytest.param(each, torch.float64, 1e-12, id=f"{each.name}-double") for each in zoo.ARCHITECTURES),
        *(pytest.param(each, torch.float32, 2e-5, id=f"{each.name}-single") for each in zoo.ARCHITECTURES[::4]),
    ],
)
def test_equals_separate_sequences(architecture, dtype, tolerance):
    model = make(architecture, dtype)
    with zoo.DoublePrecision() if dtype == torch.float64 else nullcontext():
        exact, refs = separate(model, ROWS)
        for packing in PACKINGS if architecture.packing == "prefix" else ("padded",):
            assert_equal(packed(model, ROWS, packing, refs), exact, tolerance, packing)
        with torch.no_grad():  # packed attention stays set in the model, whose own forward must be as it was
            again = naive_sequence_logps(model, ROWS)
        assert_equal((again, *exact[1:]), exact, tolerance, "unpacked, after the packed passes")


@each("padded")
def test_refuses_to_pack_what_it_cannot(architecture):
    model = make(architecture)
    for packing in ("prefix", "varlen"):
        with pytest.raises(UserError, match=type(model).__name__):
            verify_packing(model, packing)
    verify_packing(model, "padded")


@pytest.mark.parametrize("architecture", zoo.LENGTH_DEPENDENT, ids=lambda a: a.name)
def test_rope_by_the_longest_position_of_the_batch(architecture):
    """Beyond the trained length a sequence has other log-probs beside a longer one than alone: refused, not packed."""
    model, rows = make(architecture, torch.float64), [row for row in ROWS if len(row["prompt_ids"]) < 5]
    with zoo.DoublePrecision():
        exact, refs = separate(model, rows)
        for packing in PACKINGS:
            assert_equal(packed(model, rows, packing, refs), exact, 1e-12, packing)
            with pytest.raises(UserError, match="max_length=13"):
                packed(model, ROWS, packing, torch.zeros(2 * len(ROWS)))


@each()
def test_is_documented(architecture):
    name, packing = architectures.documented()[architecture.name]
    assert (type(make(architecture)).__name__, architectures.auto_packing(architecture)[0]) == (name, packing)
    assert packing == architecture.packing


def test_documents_nothing_else():
    assert list(architectures.documented()) == [a.name for a in zoo.ARCHITECTURES]
