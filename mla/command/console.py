"""Where a command prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from mla_backends.outside import escaped, safe, shortened

_MOST_SAID = 4000  # characters of a sentence: more can only be what a file says

_results: TextIO | None = None  # stdout while `results_apart` keeps it for results; None: sys.stdout
_rank = 0  # of a run over several ranks: rank 0 speaks for all
_complaint = ""  # why the command ends
_unsaid = False  # that it was left to rank 0


def note(text: str) -> None:
    """Print a remark where it cannot disturb the result; on rank 0 alone, as the others have the same."""
    if not _rank:
        _print(text)


def become(rank: int) -> None:
    """Speak as this rank of a run, or, as rank 0, for all."""
    global _rank, _complaint, _unsaid
    _rank, _complaint, _unsaid = rank, "", False


def fit(sentence: str) -> str:
    """Return a sentence as one printable line, which may repeat what a file or the user says."""
    return shortened(escaped(sentence), _MOST_SAID)


def complain(sentence: str, common: bool, show: Callable[[], None] | None = None) -> None:
    """Say why the command ends, by `show` if given; rank 0 alone says what is `common` to all ranks."""
    global _complaint, _unsaid
    sentence = fit(sentence)
    _complaint, _unsaid = sentence, bool(_rank and common)
    if _unsaid:
        return
    if show is not None:
        show()
    else:
        _print(f"rank {_rank}: error: {sentence}" if _rank else f"error: {sentence}")


def insist() -> None:
    """Print what `complain` left to rank 0, which cannot have heard of it."""
    if _unsaid:
        complain(_complaint, common=False)


def complaint() -> str:
    """Return why the command ends, as far as it was told; "" if it was not."""
    return _complaint


def _print(text: str) -> None:
    try:
        print(safe(text), file=sys.stderr, flush=True)  # noqa: T201
    except BrokenPipeError:  # `2>&1 | head` must not end the run
        _discard(sys.stderr)


def out(text: str) -> None:
    """Print part of the result."""
    stream = results_stream()
    encoding = getattr(stream, "encoding", None) or "utf-8"  # a name may not fit the terminal's
    try:
        print(safe(text).encode(encoding, "replace").decode(encoding), end="", file=stream, flush=True)
    except BrokenPipeError:  # the reader went away (`| head`): not an error of ours
        _discard(stream)


def results_stream() -> TextIO:
    """Return the stream that results are written to."""
    return sys.stdout if _results is None else _results


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """Keep stdout for what `out` prints inside the block; all else that is printed there goes to stderr.

    Plugins and vendor libraries print while they load and run, also below Python: so descriptor 1 is that of
    stderr, and `out` writes to a copy of what it was.
    """
    global _results
    shown = sys.stdout
    if _results is not None or shown is None:
        yield
        return
    _flush(shown)
    with contextlib.ExitStack() as undo:
        descriptor = _redirect(undo)
        ours = descriptor is not None and _descriptor(shown) == 1
        _results = undo.enter_context(_reopened(descriptor, shown)) if ours and descriptor else shown
        sys.stdout = sys.stderr
        try:
            yield
        finally:
            sys.stdout, _results = shown, None
            _flush(shown)  # a library may have kept the stream, and still hold text of its own
            _flush_c()


def _redirect(undo: contextlib.ExitStack) -> int | None:
    """Make descriptor 1 stderr's until `undo`; return a copy of what it was, None if it is closed."""
    try:
        kept = os.dup(1)
    except OSError:
        return None
    undo.callback(os.close, kept)
    undo.callback(os.dup2, kept, 1)
    _to_stderr()
    return kept


def _to_stderr() -> None:
    """Point descriptor 1 to stderr, or to nowhere if there is none."""
    try:
        os.dup2(2, 1)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


@contextlib.contextmanager
def _reopened(descriptor: int, like: TextIO) -> Iterator[TextIO]:
    """Open a stream like another one on a descriptor, which stays open afterwards."""
    stream = open(os.dup(descriptor), "w", encoding=like.encoding, errors=like.errors)  # noqa: SIM115
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):  # a stream of a test has none
        return None


def _flush_c() -> None:
    """Write out what C libraries printed and still hold."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).fflush(None)


def flush() -> None:
    """Write out what libraries left in the streams, before Python does so and fails with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)


def close() -> None:
    """Give up stdout at the end of the process: what libraries print while it ends is no result.

    Nor is it an error that is to be shown if Ctrl-C comes meanwhile.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    flush()
    with contextlib.suppress(OSError):
        _to_stderr()


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except BrokenPipeError:
        _discard(stream)


def _discard(stream: TextIO) -> None:
    """Send what a stream holds, and all that follows, to nowhere."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


Note = Callable[[str], None]
