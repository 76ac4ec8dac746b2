"""Errors the user can fix, and how a script ends on one: a message and an exit status, no traceback."""

import os
import signal
import sys
from collections.abc import Callable

from common.output import outlive_output, report_lost_output
from common.paths import printable


class UsageError(Exception):
    """A mistake that the person who typed the command can fix; the message says what is wrong and what to do."""


class RankError(UsageError):
    """An error only one rank sees, so that rank reports it itself."""


class Stopped(Exception):
    """A signal ended the run after it was saved."""

    def __init__(self, number: int):
        self.number, self.name = number, signal.Signals(number).name
        super().__init__(self.name)


def report(error: UsageError, who: str = ""):
    lines = map(printable, str(error).split("\n"))  # what was typed or read may hold a terminal's escape codes
    print(f"error{who}: " + "\n".join(lines), file=sys.stderr, flush=True)


def run_script(main: Callable[[], None], outlives_output: bool = False):
    """Runs `main`; turns the user's mistakes, signals and Ctrl-C into a message and an exit status.

    Args:
        outlives_output: Whether it goes on where its output cannot be written (`| head`, a closed terminal).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # don't crash on an ASCII terminal (LC_ALL=C)
    try:
        if outlives_output:
            outlive_output()
        try:
            main()
        finally:
            report_lost_output()
    except RankError as error:
        rank = os.environ.get("RANK", "")
        report(error, f" (process {rank})" if rank.isdecimal() else "")
        sys.stdout.flush()
        os._exit(1)  # a normal exit would wait for the other ranks, who may never answer
    except UsageError as error:
        # Under torchrun every rank sees the same mistake; one per machine reports it.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            report(error)
        sys.exit(1)
    except Stopped as stopped:
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
