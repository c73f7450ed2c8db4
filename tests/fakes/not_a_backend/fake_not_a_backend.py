"""A backend whose hook returns something else."""

from mla_backends import hookimpl


@hookimpl
def mla_backend(options):
    return {"name": "fake-not-a-backend"}
