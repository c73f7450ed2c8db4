"""A backend that works: the CPU under another name."""

from mla_backends import Availability, Backend, hookimpl


class FakeGood(Backend):
    name = "fake-good"
    api_version = 1

    def probe(self):
        return Availability(ok=True, evidence={"device": "host"})

    def setup(self, index=None):
        import torch

        return torch.device("cpu")

    def synchronize(self):
        pass


@hookimpl
def mla_backend(options):
    return FakeGood(options)
