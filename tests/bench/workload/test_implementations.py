"""The grammar of `--implementations`: what it reads, writes again, and refuses with a sentence."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mla.bench.workload.implementations import OURS, Named, is_ours, parse, parse_one
from mla.errors import UsageError

WORDS = st.text(st.characters(exclude_characters="[],=", exclude_categories=("Cs",)), min_size=1).filter(
    lambda word: word == word.strip()
)
OPS = st.dictionaries(WORDS, WORDS | st.just("a=b"), max_size=4).map(lambda ops: tuple(sorted(ops.items())))
NAMED = st.builds(Named, st.sampled_from(OURS), OPS) | st.builds(Named, WORDS)


@given(st.lists(NAMED, unique=True, max_size=4))
def test_what_is_written_is_read_again(names: list[Named]) -> None:
    assert parse(",".join(map(str, names))) == names
    assert [parse_one(str(name)) for name in names] == names


@given(st.text("abc =,[] \n") | st.text())
@example("mla[a=b")
@example("mla]a=b[")
@example("mla[a=[b]]")
def test_anything_else_is_a_sentence(text: str) -> None:
    names = []
    with contextlib.suppress(UsageError):
        names = parse(text)
    assert parse(",".join(map(str, names))) == names, "a name that results carry reads back as itself"


def test_spaces_and_order_do_not_matter() -> None:
    assert str(parse_one(" mla [ o_proj = x , latent_attention=y ] ")) == "mla[latent_attention=y,o_proj=x]"
    assert list(map(str, parse("mla, ,mla[ a=b , c = d ],"))) == ["mla", "mla[a=b,c=d]"]


def test_only_our_own_layer_is_ours() -> None:
    assert [is_ours(name) for name in ("mla", "mla-reference", "mla[a=b]", "transformers", "mlas")] == [
        *(True, True, True),
        *(False, False),
    ]


NO_NAMES = ("mla[a=b", "mla]", "mla[a=[b]]", "mla[a=b]c", "[a=b]")
NO_OPS = {"mla[]": "", "mla[a]": "a", "mla[a=]": "a=", "mla[=b]": "=b", "mla[a=b,]": ""}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        *((name, f"--implementations takes NAME or NAME[ROLE=OP,...], got '{name}'.") for name in NO_NAMES),
        *(
            (name, f"'{name}': brackets hold ROLE=OP, separated by commas, got '{got}'.")
            for name, got in NO_OPS.items()
        ),
        ("mla,mla[a=b,c=d", "--implementations takes NAME or NAME[ROLE=OP,...], got 'mla[a=b'."),
        ("mla[a=b,a=c]", "'mla[a=b,a=c]' gives a two ops: keep one."),
        ("mla,mla", "--implementations names 'mla' twice: it is measured once."),
        ("mla[a=b],mla[ a=b]", "--implementations names 'mla[a=b]' twice: it is measured once."),
        ("x[a=b]", "'x[a=b]': x cannot be given ops in brackets; only mla and mla-reference can."),
    ],
)
def test_a_mistake_gets_its_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    assert str(error.value) == sentence
