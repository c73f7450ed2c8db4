"""Tensors of the emulated device, and what happens when an operation meets one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from emulated.state import STATE, DeviceMix
from emulated.trees import change, tensors

# Operations whose result the host needs before it can go on.
WAITING = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy"),
        *("masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
    )
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPIES = {"aten::_to_copy", "aten::copy_"}
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::matmul"}
FRESH = {
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
}


POISONED_BYTES = 1 << 28  # memory beyond that stays untouched: the host has less than a card


class EmulatedTensor(torch.Tensor):
    """Reports an emulated device and keeps its numbers in `raw`, on the host."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor, index: int) -> EmulatedTensor:
        device = torch.device(STATE.name, index)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=device,
        )
        made.raw, made.index, made.block = raw, index, STATE.block(raw)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        STATE.wait("tolist")
        return self.raw.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy; use .cpu() first.")

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"EmulatedTensor({self.raw!r}, device='{self.device}')"


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Carry out one operation that touches the emulated device."""
    name = _name(func)
    if name in COPIES:
        return _copy(func, args, kwargs)
    leaves = tensors(args, kwargs)
    here = [leaf for leaf in leaves if type(leaf) is EmulatedTensor]
    _check_mixing(name, leaves, here)
    if here:
        _check_waiting(name, args, kwargs)
        _check_arithmetic(name, here)
    return _on_host(func, args, kwargs, _target(kwargs, here), here)


@functools.cache
def _name(func: Any) -> str:
    """Return an operation's name: torch makes its schema anew whenever it is asked for."""
    return func._schema.name


def _target(kwargs: Any, here: list[EmulatedTensor]) -> int | None:
    """Return the card that results are on; None for a factory of another device."""
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
        if wanted.type != STATE.name:
            return None
        index = STATE.current if wanted.index is None else wanted.index
        if index >= STATE.count:
            raise RuntimeError(f"{STATE.name} error: invalid device ordinal {index}")
        return index
    return here[0].index if here else STATE.current


def _on_host(
    func: Any,
    args: Any,
    kwargs: Any,
    index: int | None,
    here: list[EmulatedTensor],
    counted: bool = True,
) -> Any:
    if kwargs.get("device") is not None and index is not None:
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": "cpu"}
    plain_args, plain_kwargs = change(args, _plain), change(kwargs, _plain) if kwargs else kwargs
    recorder = STATE.recorder
    if recorder is not None:
        recorder.before(plain_args, plain_kwargs)
    out = func(*plain_args, **plain_kwargs)
    if _name(func) in FRESH:
        if out.nbytes <= POISONED_BYTES:
            poison(out)
    elif counted and not _is_view(func):
        STATE.launches += 1
    if recorder is not None:
        again = functools.partial(func, *plain_args, **plain_kwargs)
        recorder.after(again, (plain_args, plain_kwargs), out)
    return out if index is None else change(out, _wrapper(here, index))


@functools.cache
def _is_view(func: Any) -> bool:
    """Return whether an operation only describes memory that is already there."""
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _wrapper(here: list[EmulatedTensor], index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that wraps results; what was written in place keeps its wrapper."""

    def wrap(value: torch.Tensor) -> torch.Tensor:
        for same in here:
            if same.raw is value:
                assert same.shape == value.shape, "an emulated tensor cannot be resized"
                return same
        return EmulatedTensor(value, index)

    return wrap


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.raw if type(value) is EmulatedTensor else value


def _check_mixing(name: str, leaves: list[torch.Tensor], here: list[EmulatedTensor]) -> None:
    if len(here) > 1 and len(cards := {tensor.index for tensor in here}) > 1:
        raise DeviceMix(f"{name}: tensors on cards {sorted(cards)} of {STATE.name}")
    if not here or len(here) == len(leaves):
        return
    strange = [leaf for leaf in leaves if type(leaf) is not EmulatedTensor and leaf.dim() > 0]
    if not strange:
        return
    if name not in INDEXING:
        raise DeviceMix(
            f"{name}: all tensors must be on one device, found {STATE.name} and {strange[0].device}"
        )
    STATE.wait(f"{name} with an index on the host")


def _check_waiting(name: str, args: Any, kwargs: Any) -> None:
    masks = name in INDEXING and any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    counted = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
    if name in WAITING or masks or counted:
        STATE.wait(name)


def _check_arithmetic(name: str, here: list[EmulatedTensor]) -> None:
    """Fail as a card does that can store a dtype and not multiply in it."""
    if name in PRODUCTS:
        dtype = str(here[0].dtype).removeprefix("torch.")
        if dtype in ("bfloat16", "float16") and dtype not in STATE.card.products:
            raise RuntimeError(
                f"{STATE.name} error: {name} is not implemented for {dtype} on {STATE.card.name}"
            )


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    """Carry out a copy, perhaps between devices. Reading back always waits."""
    STATE.launches += 1
    if _name(func) == "aten::copy_":
        target, source = args[0], args[1]
        waits = _note_copy(
            source, target.device, kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        )
        there, read = _plain(target), _reader(source)
        if STATE.recorder is not None and not waits:
            STATE.recorder.before(there)
            STATE.recorder.after(lambda: there.copy_(read()), there, there)
        there.copy_(read())
        return target
    source, rest = args[0], {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else source.device
    waits = _note_copy(source, device, rest.pop("non_blocking", False))
    if device.type != STATE.name:
        return func(_plain(source), **rest)
    if isinstance(source, EmulatedTensor):
        return _on_host(func, args, rest, _target({"device": device}, []), [source], counted=False)
    made, read = func(source, **rest), _reader(source)
    if STATE.recorder is not None and not waits:
        STATE.recorder.after(lambda: func(read(), **rest), (), made)
    return EmulatedTensor(made, _target({"device": device}, []) or 0)


def _note_copy(source: torch.Tensor, target: torch.device, lazy: bool) -> bool:
    """Note a copy and return whether the host waits for it."""
    there, here = isinstance(source, EmulatedTensor), target.type == STATE.name
    if there and not here:
        STATE.wait("a copy to the host")
    elif here and not there and not lazy:
        STATE.wait("a blocking copy from the host")
    elif here and not there:
        STATE.upload(is_pinned(source))
    return there != here and not (here and lazy)


_pinned: dict[int, StorageWeakRef] = {}


def pin(memory: torch.Tensor) -> torch.Tensor:
    """Make host memory such that a captured copy may read it."""
    storage = memory.untyped_storage()
    _pinned[storage.data_ptr()] = StorageWeakRef(storage)
    return memory


def is_pinned(memory: torch.Tensor) -> bool:
    pinned = _pinned.get(memory.untyped_storage().data_ptr())
    return pinned is not None and not pinned.expired()


def _reader(source: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return what reads a copy's source: of host memory whatever is there by then, zeros if it was freed."""
    if isinstance(source, EmulatedTensor):
        return lambda: source.raw
    memory = StorageWeakRef(source.untyped_storage())
    layout, dtype = (source.storage_offset(), source.size(), source.stride()), source.dtype

    def read() -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
        if storage is None:
            return torch.zeros(layout[1], dtype=dtype)
        return torch.empty(0, dtype=dtype).set_(storage, *layout)

    return read


def poison(raw: torch.Tensor) -> None:
    """Fill memory that nobody has written: NaN, or an integer that is no index."""
    if raw.dtype.is_floating_point:
        raw.fill_(float("nan"))
    elif raw.dtype in (torch.int16, torch.int32, torch.int64):
        raw.fill_(torch.iinfo(raw.dtype).min)
