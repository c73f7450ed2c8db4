"""How an attention op is made wrong: in its call, in its plan, or in what it declares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

from mla.reference import REFERENCE

Makers = Mapping[str, list[Callable[[], Any]]]  # id of a check -> ops that it must fail
Latent, Expanded = (type(REFERENCE[kind]) for kind in ("latent_attention", "expanded_attention"))
PAGE = 64
FAR = 1 << 22  # numbers: as far as `smaller_cases.py` lets the suite go


def starts(batch: Any) -> list[int]:
    """Return where each request's new tokens start, and the end of the last."""
    return [0, *accumulate(batch.query_lens)]


def altered(batch: Any, **changes: Any) -> SimpleNamespace:
    """Return the batch, or the lengths of segments, with other attributes."""
    names = ("query_lens", "kv_lens", "page_size", "block_table", "kv_lens_device", "cu_q", "causal")
    names = tuple(name for name in names if hasattr(batch, name))
    return SimpleNamespace(**{**{name: getattr(batch, name) for name in names}, **changes})


def curried(change: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Return a function of the first arguments, such as limits, that returns one of the others."""
    return lambda *how: functools.partial(change, *how)


def wrong(
    base: type,
    call: Callable[..., None] | None = None,
    prepare: Callable[..., Any] | None = None,
    **facts: Any,
) -> Any:
    """Return an op that differs from the reference in its call, its plan, or what it declares.

    `call(right, batch, **tensors)` gets the right call, its state bound. `prepare(spec, batch)` returns
    the batch that is planned instead.
    """

    class Wrong(base):  # type: ignore[misc]
        def prepare(self, spec: Any, batch: Any) -> Any:
            return batch, super().prepare(spec, prepare(spec, batch) if prepare else batch)

        def __call__(self, state: Any, **tensors: Any) -> None:
            batch, inner = state
            right = super().__call__
            if call is None:
                right(inner, **tensors)
            else:
                call(lambda **given: right(inner, **given), batch, **tensors)

    for name, value in {"lse_optional": False, **facts}.items():
        setattr(Wrong, name, value)
    return Wrong()


def after(base: type, spoil: Callable[..., object], prepare: Any = None, **facts: Any) -> Any:
    """Return an op that is right until `spoil(batch, **tensors)` has changed its outputs."""

    def call(right: Any, batch: Any, **tensors: Any) -> None:
        right(**tensors)
        spoil(batch, **tensors)

    return wrong(base, call, prepare, **facts)


def given(base: type, change: Callable[..., dict[str, Any]]) -> Any:
    """Return an op that computes with other tensors than it was given: `change(**tensors)`."""
    return wrong(base, lambda right, batch, **tensors: right(**{**tensors, **change(**tensors)}))
