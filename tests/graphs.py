"""CUDA graphs: a step captured once, and replayed on other numbers."""

import torch


def replayed(step, inputs):
    """What a graph of `step()` gives once `inputs` are drawn anew in place, and what `step()` then gives without one.

    Floating-point inputs are drawn from a normal distribution, integers are put in another order.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles kernels, and sets up cuBLAS
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for each in inputs:
            each.copy_(torch.randn_like(each) if each.is_floating_point() else each.flip(0))
    graph.replay()
    return captured, step()
