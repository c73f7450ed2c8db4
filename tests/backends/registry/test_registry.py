"""Finding, loading and validating backends, with real installations in real interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Python = Callable[..., str]

REFUSAL = """
from mla_backends import BackendError
from mla_backends.registry import open_backend
try:
    open_backend({name!r}, options={options!r})
except BackendError as error:
    print(type(error).__name__ + ": " + str(error))
"""

BACKEND = """
from mla_backends import Availability, Backend, hookimpl
class Local(Backend):
    name = "local"
    api_version = 1
    def probe(self): return Availability(True)
    def setup(self, index=None): return "device %s" % index
    def synchronize(self): pass
"""


def refusal(python: Python, name: str, *fakes: str, options: dict[str, str] | None = None) -> str:
    return python(REFUSAL.format(name=name, options=options or {}), *fakes).strip()


def test_importing_the_contract_imports_no_torch(python: Python) -> None:
    code = "import mla_backends, mla_backends.registry, sys; print('torch' in sys.modules)"
    assert python(code, everything=True).strip() == "False"


def test_the_contract_exports_exactly_its_public_names() -> None:
    import mla_backends

    classes = {"Availability", "Backend", "BackendError", "BackendOptionError", "FusedOp", "TorchBackend"}
    assert set(mla_backends.__all__) == {"API_VERSION", "hookimpl", *classes}
    assert all(hasattr(mla_backends, name) for name in mla_backends.__all__)


def test_entries_come_from_metadata_and_import_no_plugin(python: Python) -> None:
    code = """
import sys
from mla_backends.registry import entries
for entry in entries():
    print(entry.name, entry.distribution, entry.version, entry.value)
print([module for module in sys.modules if module.startswith("fake_")])
"""
    assert python(code, "no_device", "broken_import", "good").splitlines() == [
        "fake-broken-import mla-backend-fake-broken-import 1.2.3 fake_broken_import",
        "fake-good mla-backend-fake-good 1.0 fake_good",
        "fake-no-device mla-backend-fake-no-device 1.0 fake_no_device",
        "[]",
    ]


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("MLA_backend.fake_good.egg-info", "PKG-INFO"),  # what an editable setuptools install leaves
        ("~la_backend_fake_good-7.dist-info", "METADATA"),  # what an interrupted pip leaves
    ],
)
def test_one_distribution_found_twice_is_no_duplicate(
    python: Python, tmp_path: Path, folder: str, text: str
) -> None:
    twin = tmp_path / folder
    twin.mkdir()
    (twin / text).write_text("Metadata-Version: 2.1\nName: MLA_backend.fake_good\nVersion: 7\n")
    (twin / "entry_points.txt").write_text("[mla.backends]\nfake-good = fake_good\n")
    code = """
from mla_backends.registry import create, entries
print([(entry.name, entry.version) for entry in entries()])
print(create("fake-good").name)
"""
    # The current directory comes first on the path.
    assert python(code, "good").splitlines() == ["[('fake-good', '7')]", "fake-good"]


def test_a_half_removed_installation_hides_no_other_backend(python: Python, tmp_path: Path) -> None:
    broken = tmp_path / "half_removed-1.0.dist-info"
    broken.mkdir()
    (broken / "entry_points.txt").write_text("[mla.backends]\nhalf = half_removed\n")
    code = "from mla_backends.registry import entries; print([entry.name for entry in entries()])"
    assert python(code, "good").strip() == "['fake-good', 'half']"


def test_a_chosen_backend_is_probed_and_set_up_on_a_real_device(python: Python) -> None:
    code = """
