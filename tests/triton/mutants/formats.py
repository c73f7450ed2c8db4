"""Mistakes in what kernels read and write of cache formats."""

from __future__ import annotations

from functools import partial

from mutating import Mutant

_formats = partial(Mutant, room="formats")

FORMATS = (
    _formats(
        "codes of NaN are read as 480",
        old='tl.where((codes & 0x7F) == 0x7F, float("nan"), numbers)',
        new="numbers",
    ),
    _formats("only one code of NaN is", old="(codes & 0x7F) == 0x7F", new="codes == 0x7F"),
    _formats("the sign of e4m3 is lost", old="((wide & 0x80) << 8)", new="((wide & 0x80) << 7)"),
    _formats("e4m3 of the other bias", old="tl.float32) * 256.0", new="tl.float32) * 128.0"),
    _formats("saturation to NaN", old="bits & 0x7FFFFFFF, 0x43E00000", new="bits & 0x7FFFFFFF, 0x43F00000"),
    _formats("saturation one code early", old="0x43E00000)", new="0x43D00000)"),
    _formats("halves are rounded up", old="0x7FFFF + ((size >> 20) & 1)", new="0x80000"),
    _formats("numbers are cut to e4m3", old="size + 0x7FFFF + ((size >> 20) & 1)", new="size"),
    _formats(
        "denormals of e4m3 are those of normals",
        old="tl.where(size < 0x3C800000, small, normal)",
        new="normal",
    ),
    _formats("NaN saturates", old="tl.where(numbers != numbers, 0x7F, code)", new="code"),
    _formats(
        "numbers are rounded to bfloat16 before",
        old="codes = e4m3_codes(tl.div_rn(parts,",
        new="codes = e4m3_codes(tl.div_rn(parts.to(tl.bfloat16).to(tl.float32),",
    ),
    _formats(
        "scales are those of the tile before",
        old="group // SHARING * STEP)",
        new="tl.maximum(group // SHARING - 1, 0) * STEP)",
    ),
    _formats("scales are read one further", old="(AT + group", new="(AT + STEP + group"),
    _formats(
        "scales of upper halves are those of lower ones",
        old="group = FIRST + tl.arange(0, N // WIDTH) * WIDTH  # its",
        new="group = tl.arange(0, N // WIDTH) * WIDTH  # its",
    ),
    _formats(
        "scales are written in the other order",
        old=".to(tl.pointer_type(tl.float32)) + tile,",
        new=".to(tl.pointer_type(tl.float32)) + (COUNT - 1) // WIDTH - tile,",
    ),
    _formats("powers of two are below", old="bits + 0x7FFFFF", new="bits"),
    _formats("a power of two is doubled", old="bits + 0x7FFFFF", new="bits + 0x800000"),
    _formats(
        "the rule of the other kind",
        old='if FORMAT == "fp8_ds_mla":\n        bits',
        new='if FORMAT == "fp8_ds_mla_any":\n        bits',
    ),
    _formats(
        "the least scale is lost", old="tl.maximum(ratio, LEAST_RATIO)", new="tl.maximum(ratio, LEAST_SCALE)"
    ),
    _formats(
        "a tile of zeros divides by zero", old="scales = tl.maximum(ratio, LEAST_SCALE)", new="scales = ratio"
    ),
    _formats(
        "NaN reaches the scale",
        old="tl.where(parts != parts, 0.0, tl.minimum",
        new="tl.where(parts != parts, FP32_MAX, tl.minimum",
    ),
    _formats("infinity reaches the scale", old="tl.minimum(tl.abs(parts), FP32_MAX)", new="tl.abs(parts)"),
    _formats(
        "the scale is of the largest, not of its size", old="tl.abs(parts), FP32_MAX", new="parts, FP32_MAX"
    ),
    _formats(
        "scales of int8 are swapped",
        old="LATENT + ROPE + 4 * PART",
        new="LATENT + ROPE + 4 - 4 * PART",
    ),
    _formats(
        "scales of int8 are written swapped",
        old="N, LATENT + ROPE + 4 * (FIRST // LATENT))\n        if",
        new="N, LATENT + ROPE + 4 - 4 * (FIRST // LATENT))\n        if",
    ),
    _formats(
        "a key of no columns has no scale",
        old="tl.pointer_type(tl.float32)), LEAST_SCALE)",
        new="tl.pointer_type(tl.float32)), 0.0)",
    ),
    _formats(
        "int8 is unsigned",
        old=".to(tl.int8, bitcast=True)\n        numbers = codes.to(dtype)",
        new="\n        numbers = codes.to(dtype)",
    ),
    _formats("int8 is cut", old="+ TO_WHOLE) - TO_WHOLE\n", new="+ TO_WHOLE - 0.5) - TO_WHOLE\n"),
    _formats(
        "halves of q8_0 are rounded to even",
        old="(tl.floor(2.0 * size).to(tl.int32) + 1) >> 1",
        new="((size + TO_WHOLE) - TO_WHOLE).to(tl.int32)",
    ),
    _formats(
        "q8_0 divides",
        old="ratio = parts * inverse[:, None]",
        new="ratio = tl.div_rn(parts, parts * 0.0 + tl.maximum(scales, LEAST_SCALE)[:, None])",
    ),
    _formats(
        "codes of q8_0 are those of the rounded scale",
        old="scales = over(largest(parts), INT8_MAX)\n    inverse",
        new="scales = over(largest(parts), INT8_MAX).to(tl.float16).to(tl.float32)\n    inverse",
    ),
    _formats(
        "a scale of q8_0 beyond float16 is infinite",
        old="kept = tl.minimum(scales, FP16_MAX)",
        new="kept = scales",
    ),
    _formats(
        "the key of q8_0 begins at its first block",
        old="begins = row + (FIRST // BLOCK + block)",
        new="begins = row + (FIRST // BLOCK * 0 + block)",
    ),
    _formats(
        "the key is quantised",
        old="tl.pointer_type(tl.bfloat16)) + at, key.to(tl.bfloat16)",
        new="tl.pointer_type(tl.bfloat16)) + at, key.to(tl.float8e4nv).to(tl.bfloat16)",
    ),
    _formats("the key saturates to infinity", old="tl.clamp(numbers, -BF16_MAX, BF16_MAX)", new="numbers"),
    _formats(
        "the key is read where scales lie",
        old="keys = (row + (LATENT + 4 * ((LATENT + TILE - 1) // TILE)))",
        new="keys = (row + LATENT)",
    ),
    _formats(
        "fp8 is written over no scale",
        old="tl.div_rn(numbers, scale + tl.zeros_like(numbers))",
        new="numbers",
    ),
    _formats(
        "the inverse is multiplied",
        old="tl.div_rn(numbers, scale + tl.zeros_like(numbers))",
        new="numbers * (1.0 / scale)",
    ),
    _formats(
        "amax times an inverse",
        old="tl.div_rn(numbers, tl.zeros_like(numbers) + divisor)",
        new="numbers * (1.0 / divisor)",
    ),
    _formats(
        "tokens behind the last are read",
        old="inside = there[:, None] & (column < END)[None, :]",
        new="inside = (tl.arange(0, row.shape[0]) >= 0)[:, None] & (column < END)[None, :]",
    ),
    _formats(
        "columns behind the latent are written",
        old="tl.store(row + FIRST + at, codes, mask=at < COUNT)",
        new="tl.store(row + FIRST + at, codes)",
    ),
)
STORED = (
    Mutant("values are not scaled", "latent", old="weight = weight * by\n", new="weight = weight\n"),
    Mutant("latents have the scale of keys", "latent", old="key, there, 0, L", new="key, there, 1, L"),
    Mutant("keys have the scale of latents", "latent", old="key, there, 1, L", new="key, there, 0, L"),
    Mutant("the product of keys is lost", "latent", old="score * by + of_keys", new="score * by"),
    Mutant(
        "the second part of numbers is lost",
        "latent",
        old="if numbers.dtype != q.dtype:",
        new="if numbers.dtype == tl.int1:",
    ),
    Mutant("the scale of fp8 is lost", "latent", old="whole = whole / stored_scale", new="whole = whole"),
    Mutant(
        "tokens of bytes lie as numbers do",
        "latent",
        old="(PAGE * TOKEN) + (start % PAGE + tl.arange(0, KEYS)) * TOKEN",
        new="(PAGE * (LATENT + ROPE)) + (start % PAGE + tl.arange(0, KEYS)) * (LATENT + ROPE)",
    ),
    Mutant(
        "tokens of bytes lie as numbers do where pages are odd",
        "latent",
        old="place % PAGE) * TOKEN",
        new="place % PAGE) * (LATENT + ROPE)",
    ),
    Mutant(
        "bytes are written where numbers would be",
        "pointwise",
        old="tl.load(slots + token) * TOKEN",
        new="tl.load(slots + token) * (LATENT + 2 * PAIRS)",
    ),
    Mutant(
        "the key is written as the latent of another token",
        "pointwise",
        old="put(row, key, stored_scale, LATENT,",
        new="put(row, key, stored_scale, 0,",
    ),
)
