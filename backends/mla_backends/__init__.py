"""The contract between `mla` and an accelerator. Importing it imports no torch."""

from mla_backends.api import API_VERSION, Availability, Backend, FusedOp
from mla_backends.errors import BackendError, BackendOptionError
from mla_backends.registry import hookimpl
from mla_backends.torch_backend import TorchBackend

__all__ = [
    "API_VERSION", "Availability", "Backend", "BackendError", "BackendOptionError", "FusedOp", "TorchBackend",
    "hookimpl",
]  # fmt: skip
