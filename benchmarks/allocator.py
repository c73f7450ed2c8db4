"""What glibc does with freed memory, chosen when a process starts.

`python benchmarks/allocator.py COMMAND...` runs a command whose processes keep their temporaries.

By default it maps tensors above a threshold (32 MiB at most), faults them in, and returns them in every call.
That costs most where temporaries are large, and is no property of what is compared: so both are shown.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
# Keep temporaries in the process.
TUNABLES = ":".join(
    f"glibc.malloc.{name}={size}"
    for name, size in (("mmap_threshold", 32 << 30), ("trim_threshold", 32 << 30), ("top_pad", 256 << 20))
)


if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, VARIABLE: TUNABLES})
