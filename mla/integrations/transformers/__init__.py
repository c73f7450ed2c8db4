"""`transformers` models whose attention layers run this project's ops: `use_mla(model, backend="cpu")`."""

from mla.integrations import require_transformers

require_transformers()

from mla.integrations.transformers.admission import UnsupportedModel  # noqa: E402
from mla.integrations.transformers.model import restore, use_mla  # noqa: E402
from mla.integrations.transformers.paged import PagedCache  # noqa: E402

__all__ = ["PagedCache", "UnsupportedModel", "restore", "use_mla"]
