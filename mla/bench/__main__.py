"""`python -m mla.bench`."""

from __future__ import annotations

import sys

from mla.bench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
