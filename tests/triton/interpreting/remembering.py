"""What the interpreter works out again at every operation, and could remember: about half of its time."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class Language:
    """Stands for `_patch_lang`, which at every call of a function makes the whole language interpreted."""

    def __init__(self, patch: Any) -> None:
        self._patch, self._done = patch, False

    def __call__(self, function: Any) -> Any:
        if not self._done:
            self._patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            # Before 3.7 this was int(array), which numpy 2.4 refuses.
            tl.tensor.__index__ = lambda tensor: int(tensor.handle.data.item())
            self._done = True
        return SimpleNamespace(restore=lambda: None)


def by_name(upstream: Any) -> Any:
    """Return a function of a Triton dtype that remembers what `upstream` says of it."""
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        answer = known.get(dtype.name)
        if answer is None:
            answer = known[dtype.name] = upstream(dtype)
        return answer

    return remembered


def of_one_type(upstream: Any) -> Any:
    """Return a constructor of tensors that remembers what all of one type have in common."""
    known: dict[str, dict[str, Any]] = {}

    @functools.wraps(upstream)
    def construct(self: Any, handle: Any, type: Any) -> None:
        common = known.get(type.name)
        if common is None:
            upstream(self, handle, type)
            known[type.name] = {**vars(self), "handle": None}
        else:
            vars(self).update(common, handle=handle)

    return construct


def of_one_shape(upstream: Any) -> Any:
    """Return a constructor of block types that remembers those it has made."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    @functools.wraps(upstream)
    def construct(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        common = known.get(key)
        if common is None:
            upstream(self, element_ty, shape)
            known[key] = {**vars(self), "element_ty": None}
        else:
            vars(self).update(common, element_ty=element_ty)

    return construct


def install() -> None:
    """Let the interpreter remember."""
    interpreter._patch_lang = Language(interpreter._patch_lang)
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    tl.block_type.__init__ = of_one_shape(tl.block_type.__init__)
    tl.tensor.__init__ = of_one_type(tl.tensor.__init__)
