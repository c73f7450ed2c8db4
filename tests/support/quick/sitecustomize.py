"""Limits that take no time to measure, in processes of tests: what `ceiling_cases` does, at the import.

Python imports this before all else where PYTHONPATH names its folder; nothing heavy may be imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

CONSTANTS: dict[str, dict[str, Any]] = {
    "mla.bench.limits.microbench": {"SIDES": (256, 512), "REPEAT_S": 0.0, "REPEATS": 2},
}


class QuickLimits:
    """Finds the modules above, and changes their constants once they are loaded."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """Return how to load one of the modules; None for all others."""
        spec = PathFinder.find_spec(name, path) if name in CONSTANTS else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            vars(module).update(CONSTANTS[name])

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, QuickLimits)  # type: ignore[arg-type]
