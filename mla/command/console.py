"""Where a command prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import selectors
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from mla_backends.outside import escaped, safe, shortened, wait

_noted: set[str] = set()
_MAX_SAID = 4000  # characters of a sentence: more can only be what a file says

_results: TextIO | None = None  # stdout while `results_apart` keeps it for results; None: sys.stdout
_rank = 0  # of a run over several ranks: rank 0 speaks for all
_verbose = False  # `detail` prints
_complaint = ""  # why the command ends
_unsaid = False  # that it was left to rank 0
_unshown = ""  # why a result could not be printed


class _Descriptor(io.FileIO):
    """Something to print to that never raises: a run goes on where nobody reads, or a disk is full."""

    def __init__(self, number: int, results: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._results = results

    def write(self, data: Any) -> int:
        global _unshown
        try:
            while (count := super().write(data)) is None:  # somebody else made it non-blocking
                wait(self.fileno(), selectors.EVENT_WRITE)
            return count
        except BrokenPipeError:  # the reader went away (`| head`): not an error of ours
            pass
        except OSError as error:
            closed = error.errno == errno.EBADF
            if self._results:
                _unshown = "it is closed (`> /dev/null` discards it)" if closed else str(error.strerror)
        return len(data)


def own_streams() -> None:
    """Let printing never fail from now on, and keep stdout for results; `unshown` tells what was lost.

    Plugins and vendor libraries print also below Python: so descriptor 1 becomes that of stderr, and
    sys.stdout writes to a copy of what it was.
    """
    global _unshown
    _unshown = ""
    sys.stdin = sys.stdin or open(_number(None, os.O_RDONLY))  # noqa: SIM115
    shown, number = sys.stdout, -1
    if shown is sys.__stdout__:  # not a test's, and not done before
        number = _number(shown, os.O_RDONLY)  # reading only: writing fails
    if sys.stderr is sys.__stderr__:
        errors = _stream(_number(sys.stderr, os.O_WRONLY), sys.stderr, results=False)
        vars(sys).update(stderr=errors, __stderr__=errors)
    if number >= 0:
        results, rest = (_stream(fd, shown, fd != number) for fd in (os.dup(number), number))
        vars(sys).update(stdout=results, __stdout__=rest)
        os.dup2(2, number)


def unshown() -> str:
    """Return why a result could not be printed; "" if nothing was lost."""
    return _unshown


def _number(stream: TextIO | None, mode: int) -> int:
    """Return the descriptor of a stream; what is closed becomes /dev/null, also for child processes.

    A file would else get its number when it is opened, and with it all that libraries print.
    """
    if stream is not None:
        return stream.fileno()
    number = os.open(os.devnull, mode)
    os.set_inheritable(number, True)
    return number


def _stream(number: int, like: TextIO | None, results: bool) -> Any:
    """Return a stream like another one, that never raises; None: like stderr."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, results)),
        encoding=like.encoding if like else "utf-8",
        errors=like.errors if like else "backslashreplace",
        line_buffering=bool(getattr(like, "line_buffering", True)),
    )


def note(text: str) -> None:
    """Print a remark where it cannot disturb the result; on rank 0 alone, as the others have the same."""
    if not _rank:
        _print(text)


def note_once(text: str, about: str = "") -> None:
    """Print a remark, unless this process has printed the same, or one about the same."""
    if (about or text) not in _noted:
        _noted.add(about or text)
        note(text)


def verbose(on: bool) -> None:
    """Choose whether `detail` prints."""
    global _verbose
    _verbose = on


def detail(text: str) -> None:
    """Print a remark that only -v asks for."""
    if _verbose:
        note(text)


def become(rank: int) -> None:
    """Speak as this rank of a run, or, as rank 0, for all."""
    global _rank, _complaint, _unsaid
    _rank, _complaint, _unsaid = rank, "", False


def fit(sentence: str) -> str:
    """Return a sentence as one printable line, which may repeat what a file or the user says."""
    return shortened(escaped(sentence), _MAX_SAID)


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
    print(safe(text), file=sys.stderr, flush=True)  # noqa: T201


def out(text: str) -> None:
    """Print part of the result."""
    stream = results_stream()
    encoding = getattr(stream, "encoding", None) or "utf-8"  # a name may not fit the terminal's
    print(safe(text).encode(encoding, "replace").decode(encoding), end="", file=stream, flush=True)


def write(data: bytes) -> None:
    """Print part of the result as it is, in UTF-8."""
    stream = results_stream()
    stream.flush()
    if (binary := getattr(stream, "buffer", None)) is None:  # of a notebook
        stream.write(data.decode())
    else:
        binary.write(data)
    stream.flush()


def results_stream() -> TextIO:
    """Return the stream that results are written to."""
    return sys.stdout if _results is None else _results


@contextlib.contextmanager
def results_apart() -> Iterator[None]:
    """Keep stdout for what `out` prints inside the block; what else Python prints there goes to stderr."""
    global _results
    before = _results, sys.stdout
    _results, sys.stdout = results_stream(), sys.stderr
    try:
        yield
    finally:
        _results, sys.stdout = before


def descriptor(stream: TextIO) -> int | None:
    """Return the number below a stream; None for a stream of a test or a notebook."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def flush() -> None:
    """Write out what libraries left in the streams."""
    sys.stdout.flush()
    sys.stderr.flush()


def close() -> None:
    """Give up stdout at the end of the process: what libraries print while it ends is no result.

    Nor is it an error that is to be shown if Ctrl-C comes meanwhile.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    flush()
    sys.stdout = sys.stderr


Note = Callable[[str], None]
