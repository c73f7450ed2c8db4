"""`python -m mla.conformance`."""

from __future__ import annotations

import sys

from mla.command import console
from mla.conformance.cli import main

if __name__ == "__main__":
    code = main()
    console.close()
    sys.exit(code)
