"""Other packages' kernels for the head, in the place of which stand fakes with the same functions."""

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from oracle import linear_token_logprobs

import fastdpo
from fastdpo.ops import head_backend, linear_token_logps_with_stats
from fastdpo.ops.dispatch import LogitOptions, row_kernels
from fastdpo.ops.linear_logps import make_head

N, D, V = 50, 64, 256
NAMES = list(head_backend.BACKENDS)


class Fake:
    """What both packages compute, right unless told otherwise; `rows` are those of the calls, `error` is added."""

    def __init__(self):
        self.rows: list[int] = []
        self.error, self.raises = 0.0, None

    def __call__(self, hidden, weight, labels):
        self.rows.append(len(hidden))
        assert not hidden.requires_grad and not weight.requires_grad  # which DLPack would refuse
        assert ((labels >= 0) & (labels < len(weight))).all()
        if self.raises is not None:
            raise self.raises
        logits = hidden.float() @ weight.float().T
        lse = logits.logsumexp(1)
        return logits.gather(1, labels[:, None]).squeeze(1) - lse + self.error, lse

    def lse_target_epi(self, a, b, c=None, *, out=None, store_d=True, tuned=True, target):
        assert not store_d
        logps, lse = self(a, b.mT, target)
        return {"lse": lse, "target_logit": logps + lse}

    def scaled_ce_forward_fragment(self, hidden, weight, target, temperature=1.0, ignore_index=-100):
        logps, lse = self(hidden, weight, target)
        return -logps, None, lse


@pytest.fixture
def install(monkeypatch):
    """Puts a fake of a package where it would be imported from, on what seems to be a Hopper GPU."""

    def put(name):
        fake = Fake()
        modules = {
            "quack": {"quack.epilogue": {}, "quack.epilogue.library": {"lse_target_epi": fake.lse_target_epi}},
            "liger": {
                "liger_kernel.ops.cutedsl.ops._fused_scaled_cross_entropy_forward_fragment_sm90": {
                    "scaled_ce_forward_fragment": fake.scaled_ce_forward_fragment
                },
                "liger_kernel.ops.cutedsl.ops.utils": {"ensure_cuda_context": lambda: None},
            },
        }[name]
        for module, values in {head_backend.BACKENDS[name].module: {}, **modules}.items():
            made = ModuleType(module)
            made.__spec__ = importlib.machinery.ModuleSpec(module, None)
            vars(made).update(values)
            monkeypatch.setitem(sys.modules, module, made)
        return fake

    monkeypatch.setattr(head_backend, "_verified", {})
    monkeypatch.setattr(head_backend, "_capability", lambda device: (9, 0))
    monkeypatch.delenv(head_backend.VARIABLE, raising=False)
    return put


