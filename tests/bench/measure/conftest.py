"""Scenarios for the engine."""

from engine_bench import decode, prefill

__all__ = ["decode", "prefill"]
