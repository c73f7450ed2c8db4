"""Read one attention layer from a folder of safetensors; anything that could be misread is refused.

`read_layer` looks at names and headers only, so that every mistake they reveal is found before a value is
read. The `StoredLayer` it returns reads weights one at a time, in blocks of rows.
"""

from mla.checkpoint.folder import (
    CheckpointError,
    LazyState,
    Part,
    StoredLayer,
    fingerprint,
    finite,
    refuse_other_formats,
)
from mla.checkpoint.read import read_layer

__all__ = [
    "CheckpointError", "LazyState", "Part", "StoredLayer", "fingerprint", "finite", "read_layer",
    "refuse_other_formats",
]  # fmt: skip
