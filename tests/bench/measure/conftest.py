"""Scenarios for the engine."""

from engine_bench import decode, make_bench, prefill

__all__ = ["decode", "make_bench", "prefill"]
