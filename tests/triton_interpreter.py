"""Mends of Triton's interpreter (of triton 3.6, 3.7 and 3.9), so that what kernels compute can be tested on a CPU.

- A conversion to bf16 truncates; devices round to nearest even.
- `tl.dot` of bf16 operands multiplies the integers that hold their bits.
- `tl.fma` rounds the product, which devices do not.
- Every call of one kernel function by another patches triton.language anew, which takes most of the time.
"""

import numpy as np


def mend() -> None:
    """Mend the interpreter in this process; does nothing without triton, or the second time."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if getattr(interpreter, "_mended_by_fastdpo", False):
        return
    interpreter._mended_by_fastdpo = True
    tl, round_toward_zero = interpreter.tl, interpreter._ir.ROUNDING_MODE.RTZ
    convert_float, builder = interpreter._convert_float, interpreter.InterpreterBuilder
    create_dot, create_fma = builder.create_dot, builder.create_fma

    def mended_convert_float(data, input_dtype, output_dtype, rounding_mode):
        narrows_to_bf16 = output_dtype == tl.bfloat16 and input_dtype in (tl.float32, tl.float16)
        if narrows_to_bf16 and rounding_mode != round_toward_zero:
            return bf16_bits(data.astype(np.float32))  # exact for float16
        return convert_float(data, input_dtype, output_dtype, rounding_mode)

    def mended_create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            interpreter.TensorHandle(bf16_values(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def mended_create_fma(self, x, y, z):
        if x.dtype.scalar != tl.float32:
            return create_fma(self, x, y, z)
        # The product of two float32 is exact in float64, and the sum is rounded twice, but for ties as once.
        value = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(value.astype(np.float32), x.dtype)

    grid_call, patch_lang, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def mended_grid_call(self, *args, **kwargs):
        patched.clear()
        return grid_call(self, *args, **kwargs)

    def mended_patch_lang(fn):
        if fn.__module__ in patched:  # the modules that it sees are patched already
            return None
        patched.add(fn.__module__)
        return patch_lang(fn)

    interpreter.GridExecutor.__call__ = mended_grid_call
    interpreter._patch_lang = mended_patch_lang
    interpreter._convert_float = mended_convert_float
    builder.create_fma = mended_create_fma
    builder.create_dot = mended_create_dot


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 values -> the uint16 bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    # Up to 0x7fff below half a unit of the last kept bit, 0x8000 (a tie goes up) where that bit is odd.
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """The uint16 bits of bf16 numbers -> float32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
