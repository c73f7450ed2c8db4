"""Turning a backend's name into a backend that is ready to use, or into a sentence that says why not.

Backends are found in the metadata of what is installed, and only the chosen plugin is imported. Whatever a
plugin does wrong surfaces as a `BackendError`: nothing is skipped, and nothing falls back to another backend.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pluggy

from mla_backends.api import API_VERSION, Availability, Backend
from mla_backends.errors import (
    BackendError,
    BackendImportError,
    BackendNotInstalled,
    BackendOptionError,
    BackendVersionError,
    DeviceUnavailable,
    DuplicateBackend,
    NoPlugin,
    UnknownBackend,
    describe,
    probe_hint,
    refused,
    setup_hint,
)
from mla_backends.known import GENERAL, KNOWN, WITHOUT_PLUGIN

HOOK = "mla_backend"
REPORT = "report it to the backend's authors"
PATH_HINT = "check the spelling, run from the folder it is in, or put that folder on PYTHONPATH"
PROJECT = "mla"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def mla_backend(options: Mapping[str, str]) -> Backend | None:
    """Return the backend of this plugin, made with the user's `-O key=value` options.

    Called once, after the user chose the plugin by the name of its entry point in the group
    `mla.backends`; no other plugin is imported. Must not touch the device: `Backend.probe` comes next.

    `options` are the user's, all strings; pass them to `Backend.__init__`, which rejects those the backend
    does not know.
    """


# ------------------------------------------------------------------------------------------ entries

GROUP = "mla.backends"
DISTRIBUTION = "mla-backends"


@dataclass(frozen=True)
class Entry:
    """One backend on offer: an entry point, or code the user pointed at (then without a distribution)."""

    name: str
    distribution: str | None
    version: str | None
    value: str  # "package.module" or "package.module:attribute"

    @property
    def origin(self) -> str:
        """Name the code for messages: the distribution and its version, or the module."""
        if self.distribution is None:
            return f"module {self.value.partition(':')[0]}"
        return f"{self.distribution} {self.version}"


def entries() -> list[Entry]:
    """List the backends on offer, sorted by name.

    A name may occur twice, from different distributions. One distribution found twice on `sys.path`
    (an editable install seen from its own folder) counts once; the first on the path wins, as for imports.
    """
    entries: dict[tuple[str, str], Entry] = {}
    for point in metadata.entry_points(group=GROUP):
        distribution, version = _identity(point)
        entry = Entry(point.name, distribution, version, point.value)
        key = (point.name, re.sub(r"[-_.]+", "-", distribution).lower())  # normalised as PEP 503 does
        entries.setdefault(key, entry)
    return sorted(entries.values(), key=lambda entry: (entry.name, entry.distribution or ""))


def locate(name: str) -> Entry:
    """Return the one entry called `name`, or the code that `package.module:attribute` points at.

    Raises `UnknownBackend`, `BackendNotInstalled`, `NoPlugin` or `DuplicateBackend`.
    """
    if ":" in name:
        return Entry(name, None, None, name)
    offers = entries()
    chosen = [entry for entry in (*offers, general()) if entry.name == name]
    if len(chosen) > 1:
        raise DuplicateBackend(name, [(entry.distribution or "?", entry.version or "?") for entry in chosen])
    if chosen:
        return chosen[0]
    if name in KNOWN:
        raise BackendNotInstalled(KNOWN[name])
    if name in WITHOUT_PLUGIN:
        raise NoPlugin(WITHOUT_PLUGIN[name])
    raise UnknownBackend(name, sorted({entry.name for entry in offers}), KNOWN)


def general() -> Entry:
    """Return the backend of this package itself, which needs no metadata."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = "?"
    return Entry(GENERAL, DISTRIBUTION, version, "mla_backends.any_device")


def _identity(point: metadata.EntryPoint) -> tuple[str, str]:
    """Return name and version of the distribution that declares `point`.

    A half-removed installation may lack them; it must not hide all other backends.
    """
    try:
        if point.dist is not None and point.dist.name:
            return point.dist.name, point.dist.version
    except (KeyError, OSError):
        pass  # Python 3.10 to 3.12 say None where METADATA is missing, later ones may raise
    return "(unnamed distribution)", "?"


