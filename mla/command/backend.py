"""Open the backend that a command line names: the same way, with the same options, for every command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from mla.command import launcher
from mla.command.console import note
from mla.command.exit_codes import Exit
from mla.command.last_words import while_loading
from mla.command.options import Command, add_options, how, what_to_run
from mla.errors import MLAError, UsageError
from mla_backends import host, probe
from mla_backends.discovery import locate
from mla_backends.known import GENERAL

if TYPE_CHECKING:
    from mla_backends.api import Backend


# The help of --backend where a command measures.
MEASURED_BACKEND_HELP = "Backend (see `list`), or package.module:attribute. Default: the only usable one."


class NoBackend(MLAError):
    """No backend was named, and none or several could be meant."""


@dataclass(frozen=True)
class BackendOptions:
    """The options that choose and configure a backend."""

    backend: str | None  # None: the only usable one
    device: int | None
    backend_options: tuple[str, ...]  # KEY=VALUE
    threads: int | None

    def key_values(self) -> dict[str, str]:
        """Return the `-O` options. Raises `UsageError`."""
        return key_values(self.backend_options)


@dataclass(frozen=True)
class OpenedBackend:
    """A backend whose device is set up, under the name that the user gave."""

    backend: Backend
    name: str
    version: str | None  # of the distribution that brings it
    device: int | None  # the index to repeat: given, or chosen by the launcher


def backend_options(help: str) -> Callable[[Command], Command]:
    """Return a decorator that adds --backend, --device, -O and --threads to a click command."""
    options = (
        what_to_run("--backend", metavar="NAME", common=True, help=help),
        how(
            "--device",
            metavar="INDEX",
            type=click.IntRange(0, 65535),
            show_default="LOCAL_RANK, SLURM_LOCALID, or the current one",
            help="Device index.",
        ),
        how("-O", "backend_options", metavar="KEY=VALUE", multiple=True, help="Backend option; repeatable."),
        how(
            "--threads",
            type=click.IntRange(1, 4096),
            common=True,
            show_default="chosen by the backend",
            help="Host threads.",
        ),
    )
    return add_options(options)


def open_backend(options: BackendOptions) -> OpenedBackend:
    """Find, probe and set up the backend on this task's device.

    Raises `UsageError`, `NoBackend`, `LaunchError` or a `BackendError`; there is no fallback.
    """
    import mla

    settings = options.key_values()
    name = only_usable() if options.backend is None else options.backend
    index = launcher.local_device(note) if options.device is None else options.device
    with while_loading(name):
        backend: Backend = mla.load_backend(name, index, options.threads, settings)
    for remark in (*backend.remarks(), *_own_remarks(backend)):
        note(remark)
    return OpenedBackend(backend, name, locate(name).version, _repeatable_index(options, backend))


def _own_remarks(backend: Backend) -> Iterator[str]:
    """Yield what is odd about a backend, or about how it runs here, without being wrong."""
    import torch

    threads, cpus = torch.get_num_threads(), host.cpu_limit()
    if threads > cpus:
        yield (
            f"{threads} host threads share {cpus} {'CPU' if cpus == 1 else 'CPUs'}: they wait for each "
            f"other, and times are long and uneven; --threads {cpus} gives each a CPU of its own"
        )
    entry = backend.entry
    if entry is not None and entry.distribution is not None and entry.name != backend.name:
        yield (
            f"backend '{entry.name}' of {entry.origin} calls itself '{backend.name}', and so do its results: "
            "its `name` and its entry point should agree"
        )


def _repeatable_index(options: BackendOptions, backend: Backend) -> int | None:
    """Return the index to name in commands that repeat this run: they need no launcher then."""
    if options.device is not None or launcher.local_number() is None or backend.device is None:
        return options.device
    return backend.device.index


def only_usable() -> str:
    """Return the one usable backend; `GENERAL` only where no plugin's is. Raises `NoBackend`."""
    backends = probe.statuses()
    if not any(one.state == probe.USABLE for one in backends):
        backends.append(probe.status(GENERAL))
    usable = [one.name for one in backends if one.state == probe.USABLE]
    if len(usable) == 1:
        note(f"using backend '{usable[0]}', the only usable one")
        return usable[0]
    if usable:
        raise NoBackend(f"several backends are usable: {', '.join(usable)}. Choose one with --backend.")
    error = NoBackend(
        "no backend is usable: "
        + "; ".join(f"{one.name} ({one.state})" for one in backends)
        + ". `python -m mla.bench list` says why."
    )
    error.exit_code = Exit.BACKEND
    raise error


def key_values(options: Sequence[str]) -> dict[str, str]:
    """Split `-O` options at their "=". Raises `UsageError`."""
    pairs = [option.partition("=") for option in options]
    for option, (key, equals, _) in zip(options, pairs, strict=True):
        if not key or not equals:
            raise UsageError(f"-O takes KEY=VALUE, got '{option}'.")
    return {key: value for key, _, value in pairs}
