"""Fixtures about a whole layer and about the ops around it."""

from layer_cases import (
    assert_rows_close,
    check_expanded,
    check_latent,
    check_layer,
    make_case,
)

__all__ = [
    "assert_rows_close",
    "check_expanded",
    "check_latent",
    "check_layer",
    "make_case",
]
