"""The one hook a backend implements, and the marker to implement it with."""

from __future__ import annotations

from collections.abc import Mapping

import pluggy

from mla_backends.api import Backend

PROJECT = "mla"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def mla_backend(options: Mapping[str, str]) -> Backend | None:
    """Return the backend of this plugin, made with the user's `-O key=value` options.

    Called once, after the user chose the plugin by the name of its entry point in the group
    `mla.backends`; no other plugin is imported. Must not touch the device: `Backend.probe` comes next.

    `options` are the user's, all strings; pass them to `Backend.__init__`, which rejects those the backend
    does not know.
    """
