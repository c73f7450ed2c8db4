"""A backend written for a later contract, with names this one does not have."""

from mla_backends import NotInventedYet, hookimpl


@hookimpl
def mla_backend(options):
    return NotInventedYet(options)
