"""Log-probs from logits and from hidden states: fastdpo against eager PyTorch and torch.compile.

    python benchmarks/kernels/logprobs.py           on a GPU: N=16384, V=128256 and N=4096, D=4096, V=128256, bfloat16
    python benchmarks/kernels/logprobs.py --tiny    a check of the script itself, on any device

For every variant: time, share of the measured ceiling (copy bandwidth, or matrix-product speed), memory beyond the
inputs. A variant's time is given only if its log-probs and gradient agree with the float64 ones in the same run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from common import write_result  # noqa: E402
from timing import copy_bytes_per_second, interleaved, peak_extra_bytes  # noqa: E402

import fastdpo  # noqa: E402
from fastdpo.device import gemm_flops_per_second  # noqa: E402


def eager_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def agrees(ours: torch.Tensor, truth: torch.Tensor, naive: torch.Tensor) -> bool:
    """Error at most twice that of the naive code in the same dtype, and a little."""
    scale = truth.float().abs().max()
    naive_error = (naive.float() - truth.float()).abs().max()
    return bool((ours.float() - truth.float()).abs().max() <= 2 * naive_error + 1e-5 * scale + 1e-6)


def from_logits(n: int, v: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, Any]:
    logits = torch.randn(n, v, device=device, dtype=dtype)
    labels = torch.randint(v, (n,), device=device)
    grad = torch.randn(n, device=device)
    functions = {"eager": eager_logps, "fastdpo": fastdpo.token_logps}
    if compiled:
        functions["torch.compile"] = torch.compile(eager_logps)

    def forward_backward(function: Any, rows: int = n) -> torch.Tensor:
        x = logits[:rows].detach().requires_grad_()
        return torch.autograd.grad((function(x, labels[:rows]) * grad[:rows]).sum(), x)[0]

    rows = min(n, 64)
    exact = logits[:rows].double().requires_grad_()
    truth = torch.log_softmax(exact, -1).gather(-1, labels[:rows, None]).squeeze(-1)
    (true_grad,) = torch.autograd.grad((truth * grad[:rows]).sum(), exact)
    truth, naive_grad = truth.detach(), forward_backward(eager_logps, rows)
    ceiling = copy_bytes_per_second(device)
    result: dict[str, Any] = {"n": n, "v": v, "dtype": str(dtype), "ceiling_bytes_per_second": ceiling, "variants": {}}
    with torch.no_grad():
        naive = eager_logps(logits[:rows], labels[:rows])
        correct = {name: agrees(f(logits[:rows], labels[:rows]), truth, naive) for name, f in functions.items()}
        forward = interleaved({name: (lambda f=f: f(logits, labels)) for name, f in functions.items()})
    for name, f in functions.items():
        correct[name] = correct[name] and agrees(forward_backward(f, rows), true_grad, naive_grad)
    both = interleaved({name: (lambda f=f: forward_backward(f)) for name, f in functions.items()})
    moved = n * v * logits.element_size()
    for name, function in functions.items():
        result["variants"][name] = {
            "numbers_agree": correct[name],
            "forward_ms": forward[name] * 1e3 if correct[name] else None,
            "forward_share_of_ceiling": moved / forward[name] / ceiling if correct[name] else None,
            "forward_backward_ms": both[name] * 1e3 if correct[name] else None,
            "forward_backward_share_of_ceiling": 3 * moved / both[name] / ceiling if correct[name] else None,
            "forward_backward_extra_bytes": peak_extra_bytes(lambda f=function: forward_backward(f)),
        }
    return result


def from_hidden(n: int, d: int, v: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    hidden = torch.randn(n, d, device=device, dtype=dtype)
    weight = 0.02 * torch.randn(v, d, device=device, dtype=dtype)
    labels = torch.randint(v, (n,), device=device)
    pairs = 8
    counts = [n // pairs] * pairs
    halves = [
        part for i in range(pairs) for part in ([i] * (counts[i] // 2), [pairs + i] * (counts[i] - counts[i] // 2))
    ]
    ids = torch.tensor([i for half in halves for i in half], device=device)
    refs = torch.zeros(2 * pairs, device=device)
    options = {"sequence_ids": ids, "tokens_per_pair": counts, "beta": 1e-3}

    def run(function: str, frozen: bool, grad: bool) -> list[torch.Tensor]:
        h = hidden.detach().requires_grad_(grad)
        w = weight.detach().requires_grad_(grad and not frozen)
        if function == "fastdpo":
            out = fastdpo.linear_loss(h, w, labels, refs, **options, token_metrics=False)
        else:
            out = fastdpo.loss(h @ w.T, labels, refs, sequence_ids=ids, beta=1e-3, impl="eager", token_metrics=False)
        return [out.loss, *torch.autograd.grad(out.loss, [h] if frozen else [h, w])] if grad else [out.loss]

    ceiling = gemm_flops_per_second(device, dtype)
    result: dict[str, Any] = {
        "n": n,
        "d": d,
        "v": v,
        "dtype": str(dtype),
        "ceiling_flops_per_second": ceiling,
        "cases": {},
    }
    for case, frozen, grad, products in (
        ("no grad", True, False, 2),
        ("frozen head", True, True, 4),
        ("trainable", False, True, 6),
    ):
        names = ("full logits", "fastdpo")
        outs = {name: run(name, frozen, grad) for name in names}
        correct = all(
            (a.float() - b.float()).norm() <= 0.02 * b.float().norm() + 1e-6
            for a, b in zip(outs["fastdpo"], outs["full logits"], strict=True)
        )
        del outs
        seconds = interleaved({name: (lambda m=name, f=frozen, g=grad: run(m, f, g)) for name in names})
        result["cases"][case] = {
            name: {
                "numbers_agree": correct,
                "ms": seconds[name] * 1e3 if correct else None,
                "share_of_ceiling": products * n * d * v / seconds[name] / ceiling if correct else None,
                "extra_bytes": peak_extra_bytes(lambda m=name, f=frozen, g=grad: run(m, f, g)),
            }
            for name in names
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.tiny:
        result = {
            "from_logits": [from_logits(64, 1000, device, dtype, compiled=False)],
            "from_hidden": [from_hidden(64, 32, 1000, device, dtype)],
        }
    elif device.type == "cuda":
        result = {
            "from_logits": [from_logits(16384, v, device, dtype, compiled=True) for v in (49152, 128256, 151936)],
            "from_hidden": [from_hidden(4096, 4096, 128256, device, dtype)],
        }
    else:
        result = {
            "from_logits": [from_logits(2048, 49152, device, dtype, compiled=False)],
            "from_hidden": [from_hidden(1024, 576, 49152, device, dtype)],
        }
    for part in result["from_logits"]:
        print(f"\nlog-probs from logits, N={part['n']} V={part['v']} {part['dtype']}")
        for name, row in part["variants"].items():
            print(f"  {name:14}", {key: value if value is None else round(value, 4) for key, value in row.items()})
    for part in result["from_hidden"]:
        print(f"\nloss from hidden states, N={part['n']} D={part['d']} V={part['v']} {part['dtype']}")
        for case, rows in part["cases"].items():
            for name, row in rows.items():
                print(
                    f"  {case:12} {name:12}",
                    {key: value if value is None else round(value, 4) for key, value in row.items()},
                )
    if options.results:
        print("written to", write_result("tiny" if options.tiny else "logprobs", result, options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
