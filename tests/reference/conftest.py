"""Fixtures about ops: attention problems with their truth, and a layer that calls the ops."""

from layer_cases import assert_rows_close, latent_problem, make_case

__all__ = ["assert_rows_close", "latent_problem", "make_case"]
