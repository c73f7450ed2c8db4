"""The CPU with clocks that do not run: timers return scripted milliseconds.

The runner's host clock is its own, so a test replaces it by `scripted` (`tests/support/scripted_clock.py`).

Options:

- `script`: milliseconds, separated by commas and repeated for ever. `2*50` is 50 times 2, and `1~2*50` goes
  from 1 to 2 in 50 equal steps, so noise, drift, throttling and a hang can all be written down. Scripts for
  several timers are separated by `/`: they go to the timers in the order they are made, the last to all
  further ones. The runner makes one timer per lane of an implementation and then those of its warm-ups.
- `device_script`: the same for the device's clock, which there is only with this option. The runner makes
  one to see whether there is one.
- `graphs=on`: functions can be captured, and there is a latent attention that is safe to capture.
  `graphs=stale`: a replay does nothing after `after` replays. `graphs=refuse`: capturing a layer raises.
- `sensors`: readings of a clock in MHz, separated by commas, one for each time the sensors are asked.
- `interrupt`: send SIGINT to this process when it has waited for the device that many times.
- `announce`: say on stderr when it first waits for the device.
"""

import itertools
import os
import signal
import sys

from mla_backends import Availability, Backend, BackendError, hookimpl
from mla_backends.api import DeviceInfo


def parse(script):
    """Return the milliseconds of one script."""
    samples = []
    for word in script.split(","):
        values, _, count = word.partition("*")
        first, _, last = values.partition("~")
        count, first, last = int(count or "1"), float(first), float(last or first)
        samples += [first + (last - first) * i / max(1, count - 1) for i in range(count)]
    return samples


class VirtualTimer:
    def __init__(self, clock, script):
        self.clock = clock
        self._samples = itertools.cycle(parse(script))

    def start(self):
        pass

    def stop(self):
        return next(self._samples)


class VirtualClock(Backend):
    name = "virtual"  # not the name of the entry point, which alone counts on the command line
    api_version = 1

    def __init__(self, options=None):
        super().__init__(options)
        self._made = {"script": 0, "device_script": 0}
        self._readings = iter(self.options.get("sensors", "").split(","))
        self._captures = 0
        self._waits = 0

    @classmethod
    def known_options(cls):
        names = ("script", "device_script", "graphs", "after", "sensors", "interrupt", "announce")
        return ("threads", *names)

    def probe(self):
        return Availability(ok=True)

    def setup(self, index=None):
        import torch

        torch.set_num_threads(1)
        return torch.device("cpu")

    def synchronize(self):
        self._waits += 1
        if self._waits == 1 and "announce" in self.options:
            sys.stderr.write("timing starts\n")
            sys.stderr.flush()
        if self._waits == int(self.options.get("interrupt", "0")):
            os.kill(os.getpid(), signal.SIGINT)

    def device_info(self):
        return DeviceInfo(name="a virtual device", cache_bytes=1 << 20)

    def _script(self, option):
        scripts = self.options.get(option, "1,2,3,4").split("/")
        number = self._made[option]
        self._made[option] += 1
        return scripts[min(number, len(scripts) - 1)]

    def scripted(self):
        return VirtualTimer("host", self._script("script"))

    def device_timer(self):
        if "device_script" not in self.options:
            return None
        return VirtualTimer("virtual device", self._script("device_script"))

    def graph(self, fn):
        kind = self.options.get("graphs", "off")
        if kind == "off":
            return None
        from fake_graphs import capture

        self._captures += 1
        if kind == "refuse" and self._captures > 1:  # the first is to see whether anything can be
            raise BackendError("the virtual driver is busy.")
        return capture(fn, int(self.options.get("after", "0")) if kind == "stale" else None)

    def sensors(self):
        reading = next(self._readings, "")
        if reading == "broken":
            raise RuntimeError("the sensor does not answer")
        return {"clock_mhz": reading} if reading else {}

    def ops(self):
        if self.options.get("graphs", "off") == "off":
            return {}
        from fake_graphs import DenseAttention

        return {"dense": DenseAttention()}


@hookimpl
def mla_backend(options):
    return VirtualClock(options)
