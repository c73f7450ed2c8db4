"""The whole is bounded: rooms have budgets of lines and tokens, which only fall."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import weight
from weight import ROOT, Budgets, Weight, weigh

MOST_LINES, MOST_FUNCTION_LINES = 600, 60
KERNELS = (
    "backends/mla_backends/triton_ops/jit"  # a call costs Triton's interpreter time: kernels are one function
)
LOOSE = 1.02  # a budget this far above what a room weighs is lowered in the same commit
WHY = "delete as much as was added, or say in budgets.toml, under [[added]], what it adds and why"
LOWER = "python tests/support/weight.py --lower"


@pytest.fixture(scope="module")
def budgets() -> Budgets:
    return Budgets.read()


@pytest.fixture(scope="module")
def rooms() -> dict[str, Weight]:
    return weight.rooms()


def test_no_room_outgrows_its_budget(budgets: Budgets, rooms: dict[str, Weight]) -> None:
    assert not budgets.outgrown(rooms), WHY


def test_what_has_fallen_is_written_down(budgets: Budgets, rooms: dict[str, Weight]) -> None:
    gone = budgets.rooms.keys() - rooms.keys()
    loose = {
        name
        for name, now in rooms.items()
        if budgets.of(name).tokens > max(LOOSE * now.tokens, now.tokens + 200)
        or budgets.of(name).lines > max(LOOSE * now.lines, now.lines + 20)
    }
    assert not gone | loose, LOWER


def test_the_product_is_bounded(budgets: Budgets) -> None:
    assert weight.product_lines() <= budgets.product_lines, WHY


def test_room_is_not_made_by_saying_less(budgets: Budgets) -> None:
    assert weight.docstring_share() >= budgets.docstring_share


@pytest.mark.parametrize("top", ["mla", "backends", "plugins", "benchmarks", "packaging"])
def test_files_and_functions_are_held_in_the_head(top: str) -> None:
    large = []
    for path in sorted((ROOT / top).rglob("*.py")):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if text.count("\n") > MOST_LINES:
            large.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not name.startswith(KERNELS):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                large += [f"{name}: {node.name}"] * (lines > MOST_FUNCTION_LINES)
    assert not large


def test_comments_and_docstrings_weigh_nothing() -> None:
    code = "def area(r):\n    return 3 * r\n"
    said = (
        'def area(r):\n    """Return it.\n\n    Of a circle.\n    """\n\n    # As\n    return 3 * r  # is\n'
    )
    assert weigh(".py", code) == Weight(2, 10, 0)
    assert weigh(".py", said) == Weight(2, 10, 4)
    assert weigh(".py", 'x = """a\nb"""\n') == Weight(2, 3, 0), "a string that is a value counts"
    assert weigh(".py", "x = f'{a + f\"{b}\"} c' + d\n") == Weight(1, 5, 0), "an f-string is a string"


def test_files_count_in_their_rooms() -> None:
    for path, room in (
        ("mla/bench/plan/memory.py", "mla/bench/plan"),
        ("mla/layer/ops.py", "mla/layer"),
        ("mla/errors.py", "mla"),
        ("backends/mla_backends/kernels/flashmla/op.py", "backends/kernels"),
        ("plugins/cpu/mla_backend_cpu/native/api.cpp", "plugins/cpu"),
        ("plugins/cpu/tests/test_gemm.py", "tests/plugins"),
        ("tests/support/faulty.py", "tests/support"),
    ):
        assert weight.room_of(Path(path)) == room


HELD = """# Why.
#   product_lines = 55
product_lines = {most}
docstring_share = 0.001

[rooms]
{rooms}
"mla/gone" = [3, 30]

[[added]]
room = "mla/layer"
lines = 5
tokens = 50
product_lines = 2
why = "gates"
"""


def held(rooms: dict[str, Weight], most: int, more: int) -> str:
    """Return budgets with so much more than rooms weigh."""
    rows = (f'"{name}" = [{now.lines + more}, {now.tokens + more}]' for name, now in rooms.items())
    return HELD.format(most=most, rooms="\n".join(rows))


def test_lowering_writes_what_has_fallen_and_nothing_that_has_grown(rooms: dict[str, Weight]) -> None:
    before = {name: now for name, now in rooms.items() if name != "mla/cache"}
    text = weight.lowered(held(before, most=10, more=7))
    lowered = Budgets.read(text)
    assert lowered.product_lines == 12, "it does not grow with the product"
    assert lowered.of("mla/layer") == Weight(rooms["mla/layer"].lines, rooms["mla/layer"].tokens)
    assert lowered.outgrown(rooms) == ["mla/cache"], "a new room says what it adds"
    assert not lowered.rooms.keys() - rooms.keys()
    assert text.startswith("# Why.")
    assert weight.lowered(text) == text


def test_a_room_that_outgrows_its_budget_is_named(rooms: dict[str, Weight]) -> None:
    tight = Budgets.read(held(rooms, most=10, more=-1))
    assert tight.outgrown(rooms) == [name for name in rooms if name != "mla/layer"]
