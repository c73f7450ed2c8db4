"""`TorchBackend`: the optional part of `Backend`, for devices that have a torch module."""

from mla_backends.torch_backend.backend import TorchBackend

__all__ = ["TorchBackend"]
