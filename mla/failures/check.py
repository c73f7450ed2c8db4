"""Whether a call that was read from a file is one of the contract: before its numbers size anything."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mla.cases.case import OPTIONAL, dim
from mla.failures.call import OUTPUTS, RecordedCall
from mla.text import dtype_name


def check(call: RecordedCall) -> None:
    """Raise `ValueError` for a call that no op is given; facts that contradict themselves raise anything."""
    facts, entry, held = call.facts, call.entry, call.operands
    sizes = {**call.case.sizes, "T": len(held[entry.varied[0]])}
    if "block_table" in held:
        sizes["m"] = held["block_table"].shape[1]
    if not all(type(size) is int and 0 <= size < 1 << 31 for size in sizes.values()):
        raise ValueError("a size of its spec is none")
    lengths = list(zip(facts.query_lens, facts.kv_lens, strict=True))
    if (lengths or entry.prepares) and call.case.rows != sizes["T"]:
        raise ValueError("its lengths are not those of its rows")
    if not all(0 <= new <= keys for new, keys in lengths):
        raise ValueError("it has more new tokens than keys")
    if {name: type(value) for name, value in facts.scalars.items()} != dict(entry.scalars):
        raise ValueError(f"its scalars are not {', '.join(entry.scalars)}")
    _check_tensors(call, sizes)
    if entry.cached:
        _check_cache(call, sizes)


def _check_tensors(call: RecordedCall, sizes: Mapping[str, int]) -> None:
    """Hold operands and outputs to the shapes and dtypes of the contract."""
    facts, entry, case, held = call.facts, call.entry, call.case, call.operands
    words = {**entry.operands, **({"weight": entry.packed} if entry.packed else {})}
    given = {name: (list(x.shape), x.dtype) for name, x in held.items()}
    given |= {name: (shape, case.dtype(name)) for name, shape in facts.outputs.items()}
    absent = OPTIONAL.intersection(facts.absent) | ({"out"} if facts.in_place and entry.in_place else set())
    if given.keys() | absent != words.keys() or held.keys() & OUTPUTS:
        raise ValueError(f"its tensors are not {', '.join(words)}")
    for name, (shape, dtype) in given.items():
        wanted = [dim(word, sizes) for word in words[name].split()]
        if (shape, dtype) != (wanted, case.dtype(name)):
            raise ValueError(f"its {name} is not {dtype_name(case.dtype(name))} {wanted}")
    if min([0, *(gap for gaps in facts.gaps.values() for gap in gaps)]) < 0:
        raise ValueError("a gap between its rows is negative")


def _check_cache(call: RecordedCall, sizes: Mapping[str, int]) -> None:
    """Hold tables, slots and selections to the cache, and the kept pages to these."""
    facts, entry, held, pages = call.facts, call.entry, call.operands, call.pages
    assert pages is not None
    assert call.kept_pages is not None
    kept, count, page_size = call.kept_pages, *pages.shape[:2]
    if list(pages.shape[2:]) != [dim(entry.cached, sizes)] or pages.dtype != call.case.dtype("cache"):
        raise ValueError("its pages are not those of its spec")
    if "cu_q" in held:
        starts = torch.tensor([0, *facts.query_lens]).cumsum(0)
        if not torch.equal(held["cu_q"].long(), starts) or held["kv_lens"].tolist() != facts.kv_lens:
            raise ValueError("its tables hold other lengths")
        if max(facts.kv_lens, default=0) > sizes["m"] * page_size:
            raise ValueError("its block table is too short for its lengths")
    if not torch.equal(kept, entry.touched(held, page_size)) or len(kept) != count:
        raise ValueError("its pages are not those that its tables name")
    if count and not 0 <= kept.min() <= kept.max() < facts.pages:
        raise ValueError("its tables name pages that the cache does not have")
    if (selection := held.get("selection")) is not None:
        seen = torch.tensor([keys for _, keys in call.case.spans])[:, None]
        if bool(((selection < -1) | (selection >= seen)).any()):
            raise ValueError("its selection names tokens that are not seen")
