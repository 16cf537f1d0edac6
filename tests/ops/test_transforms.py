"""What autograd and torch.func can ask of the operators besides one backward: right, or refused in one sentence."""

import pytest
import torch
from torch.autograd import forward_ad

import fastdpo
from fastdpo.ops import gather_kv

V, D, N = 23, 6, 16
SMALL = 5 * V * 4  # bytes of 5 rows of logits


def functions():
    """By name: a function of one tensor, that tensor, and whether it is differentiated in any way at all."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(V, (N,), generator=generator)
    hidden, weight, refs = draw(N, D), draw(V, D), draw(4)
    packed = {"sequence_ids": torch.tensor([0, 2, 1, 3]).repeat_interleave(N // 4)}
    index = torch.tensor([0, 0, 1, 2, 3, 3])
    places = index, index.argsort(stable=True), torch.tensor([0, 2, 3, 4, 6])
    desirable = torch.tensor([True, False, True, False])
    small = {"memory_budget": SMALL}
    return {
        "token_logps": (lambda x: fastdpo.token_logps(x, labels), draw(N, V), False),
        "of hidden": (lambda h: fastdpo.linear_token_logps(h, weight, labels), hidden, False),
        "of a head": (lambda w: fastdpo.linear_token_logps(hidden, w, labels), weight, False),
        "of a head, tiles": (lambda w: fastdpo.linear_token_logps(hidden, w, labels, **small), weight, False),
        "loss": (lambda x: fastdpo.loss(x, labels, refs, **packed).loss, draw(N, V), False),
        "linear_loss": (lambda w: fastdpo.linear_loss(hidden, w, labels, refs, **packed).loss, weight, False),
        "fused": (lambda w: fastdpo.linear_loss(hidden, w, labels, refs, **packed, **small).loss, weight, False),
        "frozen": (lambda h: fastdpo.linear_loss(h, weight, labels, refs, **packed, **small).loss, hidden, False),
        "gather_kv": (lambda k: gather_kv(k, 2 * k, *places)[1].square(), draw(4, 2, 3), False),
        "preference_loss": (lambda c: fastdpo.preference_loss(c, refs, 0 * refs, 0 * refs).loss, draw(4), True),
        "listwise_loss": (lambda c: fastdpo.listwise_loss(c.view(2, 2), 0 * refs.view(2, 2)).loss, draw(4), True),
        "unpaired_loss": (
            lambda c: fastdpo.unpaired_loss(c, 0 * refs, desirable=desirable, kl=0.1).loss, draw(4), True
        ),
    }  # fmt: skip


ONLY_BACKWARD = [name for name, (_, _, anything) in functions().items() if not anything]
ANYTHING = [name for name, (_, _, anything) in functions().items() if anything]


def gradient(function, x, **options):
    x = x.clone().requires_grad_()
    return x, torch.autograd.grad(function(x).sum(), x, **options)[0]


def tangent_of_a_dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def tangent_of_a_leaf(function, x):
    return tangent_of_a_dual(function, x.clone().requires_grad_())


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


FORWARD = {
    "jvp": jvp, "jacfwd": lambda function, x: torch.func.jacfwd(function)(x), "dual": tangent_of_a_dual,
    "dual of a leaf": tangent_of_a_leaf,
    "jvp of vmap": lambda function, x: jvp(torch.func.vmap(function), x.unsqueeze(0)),
}  # fmt: skip
REVERSE = {
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).sum())(x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "vjp": lambda function, x: torch.func.vjp(function, x),
}  # fmt: skip


@pytest.mark.parametrize("name", ONLY_BACKWARD)
@pytest.mark.parametrize("way", [*FORWARD, *REVERSE, "hessian"])
def test_what_is_not_implemented_raises(name, way):
    function, x, _ = functions()[name]
    ways = {**FORWARD, **REVERSE, "hessian": lambda f, y: torch.func.hessian(lambda z: f(z).sum())(y)}
    expected = "not implemented under torch.func's grad" if way in REVERSE else "has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=expected):
        ways[way](function, x)


@pytest.mark.parametrize("name", ONLY_BACKWARD)
def test_a_second_derivative_is_never_taken_for_zero(name):
    function, x, _ = functions()[name]
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        y, grad = gradient(function, x, create_graph=True)
        (function(y).sum() + grad.square().sum()).backward()
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.functional.hessian(lambda y: function(y).sum(), x)


@pytest.mark.parametrize("name", ANYTHING)
def test_losses_of_sums_have_every_derivative(name):
    function, x, _ = functions()[name]
    _, grad = gradient(function, x)
    for way in (*FORWARD, *REVERSE):
        if way == "vjp":
            (found,) = torch.func.vjp(function, x)[1](torch.tensor(1.0))
        else:
            found = {**FORWARD, **REVERSE}[way](function, x)
        expected = grad if way in ("grad", "jacrev", "jacfwd", "vjp") else grad.sum()
        torch.testing.assert_close(found.squeeze(), expected, rtol=1e-5, atol=1e-6)
    by_hand = torch.autograd.functional.hessian(function, x)
    torch.testing.assert_close(torch.func.hessian(function)(x), by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(functions()))
def test_vmap_gives_what_a_loop_gives(name):
    function, x, _ = functions()[name]
    batch = torch.stack([x, 0.5 * x, -x])
    many, grads = gradient(torch.func.vmap(function), batch)
    torch.testing.assert_close(torch.func.vmap(function)(many), torch.stack([function(each) for each in batch]))
    torch.testing.assert_close(grads, torch.stack([gradient(function, each)[1] for each in batch]))


def test_functional_call_differentiates_the_parameters_it_is_given():
    head, labels = torch.nn.Linear(D, V), torch.randint(V, (N,))
    hidden = torch.randn(N, D)

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self):
            return fastdpo.linear_token_logps(hidden, self.head.weight, labels, bias=self.head.bias).sum()

    given = {name: torch.randn_like(value, requires_grad=True) for name, value in Scorer().named_parameters()}
    grads = torch.autograd.grad(torch.func.functional_call(Scorer(), given, ()), list(given.values()))
    logits = torch.nn.functional.linear(hidden, *given.values())
    expected = torch.autograd.grad(-torch.nn.functional.cross_entropy(logits, labels, reduction="sum"),
                                   list(given.values()))  # fmt: skip
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-5)


def test_a_level_of_tangents_around_it_does_no_harm():
    function, x, _ = functions()["token_logps"]
    with forward_ad.dual_level():
        assert torch.equal(function(x), functions()["token_logps"][0](x))
    _, tangent = torch.func.jvp(lambda y: function(x).sum() + y, (torch.tensor(1.0),), (torch.tensor(3.0),))
    assert tangent == 3
