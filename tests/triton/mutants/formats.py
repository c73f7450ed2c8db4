"""Mistakes in what kernels read and write of cache formats."""

from mutating import mistakes

FORMATS = mistakes(
    "formats",
    {
        "codes of NaN are read as 480": (
            'tl.where((codes & 0x7F) == 0x7F, float("nan"), numbers)',
            "numbers",
        ),
        "only one code of NaN is": ("(codes & 0x7F) == 0x7F", "codes == 0x7F"),
        "the sign of e4m3 is lost": ("((wide & 0x80) << 8)", "((wide & 0x80) << 7)"),
        "e4m3 of the other bias": ("tl.float32) * 256.0", "tl.float32) * 128.0"),
        "saturation to NaN": ("bits & 0x7FFFFFFF, 0x43E00000", "bits & 0x7FFFFFFF, 0x43F00000"),
        "saturation one code early": ("0x43E00000)", "0x43D00000)"),
        "halves are rounded up": ("0x7FFFF + ((size >> 20) & 1)", "0x80000"),
        "numbers are cut to e4m3": ("size + 0x7FFFF + ((size >> 20) & 1)", "size"),
        "denormals of e4m3 are those of normals": ("tl.where(size < 0x3C800000, small, normal)", "normal"),
        "NaN saturates": ("tl.where(numbers != numbers, 0x7F, code)", "code"),
        "numbers are rounded to bfloat16 before": (
            "codes = e4m3_codes(tl.div_rn(parts,",
            "codes = e4m3_codes(tl.div_rn(parts.to(tl.bfloat16).to(tl.float32),",
        ),
        "scales are those of the tile before": (
            "group // SHARING * STEP)",
            "tl.maximum(group // SHARING - 1, 0) * STEP)",
        ),
        "scales are read one further": ("(AT + group", "(AT + STEP + group"),
        "scales of upper halves are those of lower ones": (
            "group = FIRST + tl.arange(0, N // WIDTH) * WIDTH  # its",
            "group = tl.arange(0, N // WIDTH) * WIDTH  # its",
        ),
        "scales are written in the other order": (
            ".to(tl.pointer_type(tl.float32)) + tile,",
            ".to(tl.pointer_type(tl.float32)) + (COUNT - 1) // WIDTH - tile,",
        ),
        "powers of two are below": ("bits + 0x7FFFFF", "bits"),
        "a power of two is doubled": ("bits + 0x7FFFFF", "bits + 0x800000"),
        "the rule of the other kind": (
            'if FORMAT == "fp8_ds_mla":\n        bits',
            'if FORMAT == "fp8_ds_mla_any":\n        bits',
        ),
        "the least scale is lost": ("tl.maximum(ratio, LEAST_RATIO)", "tl.maximum(ratio, LEAST_SCALE)"),
        "a tile of zeros divides by zero": ("scales = tl.maximum(ratio, LEAST_SCALE)", "scales = ratio"),
        "NaN reaches the scale": (
            "tl.where(parts != parts, 0.0, tl.minimum",
            "tl.where(parts != parts, FP32_MAX, tl.minimum",
        ),
        "infinity reaches the scale": ("tl.minimum(tl.abs(parts), FP32_MAX)", "tl.abs(parts)"),
        "the scale is of the largest, not of its size": ("tl.abs(parts), FP32_MAX", "parts, FP32_MAX"),
        "scales of int8 are swapped": ("LATENT + ROPE + 4 * PART", "LATENT + ROPE + 4 - 4 * PART"),
        "scales of int8 are written swapped": (
            "N, LATENT + ROPE + 4 * (FIRST // LATENT))\n        if",
            "N, LATENT + ROPE + 4 - 4 * (FIRST // LATENT))\n        if",
        ),
        "a key of no columns has no scale": (
            "tl.pointer_type(tl.float32)), LEAST_SCALE)",
            "tl.pointer_type(tl.float32)), 0.0)",
        ),
        "int8 is unsigned": (
            ".to(tl.int8, bitcast=True)\n        numbers = codes.to(dtype)",
            "\n        numbers = codes.to(dtype)",
        ),
        "int8 is cut": ("+ TO_WHOLE) - TO_WHOLE\n", "+ TO_WHOLE - 0.5) - TO_WHOLE\n"),
        "halves of q8_0 are rounded to even": (
            "(tl.floor(2.0 * size).to(tl.int32) + 1) >> 1",
            "((size + TO_WHOLE) - TO_WHOLE).to(tl.int32)",
        ),
        "q8_0 divides": (
            "ratio = parts * inverse[:, None]",
            "ratio = tl.div_rn(parts, parts * 0.0 + tl.maximum(scales, LEAST_SCALE)[:, None])",
        ),
        "codes of q8_0 are those of the rounded scale": (
            "scales = over(largest(parts), INT8_MAX)\n    inverse",
            "scales = over(largest(parts), INT8_MAX).to(tl.float16).to(tl.float32)\n    inverse",
        ),
        "a scale of q8_0 beyond float16 is infinite": (
            "kept = tl.minimum(scales, FP16_MAX)",
            "kept = scales",
        ),
        "the key of q8_0 begins at its first block": (
            "begins = row + (FIRST // BLOCK + block)",
            "begins = row + (FIRST // BLOCK * 0 + block)",
        ),
        "the key is quantised": (
            "tl.pointer_type(tl.bfloat16)) + at, key.to(tl.bfloat16)",
            "tl.pointer_type(tl.bfloat16)) + at, key.to(tl.float8e4nv).to(tl.bfloat16)",
        ),
        "the key saturates to infinity": ("tl.clamp(numbers, -BF16_MAX, BF16_MAX)", "numbers"),
        "the key is read where scales lie": (
            "keys = (row + (LATENT + 4 * ((LATENT + TILE - 1) // TILE)))",
            "keys = (row + LATENT)",
        ),
        "fp8 is written over no scale": ("tl.div_rn(numbers, scale + tl.zeros_like(numbers))", "numbers"),
        "the inverse is multiplied": (
            "tl.div_rn(numbers, scale + tl.zeros_like(numbers))",
            "numbers * (1.0 / scale)",
        ),
        "amax times an inverse": (
            "tl.div_rn(numbers, tl.zeros_like(numbers) + divisor)",
            "numbers * (1.0 / divisor)",
        ),
        "tokens behind the last are read": (
            "inside = there[:, None] & (column < END)[None, :]",
            "inside = (tl.arange(0, row.shape[0]) >= 0)[:, None] & (column < END)[None, :]",
        ),
        "columns behind the latent are written": (
            "tl.store(row + FIRST + at, codes, mask=at < COUNT)",
            "tl.store(row + FIRST + at, codes)",
        ),
    },
)
STORED = (
    *mistakes(
        "latent",
        {
            "values are not scaled": ("weight = weight * by\n", "weight = weight\n"),
            "latents have the scale of keys": ("key, there, 0, L", "key, there, 1, L"),
            "keys have the scale of latents": ("key, there, 1, L", "key, there, 0, L"),
            "the product of keys is lost": ("score * by + of_keys", "score * by"),
            "the second part of numbers is lost": (
                "if numbers.dtype != q.dtype:",
                "if numbers.dtype == tl.int1:",
            ),
            "the scale of fp8 is lost": ("whole = whole / stored_scale", "whole = whole"),
            "tokens of bytes lie as numbers do": (
                "(PAGE * TOKEN) + (start % PAGE + tl.arange(0, KEYS)) * TOKEN",
                "(PAGE * (LATENT + ROPE)) + (start % PAGE + tl.arange(0, KEYS)) * (LATENT + ROPE)",
            ),
            "tokens of bytes lie as numbers do where pages are odd": (
                "place % PAGE) * TOKEN",
                "place % PAGE) * (LATENT + ROPE)",
            ),
        },
    ),
    *mistakes(
        "pointwise",
        {
            "bytes are written where numbers would be": (
                "tl.load(slots + token) * TOKEN",
                "tl.load(slots + token) * (LATENT + 2 * PAIRS)",
            ),
            "the key is written as the latent of another token": (
                "put(row, key, stored_scale, LATENT,",
                "put(row, key, stored_scale, 0,",
            ),
        },
    ),
)
