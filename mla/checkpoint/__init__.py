"""Read one attention layer of a checkpoint folder of safetensors; whatever cannot be read right is refused.

`read_layer` looks at names and headers only, so that every mistake they show is found before a value is
read. The `StoredLayer` it returns reads weights one at a time, in blocks of rows.
"""

from mla.checkpoint.errors import CheckpointError
from mla.checkpoint.folder import refuse_other_formats
from mla.checkpoint.read import read_layer
from mla.checkpoint.stored import StoredLayer

__all__ = ["CheckpointError", "StoredLayer", "read_layer", "refuse_other_formats"]
