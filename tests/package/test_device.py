"""Memory that is kept, and the measurements of the device."""

import resource
import weakref

import pytest
import torch

from fastdpo import device
from fastdpo.device import _glibc, freed_memory_kept, gemm_flops_per_second, is_out_of_memory, peak_memory_gb

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
    monkeypatch.setitem(device._GEMM_SECONDS, "cpu", 1e9)
    monkeypatch.setattr(device, "_product_seconds", lambda a, out, products: left.pop(0))
    assert gemm_flops_per_second(CPU, torch.float32) == 2 * 1024**3 / 2.0
    assert len(drawn) - len(left) == drawn.index(2.0) + 1 + 10


def test_ceiling_takes_little_time(monkeypatch):
    left = [2.0, 1.0]
    monkeypatch.setattr(device, "_product_seconds", lambda a, out, products: left.pop(0))
    monkeypatch.setitem(device._GEMM_SECONDS, "cpu", 0.0)
    assert gemm_flops_per_second(CPU, torch.float32) == 2 * 1024**3 / 2.0
    assert left == [1.0]


def test_ceiling_is_measured_once_and_draws_nothing(monkeypatch):
    before = torch.get_rng_state()
    first = gemm_flops_per_second(CPU, torch.float32)
    monkeypatch.setattr(device, "_product_seconds", lambda a, out, products: pytest.fail("measured again"))
    assert gemm_flops_per_second(CPU, torch.float32) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_measurements_are_plausible():
    assert 1e8 < gemm_flops_per_second(CPU, torch.float32) < 1e15
    assert 0.05 < peak_memory_gb(CPU) < 1000


class Allocator:
    """What torch.cuda knows of a GPU's memory, kept by hand."""

    def __init__(self, monkeypatch, free, allocated=0, peak=0, reserved=0):
        self.free, self.allocated, self.peak, self.reserved = free, allocated, peak, reserved
        for name, answer in {
            "mem_get_info": lambda: (self.free, 80 << 30),
            "memory_allocated": lambda: self.allocated,
            "memory_reserved": lambda: self.reserved,
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.allocated),
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda of, answer=answer: answer())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch, "empty", lambda size, **options: self.passing(size))

    def passing(self, size):
        self.peak = max(self.peak, self.allocated + size)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("before", [5, 8, 20])
def test_measuring_leaves_no_trace_in_the_peak(monkeypatch, before, raises):
    """5 are in use, and 10 more meanwhile; the peak was, and is, 5 (then 15 would show), 8, or 20."""
    memory = Allocator(monkeypatch, free=100, allocated=5, peak=before)

    def measured(*of):
        memory.passing(10)
        if raises:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1e12

    monkeypatch.setattr(device, "_best_product", measured)
    if raises:
        with pytest.raises(torch.OutOfMemoryError):
            gemm_flops_per_second(torch.device("cuda"), torch.bfloat16)
    else:
        assert gemm_flops_per_second(torch.device("cuda"), torch.bfloat16) == 1e12
    assert memory.peak == before


@pytest.mark.parametrize(
    ("free", "size", "products"), [(8 << 30, 8192, 1), (1 << 30, 4096, 8), (128 << 20, 2048, 64), (0, 2048, 64)]
)
def test_operands_fit_the_free_memory(monkeypatch, free, size, products):
    """Two of 8192 x 8192 in bfloat16 are 256 MiB; reserved memory that nothing is in counts as free."""
    Allocator(monkeypatch, free=free - free // 4, allocated=1, peak=1, reserved=1 + free // 4)
    made = []
    monkeypatch.setattr(device, "_best_product", lambda *of: made.append(of[2:4]))
    gemm_flops_per_second(torch.device("cuda"), torch.bfloat16)
    assert made == [(size, products)]


def test_a_product_that_finds_no_memory_holds_on_to_none(monkeypatch):
    """The operands would live in the frames of the exception, as long as somebody looks at it."""
    Allocator(monkeypatch, free=100)
    made = []

    def failing(*of):
        operand = torch.zeros(3)
        made.append(weakref.ref(operand))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "_best_product", failing)
    with pytest.raises(torch.OutOfMemoryError) as seen:
        gemm_flops_per_second(torch.device("cuda"), torch.bfloat16)
    assert seen.value is not None and made[0]() is None


def test_what_counts_as_lack_of_memory():
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert all(map(is_out_of_memory, (torch.OutOfMemoryError("x"), MemoryError(), cublas)))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_several_small_products_count_as_so_many(monkeypatch):
    monkeypatch.setattr(device, "_product_seconds", lambda a, out, products: 0.5)
    found = device._best_product(CPU, torch.float32, size=8, products=64, limit=0.0, patience=1)
    assert found == 2 * 64 * 8**3 / 0.5
