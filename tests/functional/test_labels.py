"""Labels that are no tokens: on a CPU the losses say which."""

import pytest
import torch

import fastdpo

VOCABULARY, WIDTH = 20, 8


def padded():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCABULARY, (4, 6), generator=draw)
    labels[:, :2] = -100
    return torch.randn(4, 6, WIDTH, generator=draw), torch.randn(VOCABULARY, WIDTH, generator=draw), labels


def losses(labels, packed):
    """Both ways to a loss, from the same hidden states, as functions without arguments."""
    hidden, weight, _ = padded()
    ids = None
    if packed:
        ids = torch.arange(4).repeat_interleave(5)
        hidden, labels = hidden[:, :-1].reshape(-1, WIDTH), labels[:, 1:].reshape(-1)
    given = {"ref_logps": torch.zeros(4), "sequence_ids": ids}
    return [
        lambda: fastdpo.loss(hidden @ weight.T, labels, **given),
        lambda: fastdpo.linear_loss(hidden, weight, labels, **given),
    ]


@pytest.mark.parametrize("label", [VOCABULARY, 10**9, -1, -101])
@pytest.mark.parametrize("packed", [False, True])
def test_a_label_that_is_no_token_is_named(label, packed):
    labels = padded()[2]
    labels[2, 3] = label
    place = r"\[12\]" if packed else r"\[2, 3\]"
    for call in losses(labels, packed):
        with pytest.raises(ValueError, match=rf"labels{place} is {label}, and there are {VOCABULARY} tokens"):
            call()


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_target_may_be_anything(packed):
    """The first position of a padded row is predicted by none."""
    labels = padded()[2]
    wanted = [call().loss for call in losses(labels, packed)]
    labels[:, 0] = VOCABULARY
    for call, loss in zip(losses(labels, packed), wanted, strict=True):
        torch.testing.assert_close(call().loss, loss, rtol=0, atol=0)


def test_token_logps_gives_nan():
    hidden, weight, labels = padded()
    labels[2, 3] = VOCABULARY
    assert fastdpo.token_logps(hidden @ weight.T, labels).isnan().nonzero().tolist() == [[2, 3]]
