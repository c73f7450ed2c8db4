"""A backend whose author misspelt the hook."""

from mla_backends import hookimpl


@hookimpl
def mla_backnd(options):
    return None
