"""Peak memory of a forward beyond weights, cache and outputs: counted, not sampled.

Works on every device, since it watches torch's dispatcher instead of a vendor's allocator. Memory that an op
allocates internally, such as a kernel's scratch memory, bypasses the dispatcher and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages:
    """What a dispatch mode does with every call.

    A base, because TorchDispatchMode wraps the `__torch_dispatch__` that a subclass itself defines, and the
    first call of the wrapper imports all of torch._dynamo: 1.4 s of CPU in a process that compiles nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in _tensors(result) if _address(tensor) not in given]
        self._forget()  # before adding: a new storage may reuse the address of a freed one
        for tensor in made:
            storage = tensor.untyped_storage()
            self._seen.setdefault(storage.data_ptr(), (StorageWeakRef(storage), storage.nbytes()))
        self._count()
        return result

    def _forget(self) -> None:
        self._seen = {key: value for key, value in self._seen.items() if not value[0].expired()}

    def _count(self) -> None:
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))


class TransientBytes(_Storages, TorchDispatchMode):
    """Counts the storages created inside a `with` block; `peak` is the largest total at once, in bytes."""


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors with a storage; weights packed by a library are opaque."""
    for leaf in tree_leaves(tree):
        if torch.is_tensor(leaf) and leaf.layout == torch.strided:
            yield leaf


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
