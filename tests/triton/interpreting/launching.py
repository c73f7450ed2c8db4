"""A launch: on which device its tensors are, what it may touch, and in which order its programs run."""

from __future__ import annotations

import inspect
import itertools
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

from interpreting import remembering
from interpreting.addresses import Addresses, Owned
from interpreting.faults import KernelFault
from interpreting.values import LEAST_DOT, ReduceOps, ScanOps, Values

OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}  # of a launch, beside the kernel's arguments
Index = tuple[int, int, int]


class Builder(Values, Addresses):
    """Carries kernels out."""

    order: random.Random | None = None
    _places: dict[Index, Index] | None = None

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(nx, ny, nz)
        self._places = None
        if self.order is not None:
            programs = list(itertools.product(range(nx), range(ny), range(nz)))
            self._places = dict(zip(programs, self.order.sample(programs, len(programs)), strict=True))

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(*((x, y, z) if self._places is None else self._places[x, y, z]))


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of every launch in a random order."""
    before, Builder.order = Builder.order, random.Random(seed)
    try:
        yield
    finally:
        Builder.order = before


class Launch(GridExecutor):  # type: ignore[misc]
    """One launch of a kernel."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Run every program. Raises `KernelFault`, or what a program raised as an `InterpreterError`."""
        unknown = kwargs.keys() - OPTIONS - set(inspect.signature(self.fn).parameters)
        if unknown:
            raise KernelFault(f"`{self.fn.__name__}` has no argument {', '.join(sorted(unknown))}")
        if _on_emulated_device([*args, *kwargs.values()]):
            _emulated().kernel(self._run)(*args, **kwargs)
        else:
            self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> None:
        args, kwargs = tuple(map(_raw, args)), {name: _raw(value) for name, value in kwargs.items()}
        builder = interpreter.interpreter_builder
        builder.owned = Owned([x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)])
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore", RuntimeWarning)  # a device does not warn of NaN or infinities
                super().__call__(*args, **kwargs)
        except interpreter.InterpreterError as error:
            fault = _root(error)
            if not isinstance(fault, KernelFault):
                raise
            where = f"`{self.fn.__name__}`, program {builder.grid_idx}"
            raise type(fault)(f"{where}: {fault}") from error
        finally:
            builder.owned = Owned()


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _raw(value: Any) -> Any:
    return getattr(value, "raw", value) if isinstance(value, torch.Tensor) else value


def _emulated() -> Any:
    return sys.modules.get("emulated")


def _on_emulated_device(values: list[Any]) -> bool:
    """Return whether a launch is on an emulated device. Raises `DeviceMix` where it is on several."""
    devices = {value.device for value in values if isinstance(value, torch.Tensor)}
    if all(device.type == "cpu" for device in devices):
        return False
    if len(devices) > 1:
        raise _emulated().DeviceMix(f"a kernel was given tensors of {', '.join(sorted(map(str, devices)))}")
    return True


def install() -> None:
    """Put all of this in the place of what the interpreter has."""
    builder = interpreter.interpreter_builder
    builder.__class__ = Builder
    builder.codegen_fns["min_dot_size"] = lambda left, right: LEAST_DOT
    # The interpreter's own check of overflows takes ten operations for each, and then asserts nothing.
    builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.GridExecutor = Launch
    interpreter.ReduceOps, interpreter.ScanOps = ReduceOps, ScanOps
    remembering.install()
