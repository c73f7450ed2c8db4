"""The CPU with a clock that does not run: the timer returns scripted milliseconds.

Options: `script` (comma-separated, repeated for ever), `interrupt` (send SIGINT to this process when that
many samples have been taken), `announce` (say on stderr when timing starts).
"""

import itertools
import os
import signal
import sys

from mla_backends import Availability, Backend, hookimpl


class VirtualTimer:
    clock = "virtual"

    def __init__(self, options):
        script = options.get("script", "1,2,3,4").split(",")
        self._samples = itertools.cycle([float(sample) for sample in script])
        self._left = int(options.get("interrupt", "0"))
        self._announce = "announce" in options

    def start(self):
        if self._announce:
            sys.stderr.write("timing starts\n")
            sys.stderr.flush()
            self._announce = False

    def stop(self):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return next(self._samples)


class VirtualClock(Backend):
    name = "virtual"  # not the name of the entry point, which alone counts on the command line
    api_version = 1

    @classmethod
    def known_options(cls):
        return ("threads", "script", "interrupt", "announce")

    def probe(self):
        return Availability(ok=True)

    def setup(self, index=None):
        import torch

        torch.set_num_threads(1)
        return torch.device("cpu")

    def synchronize(self):
        pass

    def timer(self):
        return VirtualTimer(self.options)


@hookimpl
def mla_backend(options):
    return VirtualClock(options)