# ----------------------------------------------------------------------------------------- backends
def open_backend(
    name: str,
    index: int | Callable[[int | None], int | None] | None = None,
    options: Mapping[str, str] | None = None,
) -> Backend:
    """Create the backend `name`, probe it and set up its device `index`. Raises `BackendError`.

    `index` may be a function of the number of visible devices (None if they cannot be counted).
    """
    backend = create(name, options)
    probe_backend(name, backend)
    if callable(index):
        index = index(count_devices(name, backend))
    with _calling(name, f"setup({index})", setup_hint(name)):
        device = backend.setup(index)
    if device is None:
        raise DeviceUnavailable(name, f"setup({index}) returned no device", REPORT)
    count = count_devices(name, backend)  # `setup` should have refused what follows
    if count is not None and count < 1:
        raise DeviceUnavailable(
            name, f"device_count() is {count!r}", "check that this process may see a device"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise BackendError(f"backend '{name}' has no device {index}: it has {count}, numbered from 0.")
    backend.device = device
    return backend


def probe_backend(name: str, backend: Backend) -> Availability:
    """Return what a successful probe found, or raise `DeviceUnavailable`."""
    broken = ", which the contract forbids"
    with _calling(name, "probe()", probe_hint(name), broken):
        availability = backend.probe()
    if not isinstance(availability, Availability):
        raise DeviceUnavailable(name, f"probe() returned a {type(availability).__name__}{broken}", REPORT)
    if not availability.ok:
        raise DeviceUnavailable(
            name, availability.reason, _torch_hint(name) or availability.hint, availability.evidence
        )
    return availability


def count_devices(name: str, backend: Backend) -> int | None:
    """Return how many devices the backend sees, or None. Raises `DeviceUnavailable` when asking fails."""
    with _calling(name, "device_count()", setup_hint(name)):
        count = backend.device_count()
    if count is None or (isinstance(count, int) and not isinstance(count, bool)):
        return count
    raise DeviceUnavailable(name, f"device_count() returned {count!r}, not a number or None", REPORT)


def _calling(name: str, call: str, hint: str, broken: str = "") -> AbstractContextManager[None]:
    """Turn what a method of a backend raises into `DeviceUnavailable`."""
    return refused(
        lambda error: DeviceUnavailable(
            name, f"{call} raised {describe(error)}{broken}", _torch_hint(name, error) or hint
        )
    )


def create(name: str, options: Mapping[str, str] | None = None) -> Backend:
    """Import the one plugin that `name` stands for and return its backend, not yet probed.

    `name` is the name of an entry point, or `package.module:attribute` for code that is not packaged:
    a function marked with `hookimpl`, an object or class that has the hook, a `Backend` class or
    another callable that takes the options, or a `Backend`. Raises `BackendError`.
    """
    entry = locate(name)
    with refused(lambda error: _not_loaded(entry, f"importing {entry.origin}", error)):
        module, attribute = _import(entry.value)
    provider = _attribute(entry, module, attribute)
    with refused(lambda error: _not_loaded(entry, f"{HOOK}(options) of {entry.origin}", error)):
        backend = _validated(entry, _build(entry, provider, dict(options or {})))
    with suppress(AttributeError):  # a subclass may use the name for a property of its own
        backend.entry = entry
    return backend


def _import(value: str) -> tuple[Any, str]:
    """Import the module of "package.module:attribute"; return it and the attribute's path, or "".

    Extras in brackets are obsolete and ignored.
    """
    module, _, attribute = value.partition("[")[0].strip().partition(":")
    return importlib.import_module(module.strip()), attribute.strip()


def _attribute(entry: Entry, module: Any, path: str) -> Any:
    """Return what the entry point names inside its module. Raises `BackendImportError` if it is not there."""
    try:
        return operator.attrgetter(path)(module) if path else module
    except AttributeError as error:
        raise BackendImportError(
            entry.name, f"{entry.origin} has no attribute '{path}'", PATH_HINT
        ) from error


def _build(entry: Entry, provider: Any, options: dict[str, str]) -> Any:
    """Get the backend out of what the entry point names."""
    if isinstance(provider, Backend):
        if options:
            raise BackendOptionError.unknown(provider.name, sorted(options), ())
        return provider
    if isinstance(provider, type) and issubclass(provider, Backend):
        return provider(options)
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(sys.modules[__name__])
    plugin = provider() if isinstance(provider, type) else provider
    if inspect.isroutine(provider):  # the attribute *is* the hook, whatever it is called
        plugin = SimpleNamespace(**{HOOK: provider})
    try:
        manager.register(plugin, name=entry.name)
    except pluggy.PluginValidationError as error:
        reason = f"the hook of {entry.origin} takes the wrong arguments"
        raise BackendImportError(entry.name, reason, f"define it as {HOOK}(options)") from error
    hooks = manager.get_hookcallers(plugin) or []
    if wrong := ", ".join(repr(hook.name) for hook in hooks if not hook.has_spec()):
        reason = f"{entry.origin} implements {wrong}, not a hook"
        raise BackendImportError(entry.name, reason, f"the only hook is {HOOK}(options)")
    if hooks:
        return manager.hook.mla_backend(options=options)
    if callable(provider) and not isinstance(provider, type):
        return provider(options)
    raise BackendImportError(
        entry.name, f"{entry.origin} has no hook", f"mark its {HOOK}(options) with @mla_backends.hookimpl"
    )


def _validated(entry: Entry, backend: Any) -> Backend:
    """Return `backend` if it meets the parts of the contract that can be checked without a device."""
    version = getattr(backend, "api_version", None)
    # First, because a backend for another contract need not be an instance of this `Backend`.
    if version is not None and version != API_VERSION:
        raise BackendVersionError(entry.name, entry.origin, API_VERSION, version)
    if not isinstance(backend, Backend):
        kind = "None" if backend is None else f"a {type(backend).__name__}"
        raise BackendImportError(
            entry.name,
            f"{HOOK}(options) of {entry.origin} returned {kind}",
            "it must return a mla_backends.Backend",
        )
    if version is None:
        hint = f"set `api_version` to {API_VERSION} in its class"
        raise BackendImportError(entry.name, f"the backend of {entry.origin} has no api_version", hint)
    if not isinstance(getattr(backend, "name", None), str):
        raise BackendImportError(
            entry.name, f"the backend of {entry.origin} has no name", "set `name` to a string in its class"
        )
    return backend


def _not_loaded(entry: Entry, action: str, error: Exception) -> BackendError:
    """Return the error that names the plugin, and the cause of what `action` raised."""
    missing = _missing_from_contract(error)
    if missing:
        return BackendVersionError(entry.name, entry.origin, API_VERSION, missing=missing)
    if _missing_module(entry, error):
        return BackendImportError(entry.name, f"{entry.origin} cannot be imported: no such module", PATH_HINT)
    hint = _torch_hint(entry.name, error)
    return BackendImportError(entry.name, f"{action} raised {describe(error)}", hint)


def _missing_module(entry: Entry, error: BaseException) -> bool:
    """Return whether what is missing is the module the user named, or a package above it."""
    module = entry.value.partition(":")[0]
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    return entry.distribution is None and bool(missing) and f"{module}.".startswith(f"{missing}.")


def _missing_from_contract(error: BaseException) -> str:
    """Return what the plugin expected in `mla_backends` and did not find; empty if that is not the cause."""
    if isinstance(error, ImportError):
        owner = error.name or ""
    elif isinstance(error, AttributeError) and inspect.ismodule(error.obj):
        owner = error.obj.__name__
    else:
        return ""
    if owner.partition(".")[0] != "mla_backends":
        return ""
    return re.sub(r" \([^()]*\)$", "", str(error))  # without the path of the module


def _torch_hint(name: str, error: BaseException | None = None) -> str:
    """Return the fix if backend `name` failed because torch is absent or fails to import, else "".

    A package whose import fails is dropped from `sys.modules`, but the submodules it had loaded stay.
    """
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        known = KNOWN.get(name)
        return f"install torch from {known.torch_source}" if known else "install the torch build it needs"
    started = any(module.startswith("torch.") for module in sys.modules)
    if "torch" in sys.modules or not started:
        return ""
    return "torch itself fails to import; with TORCH_DEVICE_BACKEND_AUTOLOAD=0 it loads no vendor extension"
