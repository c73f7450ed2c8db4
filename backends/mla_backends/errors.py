"""One exception class per way a backend can fail, each carrying the sentence a user should read.

The sentence names the cause and the fix. Callers print `str(error)` and nothing else. A table can print
`state`, `reason` and `hint` instead, which omit the backend's name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mla_backends.known import GENERAL, GENERAL_DEVICES, GENERAL_USE, WITHOUT_PLUGIN

if TYPE_CHECKING:
    from mla_backends.known import KnownBackend, KnownDevice

LONGEST_LINE = 240  # characters of another's text that are quoted whole: torch's own of host memory take 180


def probe_hint(name: str) -> str:
    """Return how to see the traceback of a backend that fails before its device is set up."""
    return f"`python -m mla_backends.probe {name}` shows the traceback"


def setup_hint(name: str) -> str:
    """Return how to see the traceback of a backend that fails while its device is set up, or later."""
    return f"`python -X dev -m mla.bench --backend {name} --list-ops` shows the traceback"


class BackendError(Exception):
    """Base of every backend problem. `state` is the machine-readable name of the class."""

    state = "error"

    def __init__(self, message: str = "", *, reason: str = "", hint: str = "") -> None:
        """Keep `message` as the one line to print; `reason` and `hint` are its parts, for tables."""
        super().__init__(one_line(message))
        self.reason = one_line(reason or message)
        self.hint = one_line(hint)


class BackendOptionError(BackendError):
    """The user passed an option that the backend does not know, or an invalid value."""

    state = "bad option"

    @classmethod
    def unknown(cls, name: str, unknown: Sequence[str], known: Sequence[str]) -> BackendOptionError:
        """Name the options that the backend knows."""
        listed = ", ".join(known) or "none"
        return cls(f"backend '{name}' has no option '{', '.join(unknown)}'; it knows: {listed}.")


class NamedError(BackendError):
    """Base of problems that are said as "backend 'NAME' ...: reason; hint."."""

    says = ""

    def __init__(self, name: str, reason: str, hint: str = "") -> None:
        clauses = "; ".join(
            one_line(part).rstrip(".") for part in (reason, hint) if part
        )  # of plugins' authors
        super().__init__(f"backend '{name}'{self.says}: {clauses}.", reason=reason, hint=hint)


class UnknownBackend(BackendError):
    """No distribution offers the name, and this project does not know it."""

    state = "unknown"

    def __init__(self, name: str, installed: Sequence[str], known: Mapping[str, KnownBackend]) -> None:
        close = _closest(name.lower(), installed, known)
        general = name.lower() in GENERAL_DEVICES
        meant = f"`--backend {GENERAL} -O device={name.lower()}`" if general else f"'{close}'"
        guess = f" (did you mean {meant}?)" if close or general else ""
        others = [name for name in known if name not in installed]
        known_list = f"known: {', '.join(others)}; " if others else ""
        lists = f"installed: {', '.join(installed) or 'none'}; {known_list}without a plugin, {GENERAL_USE}"
        super().__init__(
            f"unknown backend '{name}'{guess}; {lists}.",
            reason="no backend has this name",
            hint=guess.strip(" ()") or lists,
        )


class BackendNotInstalled(BackendError):
    """This project knows the name, but no installed distribution offers it."""

    state = "not installed"

    def __init__(self, known: KnownBackend) -> None:
        hint = f"run {known.install}, with torch from {known.torch_source}"
        super().__init__(
            f"backend '{known.name}' is not installed: {hint}.",
            reason=f"no installed distribution offers it ({known.device})",
            hint=hint,
        )


class NoPlugin(NamedError):
    """This project knows the device, and has no plugin for it."""

    state = "no plugin"

    def __init__(self, known: KnownDevice) -> None:
        start = f", and `{known.plugin_command}` starts a plugin" if known.plugin_command else ""
        hint = (
            f"with {known.torch} installed, `{known.command}` measures them on the reference ops "
            f"(untried){start}"
        )
        super().__init__(known.name, f"there is no plugin for {known.device}", hint)


class DuplicateBackend(BackendError):
    """Several distributions offer the name, so choosing it would be a guess."""

    state = "duplicate"

    def __init__(self, name: str, distributions: Sequence[tuple[str, str]]) -> None:
        """Name every (distribution, version) that claims `name`."""
        owners = " and ".join(f"{distribution} {version}" for distribution, version in distributions)
        cures = " or ".join(f"`pip uninstall {distribution}`" for distribution, _ in distributions)
        reason = f"offered by {len(distributions)} distributions, {owners}"
        hint = f"uninstall one of them: {cures}"
        super().__init__(f"backend '{name}' is {reason}; {hint}.", reason=reason, hint=hint)


class BackendImportError(NamedError):
    """The backend's code failed before it returned a `Backend`: which code and how, as one clause."""

    state = "import failed"
    says = " failed to load"

    def __init__(self, name: str, reason: str, hint: str = "") -> None:
        super().__init__(name, reason, hint or probe_hint(name))


