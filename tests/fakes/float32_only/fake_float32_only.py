"""The CPU, claiming to compute float32 only."""

from mla_backends import hookimpl
from mla_backends.testing import HostBackend


class Float32Only(HostBackend):
    name = "fake-float32-only"

    def dtypes(self):
        import torch

        return (torch.float32,)


@hookimpl
def mla_backend(options):
    return Float32Only(options)
