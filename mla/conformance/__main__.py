"""`python -m mla.conformance`, and the script `mla-conformance`."""

from __future__ import annotations

import os
import sys
import time

from mla.command import last_words


def start() -> int:
    """Run the command line in a child process; return the exit code."""
    if last_words.loads_plugins(sys.argv[1:]) and (code := last_words.supervise()) is not None:
        return code
    # Cases are small: beside other work, OpenMP threads that spin until the last one gets a CPU take ten
    # times as long as threads that sleep. OpenMP reads this when torch is loaded, which comes later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    started = time.monotonic()  # importing torch takes seconds of the time asked for
    from mla.command import console
    from mla.conformance.cli import main

    code = main(started=started)
    console.close()
    last_words.dismiss(code)
    return code


if __name__ == "__main__":
    sys.exit(start())
