"""Every op in plain PyTorch: correct on any torch device, and the baseline fused ops are compared with.

Logits, softmax and norms are fp32 whatever the dtype of the tensors, and attention reads only slots that a
request owns.
"""

from __future__ import annotations

from collections.abc import Mapping

from mla.cache.formats import FORMATS, INDEX_FORMATS
from mla.reference.attention import ExpandedAttention, LatentAttention
from mla.reference.small import BatchedLinear, Linear, RmsNorm, RotateQuery, WriteLatent
from mla.reference.sparse import SelectLatents, SparseLatentAttention, WriteIndexKey
from mla_backends.api import FusedOp

# The reference for every op, by op name.
REFERENCE: Mapping[str, FusedOp] = {
    "linear": Linear(),
    "batched_linear": BatchedLinear(),
    "rms_norm": RmsNorm(),
    "rotate_query": RotateQuery(),
    "write_latent": WriteLatent(FORMATS),
    "latent_attention": LatentAttention(FORMATS),
    "expanded_attention": ExpandedAttention(),
    "write_index_key": WriteIndexKey(INDEX_FORMATS),
    "select_latents": SelectLatents(INDEX_FORMATS),
    "sparse_latent_attention": SparseLatentAttention(FORMATS),
}
