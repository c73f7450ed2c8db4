"""The interpreter itself: exact numbers, and errors where a device would fail."""

from __future__ import annotations

from typing import Any

import interpreting
import pytest
import torch
import triton
import triton.language as tl

CODED = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def cast(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def combine(x, y, sums, products, less, largest, total, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x + at)
    b = tl.load(y + at)
    tl.store(sums + at, a + b)
    tl.store(products + at, a * b)
    tl.store(less + at, a < b)
    tl.store(largest, tl.max(a, 0))
    tl.store(total, tl.sum(a, 0))


@triton.jit
def multiply(x, y, out, PRECISION: tl.constexpr, N: tl.constexpr):
    row = tl.arange(0, N)[:, None]
    column = tl.arange(0, N)[None, :]
    left = tl.load(x + row * N + column)
    right = tl.load(y + row * N + column)
    acc = tl.full([N, N], 0.0, tl.float32)
    tl.store(out + row * N + column, tl.dot(left, right, acc, input_precision=PRECISION))


@triton.jit
def gather(x, places, out, count, N: tl.constexpr):
    at = tl.arange(0, N)
    place = tl.load(places + at)
    tl.store(out + at, tl.load(x + place, mask=at < count, other=0.0), mask=at < count)


@triton.jit
def scatter(places, out, N: tl.constexpr):
    place = tl.load(places + tl.arange(0, N))
    tl.store(out + place, 1.0)


@triton.jit
def count(places, out, N: tl.constexpr):
    tl.atomic_add(out + tl.load(places + tl.arange(0, N)), 1)


@triton.jit
def offset(x, out, stride):
    tl.store(out, tl.program_id(0) * stride + tl.load(x))


@triton.jit
def visit(out, next_place):
    tl.store(out + tl.atomic_add(next_place, 1), tl.program_id(0) * 10 + tl.program_id(1))


def every_code(dtype: torch.dtype) -> torch.Tensor:
    """Return every number of a dtype of 8 bits, or many of one of 16, infinities and NaN included."""
    if dtype.itemsize == 1:
        return torch.arange(256).to(torch.uint8).view(dtype)
    return torch.arange(-(2**15), 2**15, 16).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_every_number_is_read_as_it_is(dtype: torch.dtype) -> None:
    x = every_code(dtype)
    out = torch.empty(len(x))
    cast[(1,)](x, out, N=len(x))
    assert torch.equal(out.nan_to_num(nan=123.0), x.float().nan_to_num(nan=123.0))


@pytest.mark.parametrize("dtype", CODED, ids=str)
def test_numbers_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    finite = every_code(dtype).float()
    finite = finite[finite.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    x = torch.cat((finite, middles, middles.nextafter(finite[1:]), middles.nextafter(finite[:-1])))
    x = torch.cat((x, x.new_zeros(triton.next_power_of_2(len(x)) - len(x))))
    out = torch.empty(len(x), dtype=dtype)
    cast[(1,)](x, out, N=len(x))
    assert torch.equal(out.float(), x.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_and_reductions_work_on_numbers(dtype: torch.dtype) -> None:
    x, y = (torch.randn(64, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    sums, products = torch.empty_like(x), torch.empty_like(x)
    less, largest, total = torch.empty(64, dtype=torch.bool), torch.empty(1), torch.empty(1)
    combine[(1,)](x, y, sums, products, less, largest, total, N=64)
    assert torch.equal(sums, x + y)
    assert torch.equal(products, x * y)
    assert torch.equal(less, x < y)
    assert largest.item() == x.max().item()
    assert total.item() == pytest.approx(x.float().sum().item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [*CODED, torch.float16], ids=str)
def test_products_are_of_numbers_and_summed_in_fp32(dtype: torch.dtype) -> None:
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    out = torch.empty(32, 32)
    multiply[(1,)](x, y, out, PRECISION="tf32", N=32)
    assert torch.allclose(out, x.float() @ y.float(), atol=1e-5)


def test_fp32_products_lose_digits_unless_they_ask_for_ieee() -> None:
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    errors = {}
    for precision in ("tf32", "ieee"):
        out = torch.empty(32, 32)
        multiply[(1,)](x, y, out, PRECISION=precision, N=32)
        errors[precision] = (out.double() - x.double() @ y.double()).abs().max().item()
    assert errors["ieee"] < 1e-5 < 1e-4 < errors["tf32"] < 1e-1


def test_a_product_smaller_than_a_device_multiplies_is_refused() -> None:
    x, out = torch.zeros(8, 8), torch.zeros(8, 8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="shape"):
        multiply[(1,)](x, x, out, PRECISION="ieee", N=8)


@pytest.mark.parametrize("place", [4, -1, 10**9])
def test_a_load_outside_all_arguments_names_kernel_program_and_line(place: int) -> None:
    x, out = torch.arange(4.0), torch.zeros(4)
    line = r"`gather`, program \(0, 0, 0\): load of 1 of 4 addresses outside .*check_interpreter\.py:\d+"
    with pytest.raises(interpreting.OutOfBounds, match=line):
        gather[(1,)](x, torch.tensor([0, 1, place, 2]), out, 4, N=4)


@pytest.mark.parametrize(("kernel", "what"), [(scatter, "store"), (count, "atomic")], ids=["store", "atomic"])
def test_a_write_outside_all_arguments_is_found(kernel: Any, what: str) -> None:
    out = torch.zeros(4, dtype=torch.float32 if kernel is scatter else torch.int32)
    kernel[(1,)](torch.tensor([0, 3]), out, N=2)
    assert out.tolist() == [1, 0, 0, 1]
    with pytest.raises(interpreting.OutOfBounds, match=f"{what} of 1 of 2"):
        kernel[(1,)](torch.tensor([0, 4]), out, N=2)


def test_memory_around_a_view_is_inside_its_storage() -> None:
    """What a kernel may not read there is for NaN to show."""
    whole, out = torch.arange(6.0), torch.zeros(4)
    gather[(1,)](whole[2:4], torch.tensor([-2, 0, 1, 3]), out, 4, N=4)
    assert out.tolist() == [0, 2, 3, 5]


def test_an_index_that_overflows_is_found() -> None:
    x, out = torch.tensor([1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    offset[(2,)](x, out, 2**31 - 2)
    with pytest.raises(interpreting.Overflow, match=r"`offset`, program \(2, 0, 0\): multiply in int32"):
        offset[(3,)](x, out, 2**31 - 2)
    with pytest.raises(interpreting.Overflow, match="add in int32"):
        offset[(2,)](x, out, 2**31 - 1)


def visited(grid: tuple[int, int]) -> list[int]:
    out, place = torch.zeros(grid[0] * grid[1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    visit[grid](out, place)
    return out.tolist()


def test_programs_run_in_order_or_in_any() -> None:
    in_order = [10 * x + y for x in range(4) for y in range(3)]
    assert visited((4, 3)) == in_order
    with interpreting.shuffled(1):
        grid = visited((4, 3))
    assert grid != in_order
    assert sorted(grid) == in_order
    assert visited((4, 3)) == in_order
