"""Mistakes in the kernels of the small ops."""

from mutating import mistakes

SMALL = mistakes(
    "pointwise",
    {
        "eps is lost": (
            "factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps)",
            "factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH)",
        ),
        "the mean is over the padded row": (
            "tl.sum(wide * wide, 0) / WIDTH",
            "tl.sum(wide * wide, 0) / WIDE",
        ),
        "rows are taken for contiguous": ("x + row * x_row + column", "x + row * WIDTH + column"),
        "pairs turn the other way": ("(a * cos - b * sin).to(out", "(a * cos + b * sin).to(out"),
        "heads behind the last are rotated": (
            "there = (head < HEADS)[:, None] & has_pair[None, :]",
            "there = (head >= 0)[:, None] & has_pair[None, :]",
        ),
        "slots are taken for tokens": ("tl.load(slots + token) * TOKEN", "token * TOKEN"),
        "a latent is written over its whole padded width": (
            "put(row, latent, stored_scale, 0, LATENT,",
            "put(row, latent, stored_scale, 0, WIDE_LATENT,",
        ),
        "the shared key is not turned": ("if PAIRS > 0:", "if PAIRS < 0:"),
        "the shared key turns the other way": (
            "tl.where(left, -others, others)",
            "tl.where(left, others, -others)",
        ),
        "the shared key is turned by the angles of the first token": (
            "source + LATENT, angles,",
            "source + LATENT, cos_sin,",
        ),
        "the first heads are left out where the latent is written": (
            "tl.program_id(1) - 1,",
            "tl.program_id(1),",
        ),
        "queries are those of the first token where the latent is written": (
            "x + token * x_token, angles,",
            "x, angles,",
        ),
        "rotated queries are taken for contiguous where the latent is written": (
            "angles, out + token * out_token, tl.program_id(1) - 1,",
            "angles, out + token * HEADS * 2 * PAIRS, tl.program_id(1) - 1,",
        ),
        "a norm is rounded before its weight": (
            "(wide * factor * by).to(out",
            "((wide * factor).to(out.dtype.element_ty).to(tl.float32) * by).to(out",
        ),
        "slots are held in 32 bits": (
            "tl.load(slots + token) * T",
            "tl.load(slots + token).to(tl.int32) * T",
        ),
    },
)
