"""Standard output and error that a run outlives: a lost reader, a full disk or a closed terminal ends no training."""

import sys


class SteadyStream:
    """A text stream that drops what cannot be written and remembers the first error."""

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
        try:
            if self.error is None:
                do(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = error


def outlive_output():
    """Lets the program go on where standard output or error fails."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, SteadyStream):
            setattr(sys, name, SteadyStream(stream))


def report_lost_output():
    """Reports on the other stream that one failed; keeps Python from failing at its end."""
    for name, other in (("stdout", "stderr"), ("stderr", "stdout")):
        stream = getattr(sys, name)
        if isinstance(stream, SteadyStream):
            stream.flush()
            if stream.error is not None:
                note = f"note: {name} could not be written ({stream.error}); the program went on"
                print(note, file=getattr(sys, other))
                setattr(sys, name, None)  # its buffer holds what cannot be flushed
