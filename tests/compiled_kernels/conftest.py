"""Kernels are compiled where there is a Triton; the first line of a run says when there is none."""

from __future__ import annotations

from triton_here import lacking

collect_ignore_glob = ["test_*.py"] if lacking() else []
