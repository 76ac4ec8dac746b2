"""Pictures named in a line of text: the file system says what a path is, however it is quoted, escaped or glued."""

import os
import re
from bisect import bisect_left
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from common.files import not_a_file
from dataset.pictures import PICTURE_FORMATS

# Chinese, Japanese and Korean text has no spaces: a path may start and end beside any of its characters.
WIDE = "\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U0001f000-\U0003ffff"
OPENING, CLOSING = re.escape("'\"`“‘«([{<（【《「『"), re.escape("'\"`”’»)]}>）】》」』")
KINDS = (ending[1:] for ending, kind in Image.registered_extensions().items() if kind in PICTURE_FORMATS)
ENDING = rf"\.(?:{'|'.join(KINDS)}|heic|heif|jxl|jp2|svg|psd|ico|tga)"
STARTS = re.compile(rf"(?<![^\s{WIDE}{OPENING}{CLOSING},;:=|·—…])(?<!\\\s)(?=\S)(?!['\"]{{2}})")
MOST_STARTS = 64  # tried for a path: keeps the time in proportion to the line's length
ENDS = re.compile(rf"(?<=[^/\\]){ENDING}(?![A-Za-z0-9]|\.\w)", re.IGNORECASE)  # in "a.jpg.bak" there is no a.jpg
QUOTED = re.compile(rf"""(?<!\w)(?:"[^"]*{ENDING}"|'[^']*{ENDING}'|“[^“”]*{ENDING}”)(?!\w)""", re.IGNORECASE)
MARK = "\ufffc"  # stands for a picture in the line
WORD = re.compile(rf"{QUOTED.pattern}|(?:\\\s|[^\s{OPENING}{CLOSING},;|，。、；！？{MARK}])+", re.IGNORECASE)
LOOKS_LIKE_PATH = re.compile(
    rf"(?:~[\w.-]*/|\.\.?/|[a-z]:[\\/]|/[^/]+/)[^/]|.*[^/\\]{ENDING}(?![a-z0-9])", re.IGNORECASE
)
SHELL = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.?)""")  # a shell's quotes
AROUND = re.compile(rf"[\s{OPENING}]*{MARK}[\s{CLOSING}]*[,;，、；]?\s*")


def find_pictures(line: str) -> tuple[str, list[Path]]:
    """Returns the question that a line asks (empty where only punctuation is left), and its picture files in order.

    Raises ValueError if something looks like a picture or a path but is no file: "NAME: why" each.
    """
    line = line.replace(MARK, " ")
    # In a quoted 'my cat.jpg', cat.jpg is not a path of its own.
    inside = {place for match in QUOTED.finditer(line) for place in range(match.start() + 2, match.end())}
    starts = [match.start() for match in STARTS.finditer(line) if match.start() not in inside]
    paths, pieces, done, tried = [], [], 0, 0
    for match in ENDS.finditer(line):
        near = starts[bisect_left(starts, tried) : bisect_left(starts, match.start())][-MOST_STARTS:]
        tried = match.end()
        ends = [match.end() + 1] * line.startswith(("'", '"'), match.end()) + [match.end()]
        found = ((s, e, path) for s in near for e in ends for path in spellings(line[s:e]) if os.path.isfile(path))
        if first := next(found, None):
            start, end, path = first
            paths.append(path)
            pieces += [line[done:start], MARK]
            done = end
    rest = " ".join("".join([*pieces, line[done:]]).split())
    words = [word.strip("'\"“”").rstrip(".:!?…") for word in WORD.findall(rest)]
    missing = []
    for word in filter(LOOKS_LIKE_PATH.match, words):
        reasons = [not_a_file(path) for path in spellings(word)]
        # Of several reasons, the longest knows of something there.
        why = "no picture's ending" if None in reasons else max(reasons, key=len)
        if re.match(r"(?!file:)\w+://", word):
            why = "an address: download the file and name it here"
        missing.append(f"{word}: {why}")
    if missing:
        raise ValueError("; ".join(missing))
    if not paths:
        return rest, []
    question = AROUND.sub(lambda found: " " * (" " in found[0]), rest)
    question = re.sub(r" (?=[.,;:!?。，；：！？、])", "", question).strip(" ,;:，、；：")
    return question if question.strip(" .,;:!?…。，、；：！？") else "", paths


def spellings(text: str) -> list[Path]:
    """Returns the paths that a text may mean: as typed, without a shell's quotes, or from a file:// address."""
    texts = [text, SHELL.sub(lambda found: found[1] or found[2] or found[3] or "", text)]
    texts += [unquote(text.removeprefix("file://")) for text in texts if text.startswith("file:///")]
    return [Path(os.path.expanduser(text)) for text in dict.fromkeys(texts)]
