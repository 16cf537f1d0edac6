"""Kernels of fastdpo: logits or hidden states to log-probabilities, in Triton and in plain PyTorch."""