import torch
from mla_backends.registry import open_backend
backend = open_backend("fake-good", options={"threads": "1"})
print(backend.name, backend.device, backend.device == torch.zeros(1).device, backend.options)
print(backend.entry.name, backend.entry.distribution, backend.entry.version, backend.entry.value)
"""
    assert python(code, "good", everything=True).splitlines() == [
        "fake-good cpu True {'threads': '1'}",
        "fake-good mla-backend-fake-good 1.0 fake_good",
    ]


def test_an_absent_torch_is_named_with_its_cure(python: Python) -> None:
    assert refusal(python, "fake-good", "good") == (
        "DeviceUnavailable: backend 'fake-good' has no usable device: setup(None) raised "
        "ModuleNotFoundError: No module named 'torch'; install the torch build it needs."
    )


@pytest.mark.parametrize(
    ("attribute", "definition"),
    [
        ("mla_backend", "@hookimpl\ndef mla_backend(options): return Local(options)"),
        ("under_another_name", "@hookimpl\ndef under_another_name(options): return Local(options)"),
        ("without_arguments", "@hookimpl\ndef without_arguments(): return Local({'threads': '2'})"),
        ("unmarked", "def unmarked(options): return Local(options)"),
        ("Local", ""),
        ("inner.make", "class inner:\n    make = Local"),
        ("Plugin", "class Plugin:\n    @hookimpl\n    def mla_backend(self, options): return Local(options)"),
        ("", "@hookimpl\ndef mla_backend(options): return Local(options)"),
    ],
)
def test_unpackaged_code_is_reached_by_module_and_attribute(
    python: Python, tmp_path: Path, attribute: str, definition: str
) -> None:
    (tmp_path / "local_code.py").write_text(f"{BACKEND}\n{definition}\n")
    code = f"""
from mla_backends.registry import open_backend
backend = open_backend("local_code:{attribute}", index=3, options={{"threads": "2"}})
print(backend.name, backend.device, backend.options)
"""
    assert python(code).strip() == "local device 3 {'threads': '2'}"


def test_a_ready_made_backend_takes_no_options_silently(python: Python, tmp_path: Path) -> None:
    (tmp_path / "local_code.py").write_text(f"{BACKEND}\nready = Local()\n")
    code = "from mla_backends.registry import create; print(create('local_code:ready').name)"
    assert python(code).strip() == "local"
    assert "has no option 'threads'" in refusal(python, "local_code:ready", options={"threads": "2"})


FAILED = "backend 'local_code:it' failed to load: "
OTHER = "backend 'local_code:it' has the wrong api version: module local_code is built for "
ABSENT = "backend 'local_code:it' has no usable device: "


@pytest.mark.parametrize(
    ("definition", "sentence"),
    [
        ("import sys; sys.exit(3)", FAILED + "importing module local_code raised SystemExit: 3;"),
        ("import no_such_sdk", FAILED + "importing module local_code raised ModuleNotFoundError: No module"),
        ("", FAILED + "module local_code has no attribute 'it'; check the spelling"),
        (
            "class Odd(BaseException): pass\nraise Odd('x')",
            FAILED + "importing module local_code raised Odd: x;",
        ),
        (
            "class it(Local):\n    def probe(self): raise SystemExit(0)",
            ABSENT + "probe() raised SystemExit: 0, which the contract forbids;",
        ),
        ("class it(Local):\n    def device_count(self): return 0", ABSENT + "device_count() is 0;"),
        (
            "class it(Local):\n    def device_count(self): return 'two'",
            ABSENT + "device_count() returned 'two'",
        ),
        ("it = 3", FAILED + "module local_code has no hook; mark its mla_backend(options) with"),
        (
            "@hookimpl\ndef it(options): raise KeyError(1)",
            FAILED + "mla_backend(options) of module local_code raised",
        ),
        (
            "@hookimpl\ndef it(options): return None",
            FAILED + "mla_backend(options) of module local_code returned None;",
        ),
        (
            "@hookimpl\ndef it(options, card): return 1",
            FAILED + "the hook of module local_code takes the wrong arguments; define it as mla_backend",
        ),
        ("class it(Local): name = 5", FAILED + "the backend of module local_code has no name;"),
        (
            "class it(Local): api_version = None",
            FAILED + "the backend of module local_code has no api_version;",
        ),
        (
            "class it(Local): api_version = 2",
            OTHER + "contract 2, but this mla-backends has contract 1; upgrade mla-backends",
        ),
        (
            "import mla_backends\nclass it(mla_backends.Later): pass",
            OTHER
            + "another contract, but this mla-backends has contract 1 (module 'mla_backends' has no attri",
        ),
        (
            "import mla_backends.later",
            OTHER
            + "another contract, but this mla-backends has contract 1 (No module named 'mla_backends.lat",
        ),
        (
            "class it(Local):\n    def probe(self): raise OSError('libx.so\\nmore')",
            ABSENT + "probe() raised OSError: libx.so, which the contract",
        ),
        (
            "class it(Local):\n    def probe(self): return True",
            ABSENT + "probe() returned a bool, which the contract forbids;",
        ),
        (
            "class it(Local):\n    def setup(self, index=None): raise OSError('device 0 is busy')",
            ABSENT + "setup(None) raised OSError: device 0 is busy;",
        ),
        (
            "class it(Local):\n    def setup(self, index=None): pass",
            ABSENT + "setup(None) returned no device;",
        ),
        (  # which it chose itself
            "from mla_backends import BackendError\ndef it(options): raise BackendError('no licence; buy.')",
            "no licence; buy.",
        ),
    ],
)
def test_every_fault_of_a_plugin_becomes_one_sentence(
    python: Python, tmp_path: Path, definition: str, sentence: str
) -> None:
    (tmp_path / "local_code.py").write_text(f"{BACKEND}\n{definition}\n")
    said = refusal(python, "local_code:it")
    assert said.partition(": ")[2].startswith(sentence)
    assert "\n" not in said
    assert "Traceback" not in said


def test_a_device_beyond_those_that_are_visible_is_refused(python: Python, tmp_path: Path) -> None:
    """Although the backend's own setup() takes any number."""
    counting = "class it(Local):\n    def device_count(self): return 2"
    (tmp_path / "local_code.py").write_text(f"{BACKEND}\n{counting}\n")
    code = """
from mla_backends.registry import open_backend
print(open_backend("local_code:it", 1).device)
try:
    open_backend("local_code:it", 5)
except Exception as error:
    print(type(error).__name__, error)
"""
    assert python(code).splitlines() == [
        "device 1",
        "BackendError backend 'local_code:it' has no device 5: it has 2, numbered from 0.",
    ]


