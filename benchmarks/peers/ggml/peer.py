"""The peer's process: a driver built by `build.py`, which times its ops itself and answers over pipes.

A process of its own gives the peer its own OpenMP runtime, and lets it end without ending ours: ggml answers
what it cannot do with `abort`. Operands go through the pipes as fp32 before anything is timed.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mla.errors import MLAError

DRIVER = "ggml_peer"
FACTS = "peer.json"  # written by `build.py`, beside the driver
ANSWER_SECONDS = 600.0  # seconds for one answer; then the process is ended


class PeerError(MLAError):
    """The peer is not there, does not start, or ended; the message says why."""


class PeerWork:
    """One op of the peer, bound to its operands."""

    def __init__(self, peer: Peer, number: int, shape: Sequence[int]) -> None:
        self._peer, self._number, self._shape = peer, number, tuple(shape)

    def time(self, untimed: int, timed: int) -> list[float]:
        """Return the milliseconds of `timed` calls, made back to back after `untimed` others."""
        answer = self._peer.ask(f"time {self._number} {untimed} {timed}")
        return [int(word) / 1e6 for word in answer]

    def result(self) -> torch.Tensor:
        """Call the op once more, into memory that was filled with NaN, and return what it wrote."""
        count = int(self._peer.ask(f"result {self._number}")[0])
        numbers = torch.frombuffer(bytearray(self._peer.read(4 * count)), dtype=torch.float32)
        return numbers.view(self._shape)

    def close(self) -> None:
        """Free the operands."""
        self._peer.ask(f"forget {self._number}")


class Peer:
    """The running driver. `facts`: what it says of itself, such as its caches' and weights' types."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Raises `PeerError`."""
        program = folder / DRIVER
        if not program.is_file():
            raise PeerError(
                f"'{folder}' holds no {DRIVER}: build the peer with `python benchmarks/peers/ggml/build.py "
                f"SOURCE --into {folder}`."
            )
        self._threads, self._made, self._late = threads, 0, False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the peer
        try:
            self._process = subprocess.Popen(
                [program.resolve()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"'{program}' does not start ({error.strerror}): build it again here.") from error
        try:
            self.facts = dict(word.split("=", 1) for word in self.ask("describe"))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # it had ended before it read everything
            self._process.communicate()
        self._errors.close()

    def types(self, kind: str) -> list[str]:
        """Return the types of the "caches", "weights" or "index" keys that the peer computes with here."""
        return self.facts[kind].split(",")

    def attention(
        self, q: torch.Tensor, keys: torch.Tensor, lengths: Sequence[int], scale: float,
        value_width: int, type_: str, layout: str,
    ) -> PeerWork:  # fmt: skip
        """Bind q [requests, h, k] and keys [sum of lengths, k]. Raises `PeerError` for what it cannot do."""
        (requests, heads, width), words = q.shape, " ".join(map(str, lengths))
        line = f"{type_} {layout} {heads} {width} {value_width} {scale} {requests} {words}"
        return self._make("attention", line, (requests, heads, value_width), q, keys)

    @property
    def selects(self) -> bool:
        """Whether its op of an indexer selects, and does not only score."""
        return self.facts["selects"] == "yes"

    def selection(
        self, q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, lengths: Sequence[int], type_: str,
        most: int,
    ) -> PeerWork:  # fmt: skip
        """Bind q [requests, H, D], keys [sum of lengths, D] and weights [requests, H].

        The result is positions [requests * most], or scores [sum of lengths]. Raises `PeerError`.
        """
        (requests, heads, width), words = q.shape, " ".join(map(str, lengths))
        line = f"{type_} {heads} {width} {most} {requests} {words}"
        size = requests * most if self.selects else sum(lengths)
        return self._make("selection", line, (size,), q, keys, weights)

    def product(self, weight: torch.Tensor, x: torch.Tensor, type_: str) -> PeerWork:
        """Bind weight [o, i] and x [rows, i]. Raises `PeerError` for what it cannot do."""
        (outputs, inputs), rows = weight.shape, x.shape[0]
        return self._make("product", f"{type_} {rows} {inputs} {outputs}", (rows, outputs), weight, x)

    def _make(self, kind: str, line: str, shape: Sequence[int], *operands: torch.Tensor) -> PeerWork:
        self._made += 1
        data = [operand.float().contiguous().numpy().tobytes() for operand in operands]
        self.ask(f"{kind} {self._made} {self._threads} {line}", *data)
        return PeerWork(self, self._made, shape)

    def ask(self, command: str, *operands: bytes) -> list[str]:
        """Send a command and return the words of the answer. Raises `PeerError`."""
        assert self._process.stdin
        assert self._process.stdout
        answer = ""
        with self._patience(), contextlib.suppress(BrokenPipeError):
            for part in (command.encode() + b"\n", *operands):
                self._process.stdin.write(part)
            self._process.stdin.flush()
            answer = self._process.stdout.readline().decode(errors="replace")
        state, _, rest = answer.strip().partition(" ")
        if state == "ok":
            return rest.split()
        raise PeerError(f"the peer refuses `{command}`: {rest}." if state == "error" else self._end(command))

    def read(self, count: int) -> bytes:
        """Return so many bytes that follow an answer. Raises `PeerError`."""
        assert self._process.stdout
        with self._patience():
            data = self._process.stdout.read(count)
        if len(data) < count:
            raise PeerError(self._end("result"))
        return data

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """End the process if it has not answered in time: a pipe would wait for ever."""
        timer = threading.Timer(ANSWER_SECONDS, self._lose_patience)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _lose_patience(self) -> None:
        self._late = True
        self._process.kill()

    def _end(self, command: str) -> str:
        """Return why the process is no longer there."""
        if self._late:
            return f"the peer did not answer `{command[:80]}` within {ANSWER_SECONDS:g} s, and was ended."
        try:
            code: int | str = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = "none yet"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        last = f"; it said: {said[-1]}" if said else ""
        return f"the peer's process ended during `{command[:80]}` (exit code {code}){last}."
