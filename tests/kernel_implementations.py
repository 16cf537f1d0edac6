"""The implementations of a kernel and where each is tested, as pytest's parameters."""

import pytest
import torch


def without_triton(triton_kernels):
    """The mark that skips what needs Triton."""
    return pytest.mark.skipif(triton_kernels is None, reason="triton is not installed")


def implementations(eager, triton_kernels):
    """(module, device): eager PyTorch, and Triton (None where it is not installed) on a GPU or else interpreted."""
    cuda = torch.cuda.is_available()
    no_triton = without_triton(triton_kernels)
    return [
        pytest.param((eager, "cpu"), id="eager-cpu"),
        pytest.param(
            (triton_kernels, "cpu"),
            id="triton-interpreter",
            marks=[no_triton, pytest.mark.skipif(cuda, reason="runs on the GPU")],
        ),
        *(
            pytest.param((module, "cuda"), id=name, marks=[*marks, pytest.mark.gpu])
            for module, name, marks in [(eager, "eager-cuda", []), (triton_kernels, "triton-cuda", [no_triton])]
            if cuda
        ),
    ]
