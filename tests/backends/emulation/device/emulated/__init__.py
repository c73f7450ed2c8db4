"""An accelerator that does not exist: real numbers, real mistakes, no hardware and no compiler.

Its tensors report the emulated device and keep their numbers in a host tensor. Mixing devices raises.
Whatever would make the host wait for a real device is logged, and raises inside `forbidden_waits()`. Fresh
memory holds NaN, memory is counted, streams and events exist, and graphs replay captured calls. Inside
`behind()` nothing runs until the host waits, so that copies read host memory late.

It works on `PrivateUse1` under any name, and on `cuda`, which vendors other than NVIDIA use as well.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from emulated.cards import CARDS, Card
from emulated.state import STATE, DeviceMix, HostWait, forbidden_waits

__all__ = [
    "CARDS",
    "STATE",
    "Card",
    "DeviceMix",
    "HostWait",
    "behind",
    "forbidden_waits",
    "install",
    "kernel",
]


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function` one opaque kernel of the device, which a graph repeats as a whole."""
    from emulated import graphs

    return graphs.kernel(function)


def behind() -> AbstractContextManager[None]:
    """Let the device start on its work only when the host waits for it: what is copied is read that late."""
    from emulated import graphs

    return graphs.behind()


def install(name: str, card: Card, count: int = 2) -> object:
    """Make `count` emulated cards the device `name` of this process and return its module of functions."""
    from emulated import attach, functions

    STATE.name, STATE.card, STATE.count = name, card, count
    module = functions.make_module()
    if name == "cuda":
        attach.as_cuda(module)
    else:
        attach.as_privateuse1(name, module)
    return module
