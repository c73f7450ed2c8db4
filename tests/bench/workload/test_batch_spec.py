"""Batch specs: the grammar, held against another way to read it, and a sentence for what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla.bench.workload.grid import batch_scenarios, parse, parse_batch_spec, points_of
from mla.bench.workload.scenario import MAX_COUNT, MAX_REQUESTS
from mla.errors import UsageError
from mla_backends.outside import shortened

# What the README of vLLM's tool at 10a68b7e says of its examples: (new tokens, all tokens) of each request.
PUBLISHED = {
    "q2k": [(2048, 2048)],
    "q1s1k": [(1, 1024)],
    "8q1s1k": [(1, 1024)] * 8,
    "q4s1k": [(4, 1024)],
    "2q2k_32q1s1k": [(2048, 2048)] * 2 + [(1, 1024)] * 32,
    "16q4s1k": [(4, 1024)] * 16,
    "4q8s2049_16q1s3072": [(8, 2049)] * 4 + [(1, 3072)] * 16,
    "q1ks16k": [(1024, 16384)],
    "01q02s003": [(2, 3)],
}


def requests(spec: str) -> list[tuple[int, int]]:
    """Return (new tokens, all tokens) of each request."""
    query_lens, history = parse_batch_spec(spec)
    return [(new, new + past) for new, past in zip(query_lens, history, strict=True)]


@pytest.mark.parametrize("spec", PUBLISHED)
def test_published_specs_mean_what_is_published(spec: str) -> None:
    assert requests(spec) == PUBLISHED[spec]


def number(text: str) -> int | None:
    """Return 2048 for "2k"; None for what is no number."""
    digits, times = (text[:-1], 1024) if text.endswith("k") else (text, 1)
    return int(digits) * times if digits and not digits.strip("0123456789") else None


def by_hand(spec: str) -> list[tuple[int, int]] | None:
    """Read a spec without a pattern, splitting at its letters; None if it is none."""
    pairs: list[tuple[int, int]] = []
    for segment in spec.split("_"):
        front, q, rest = segment.partition("q")
        middle, s, back = rest.partition("s")
        count = number(front) if front else 1
        new = number(middle)
        total = number(back) if s else new
        if not q or "k" in front or count is None or new is None or total is None:
            return None
        if not 1 <= count <= MAX_REQUESTS or not 1 <= new <= total <= MAX_COUNT:
            return None
        pairs += [(new, total)] * count
    return pairs if len(pairs) <= MAX_REQUESTS else None


SIZES = st.tuples(st.integers(0, 3000), st.sampled_from(["", "k"])).map(lambda pair: f"{pair[0]}{pair[1]}")
COUNTS = st.one_of(st.just(""), st.integers(0, 300).map(str))
SEGMENTS = st.builds(
    lambda count, new, total: f"{count}q{new}" + (f"s{total}" if total else ""),
    COUNTS,
    SIZES,
    st.one_of(st.none(), SIZES),
)
SPECS = st.lists(SEGMENTS, min_size=1, max_size=4).map("_".join)


@given(spec=st.one_of(SPECS, st.text("q1s2k_0", max_size=12)))
def test_another_reading_of_the_grammar_agrees(spec: str) -> None:
    expected = by_hand(spec)
    if expected is not None:
        assert requests(spec) == expected
        return
    with pytest.raises(ValueError, match=r"^batch spec '.*': segment \d+, '.*' \(character \d+\), "):
        parse_batch_spec(spec)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("", "segment 1, '' (character 1), is not [COUNT]qLEN[k][sLEN[k]], such as 16q1s4k"),
        ("q1s1k_", "segment 2, '' (character 7), is not "),
        ("2q2k_32x1s1k", "segment 2, '32x1s1k' (character 6), is not "),
        ("8Q1S1K", "is not [COUNT]qLEN[k][sLEN[k]], such as 16q1s4k (q, s and k are lower-case)"),
        ("q1m", "is not "),
        ("q٣", "is not "),  # a digit to Python, and to no other reader
        ("q1 s2", "is not "),
        ("0q1", "has no requests: count from 1"),
        ("q0s4", "has no new tokens: count from 1"),
        ("q8s4", "has s4 for q8: s counts all tokens of a request, the new ones included"),
        ("q1s2097152k", f"has a request of more than {MAX_COUNT} tokens"),
        ("65536q1_q1", f"segment 2, 'q1' (character 9), makes more than {MAX_REQUESTS} requests"),
        ("99999999999q1", f"makes more than {MAX_REQUESTS} requests"),
        ("q" + "9" * 5000, "is not "),
    ],
)
def test_a_mistake_is_named_with_its_place(spec: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r".") as refused:
        parse_batch_spec(spec)
    message = str(refused.value)
    assert message.startswith(f"batch spec '{shortened(spec)}': segment ")
    assert sentence in message
    assert "\n" not in message


def test_the_command_line_takes_lists_and_repeats() -> None:
    scenarios = batch_scenarios(["q2k,8q1s1k", "q4s1k q16"])
    assert [scenario.name for scenario in scenarios] == ["q2k", "8q1s1k", "q4s1k", "q16"]
    assert {(scenario.mode, scenario.runs, scenario.rounds * scenario.steps) for scenario in scenarios} == {
        ("prefill", 100, 100)
    }
    assert scenarios[1].final_lens == (1024,) * 8, "s holds the new token as well"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["q1,q1"], "--batch-spec lists 'q1' twice: it is measured once."),
        (["q1", "q2", "q1"], "--batch-spec lists 'q1' twice: it is measured once."),
        (["q1,,q2"], "--batch-spec takes specs of the form "),
        ([""], "--batch-spec takes specs of the form "),
    ],
)
def test_a_list_is_checked_as_a_whole(words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        batch_scenarios(words)
    assert str(refused.value).startswith(sentence)


def test_axes_of_heads_and_pages_make_a_grid_and_axes_of_lengths_do_not() -> None:
    specs = batch_scenarios(["4q1s64"])
    points = points_of(specs, parse(["heads=8,4", "page_size=16"]))
    assert [(point.name, point.heads, point.batch_spec) for point in points] == [
        ("4q1s64 heads=8 page_size=16", 8, "4q1s64"),
        ("4q1s64 heads=4 page_size=16", 4, "4q1s64"),
    ]
    assert points[1].arguments == ["--batch-spec", "4q1s64", "-a", "heads=4", "-a", "page_size=16"]
    for axis in ("batch=2", "kv=5", "q_len=1"):
        with pytest.raises(UsageError, match="the lengths of '4q1s64' come from a batch spec"):
            points_of(specs, parse([axis]))
