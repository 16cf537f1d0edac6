"""Kernels of fastdpo, in Triton and in plain PyTorch: logits to log-probabilities, and the gather of shared keys."""
