"""One MLA layer over several ranks of `torch.distributed`: heads, tokens of the context, or requests."""

from mla.parallel.batch import ShardedBatch
from mla.parallel.cache import ShardedCache
from mla.parallel.groups import Groups
from mla.parallel.layer import ParallelMLA
from mla.parallel.layout import Layout, Place
from mla.parallel.share import Share

__all__ = ["Groups", "Layout", "ParallelMLA", "Place", "ShardedBatch", "ShardedCache", "Share"]
