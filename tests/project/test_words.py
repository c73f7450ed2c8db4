"""Words that messages, help and pages do not use, and what they say instead (docs/glossary.md)."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("mla", "backends/mla_backends", "plugins", "benchmarks", "examples", "packaging", "docs/site")
LEAST_WORDS = 3  # of a sentence: less is a name or a key
# Pattern -> what to say. Whole words, in any case.
BANNED = {
    r"that nothing (had|has)": "fresh, unseen",
    r"so many": "a number, or nothing",
    r"comes? to \d": "is",
    r"(is|are) said": "names, prints",
    r"yardsticks?": "baseline",
    r"doubtful|(in|beyond) doubt": "suspect; `doubtful` is the status in files",
    r"(of|without|for) which(?! \d)": "whose, and, but",  # a stored record says "of which 18 are available"
    r"(no|some|any)body|somebody else's": "another user, no process",
    r"come on top": "plus",
    r"(held|holds?( \w+){1,3}) against": "compared with",
    r"(every|each) way in which": "each variant",
    r"ways? of (timing|measuring|reading|multiplying|\{\})": "variant, clock, probe",
    r"(tell|told) apart": "distinguish, compare",
    r"so that none|such that|that which|to be had": "the fact, in a sentence of its own",
    r"than there (is|are)": "than available, too many",
    r"(whole|all|both) in turns|in turns (with|on)": "interleaved",
    r"surroundings": "background",
    r"won|beaten|contest": "fastest, faster",
    r"thereby|therein|whereby|thereof|hence|thus|shall": "so, by, in",
    r"beside": "next to, on top of",
    r"(such )?as (that|those) (of|on|in|that)": "as in",
    r"which (is|are) (no|not)": "not",
    r"lengths? (that )?(were )?never": "unseen lengths",
    r"one's own": "your own, its own",
    r"names? no(ne|thing)?": "lacks, is empty, points outside",
    r"anew": "again",
    r"yet has": "but has",
}
# In messages alone: "this is no failure" reads well on a page.
BANNED_IN_MESSAGES = BANNED | {
    r"(?<!there )(is|are) no(?! longer| more)": "is not a",
    r"so (that )?there (is|are) no": "has no, and the fix",
    r"and there (is|are)": "has, for",
    r"(is|are|was) (that|those) of": "the owner's, comes from",
    r"\w+\(s\)": "`counted`, or a sentence of its own",
}
# A page may quote the status of a case as the file and the table have it.
QUOTED = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|<[^>]+>|\*\*[^*\n]*\*\*", re.DOTALL)


def tracked(*patterns: str) -> list[Path]:
    """Return files of the repository, or all that fit where it is not under version control."""
    command = ["git", "ls-files", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        return [path for pattern in patterns for path in sorted(ROOT.glob(f"**/{pattern}"))]
    return [ROOT / name for name in done.stdout.splitlines()]


def sentences(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string of a module that is a sentence and no docstring."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)  # a docstring
        if isinstance(node, ast.JoinedStr):
            skipped |= {child for child in ast.walk(node) if child is not node}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        text = ""
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        if text.count(" ") >= LEAST_WORDS:
            yield node.lineno, text


def banned(text: str, phrases: Mapping[str, str] = BANNED) -> Iterator[str]:
    """Yield the phrases of a text that are not used, and what to say instead."""
    for pattern, instead in phrases.items():
        for match in re.finditer(rf"(?<![\w-])({pattern})(?![\w-])", text, re.IGNORECASE):
            yield f"{match[0]!r} -> {instead}"


@pytest.mark.parametrize("folder", PRODUCT)
def test_messages_and_help_use_the_words_of_the_field(folder: str) -> None:
    files = [path for path in sorted((ROOT / folder).rglob("*.py")) if "tests" not in path.parts]
    assert files
    phrases = [
        f"{path.relative_to(ROOT)}:{line}: {phrase}"
        for path in files
        for line, text in sentences(path.read_text(encoding="utf-8"))
        for phrase in banned(text, BANNED_IN_MESSAGES)
    ]
    assert phrases == [], "\n".join(phrases)


def test_descriptions_of_commands_use_the_words_of_the_field() -> None:
    """Help that is a docstring."""
    from mla.bench.cli.main import cli as bench
    from mla.conformance.cli import cli as conformance

    commands = [*bench.commands.values(), conformance]
    assert len(commands) > 10
    phrases = [f"{command.name}: {phrase}" for command in commands for phrase in banned(command.help or "")]
    assert phrases == []


def test_pages_use_the_words_of_the_field() -> None:
    pages = [path for path in tracked("*.md") if path.name != "CHANGELOG.md" and "tests" not in path.parts]
    assert len(pages) > 20
    phrases = []
    for path in pages:
        text = QUOTED.sub(lambda match: "\n" * match[0].count("\n"), path.read_text(encoding="utf-8"))
        for paragraph in re.finditer(r"(?:.+\n?)+", text):
            line = text.count("\n", 0, paragraph.start()) + 1
            flat = " ".join(paragraph[0].split())
            phrases += [f"{path.relative_to(ROOT)}:{line}: {phrase}" for phrase in banned(flat)]
    assert phrases == [], "\n".join(phrases)


def test_the_scan_sees_formatted_strings_and_no_docstrings() -> None:
    source = '"""So many words of it."""\nraise ValueError(f"{a} is no number of {b}")\nx = "so many"\n'
    ((line, text),) = sentences(source)
    assert (line, text) == (2, "{} is no number of {}")
    assert list(banned(text, BANNED_IN_MESSAGES)) == ["'is no' -> is not a"]
