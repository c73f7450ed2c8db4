"""Valid documents, damaged: text, bytes and trees as JSON has them; and what a terminal may show of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click
from hypothesis import settings
from hypothesis import strategies as st

from mla.command.exit_codes import guarded
from mla.errors import MLAError
from mla_backends import BackendError

T = TypeVar("T")


class Text(str):
    """Text whose `repr`, which a failure shows, is short."""

    def __repr__(self) -> str:
        return _ends(str.__repr__(self))


class Data(bytes):
    """Bytes whose `repr` is short."""

    def __repr__(self) -> str:
        return _ends(bytes.__repr__(self))


def _ends(text: str) -> str:
    return text if len(text) < 2000 else f"{text[:900]} ... {text[-900:]}"


OWN = (MLAError, BackendError, click.UsageError)
MAX_LETTERS = 700  # characters of a sentence about a file, its name included
LONGEST_TYPED = 4100  # of one that repeats the user's own words

# What acts on a terminal, breaks a table, or is more than anybody wants to read.
HOSTILE = ("\x1b]0;owned\x07", "\x1b[31m", "\u202egnp", "a\nb", "\r", "\u2028", "\0", "\ud800")
LONG_VALUES = (Text("x" * 100_000), Text("9" * 5000))
TEXTS = st.sampled_from(("", " ", "é", "../x", "nan", *HOSTILE, *LONG_VALUES)) | st.text(max_size=8)
NUMBERS = (
    st.sampled_from((2**31, 2**63, 2**64, 2**80, -(2**64), 10**400, -0.0, 5e-324, 1e300))
    | st.integers(-2, 300)
    | st.floats()
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
INSERTED = (
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\0",
    b"\xff\xfe",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
)
FOREIGN = st.binary(min_size=1, max_size=8) | st.sampled_from(INSERTED)


def few(part: int) -> settings:
    """Return the room's profile with a part of its examples, for tests whose examples take long."""
    profile = settings.get_profile("fuzz")
    return settings(profile, max_examples=max(1, profile.max_examples // part))


# ---------------------------------------------------------------------------------------------- damage


def _cut(draw: Callable[..., Any], whole: Sequence[T], foreign: st.SearchStrategy[Sequence[T]]) -> list[T]:
    """Return a sequence truncated, without a span, with one twice or elsewhere, or with foreign items."""
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    before, span, after = [list(part) for part in (whole[:start], whole[start:stop], whole[stop:])]
    kind = draw(st.sampled_from(("truncate", "drop", "double", "swap", "insert", "replace")))
    middle = {"drop": [], "double": span * 2, "insert": [*draw(foreign), *span]} if kind != "truncate" else {}
    if kind == "truncate":
        return before
    if kind == "swap":
        return after + span + before
    return before + middle.get(kind, list(draw(foreign))) + after


@st.composite
def damaged_text(draw: Callable[..., Any], valid: Sequence[str], alphabet: str) -> Text:
    """Draw a valid text, or one made of its alphabet, with up to three cuts."""
    text = draw(st.sampled_from(valid) | st.text(alphabet, max_size=12))
    for _ in range(draw(st.integers(0, 3))):
        text = "".join(_cut(draw, text, st.text(alphabet, min_size=1, max_size=3) | TEXTS))
    return Text(text)


@st.composite
def damaged_bytes(draw: Callable[..., Any], valid: bytes) -> Data:
    """Draw bytes with one to three flipped bits or cuts."""
    data = valid
    for _ in range(draw(st.integers(1, 3))):
        if data and draw(st.booleans()):
            place, bit = draw(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 7)))
            data = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        else:
            data = bytes(_cut(draw, data, FOREIGN))
    return Data(data)


def damaged_json(valid: Any) -> st.SearchStrategy[Data]:
    """Draw JSON whose tree is damaged, or whose text is."""
    plain = json.dumps(valid).encode()
    return damaged(valid).map(lambda tree: Data(json.dumps(tree).encode())) | damaged_bytes(plain)


@st.composite
def damaged(draw: Callable[..., Any], valid: Any) -> Any:
    """Draw a tree with one to three of its values replaced, dropped, doubled, renamed or exchanged."""
    tree = [copy.deepcopy(valid)]  # so that the whole of it has a place, too
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        (holder, key), (other, name) = (places[draw(st.integers(0, len(places) - 1))] for _ in range(2))
        kind = draw(st.sampled_from(("replace", "replace", "drop", "double", "rename", "exchange")))
        if kind == "replace" or holder is tree:
            holder[key] = draw(VALUES)
        elif kind == "exchange":
            holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(holder[key])
        elif isinstance(holder, list):
            holder[key : key + 1] = [] if kind == "drop" else [holder[key]] * 2
        else:
            value = holder.pop(key) if kind != "double" else holder[key]
            if kind != "drop":
                holder[draw(TEXTS | st.sampled_from([*holder, "x"]))] = value
    return tree[0]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key) of every value in a tree."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], (dict, list)):
            yield from _places(holder[key])


# ---------------------------------------------------------------------------------------------- judgement


def attempt(call: Callable[[], T], longest: int = MAX_LETTERS) -> T | None:
    """Return what a call returns, or None for an error of the project's own, which fits a terminal.

    Any other exception is the defect that is looked for, and gets out.
    """
    try:
        return call()
    except OWN as error:
        caught = error

    def again() -> int:
        raise caught

    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert guarded(again) in (2, 3)
    _, _, sentence = said.getvalue().rpartition("Usage: ")  # which click prints before
    assert_sentence(sentence[sentence.lower().index("error: ") :], longest)
    return None


def assert_sentence(text: str, longest: int = MAX_LETTERS) -> None:
    """Assert that this is one printable line, which says something in few words."""
    assert text.endswith("\n"), text
    assert text[:-1].isprintable(), ascii(text[:MAX_LETTERS])
    assert len("error: ") + 1 < len(text) <= longest, f"{len(text)} characters: {text[:longest]}"
