"""`python -m mla.bench`, and the script `mla-bench`."""

from __future__ import annotations

import os
import sys

from mla.command import last_words

# Commands that load no plugin into their process.
LIGHT = ("compare", "doctor", "export", "list", "new-backend", "report", "show")


def start() -> int:
    """Run the command line, in a child process if it loads a plugin; return the exit code."""
    if last_words.loads_plugins(sys.argv[1:], LIGHT) and (code := last_words.supervise()) is not None:
        return code
    # Beside other work, OpenMP threads that spin for milliseconds until the last one gets a CPU take five
    # times as long. A tenth of a millisecond bridges the gap between two ops. Read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from mla.bench.cli.main import main
    from mla.command import console

    code = main()
    console.close()
    last_words.dismiss(code)
    return code


if __name__ == "__main__":
    sys.exit(start())
