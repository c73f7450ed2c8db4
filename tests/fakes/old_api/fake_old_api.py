"""A backend written for an earlier contract, whose objects had no base class."""

from mla_backends import hookimpl


class FakeOld:
    name = "fake-old-api"
    api_version = 0


@hookimpl
def mla_backend(options):
    return FakeOld()
