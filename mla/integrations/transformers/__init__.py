"""`transformers` models whose attention layers run this project's ops: `use_mla(model, backend="cpu")`."""

from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.model import restore, use_mla
from mla.integrations.transformers.paged import PagedCache

__all__ = ["PagedCache", "UnsupportedModel", "restore", "use_mla"]