def test_an_interrupt_is_no_fault_of_the_plugin(python: Python, tmp_path: Path) -> None:
    (tmp_path / "local_code.py").write_text("raise KeyboardInterrupt\n")
    code = """
from mla_backends.registry import create
try:
    create("local_code:it")
except KeyboardInterrupt:
    print("interrupted")
"""
    assert python(code).strip() == "interrupted"


def test_the_example_in_the_readme_works(python: Python, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[3] / "backends" / "README.md").read_text()
    (tmp_path / "my_backend.py").write_text(readme.split("```python\n")[1].split("```")[0])
    code = (
        "from mla_backends.registry import open_backend; print(open_backend('my_backend:mla_backend').device)"
    )
    assert python(code, everything=True).strip() == "cpu"


@pytest.mark.parametrize(
    ("names", "code", "last"),
    [
        (["fake-good"], 0, ""),
        (["fake-goud"], 3, "error: unknown backend 'fake-goud' (did you mean 'fake-good'?); installed: "),
        (["fake-broken-import"], 3, "error: backend 'fake-broken-import' failed to load: "),
        ([], 2, "usage: python -m mla_backends.probe NAME"),
    ],
)
def test_the_probe_by_hand_says_what_is_wrong_and_shows_the_traceback(
    install: Callable[[str], Path],
    contract_alone: Path,
    tmp_path: Path,
    names: list[str],
    code: int,
    last: str,
) -> None:
    folders = [str(install("good")), str(install("broken_import")), str(contract_alone)]
    shown = subprocess.run(
        [sys.executable, "-S", "-m", "mla_backends.probe", *names],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    *trace, said = shown.stderr.splitlines() or [""]
    assert shown.returncode == code
    assert said.startswith(last)
    assert bool(trace) == ("Traceback" in shown.stderr) == (names == ["fake-broken-import"])
    if trace:
        assert json.loads(shown.stdout.splitlines()[-1])["state"] == "import failed"
        assert "and this line is not for users" in shown.stderr
