"""`python -m mla.conformance`."""

from __future__ import annotations

import sys

from mla.conformance.cli import main

if __name__ == "__main__":
    sys.exit(main())
