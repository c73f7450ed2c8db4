"""Names of wrong rows, and what they have in common: every sentence is read back by an independent reader."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla.verify.places import Places, describe, name_row, pattern_of

PAGE = 16
# A prefill, a decode, several tokens after a history, one without rows, one that ends with its page.
LENGTHS = ((40, 1, 5, 0, 3, 16), (40, 130, 70, 9, 64, 32))


def table(kv_lens: tuple[int, ...]) -> torch.Tensor:
    """Return pages in an order of their own."""
    width = max(-(-length // PAGE) for length in kv_lens)
    order = torch.randperm(len(kv_lens) * width, generator=torch.Generator().manual_seed(1))
    return order.view(len(kv_lens), width).int()


def rows(query_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Return request, position and index of every row, written out by hand."""
    pairs = zip(query_lens, kv_lens, strict=True)
    plain = [(i, kv - new + j) for i, (new, kv) in enumerate(pairs) for j in range(new)]
    return [(request, position, index) for index, (request, position) in enumerate(plain)]


@pytest.fixture(scope="module")
def places() -> Places:
    return Places.new_tokens(*LENGTHS, table(LENGTHS[1]), PAGE)


def test_every_row_has_the_name_of_its_request_and_position(places: Places) -> None:
    pages, count = table(LENGTHS[1]), len(places.request)
    for request, position, index in rows(*LENGTHS):
        page, slot = int(pages[request, position // PAGE]), position % PAGE
        where = f"row {index}; page {page}, slot {slot}"
        assert name_row(index, (count,), places) == f"request {request}, position {position} ({where})"
        named = f"request {request}, position {position}, head 3 ({where})"
        assert name_row(4 * index + 3, (count, 4), places) == named


def test_without_a_cache_there_are_no_pages_and_without_requests_only_rows() -> None:
    assert name_row(2, (3, 1), Places.new_tokens((1, 2), (5, 9))) == "request 1, position 8, head 0 (row 2)"
    assert (name_row(2, (3, 1), None), name_row(2, (3,), None)) == ("row 2, head 0", "row 2")


# ------------------------------------------------------------------------------------------- patterns


def read_back(text: str, heads: int) -> torch.Tensor:
    """Return the rows [T, heads] that a sentence means; written for `LENGTHS` and without `mla`."""
    pages = table(LENGTHS[1]).tolist()
    head_part, row_part = re.fullmatch(
        r"(?:only )?(?:(heads? [\d., ]+(?:and [\d.]+)?) ?(?:of )?)?(.*)", text
    ).groups()
    chosen = numbers(head_part) if head_part else set(range(heads))
    bad = torch.zeros(sum(LENGTHS[0]), heads, dtype=torch.bool)
    for request, position, index in rows(*LENGTHS):
        new, kv = LENGTHS[0][request], LENGTHS[1][request]
        token, page = position - (kv - new), pages[request][position // PAGE]
        last = position // PAGE == (kv - 1) // PAGE
        if row_part in ("", "every row"):
            inside = True
        elif match := re.fullmatch(r"(?:every row of )?(requests? [\d., and]+)", row_part):
            inside = request in numbers(match[1])
        elif match := re.fullmatch(r"every row from position (\d+) on", row_part):
            inside = position >= int(match[1])
        elif match := re.fullmatch(r"every row from new token (\d+) of its request on", row_part):
            inside = token >= int(match[1])
        elif match := re.fullmatch(r"every row from row (\d+) on", row_part):
            inside = index >= int(match[1])
        elif match := re.fullmatch(r"every row whose page is (\d+) or beyond", row_part):
            inside = page >= int(match[1])
        else:
            inside = {
                "every row in the last page of its request": last,
                "every row of the requests whose last page is not full": kv % PAGE != 0,
                "every row of the requests whose last page is full": kv % PAGE == 0 < kv,
                "the last row of every request with several": new > 1 and token == new - 1,
                "the first row of every request with several": new > 1 and token == 0,
            }[row_part]
        for head in chosen if inside else ():
            bad[index, head] = True
    return bad


def numbers(text: str) -> set[int]:
    rows: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:\.\.(\d+))?", text):
        rows |= set(range(int(first), int(last or first) + 1))
    return rows


EXACT = (
    "every row",
    "every row of request 0",
    "every row of requests 0, 4 and 5",
    "every row of requests 2 and 4",
    "every row from position 33 on",
    "every row from new token 3 of its request on",
    "every row from row 39 on",
    "every row in the last page of its request",
    "every row of the requests whose last page is not full",
    "every row of the requests whose last page is full",
    "the last row of every request with several",
    "the first row of every request with several",
)


@pytest.mark.parametrize("text", EXACT)
def test_a_clear_pattern_is_named(places: Places, text: str) -> None:
    bad = read_back(text, 1)
    assert pattern_of(bad[:, 0], places) == text
    assert pattern_of(bad.expand(-1, 4), places) == text
    one_head = torch.zeros(4, dtype=torch.bool)
    one_head[2] = True
    assert pattern_of(bad & one_head, places) == f"head 2 of {text}"


def test_pages_beyond_a_limit_are_named() -> None:
    """An index that wraps, over pages that a cache hands out in no order."""
    places = Places.new_tokens((1,) * 6, (9,) * 6, torch.tensor([[5], [700], [3], [513], [512], [9]]), PAGE)
    bad = torch.tensor([False, True, False, True, True, False])
    assert pattern_of(bad, places) == "every row of requests 1, 3 and 4"
    many = torch.arange(24).view(-1, 1)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    places = Places.new_tokens((1,) * 24, (9,) * 24, many, PAGE)
    assert pattern_of(many[:, 0] >= 13, places) == "every row whose page is 13 or beyond"


HEADS = {(6,): "only head 6", (6, 7): "only heads 6 and 7", (0, 1, 2, 7): "only heads 0..2 and 7"}


@pytest.mark.parametrize("heads", HEADS)
def test_few_heads_are_named_where_the_rows_have_no_pattern(places: Places, heads: tuple[int, ...]) -> None:
    bad = torch.zeros(len(places.request), 8, dtype=torch.bool)
    bad[torch.tensor([0, 7, 41, 44, 50])[:, None], list(heads)] = True
    assert pattern_of(bad, places) == HEADS[heads]


def test_part_of_a_request_is_named_and_nothing_is_said_of_one_row_or_rows_all_over(places: Places) -> None:
    bad = torch.zeros(len(places.request), dtype=torch.bool)
    bad[[3, 9, 17]] = True
    assert pattern_of(bad, places) == "only request 0"
    bad[[46, 47]] = True
    assert pattern_of(bad, places) == "only requests 0 and 4"
    bad.zero_()
    bad[17] = True
    assert pattern_of(bad, places) == ""
    bad[[0, 5, 40, 43, 46, 49]] = True
    assert pattern_of(bad, places) == ""
    assert pattern_of(torch.zeros(0, dtype=torch.bool), Places.new_tokens((0,), (5,))) == ""


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_said_is_true(data: st.DataObject) -> None:
    """Of any rows: "every" means exactly them, and "only" holds all of them."""
    places, heads = (
        Places.new_tokens(*LENGTHS, table(LENGTHS[1]), PAGE),
        data.draw(st.sampled_from([1, 3, 8])),
    )
    bad = read_back(data.draw(st.sampled_from(EXACT)), heads)
    if data.draw(st.booleans()):
        kept = data.draw(st.sets(st.integers(0, heads - 1), min_size=1))
        bad = bad & torch.tensor([head in kept for head in range(heads)])
    for row in data.draw(st.lists(st.integers(0, len(places.request) - 1), max_size=3)):
        bad[row, data.draw(st.integers(0, heads - 1))] ^= True
    text = pattern_of(bad, places)
    if text.startswith("only"):
        assert not (bad & ~read_back(text, heads)).any()
    elif text:
        assert torch.equal(read_back(text, heads), bad)


def test_a_description_names_one_row_and_what_all_have_in_common(places: Places) -> None:
    bad = torch.zeros(len(places.request), 8, dtype=torch.bool)
    bad[41:46, 6:] = True
    first, worst = describe(bad, places), describe(bad, places, 43 * 8 + 7)
    assert re.fullmatch(
        r"request 2, position 65, head 6 \(row 41; page \d+, slot 1\); "
        r"heads 6 and 7 of every row of request 2",
        first,
    )
    assert worst.startswith("request 2, position 67, head 7 (row 43; ")
    assert describe(bad[41], None, 6) == "row 6; every row from row 6 on"


def test_some_of_the_rows_keep_their_names() -> None:
    whole = Places.new_tokens([2, 3], [5, 9], torch.tensor([[1, 0], [3, 2]]), 8)
    part = whole.of(torch.tensor([1, 4]))
    assert len(part.request) == 2
    assert [part.name(row) for row in (0, 1)] == [whole.name(row) for row in (1, 4)]
