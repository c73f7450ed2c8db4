"""Small pieces of the sentences and tables that users read. Needs no torch."""

from __future__ import annotations


def dtype_name(dtype: object) -> str:
    """Return "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, which may be empty: stacks append pages of theirs."""
    return str(error).strip().partition("\n")[0].strip()
