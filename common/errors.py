"""Errors the user can fix, and how a script ends on one: a message and an exit status, no traceback."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from common.paths import printable


class UsageError(Exception):
    """A mistake that the person who typed the command can fix; the message says what is wrong and what to do."""


class RankError(UsageError):
    """An error only one rank sees, so that rank reports it itself."""


class Stopped(Exception):
    """A signal, whose number is the argument, ended the run after it was saved."""


@dataclass(eq=False)
class SteadyStream:
    """A text stream that drops what cannot be written (a lost reader, a full disk) and remembers the first error."""

    stream: TextIO
    error: Exception | None = None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, act: Callable, *args):
        try:
            if self.error is None:
                act(*args)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = error


def report_interrupt(kind: type, error: BaseException, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report_interrupt  # Ctrl-C while a script imports what comes after this


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_script(main: Callable[[], None], outlives_output: bool = False):
    """Runs `main`; turns the user's mistakes, signals and Ctrl-C into a message and an exit status.

    With `outlives_output` it goes on where output cannot be written (`| head`); the other stream says so at the end.
    """
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr") if getattr(sys, name) is not None}
    for stream in streams.values():
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # don't crash on an ASCII terminal (LC_ALL=C)
    steady = {name: SteadyStream(stream) for name, stream in streams.items() if outlives_output}
    for name, stream in steady.items():
        setattr(sys, name, stream)
    try:
        main()
    except UsageError as error:
        is_of_rank, rank = isinstance(error, RankError), os.environ.get("RANK", "")
        # Under torchrun every rank sees the same mistake; one per machine reports it.
        if is_of_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            who = f" (process {rank})" if is_of_rank and rank.isdecimal() else ""
            lines = map(printable, str(error).split("\n"))  # what was typed or read may hold a terminal's escape codes
            print(f"error{who}: " + "\n".join(lines), file=sys.stderr, flush=True)
        if is_of_rank:
            sys.stdout.flush()
            os._exit(1)  # a normal exit would wait for the other ranks, who may never answer
        sys.exit(1)
    except Stopped as stopped:
        sys.exit(128 + stopped.args[0])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    finally:
        for name, stream in steady.items():
            stream.flush()
            if stream.error is not None:
                note = f"note: {name} could not be written ({stream.error}); the program went on"
                print(note, file=sys.stderr if name == "stdout" else sys.stdout)
                setattr(sys, name, None)  # its buffer holds what cannot be flushed
