"""Forms of arithmetic are no part of an installed package: they are imported from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

# Last on the path, unlike pytest's `pythonpath`: the checkout must not shadow packages that are installed.
sys.path.append(str(Path(__file__).parents[2]))
