"""Kernels that only read or write tokens of a cache format, or convert e4m3."""

import triton
import triton.language as tl

from mla_backends.triton_ops.jit.formats import cached, e4m3_codes, e4m3_numbers, int8_scales, put


@triton.jit
def write_all(
    numbers, cache, scale, LATENT: tl.constexpr, WIDE: tl.constexpr, ROPE: tl.constexpr,
    WIDE_ROPE: tl.constexpr, TOKEN: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.arange(0, WIDE)
    source = numbers + token * (LATENT + ROPE)
    latent = tl.load(source + column, mask=column < LATENT, other=0.0)
    put(cache + token * TOKEN, latent, scale, 0, LATENT, WIDE, LATENT, ROPE, FORMAT, NATIVE)
    if ROPE > 0:
        turn = tl.arange(0, WIDE_ROPE)
        key = tl.load(source + LATENT + turn, mask=turn < ROPE, other=0.0)
        put(cache + token * TOKEN, key, scale, LATENT, ROPE, WIDE_ROPE, LATENT, ROPE, FORMAT, NATIVE)


@triton.jit
def read_all(
    cache, numbers, tokens, scale, KEYS: tl.constexpr, LATENT: tl.constexpr, WIDE: tl.constexpr,
    ROPE: tl.constexpr, WIDE_ROPE: tl.constexpr, TOKEN: tl.constexpr, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, KEYS)
    there = token < tokens
    target = numbers + token[:, None] * (LATENT + ROPE)
    column = tl.arange(0, WIDE)
    row = cache + token * TOKEN
    latent = cached(row, there, tl.float32, 0, WIDE, LATENT, ROPE, FORMAT, NATIVE)
    if FORMAT == "int8":
        latent = latent * int8_scales(row, there, 0, LATENT, ROPE)[:, None]
    tl.store(target + column[None, :], latent, mask=there[:, None] & (column < LATENT)[None, :])
    if ROPE > 0:
        turn = tl.arange(0, WIDE_ROPE)
        key = cached(row, there, tl.float32, LATENT, WIDE_ROPE, LATENT, ROPE, FORMAT, NATIVE)
        if FORMAT == "int8":
            key = key * int8_scales(row, there, 1, LATENT, ROPE)[:, None]
        tl.store(target + LATENT + turn[None, :], key, mask=there[:, None] & (turn < ROPE)[None, :])


@triton.jit
def encode(x, out, N: tl.constexpr, NATIVE: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, e4m3_codes(tl.load(x + at), NATIVE))


@triton.jit
def decode(x, out, N: tl.constexpr, NATIVE: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, e4m3_numbers(tl.load(x + at), tl.float32, NATIVE))
