"""Ctrl-C, SIGTERM and a closed terminal finish and save the step; a second signal exits immediately."""

import contextlib
import os
import signal
import sys
import time

from dataset.workers import SIGNALS

# On Ctrl-C torchrun sends its processes a signal of its own, though they got the first one too: it counts as the same.
SAME_SECONDS = 2.0


class StopSignals:
    """While entered, keeps the first SIGINT, SIGTERM or SIGHUP in `asked`; `speaks` tells of it on standard error."""

    def __init__(self, speaks: bool):
        self.speaks, self.asked, self.asked_at = speaks, None, 0.0

    def __enter__(self) -> "StopSignals":
        # One that is ignored stays so, as SIGHUP under nohup.
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame):
        now = time.monotonic()
        if self.asked is None:
            self.asked, self.asked_at = number, now
            self._acknowledge(
                f"\n{signal.Signals(number).name}: finishing this step and saving (again: exit immediately)\n"
            )
        elif now - self.asked_at > SAME_SECONDS:
            self._acknowledge("exited immediately; what was saved before is kept\n")
            os._exit(128 + number)

    def _acknowledge(self, message: str):
        if self.speaks:
            # Not through Python's buffers: the code that the signal interrupted may be writing to them.
            with contextlib.suppress(OSError, AttributeError):  # the terminal may be gone
                os.write(sys.stderr.fileno(), message.encode())
