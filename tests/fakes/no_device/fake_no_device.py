"""A backend that loads on a host without its device."""

from mla_backends import Availability, Backend, hookimpl


class FakeNoDevice(Backend):
    name = "fake-no-device"
    api_version = 1

    def probe(self):
        return Availability(False, "no card on the bus", "plug one in", {"cards": "0"})

    def setup(self, index=None):
        raise AssertionError("set up, although the probe failed")

    def synchronize(self):
        pass


@hookimpl
def mla_backend(options):
    return FakeNoDevice(options)
