"""A layer on a poisoned cache."""

from layer_cases import make_case

__all__ = ["make_case"]
