"""The CPU, claiming to compute float32 only."""

from mla_backends import Availability, Backend, hookimpl


class Float32Only(Backend):
    name = "fake-float32-only"
    api_version = 1

    def probe(self):
        return Availability(ok=True)

    def setup(self, index=None):
        import torch

        return torch.device("cpu")

    def synchronize(self):
        pass

    def dtypes(self):
        import torch

        return (torch.float32,)


@hookimpl
def mla_backend(options):
    return Float32Only(options)
