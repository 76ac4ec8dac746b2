"""The argument parser and argument types of every command line here."""

import argparse
import difflib
import importlib
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from common.paths import ROOT, printable, typed_path


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks, and appends a flag's default to its help where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default is not None and action.default is not False and action.option_strings
        return super()._get_help_string(action) if has_default and "(default:" not in action.help else action.help


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake in a line, without the list of all flags; for an unknown flag it names the closest one.

    With `imports` it has the flag --import, whose file is imported before the other flags are checked.
    """

    def __init__(self, imports: bool = False, **settings):
        super().__init__(formatter_class=HelpFormatter, **settings)
        self.first = argparse.ArgumentParser(add_help=False)
        self.first.error = self.error
        for parser in (self, self.first) if imports else ():
            what = "your file with another projector, tower or form of rows, as in tests/changes but without the test"
            parser.add_argument("--import", dest="imported", type=file_path, metavar="FILE.py", help=what)

    def parse_known_args(self, args=None, namespace=None):
        # Before argparse looks for missing arguments: a mistyped flag may be why one is missing.
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        typed = [flag.split("=")[0] for flag in (sys.argv[1:] if args is None else args) if flag.startswith("--")]
        unknown = [flag for flag in typed if " " not in flag and not any(name.startswith(flag) for name in known)]
        if unknown:
            like = difflib.get_close_matches(unknown[0], known, n=1)
            self.error(f"unknown: {' '.join(unknown)}" + (f" (did you mean {like[0]}?)" if like else ""))
        if file := getattr(self.first.parse_known_args(args)[0], "imported", None):
            file = file.resolve()
            if not (file.is_file() and file.suffix == ".py" and file.stem.isidentifier()):
                self.error(f"argument --import: {file} is not a file that Python can import, such as my_form.py")
            sys.path.append(str(file.parent))
            if Path(importlib.import_module(file.stem).__file__ or "").resolve() != file:
                self.error(f"argument --import: another module is called {file.stem}: rename the file")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)}\n{self.prog} --help shows all flags\n")


def file_path(text: str) -> Path:
    """Converts a command line's text to a path, ~ expanded; raises ArgumentTypeError if no file can have that path."""
    try:
        path = Path(text).expanduser()
        path.resolve().exists()  # raises for a NUL character, names that are too long, and links in a circle
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~nobody, or a circle
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: {reason}") from error
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is an address: download the file and name it here")
    return path


def number(kind: type, least: float, most: float = sys.float_info.max) -> Callable[[str], float]:
    """Returns an argparse type: an int or a float from `least` to `most`; neither NaN nor infinite."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            bounds = f"at least {least}" if most == sys.float_info.max else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be {bounds}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def temperature(text: str) -> float:
    """Converts a command line's text to 0 or a temperature that logits can be divided by without an overflow."""
    try:
        return float(text) and number(float, 1e-3)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or 0") from error


def command(script: str, flags: dict[str, object]) -> str:
    """Returns the command that runs a script with these flags in the current folder, a line for each few.

    Flags that are None are left out; one that is True has no value.
    """
    words = [f"python {shlex.quote(typed_path(ROOT / script))}"]
    for name, value in flags.items():
        if value is not None:
            text = printable(typed_path(value) if isinstance(value, Path) else str(value))
            # After a blank, a value that begins with a hyphen would be read as a flag.
            text = f"{'=' if text.startswith('-') else ' '}{shlex.quote(text)}"
            words.append(f"--{name}{'' if value is True else text}")
    # Each flag stays beside its value: only the spaces between flags may break.
    text = " ".join(word.replace(" ", "\0") for word in words)
    lines = textwrap.wrap(text, 74, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(lines).replace("\0", " ")
