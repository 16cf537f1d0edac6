"""Memory that is kept, and the measurements of the device."""

import resource

import pytest
import torch

from fastdpo.device import _glibc, freed_memory_kept, gemm_flops_per_second, peak_memory_gb

CPU = torch.device("cpu")


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


def test_measurements_are_plausible():
    assert 1e8 < gemm_flops_per_second(CPU, torch.float32) < 1e15
    assert 0.05 < peak_memory_gb(CPU) < 1000
