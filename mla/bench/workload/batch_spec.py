"""Batch specs such as 4q8s2049_16q1s3072: the grammar of vLLM's attention benchmarks, read into lengths.

A spec is one forward over a batch, at exactly these lengths. Its segments are joined with "_", and each is
[COUNT]qLEN[k][sLEN[k]]: COUNT requests (one without), with q new tokens each. s counts *all* tokens of a
request, the new ones included; without it there is no history. k is 1024. Needs no torch.

Grammar: benchmarks/attention_benchmarks/batch_spec.py of github.com/vllm-project/vllm at 04028200.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mla.bench.workload.grid import Point
from mla.bench.workload.scenario import MAX_COUNT, MAX_REQUESTS
from mla.errors import UsageError
from mla_backends.outside import shortened

FORM = "[COUNT]qLEN[k][sLEN[k]], such as 16q1s4k"
_NUMBER = "[0-9]{1,20}"
_SEGMENT = re.compile(rf"({_NUMBER})?q({_NUMBER})(k?)(?:s({_NUMBER})(k?))?")
PASSES = 10  # over which the 100 forwards of a spec on the command line are spread, as those of a prefill


class BatchScenario(Point, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A batch spec of the command line."""

    @property
    def selection(self) -> list[str]:
        """The command-line arguments that select this point alone."""
        return ["--batch-spec", self.base, *super().selection[2:]]


def parse_batch_spec(spec: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the new tokens and the history of each request. Raises ValueError, which names the place."""
    query_lens: list[int] = []
    history: list[int] = []
    place = 1
    for number, segment in enumerate(spec.split("_"), 1):
        where = (
            f"batch spec '{shortened(spec)}': segment {number}, '{shortened(segment)}' (character {place}),"
        )
        count, new, total = _segment(segment, where)
        if len(query_lens) + count > MAX_REQUESTS:
            raise ValueError(f"{where} makes more than {MAX_REQUESTS} requests")
        query_lens += [new] * count
        history += [total - new] * count
        place += len(segment) + 1
    return tuple(query_lens), tuple(history)


def _segment(text: str, where: str) -> tuple[int, int, int]:
    """Return count, new tokens and all tokens of a segment. Raises ValueError."""
    found = _SEGMENT.fullmatch(text)
    if found is None:
        hint = " (q, s and k are lower-case)" if _SEGMENT.fullmatch(text.lower()) else ""
        raise ValueError(f"{where} is not {FORM}{hint}")
    count = int(found[1] or 1)
    new = _size(found[2], found[3])
    total = _size(found[4], found[5]) if found[4] else new
    if count < 1 or new < 1:
        raise ValueError(f"{where} has no {'requests' if count < 1 else 'new tokens'}: count from 1")
    if total < new:
        raise ValueError(
            f"{where} has s{total} for q{new}: s counts all tokens of a request, the new ones included"
        )
    if total > MAX_COUNT:
        raise ValueError(f"{where} has a request of more than {MAX_COUNT} tokens")
    return count, new, total


def _size(digits: str, suffix: str) -> int:
    return int(digits) * (1024 if suffix else 1)


def batch_scenarios(words: Iterable[str]) -> list[BatchScenario]:
    """Return a scenario for each spec in comma-separated lists. Raises `UsageError`."""
    specs = split(words)
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice:
        raise UsageError(f"--batch-spec lists '{twice}' twice: it is measured once.")
    try:
        return list(map(_scenario, specs))
    except ValueError as error:
        raise UsageError(f"{error}.") from error


def split(words: Iterable[str]) -> Sequence[str]:
    """Return the specs in comma-separated lists. Raises `UsageError` if there is none."""
    specs = [spec for word in words for spec in re.split(r"\s*,\s*|\s+", word.strip())]
    if not all(specs):
        raise UsageError(f"--batch-spec takes specs of the form {FORM}, comma-separated; one is empty.")
    return specs


def _scenario(spec: str) -> BatchScenario:
    query_lens, history = parse_batch_spec(spec)
    return BatchScenario(
        name=spec,
        base=spec,
        mode="prefill",
        query_lens=query_lens,
        history=history,
        passes=PASSES,
        batch_spec=spec,
    )