class BackendVersionError(NamedError):
    """The backend was written for another version of the contract."""

    state = "wrong api version"
    says = " has the wrong api version"

    def __init__(
        self, name: str, origin: str, speaks: int, built_for: object = None, missing: str = ""
    ) -> None:
        """Compare `speaks` with `built_for`; if that is unknown, name what the backend found `missing`."""
        core = (
            "mla-backends (`pip install ./backends` in a newer checkout; once released, "
            "`pip install -U mla-backends`)"
        )
        contract = "another contract" if missing else f"contract {built_for}"
        reason = f"{origin} is built for {contract}, but this mla-backends has contract {speaks}"
        newer = isinstance(built_for, int) and built_for > speaks
        older = f"whichever is older: {origin}, or {core}" if missing else core if newer else origin
        super().__init__(name, f"{reason} ({missing})" if missing else reason, f"upgrade {older}")


class DeviceUnavailable(NamedError):
    """The backend loads, but its device cannot be used."""

    state = "no device"
    says = " has no usable device"

    def __init__(
        self, name: str, reason: str, hint: str = "", evidence: Mapping[str, str] | None = None
    ) -> None:
        """Take the result of `Backend.probe`."""
        super().__init__(name, reason or "no reason given", hint)
        self.evidence = dict(evidence or {})


class Ended(Exception):
    """Plugin code raised what is meant to end the process: SystemExit, GeneratorExit and the like."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__(describe(error))


def original(error: BaseException) -> BaseException:
    """Return what was raised: of `Ended`, what it stands for."""
    return error.error if isinstance(error, Ended) else error


def describe(error: BaseException) -> str:
    """Return the type of `error` and what it says, on one line."""
    if isinstance(error, Ended):
        return str(error)
    text = first_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, which may be empty; of a long one, its first sentence.

    Stacks append pages: torch lists all devices for which it has an operator that one lacks.
    """
    line = next(iter(str(error).strip().splitlines()), "").strip()
    return line if len(line) <= LONGEST_LINE else line.partition(". ")[0]


_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|ALLOC_FAILED|bad_alloc|cannot allocate memory", re.IGNORECASE
)


def out_of_memory(text: str) -> bool:
    """Return whether an error's description says that memory was short: later it may not be."""
    return bool(_OUT_OF_MEMORY.search(text))


def one_line(text: str) -> str:
    """Join the lines of `text`: what plugins say ends up in one sentence."""
    return " ".join(str(text).split())


def _closest(name: str, installed: Iterable[str], known: Mapping[str, KnownBackend]) -> str | None:
    """Find the backend meant by a misspelt name, or by the name of its platform ("cuda"), in lower case.

    Of three letters two always agree ("gpu", "cpu"), so such words must have the same ones.
    """
    words = {word.lower(): word for word in (GENERAL, *installed)}
    entries: list[KnownDevice | KnownBackend] = [*WITHOUT_PLUGIN.values(), *known.values()]
    for entry in entries:
        words.update(dict.fromkeys((entry.name, *entry.also), entry.name))
    close = difflib.get_close_matches(name, words, n=len(words), cutoff=0.65)
    fitting = (word for word in close if max(len(word), len(name)) > 3 or sorted(word) == sorted(name))
    return words.get(next(fitting, ""))


@contextmanager
def plugin_code() -> Iterator[None]:
    """Turn what is meant to end a process into `Ended`, an Exception like any other.

    A plugin, or a vendor's library below it, may call `sys.exit` or raise GeneratorExit. A process that ends
    with code 0 but without a result looks like a success. KeyboardInterrupt is the user's, and passes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Ended(error) from error


@contextmanager
def refused(report: Callable[[Exception], BackendError]) -> Iterator[None]:
    """Raise what `report` makes of anything that a plugin's code raises, except its own `BackendError`."""
    try:
        with plugin_code():
            yield
    except BackendError:
        raise
    except Exception as error:
        raise report(error) from error
