"""What the whole weighs: lines and tokens by room, read off the sources.

python tests/support/weight.py            rooms beside their budgets, the heaviest first
python tests/support/weight.py --lower    write down what has fallen, in budgets.toml
"""

from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "tests" / "project" / "budgets.toml"
WEIGHED = ("mla", "backends", "plugins", "tests", "examples", "benchmarks", "packaging")
PRODUCT = ("mla", "backends", "plugins")
# How a kind of file writes its comments. Documents, pictures and recorded data are not weighed.
HASH = r"#[^\n]*"
C_LIKE = r"//[^\n]*|/\*.*?\*/"
COMMENTS = {
    ".toml": HASH, ".sh": HASH, ".sbatch": HASH, ".ini": HASH, ".cpp": C_LIKE, ".h": C_LIKE,
    ".css": r"/\*.*?\*/", ".j2": r"\{#.*?#\}", ".template": HASH,
}  # fmt: skip
WORD = re.compile(r'"(?:[^"\\\n]|\\.)*"|\w+|[^\w\s]')
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip
# Kinds of tokens that begin and end an f-string, from Python 3.12 on, or a t-string.
F_STRINGS = tuple(
    {getattr(tokenize, f"{letter}STRING_{end}", None) for letter in "FT"} - {None} for end in ("START", "END")
)


@dataclass
class Weight:
    """What files hold: lines and tokens of code, without comments and docstrings; and lines of docstrings."""

    lines: int = 0
    tokens: int = 0
    docstrings: int = 0

    def __add__(self, other: Weight) -> Weight:
        return Weight(
            self.lines + other.lines, self.tokens + other.tokens, self.docstrings + other.docstrings
        )


def room_of(path: Path) -> str:
    """Return the room of a file, by its path in the checkout: two folders deep, three inside mla/bench."""
    parts = path.parts
    if parts[0] == "plugins":
        return "/".join(parts[:2]) if "tests" not in parts else "tests/plugins"
    if parts[:2] == ("backends", "mla_backends"):
        parts = ("backends", *parts[2:])
    deep = 3 if parts[:2] == ("mla", "bench") else 2
    return "/".join(parts[:-1][:deep])


def files() -> Iterator[Path]:
    """Yield what is weighed, as paths in the checkout."""
    for top in WEIGHED:
        for path in sorted((ROOT / top).rglob("*")):
            if path.suffix in (".py", *COMMENTS) and not {"__pycache__", "build"} & set(path.parts):
                yield path.relative_to(ROOT)


def product() -> Iterator[Path]:
    """Yield the Python files that users install."""
    for path in files():
        if path.suffix == ".py" and path.parts[0] in PRODUCT and "tests" not in path.parts:
            yield path


def docstring_lines(source: str) -> set[int]:
    """Return the lines that docstrings stand on."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def weigh(suffix: str, text: str) -> Weight:
    """Return what a file of this kind with this text weighs."""
    if suffix != ".py":
        bare = re.sub(COMMENTS[suffix], "", text, flags=re.DOTALL)
        return Weight(sum(bool(line.strip()) for line in bare.splitlines()), len(WORD.findall(bare)))
    described = docstring_lines(text)
    lines, tokens, depth = set(), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in SILENT or token.start[0] in described:
            continue
        lines.update(range(token.start[0], token.end[0] + 1))
        tokens += depth == 0  # an f-string is one token, as before Python 3.12
        depth += (token.type in F_STRINGS[0]) - (token.type in F_STRINGS[1])
    return Weight(len(lines), tokens, len(described))


@functools.cache
def rooms() -> dict[str, Weight]:
    """Return what each room weighs."""
    by_room: dict[str, Weight] = defaultdict(Weight)
    for path in files():
        by_room[room_of(path)] += weigh(path.suffix, (ROOT / path).read_text())
    return dict(by_room)


def product_lines() -> int:
    """Return the lines of the product's Python as `wc -l` counts them."""
    return sum((ROOT / path).read_bytes().count(b"\n") for path in product())


@functools.cache
def docstring_share() -> float:
    """Return which share of the product's lines, blank ones left out, docstrings are."""
    total = sum((weigh(".py", (ROOT / path).read_text()) for path in product()), Weight())
    return total.docstrings / (total.lines + total.docstrings)


@dataclass
class Budgets:
    """The most that rooms may weigh, with what capabilities have added since."""

    product_lines: int
    docstring_share: float
    rooms: dict[str, Weight]
    added: dict[str, Weight]

    @classmethod
    def read(cls, text: str | None = None) -> Budgets:
        """Return what budgets.toml says."""
        held = tomllib.loads(BUDGETS.read_text() if text is None else text)
        added: dict[str, Weight] = defaultdict(Weight)
        most = held["product_lines"]
        for entry in held.get("added", ()):
            assert entry["why"].strip(), f"{entry['room']}: say what is added"
            added[entry["room"]] += Weight(entry["lines"], entry["tokens"])
            most += entry.get("product_lines", 0)
        rooms = {name: Weight(*numbers) for name, numbers in held["rooms"].items()}
        return cls(most, held["docstring_share"], rooms, added)

    def of(self, room: str) -> Weight:
        """Return the most that a room may weigh; nothing if it has no budget."""
        return self.rooms.get(room, Weight()) + self.added.get(room, Weight())

    def outgrown(self, weighed: dict[str, Weight]) -> list[str]:
        """Return the rooms that weigh more than they may."""
        return [
            name
            for name, now in weighed.items()
            if now.lines > self.of(name).lines or now.tokens > self.of(name).tokens
        ]


def lowered(text: str) -> str:
    """Return budgets.toml with what has fallen written down; new rooms wait for `[[added]]`."""
    weighed, budgets = rooms(), Budgets.read(text)
    share = max(budgets.docstring_share, int(1000 * docstring_share()) / 1000)
    extra_lines = budgets.product_lines - tomllib.loads(text)["product_lines"]
    rows = [f"product_lines = {min(budgets.product_lines, product_lines()) - extra_lines}"]
    rows += [f"docstring_share = {share}", "", "[rooms]"]
    for name in sorted(weighed.keys() & budgets.rooms.keys()):
        now, most, extra = weighed[name], budgets.rooms[name], budgets.added.get(name, Weight())
        lines, tokens = min(most.lines, now.lines - extra.lines), min(most.tokens, now.tokens - extra.tokens)
        rows.append(f'"{name}" = [{lines}, {tokens}]')
    head, _, rest = text.partition("\nproduct_lines = ")  # not that of the example in the comment
    _, mark, added = rest.partition("\n[[added]]")
    return f"{head}\n" + "\n".join(rows) + "\n" + mark + added


def main() -> None:
    """Print all rooms, or lower the budgets."""
    if sys.argv[1:] == ["--lower"]:
        BUDGETS.write_text(lowered(BUDGETS.read_text()))
        return
    budgets = Budgets.read()
    for name, now in sorted(rooms().items(), key=lambda item: -item[1].tokens):
        most = budgets.of(name)
        lines, tokens = f"{now.lines:6} of {most.lines:6}", f"{now.tokens:7} of {most.tokens:7}"
        sys.stdout.write(f"{name:30} {lines} lines, {tokens} tokens\n")
    share = docstring_share()
    sys.stdout.write(f"product: {product_lines()} of {budgets.product_lines} lines; docstrings {share:.3f}\n")


if __name__ == "__main__":
    main()
