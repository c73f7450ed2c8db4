"""Files from outside: every reader meets whatever could hang, fill the memory or act on a terminal."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoint_maker as maker
import pytest

import mla.bench.results.file
import mla_backends.outside
from mla.bench import results
from mla.bench.cli import stored
from mla.bench.workload.workload_file import read_workload
from mla.checkpoint import read_layer
from mla.config import MLAConfig
from mla.conformance.selection import Xfails
from mla.errors import MLAError
from mla.failures import file as failure_file
from mla_backends import BackendError, outside
from mla_backends.triton_ops.tuning import read_tuning

Bench = Callable[..., Any]
Reader = Callable[[Path], object]

TINY_CONFIG = MLAConfig(hidden_size=64, num_attention_heads=2)
# What a user names, and how it is read.
NAMED: dict[str, Reader] = {
    "config.json": MLAConfig.from_pretrained,
    "workload.toml": lambda path: read_workload(str(path)),
    "run.json": results.read,
    "ceilings.json": lambda path: stored.stored(path, "table"),
    "tuning.json": read_tuning,
    "xfails.txt": Xfails.read,
    "failure.safetensors": failure_file.read,
}
# What lies in the folder that a user names.
IN_A_FOLDER: dict[str, Reader] = {
    "model/config.json": lambda path: MLAConfig.from_pretrained(path.parent),
    "model/model.safetensors": lambda path: read_layer(path.parent, TINY_CONFIG),
    "model/model.safetensors.index.json": lambda path: read_layer(path.parent, TINY_CONFIG),
}
READERS = {**NAMED, **IN_A_FOLDER}


def terabyte(path: Path) -> None:
    """Make a file that is large and takes no room."""
    path.touch()
    os.truncate(path, 1 << 40)


WORDS = {
    ".txt": "\x1b]0;%s: 1",
    ".toml": '[[scenario]]\n"\\u001b]0;%s" = 1',
    ".json": '{"kv_lora_rank": "\\u001b]0;%s", "hidden_size": 1, "num_attention_heads": 1, "format": 1}',
    ".safetensors": "\x1b]0;%s",
}
HOSTILE: dict[str, Callable[[Path], object]] = {
    "pipe without a writer": os.mkfifo,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
    "a terabyte": terabyte,
    "brackets without end": lambda path: path.write_text("a = " * path.match("*.toml") + "[" * 100_000),
    "no UTF-8": lambda path: path.write_bytes(b'{"\xff\xfe": "\xc3"}'),
    "a long word": lambda path: path.write_text(WORDS[path.suffix] % ("long" * 25_000)),
}


@pytest.fixture(autouse=True)
def _no_hang_and_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End a read that waits, and refuse memory to one that does not end."""
    monkeypatch.setattr(mla_backends.outside, "_PIPE_SECONDS", 0.1)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), limits[1]))
    before = signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def _give_up(number: int, frame: object) -> None:
    raise AssertionError("the file was waited for")


def refusal(reader: Reader, path: Path) -> str:
    """Return the sentence that a reader refuses a file with."""
    with pytest.raises((MLAError, BackendError)) as refused:
        reader(path)
    said = str(refused.value)
    assert len(said) < 700
    assert outside.escaped(said) == said
    return said


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_every_hostile_file(name: str, hostile: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    HOSTILE[hostile](path)
    refusal(READERS[name], path)


@pytest.mark.parametrize("name", IN_A_FOLDER)
def test_a_link_out_of_its_folder_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    """The other end is a pipe: to open it would take the word of its writer."""
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "elsewhere")
    reader = os.open(tmp_path / "elsewhere", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "elsewhere", os.O_WRONLY)
    os.write(writer, b"{}")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    assert "is a link that leaves the directory" in refusal(IN_A_FOLDER[name], tmp_path / name)
    assert os.read(reader, 9) == b"{}"
    os.close(reader)
    os.close(writer)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    made = maker.LAYOUTS["hub-cache"].make(tmp_path / "model")
    assert (made.folder / "config.json").is_symlink()
    assert MLAConfig.from_pretrained(made.folder).hidden_size == made.config.hidden_size


def test_the_blobs_of_a_hub_cache_may_lie_on_another_disk(tmp_path: Path) -> None:
    made = maker.LAYOUTS["hub-cache"].make(tmp_path / "model")
    blobs = made.folder.parents[1] / "blobs"
    blobs.rename(tmp_path / "disk")
    blobs.symlink_to(tmp_path / "disk")
    assert read_layer(made.folder, made.config)


def test_a_config_that_is_named_may_be_a_link_to_anywhere(tmp_path: Path) -> None:
    """Data version control makes such files, of which a checkpoint's rule does not hold."""
    (tmp_path / "store").write_text(
        json.dumps({"hidden_size": 64, "num_attention_heads": 2, "kv_lora_rank": 8})
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "store")
    assert MLAConfig.named(str(tmp_path / "model" / "config.json")).hidden_size == 64


def test_a_pipe_of_a_high_number_is_read(tmp_path: Path) -> None:
    """`select` would refuse it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2000, limits[1]), limits[1]))
    taken = [os.dup(2) for _ in range(1024)]
    try:
        with subprocess.Popen(["echo", "[1]"], stdout=subprocess.PIPE) as echo:
            assert echo.stdout is not None
            assert outside.read(f"/dev/fd/{echo.stdout.fileno()}") == b"[1]\n"
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("seconds", [0, 0.5], ids=["writer", "slow writer"])
def test_a_pipe_that_a_user_names_is_read(
    seconds: float, tmp_path: Path, make_run: Callable[..., results.Run]
) -> None:
    """As in `compare <(zcat a.json.gz) b.json`; the pipe is empty for longer than a writer may be missing."""
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        with (tmp_path / "pipe").open("wb") as pipe:
            time.sleep(seconds)
            pipe.write(results.encode(make_run()))

    writer = threading.Thread(target=write)
    writer.start()
    read = results.read(tmp_path / "pipe")
    writer.join()
    assert read == make_run()


def test_a_pipe_is_read_as_far_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla.bench.results.file, "_MAX_BYTES", 1 << 20)
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        assert endless.stdout is not None
        said = refusal(results.read, Path(f"/dev/fd/{endless.stdout.fileno()}"))
        endless.kill()
    assert said.endswith("it is larger than 1 MiB.")


@pytest.mark.parametrize("config", [False, True], ids=["workload", "config"])
def test_what_a_file_says_of_itself_cannot_act_on_a_terminal(
    config: bool, tmp_path: Path, bench: Bench, small: list[str]
) -> None:
    """In a run that succeeds, and in one sentence."""
    bad = "\x1b]0;owned\x07 \u202etxt " + "long" * 10_000
    if config:
        values = json.loads(Path(small[small.index("--config") + 1]).read_text())
        (tmp_path / "bad.json").write_text(json.dumps({**values, "name": bad}))
        small[small.index("--config") + 1] = "./bad.json"
        done = bench("--backend", "fake-virtual-clock", *small, "--dry-run", fakes=["virtual_clock"])
    else:
        (tmp_path / "bad.toml").write_text(f'[[scenario]]\nname = "a"\n{json.dumps(bad)} = 1\n')
        done = bench("--backend", "fake-virtual-clock", "--workload", "bad.toml", fakes=["virtual_clock"])
    assert done.code == (0 if config else 2)
    assert "long" in done.err
    assert "\\x1b]0;" in done.err
    assert set(done.err) - set("\n") == {letter for letter in done.err if letter.isprintable()}
    assert max(map(len, done.err.splitlines())) < 1000
