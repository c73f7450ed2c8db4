"""A backend whose probe takes the process down, as a vendor library may."""

import os

from mla_backends import Backend, hookimpl


class FakeCrash(Backend):
    name = "fake-crash"
    api_version = 1

    def probe(self):
        os.abort()

    def setup(self, index=None):
        raise NotImplementedError

    def synchronize(self):
        pass


@hookimpl
def mla_backend(options):
    return FakeCrash(options)
