"""Layers of other families, judged per token."""

from layer_cases import assert_rows_close, make_case

__all__ = ["assert_rows_close", "make_case"]
