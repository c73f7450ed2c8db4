"""`transformers` models whose attention layers run this project's ops: `use_mla(model, backend="cpu")`."""

try:
    from transformers import AttentionInterface as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"this needs transformers 5.20 or later: `pip install 'transformers>=5.20'` ({error})."
    ) from error

from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.model import restore, use_mla
from mla.integrations.transformers.paged import PagedCache

__all__ = ["PagedCache", "UnsupportedModel", "restore", "use_mla"]