def problem(v=V, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(v, D, generator=generator)).to(dtype)
    return hidden, weight, torch.randint(v, (N,), generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_without_a_gradient(install, name):
    fake = install(name)
    hidden, weight, labels = problem()
    for _ in range(2):
        logps = fastdpo.linear_token_logps(hidden, weight, labels)
        torch.testing.assert_close(logps.double(), linear_token_logprobs(hidden, weight, labels), rtol=1e-5, atol=1e-5)
    assert fake.rows == [head_backend._ROWS, N, N]  # verified once
    labels[:3] = torch.tensor([V, -1, 7])
    head = make_head(weight, None, weight.dtype, LogitOptions(7, 1.0, None, 1.0), row_kernels("eager", weight))
    logps = head_backend.head_scores(hidden, head, "auto")(hidden, weight, labels)
    assert logps[:2].isnan().all() and logps[2] == 0 and logps[3:].isfinite().all()


WRONG = {
    "log-probs": {"error": 0.3},
    "NaN": {"error": float("nan")},
    "raised RuntimeError: no such kernel": {"raises": RuntimeError("no such kernel")},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_backend_that_is_wrong_is_not_taken(install, monkeypatch, caplog, name, wrong):
    fake = install(name)
    for attribute, value in WRONG[wrong].items():
        setattr(fake, attribute, value)
    inputs = problem()
    own = fastdpo.linear_token_logps(*inputs, impl="eager")
    for _ in range(3):
        assert torch.equal(fastdpo.linear_token_logps(*inputs), own)
    assert fake.rows == [head_backend._ROWS]
    (record,) = caplog.records
    assert ("off by nan" if wrong == "NaN" else wrong) in record.message and "FASTDPO_HEAD_BACKEND" in record.message
    monkeypatch.setenv(head_backend.VARIABLE, name)
    with pytest.raises(ValueError, match=f"FASTDPO_HEAD_BACKEND={name} cannot be"):
        fastdpo.linear_token_logps(*inputs)


def test_without_the_packages(install, monkeypatch, caplog):
    monkeypatch.setattr(head_backend.importlib.util, "find_spec", lambda name: None)
    inputs = problem()
    assert torch.equal(fastdpo.linear_token_logps(*inputs), fastdpo.linear_token_logps(*inputs, impl="eager"))
    assert not caplog.records
    monkeypatch.setenv(head_backend.VARIABLE, "liger")
    with pytest.raises(ValueError, match=r"liger-kernel\[cutedsl\] is not installed"):
        fastdpo.linear_token_logps(*inputs)


def test_a_package_without_the_kernel(install, monkeypatch, caplog):
    """Liger without the DSL, or a version that has other names, is as good as none."""
    install("liger")
    monkeypatch.delitem(sys.modules, "liger_kernel.ops.cutedsl.ops.utils")
    fake = install("quack")
    del sys.modules["quack.epilogue.library"].lse_target_epi
    inputs = problem()
    assert torch.equal(fastdpo.linear_token_logps(*inputs), fastdpo.linear_token_logps(*inputs, impl="eager"))
    assert not caplog.records and not fake.rows
    monkeypatch.setenv(head_backend.VARIABLE, "quack")
    with pytest.raises(ValueError, match=r"cannot be imported .*lse_target_epi"):
        fastdpo.linear_token_logps(*inputs)


def test_the_variable(install, monkeypatch):
    fakes = {name: install(name) for name in NAMES}
    inputs = problem()
    for value, called in {"none": [], "quack": ["quack"], "liger": ["liger"], "": ["quack"]}.items():
        for fake in fakes.values():
            fake.rows.clear()
        monkeypatch.setenv(head_backend.VARIABLE, value)
        fastdpo.linear_token_logps(*inputs)
        assert [name for name, fake in fakes.items() if fake.rows] == called
    monkeypatch.setenv(head_backend.VARIABLE, "cute")
    with pytest.raises(ValueError, match="is 'cute'; it must be auto, none, quack or liger"):
        fastdpo.linear_token_logps(*inputs)
    monkeypatch.setattr(head_backend, "_capability", lambda device: (8, 0))
    monkeypatch.setenv(head_backend.VARIABLE, "auto")
    fastdpo.linear_token_logps(*inputs)
    monkeypatch.setenv(head_backend.VARIABLE, "quack")
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        fastdpo.linear_token_logps(*inputs)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"v": 200},  # of quack alone: no multiple of 128
        {"bias": torch.zeros(V, dtype=torch.bfloat16)},
        {"softcap": 30.0},
        {"temperature": 0.7},
        {"impl": "eager"},
        {"weight": lambda weight: weight.T.contiguous().T},
        {"hidden": lambda hidden: hidden.requires_grad_()},
        {"weight": lambda weight: weight.requires_grad_()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_no_backend_serves(install, change):
    fake = install("quack")
    hidden, weight, labels = problem(**{k: v for k, v in change.items() if k in ("v", "dtype")})
    hidden, weight = change.get("hidden", lambda h: h)(hidden), change.get("weight", lambda w: w)(weight)
    options = {k: v for k, v in change.items() if k in ("bias", "softcap", "temperature", "impl")}
    logps = fastdpo.linear_token_logps(hidden, weight, labels, **options)
    if logps.requires_grad:
        logps.sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in (hidden, weight) if leaf.requires_grad)
    assert not fake.rows and logps.isfinite().all()


def test_statistics_are_made_of_logits(install):
    fake = install("quack")
    _, stats = linear_token_logps_with_stats(*problem(), LogitOptions(-100, 1.0, None, 1.0))
    assert not fake.rows and (stats.entropy > 0).all()
