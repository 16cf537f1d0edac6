"""A pytest plugin that says how near each test comes to its tolerances: `pytest -p margins --margins FILE`.

A comparison that uses most of its tolerance on one machine may fail on another, which rounds otherwise. For every test
the file gets a line with the largest share of a tolerance that `torch.testing.assert_close` or `pytest.approx` used.
"""

import contextlib
import json

import pytest
import torch

_shares = {}
_current = None


def pytest_addoption(parser):
    parser.addoption("--margins", metavar="FILE", help="append each test's largest share of a tolerance to FILE")


def pytest_configure(config):
    if not config.getoption("--margins"):
        return
    assert_close, scalar = torch.testing.assert_close, type(pytest.approx(1.0))
    equal = scalar.__eq__

    def measured_close(actual, expected, *args, rtol=None, atol=None, **options):
        assert_close(actual, expected, *args, rtol=rtol, atol=atol, **options)
        with contextlib.suppress(Exception):
            for a, b in _pairs(actual, expected):
                default = torch.testing._comparison.default_tolerances(a, b)
                kind, a, b = a.dtype, a.double(), b.double()
                limit = (default[1] if atol is None else atol) + (default[0] if rtol is None else rtol) * b.abs()
                share = ((a - b).abs() / limit).nan_to_num(0.0, 0.0, 0.0)
                if share.numel():
                    _note(float(share.max()), kind)

    def measured_equal(self, actual):
        result = equal(self, actual)
        with contextlib.suppress(Exception):
            if result and self.tolerance:
                _note(abs(float(actual) - self.expected) / self.tolerance, "number")
        return result

    torch.testing.assert_close = measured_close
    scalar.__eq__ = measured_equal


def _pairs(actual, expected):
    if isinstance(actual, list | tuple):
        for a, b in zip(actual, expected, strict=True):
            yield from _pairs(a, b)
    else:
        a, b = torch.as_tensor(actual), torch.as_tensor(expected)
        if a.dtype.is_floating_point and a.device.type == "cpu":
            yield a.detach(), b.detach()


def _note(share, kind):
    if _current is not None and share > _shares.get(_current, (0.0, ""))[0]:
        _shares[_current] = share, str(kind)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    global _current
    _current = item.nodeid
    try:
        return (yield)
    finally:
        _current = None
        if item.config.getoption("--margins") and item.nodeid in _shares:
            with open(item.config.getoption("--margins"), "a") as file:
                file.write(json.dumps([item.nodeid, *_shares[item.nodeid]]) + "\n")
