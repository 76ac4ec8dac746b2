"""Standard output and error that a run outlives: a lost reader, a full disk or a closed terminal ends no training."""

import sys


class SteadyStream:
    """A text stream whose failing writes are dropped and remembered; everything else is the stream's own."""

    def __init__(self, stream):
        self.stream, self.error = stream, None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, do, *arguments):
        if self.error is not None:
            return
        try:
            do(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = error


def outlive_output():
    """Lets the program go on where standard output or error fails."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), SteadyStream) and getattr(sys, name) is not None:
            setattr(sys, name, SteadyStream(getattr(sys, name)))


def report_lost_output():
    """Says on what is left of standard output and error that the other failed; keeps Python from failing at its end."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        if isinstance(stream, SteadyStream):
            stream.flush()
            if stream.error is not None:
                left = streams["stderr" if name == "stdout" else "stdout"]
                print(f"note: {name} could not be written ({stream.error}); the program went on", file=left)
                setattr(sys, name, None)  # its buffer holds what cannot be flushed
