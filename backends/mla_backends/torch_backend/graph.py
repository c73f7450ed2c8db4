"""Capturing a function into a device graph, the same way for every stack shaped like torch.cuda."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WARMUPS = 3  # calls before the capture: lazy initialisation and growing workspaces must not be captured


def capture(module: ModuleType, graph_class: str, fn: Callable[[], None]) -> Callable[[], None]:
    """Run `fn` a few times on a side stream, capture one more call, and return its replay.

    A replay repeats the captured kernels on the same addresses; host code of `fn` does not run again.
    Raises whatever the stack does when `fn` cannot be captured, for example because it waits for the device.
    """
    side = module.Stream()
    side.wait_stream(module.current_stream())
    with module.stream(side):
        for _ in range(WARMUPS):
            fn()
    module.current_stream().wait_stream(side)
    graph = getattr(module, graph_class)()
    with module.graph(graph):
        fn()
    replay: Callable[[], None] = graph.replay
    return replay


def capturing(device: torch.device) -> bool:
    """Return whether the device's current stream is being captured into a graph."""
    import torch

    probe = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return bool(probe is not None and probe())
