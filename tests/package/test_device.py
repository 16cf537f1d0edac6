"""Memory that is kept, and the measurements of the device."""

import resource

import pytest
import torch

from fastdpo import device
from fastdpo.device import _glibc, freed_memory_kept, gemm_flops_per_second, peak_memory_gb

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured_anew():
    gemm_flops_per_second.cache_clear()
    yield
    gemm_flops_per_second.cache_clear()


def faults_of_a_step():
    """Page faults of 160 MB of activations, allocated, written, and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 21) for _ in range(20)]
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(_glibc() is None, reason="no glibc")
def test_later_steps_fault_nothing_in():
    with freed_memory_kept(CPU):
        with freed_memory_kept(CPU):
            faults_of_a_step()
        faults = [faults_of_a_step() for _ in range(5)]
    assert faults[-1] < 1000  # of some 40,000 pages
    with freed_memory_kept(torch.device("cuda")):  # nothing to do there
        pass


def test_ceiling_is_that_of_the_fastest_product(monkeypatch):
    """Slow ones, as on a busy machine, change nothing while there is time; ten that bring nothing are the end."""
    drawn = [9.0, 8.0, *[9.0] * 9, 7.0, 6.97, 2.0, *[3.0] * 50]
    left = list(drawn)
    monkeypatch.setattr(device, "_product_seconds", lambda a, out: left.pop(0))
    assert gemm_flops_per_second(CPU, torch.float32) == 2 * 1024**3 / 2.0
    assert len(drawn) - len(left) == drawn.index(2.0) + 1 + 10


def test_ceiling_takes_little_time(monkeypatch):
    left = [2.0, 1.0]
    monkeypatch.setattr(device, "_product_seconds", lambda a, out: left.pop(0))
    monkeypatch.setattr(device, "_GEMM_SECONDS", 0.0)
    assert gemm_flops_per_second(CPU, torch.float32) == 2 * 1024**3 / 2.0
    assert left == [1.0]


def test_ceiling_is_measured_once_and_draws_nothing(monkeypatch):
    before = torch.get_rng_state()
    first = gemm_flops_per_second(CPU, torch.float32)
    monkeypatch.setattr(device, "_product_seconds", lambda a, out: pytest.fail("measured again"))
    assert gemm_flops_per_second(CPU, torch.float32) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_measurements_are_plausible():
    assert 1e8 < gemm_flops_per_second(CPU, torch.float32) < 1e15
    assert 0.05 < peak_memory_gb(CPU) < 1000
