"""The runner's own clock, bound before any plugin is loaded."""

from time import perf_counter_ns as now_ns

__all__ = ["now_ns"]
