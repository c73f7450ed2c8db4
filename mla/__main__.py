"""`python -m mla` names the two commands there are."""

import sys

COMMANDS = """\
mla-bench        or python -m mla.bench: measure MLA on a device (--help)
mla-conformance  or python -m mla.conformance: check the ops of a backend (--help)
"""

if __name__ == "__main__":
    sys.stdout.write(COMMANDS)
