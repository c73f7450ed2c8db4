"""Calls of every kind, watched as a run watches them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mla.cache.formats import codec_of, index_codec
from mla.cases import KINDS
from mla.cases.case import OpCase
from mla.cases.memory import Layout
from mla.cases.played import Laid
from mla.failures.call import JudgedCall, Watched, Watcher
from mla.reference import REFERENCE

EVERY_KIND = [(kind, name) for kind, entry in KINDS.items() for name in ("", *["fp8"] * bool(entry.stored))]


def stored(spec: Any, name: str) -> Any:
    """Return the spec over a cache of this format; itself if "" is named."""
    if not name:
        return spec
    if hasattr(spec, "index_format"):
        codec: Any = index_codec(name, spec.head_dim)
        return dataclasses.replace(spec, index_format=name, token_bytes=codec.token_bytes)
    codec = codec_of(name, spec.kv_lora_rank, spec.qk_rope_head_dim)
    return dataclasses.replace(spec, cache_format=name, token_bytes=codec.token_bytes)


def watched_call(kind: str, cache_format: str, **changes: Any) -> JudgedCall:
    """Return a right call of the reference, over a cache of this format; `changes` are of its spec."""
    usual = {**KINDS[kind].usual, "dtype": torch.bfloat16, "device": torch.device("cpu"), **changes}
    case = OpCase(kind, stored(KINDS[kind].spec(**usual), cache_format), (1, 3), (70, 5), layout=Layout(16))
    watcher = Watcher(lambda: None)
    watcher.lengths = case.query_lens, case.kv_lens
    assert Laid(case, Watched(kind, "mine", REFERENCE[kind], watcher, case.spec)).call() == ""
    assert watcher.last is not None
    return watcher.last
