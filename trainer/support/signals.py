"""Ctrl-C and SIGTERM: the step is finished and saved; a second signal leaves at once."""

import os
import signal
import sys
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun answers Ctrl-C, which its processes got too, by sending them another signal: that is no second one.
SAME_SECONDS = 2.0


class StopSignals:
    """While entered, notes the first SIGINT or SIGTERM in `asked` (its number, else None).

    Args:
        speaks: Whether to tell on standard error that it was understood.
    """

    def __init__(self, speaks: bool):
        self.speaks, self.asked, self.asked_at = speaks, None, 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame):
        now = time.monotonic()
        if self.asked is None:
            self.asked, self.asked_at = number, now
            self._say(f"\n{signal.Signals(number).name}: finishing this step and saving (once more: leave at once)\n")
        elif now - self.asked_at > SAME_SECONDS:
            self._say("left at once; what was saved before is kept\n")
            os._exit(128 + number)

    def _say(self, message: str):
        if self.speaks:
            # Not through Python's own buffers: what the signal interrupted may be writing to them.
            os.write(sys.stderr.fileno(), message.encode())


def ignore_in_worker(worker: int):
    """For a loader's workers: the signals reach them too, and the step that is to be finished needs them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
