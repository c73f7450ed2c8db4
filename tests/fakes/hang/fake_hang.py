"""A backend whose probe never answers, offered under two names."""

import time

from mla_backends import Backend, hookimpl


class FakeHang(Backend):
    name = "fake-hang"
    api_version = 1

    def probe(self):
        time.sleep(3600)

    def setup(self, index=None):
        raise NotImplementedError

    def synchronize(self):
        pass


@hookimpl
def mla_backend(options):
    return FakeHang(options)
