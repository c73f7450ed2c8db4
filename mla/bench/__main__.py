"""`python -m mla.bench`."""

from __future__ import annotations

import os
import sys

from mla.bench.cli.main import main
from mla.command import console

if __name__ == "__main__":
    # Beside other work, OpenMP threads that spin for milliseconds until the last one gets a CPU take five
    # times as long. A tenth of a millisecond bridges the gap between two ops. Read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    code = main()
    console.close()
    sys.exit(code)
