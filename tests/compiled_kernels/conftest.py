"""Kernels are compiled where there is a Triton; the first line of a run says when there is none."""

from __future__ import annotations

import sys
from pathlib import Path

from triton_here import lacking

sys.path.append(str(Path(__file__).parents[2]))  # benchmarks/ is no part of the installed packages

collect_ignore_glob = ["test_*.py"] if lacking() else []
