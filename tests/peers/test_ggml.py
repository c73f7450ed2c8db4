"""The comparison with ggml's ops: its driver on naive ops, the command, refusals. No test needs the peer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers.ggml import build, peer, record
from benchmarks.peers.ggml.peer import DRIVER, Peer, PeerError
from benchmarks.peers.ggml.ways import require_passive_waiting
from mla.errors import UsageError
from mla.verify.op_oracle import attend_requests, product
from mla_backends.api import SegmentLengths

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "benchmarks" / "peers" / "ggml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as `build.py` makes it, whose driver computes with naive loops."""
    made = tmp_path_factory.mktemp("ggml")
    sources = [str(FOLDER / "driver" / "main.cpp"), str(HERE / "fake_ops.cpp")]
    words = ["g++", "-std=c++20", "-O1", f"-I{FOLDER / 'driver'}", *sources, "-o", str(made / DRIVER)]
    subprocess.run(words, check=True)
    return made


def command(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of the two commands in a process of its own."""
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def compare(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the comparison once, on one thread."""
    return command("compare.py", "--peer", str(folder), "--threads", "1", "--runs", "1", *words, **variables)


@pytest.mark.parametrize("layout", ["separate", "unified"])
def test_operands_and_results_pass_through_the_driver(folder: Path, layout: str) -> None:
    lengths, heads = (3, 1, 5), 2
    q, keys = torch.randn(len(lengths), heads, 8), torch.randn(sum(lengths), 8)
    with Peer(folder, 1) as running:
        work = running.attention(q, keys, lengths, 0.3, 6, "f16", layout)
        assert len(work.time(1, 4)) == 4
        output = work.result()
    decode = SegmentLengths((1,) * len(lengths), lengths, causal=True)
    truth, _ = attend_requests(q, keys[:, None], keys[:, None, :6], decode, 0.3)
    torch.testing.assert_close(output.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_product_passes_through_the_driver(folder: Path) -> None:
    weight, x = torch.randn(5, 7), torch.randn(3, 7)
    with Peer(folder, 1) as running:
        output = running.product(weight, x, "f16").result()
    torch.testing.assert_close(output.double(), product(x, weight), rtol=1e-5, atol=1e-5)


def test_a_selection_passes_through_the_driver(folder: Path) -> None:
    lengths, most = (9, 5), 3
    q, keys, weights = torch.randn(2, 4, 8), torch.randn(sum(lengths), 8), torch.randn(2, 4)
    with Peer(folder, 1) as running:
        positions = running.selection(q, keys, weights, lengths, "f16", most).result().view(2, most)
    for row, query, of, part in zip(positions, q, weights, keys.split(lengths), strict=True):
        scores = (of.double() @ (query.double() @ part.double().T).clamp_min(0)).topk(most).indices
        assert sorted(row.tolist()) == sorted(scores.tolist())


def test_what_the_driver_refuses_leaves_it_usable(folder: Path) -> None:
    weight, x = torch.ones(5, 7), torch.ones(3, 7)
    with Peer(folder, 1) as running:
        with pytest.raises(PeerError, match=r"refuses `product 1 1 q9 3 7 5`: no type 'q9'\."):
            running.product(weight, x, "q9")
        work = running.product(weight, x, "f16")
        work.close()
        with pytest.raises(PeerError, match="there is no work 2"):
            work.result()
        assert running.product(weight, x, "f16").result().tolist() == [[7.0] * 5] * 3


def test_a_peer_that_ends_is_said_with_its_last_words(folder: Path) -> None:
    with (
        Peer(folder, 1) as running,
        pytest.raises(PeerError, match=r"ended during `product .* \(exit code -6\); it said: this cannot be"),
    ):
        running.product(torch.ones(1, 1), torch.ones(1, 1), "abort")


def test_a_peer_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "ANSWER_SECONDS", 0.5)
    silent = tmp_path / DRIVER
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    with pytest.raises(PeerError, match=r"did not answer `describe` within 0\.5 s, and was ended\."):
        Peer(tmp_path, 1)


def test_all_ways_are_timed_and_right(folder: Path, tmp_path: Path) -> None:
    done = compare(
        folder,
        "--only",
        "1x400-h16,1x400-h16-q8_0,select-1x4096,16x512x4096",
        "-o",
        str(tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stderr
    run = record.read(tmp_path / "out.json")
    assert [(case.name, case.op) for case in run.cases] == [
        ("1x400-h16", "attention"),
        ("1x400-h16-q8_0", "attention"),
        ("select-1x4096", "selection"),
        ("16x512x4096", "product"),
    ]
    for case in run.cases:
        assert {"ours", "peer"} <= {timing.party for timing in case.timings}
        assert all(timing.error < record.WRONG for timing in case.timings)
        kind = "q8_0" if "q8_0" in case.name else "f16"
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {case.name} "))
        assert f", {kind} |" in row
        assert {timing.name for timing in case.timings if timing.party == "peer"} == {f"peer {kind}"}
    assert run.threads == 1
    assert run.peer["peer"] == "fake"
    again = command("compare.py", "--markdown", str(tmp_path / "out.json"))
    assert (again.returncode, again.stdout) == (0, done.stdout)


@pytest.mark.parametrize(("case", "fewer"), [("1x400-h16", "16"), ("select-1x4096", "1")])
def test_a_kernel_that_leaves_keys_out_is_wrong(folder: Path, case: str, fewer: str) -> None:
    done = compare(folder, "--only", case, FAKE_LEAVES_OUT=fewer)
    assert done.returncode == 4, done.stderr
    assert f"{case}: peer f16 is WRONG, by " in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {case} "))
    assert row.endswith("| - | - |")  # no ratio with what did not compute the op


def test_a_case_that_is_not_there_is_refused(folder: Path) -> None:
    done = compare(folder, "--only", "2x2")
    assert done.returncode == 2
    assert "error: --only matches no case: use attention, selection, product, 1x400-h16, " in done.stderr


def test_threads_that_never_sleep_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "Active")
    with pytest.raises(UsageError, match=r"OMP_WAIT_POLICY=active makes idle threads .*: unset it"):
        require_passive_waiting()


def test_a_folder_without_a_driver_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="holds no ggml_peer: build the peer with `python benchmarks/peers/"):
        Peer(tmp_path, 1)
    (tmp_path / DRIVER).write_text("not a program")
    with pytest.raises(PeerError, match=r"does not start .*: build it again here"):
        Peer(tmp_path, 1)
    (tmp_path / DRIVER).chmod(0o755)
    shutil.copy("/bin/true", tmp_path / DRIVER)  # a program that says nothing
    with pytest.raises(PeerError, match="ended during `describe` \\(exit code 0\\)"):
        Peer(tmp_path, 1)


def source(folder: Path) -> Path:
    """Make what a checkout is known by."""
    (folder / "ggml" / "include").mkdir(parents=True)
    for name in ("CMakeLists.txt", "include/ggml.h"):
        (folder / "ggml" / name).touch()
    return folder


def test_a_folder_without_the_source_is_refused(tmp_path: Path) -> None:
    done = command("build.py", str(tmp_path), "--into", str(tmp_path / "into"))
    assert done.returncode == 2
    assert "holds no ggml/CMakeLists.txt and ggml/include/ggml.h: give a checkout" in done.stderr
    built = source(tmp_path) / "ggml"
    assert build.ggml_folder(tmp_path) == build.ggml_folder(built) == built.resolve()
    assert build.commit_of(built) == "unknown"


def test_a_step_that_fails_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PeerError, match="no-such-cmake is not installed: `pip install no-such-cmake`"):
        build.run("configuring", "no-such-cmake")
    with pytest.raises(PeerError, match=r"building failed, as said above; needed are CMake 3\.14"):
        build.run("building", sys.executable, "-c", "exit('a.cpp:1:2: error: no member x')")
    assert "a.cpp:1:2: error" in capfd.readouterr().err
