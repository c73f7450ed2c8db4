"""`python -m mla.bench`."""

from __future__ import annotations

import sys

from mla.bench.cli.main import main
from mla.command import console

if __name__ == "__main__":
    code = main()
    console.close()
    sys.exit(code)
