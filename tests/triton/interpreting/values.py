"""Arithmetic of numbers that the interpreter keeps as integers, bfloat16 and float8: on their values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from interpreting.faults import Overflow, place

CODED = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
LEAST_DOT = (16, 16, 16)  # rows, columns and terms of a product: what every compiler accepts
_CAN_OVERFLOW = (np.add, np.subtract, np.multiply)
_PRECISION = interpreter._ir.INPUT_PRECISION
_TO_NEAREST = interpreter._ir.ROUNDING_MODE.RTNE


def decoded(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Return the numbers that `data` of this Triton dtype stands for."""
    if dtype not in CODED:
        return data
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(np.array(data)).view(CODED[dtype]).float().numpy()


def encoded(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """Return numbers as the interpreter keeps them, rounded to nearest; float8 saturates as on a device."""
    stored = interpreter._get_np_dtype(dtype)
    if dtype not in CODED:
        return np.asarray(numbers).astype(stored, copy=False)
    wide, target = torch.from_numpy(np.array(numbers, dtype=np.float32)), CODED[dtype]
    if dtype != tl.bfloat16:
        most = torch.finfo(target).max
        wide = wide.clamp(-most, most)
    codes = torch.int16 if dtype == tl.bfloat16 else torch.uint8
    return wide.to(target).view(codes).numpy().view(stored)


def handle(numbers: np.ndarray, dtype: Any) -> TensorHandle:
    """Return numbers as a value of this Triton dtype."""
    return TensorHandle(encoded(numbers, dtype), dtype)


def numbers_of(value: TensorHandle) -> np.ndarray:
    """Return the numbers of a value."""
    return decoded(value.data, value.dtype.scalar)


class Values(InterpreterBuilder):  # type: ignore[misc]
    """Casts, arithmetic, comparisons and products."""

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if src.dtype.scalar in CODED or dst_type.scalar in CODED:
            return handle(numbers_of(src), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if rounding_mode in (None, _TO_NEAREST):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        kind = lhs.dtype.scalar
        if kind in CODED:
            result = op(numbers_of(lhs), numbers_of(rhs))
            return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else handle(result, kind)
        made = super().binary_op(lhs, rhs, op)
        if made.data.dtype == np.bool_:  # the interpreter would keep the operands' dtype
            return TensorHandle(made.data, tl.int1)
        if kind == tl.int32 and op in _CAN_OVERFLOW:
            _require_fit(op, lhs.data, rhs.data, made.data)
        return made

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        if arg.dtype.scalar in CODED:
            return handle(op(numbers_of(arg)), arg.dtype.scalar)
        return super().unary_op(arg, op)

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Any) -> TensorHandle:
        kind = other.dtype.scalar
        if kind in CODED and op is not np.where:
            return handle(op(numbers_of(lhs), numbers_of(rhs), numbers_of(other)), kind)
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return handle(numbers_of(x) * numbers_of(y) + numbers_of(z), z.dtype.scalar)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)  # older interpreters let NaN through

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def get_bf16(self, value: float) -> TensorHandle:
        return handle(np.array([value], np.float32), tl.bfloat16)

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, imprecise: Any
    ) -> TensorHandle:
        operands = [numbers_of(a), numbers_of(b)]
        if a.dtype.scalar == tl.float32 and input_precision == _PRECISION.TF32:
            operands = [_tf32(operand) for operand in operands]
        sums = np.int32 if np.issubdtype(d.data.dtype, np.integer) else np.float32
        product = np.matmul(*(operand.astype(sums, copy=False) for operand in operands))
        return TensorHandle((product + d.data).astype(d.data.dtype, copy=False), d.dtype.scalar)


def _require_fit(op: Any, left: np.ndarray, right: np.ndarray, result: np.ndarray) -> None:
    if (op(left.astype(np.int64), right.astype(np.int64)) != result).any():
        raise Overflow(f"{op.__name__} in int32 overflows ({place()})")


def _tf32(numbers: np.ndarray) -> np.ndarray:
    """Round fp32 to the 10 bits that a TF32 product reads."""
    bits = (np.ascontiguousarray(numbers).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(numbers), bits.view(np.float32), numbers)


def _on_numbers(upstream: type) -> type:
    """Return a class of reductions or scans that works on numbers."""

    class OnNumbers(upstream):  # type: ignore[misc]
        def apply_impl(self, input: Any) -> Any:
            kinds = [value.dtype.scalar for value in input]
            wide = tuple(
                _widened(value) if kind in CODED else value for value, kind in zip(input, kinds, strict=True)
            )
            results = super().apply_impl(wide)
            several = isinstance(results, (list, tuple))
            made = [
                _narrowed(value, kind) if kind in CODED else value
                for value, kind in zip(results if several else [results], kinds, strict=False)
            ]
            return [*made, *results[len(made) :]] if several else made[0]

    return OnNumbers


def _widened(value: Any) -> Any:
    return _like(value, handle(numbers_of(value.handle), tl.float32), tl.float32)


def _narrowed(value: Any, dtype: Any) -> Any:
    return _like(value, handle(numbers_of(value.handle), dtype), dtype)


def _like(value: Any, data: TensorHandle, dtype: Any) -> Any:
    shaped = value.type.is_block()
    return tl.core.tensor(data, tl.block_type(dtype, list(value.shape)) if shaped else dtype)


ReduceOps, ScanOps = _on_numbers(interpreter.ReduceOps), _on_numbers(interpreter.ScanOps)
