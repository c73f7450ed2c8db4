"""Ask the package index whether the names of our distributions are free, before the first release.

    python packaging/names.py

An index also refuses a name that looks like one that exists: PyPI ignores case, dots, dashes and
underscores, and takes l, i and 1 for one letter and o and 0 for another. Likely lookalikes are therefore
asked for too; there are too many for all of them.

Exit codes: 0 all are free, 1 a name is taken or looks like one that is, 2 the index did not answer.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

from distributions import distributions

ALIKE = ("li1", "o0")


def lookalikes(name: str) -> Iterator[str]:
    """Yield names that PyPI takes for `name`: one letter replaced, or written without dashes."""
    for group in ALIKE:
        for place, letter in enumerate(name):
            if letter in group:
                yield from (name[:place] + other + name[place + 1 :] for other in group if other != letter)
    if "-" in name:
        yield name.replace("-", "")


def exists(index: str, name: str) -> bool:
    """Return whether the index has a project of that name. Raises OSError if it does not say."""
    request = urllib.request.Request(f"{index.rstrip('/')}/{name}/", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=30):
            return True
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise


def taken(index: str) -> list[str]:
    """Return one sentence for every name that cannot be registered."""
    wanted = [distribution.name for distribution in distributions()]
    asked = [(name, name) for name in wanted]
    asked += [(name, other) for name in wanted for other in lookalikes(name)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda pair: exists(index, pair[1]), asked))
    return [_taken(*pair) for pair, name in zip(asked, answers, strict=True) if name]


def _taken(name: str, existing: str) -> str:
    if name == existing:
        return f"'{name}' is taken."
    return f"'{name}' will be refused: it is too similar to '{existing}', which exists."


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", default="https://pypi.org/simple", metavar="URL", help="[%(default)s]")
    options = parser.parse_args(arguments)
    try:
        refusals = taken(options.index)
    except (OSError, ValueError, HTTPException) as error:  # the last two of what is no address
        print(f"error: {options.index} did not say which names exist: {error}.", file=sys.stderr)
        return 2
    print("\n".join(refusals) or f"free: {', '.join(distribution.name for distribution in distributions())}")
    return 1 if refusals else 0


if __name__ == "__main__":
    sys.exit(main())
