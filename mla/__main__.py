"""`python -m mla` names the two commands."""

import sys

if __name__ == "__main__":
    sys.stdout.write(
        "mla-bench: measure MLA on a device (--help)\nmla-conformance: check the ops of a backend (--help)\n"
    )
