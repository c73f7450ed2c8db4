"""`python -m mla.conformance`."""

from __future__ import annotations

import os
import sys

from mla.command import console
from mla.conformance.cli import main

if __name__ == "__main__":
    # Cases are small: beside other work, OpenMP threads that spin until the last one gets a CPU take ten
    # times as long as threads that sleep. OpenMP reads this when torch is loaded, which comes later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = main()
    console.close()
    sys.exit(code)
