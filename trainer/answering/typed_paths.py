"""Pictures named in a line of text: the file system says what a path is, however it is quoted, escaped or glued."""

import os
import re
import unicodedata
from bisect import bisect_right
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from dataset.pictures import PICTURE_FORMATS

# Chinese, Japanese and Korean text has no spaces: a path may begin and end beside any of its characters.
WIDE = "\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U0001f000-\U0003ffff"
OPENING, CLOSING = "'\"`“‘«([{<", "'\"`”’»)]}>"
BRACKETS = re.escape(OPENING + CLOSING)
STARTS = re.compile(rf"(?<![^\s{WIDE}{BRACKETS},;:=|·—…])(?<!\\\s)(?=\S)(?!['\"]{{2}})")
# After a path: an end, or punctuation that ends there too: in "a.jpg.bak" there is no a.jpg.
ENDS = re.compile(rf"(?=$|[\s{WIDE}{re.escape(CLOSING)},;:!?<|—…]|[^\w\s/\\]{{1,32}}(?:$|[\s{WIDE}]))")
NAMED = re.compile(r"""\.[A-Za-z0-9]{1,5}['"]?$|['"]$""")  # the end of a file name rather than of a word
# Bounds that keep the time in proportion to the line's length. A name of 255 bytes is typed as 765 where each is %XX.
LONGEST_NAME, MOST_FOLDERS, MOST_ENDS = 765, 64, 5
MARK = "\ufffc"  # stands for a picture in the line
KINDS = (ending[1:] for ending, kind in Image.registered_extensions().items() if kind in PICTURE_FORMATS)
KINDS = "|".join(KINDS) + "|heic|heif|jxl|jp2|mpo|svg|psd|ico|tga"
LOOKS = re.compile(rf"[^/\\]\.(?:{KINDS})(?![A-Za-z0-9])", re.IGNORECASE)
ROOTED = re.compile(r"(?:file:/|~[\w.-]*/|\.\.?/|[A-Za-z]:[\\/]|/[^/]+/)[^/]", re.IGNORECASE)
QUOTED = rf"""(?<!\w)(?:"[^"]*\.(?:{KINDS})"|'[^']*\.(?:{KINDS})'|“[^“”]*\.(?:{KINDS})”)(?!\w)"""
WORD = re.compile(rf"{QUOTED}|(?:\\\s|[^\s{BRACKETS},;|，。、；！？（）【】《》「」『』{MARK}])+", re.IGNORECASE)
PAIR = re.compile(rf"[{re.escape(OPENING)}（【《「『] ?{MARK} ?[{re.escape(CLOSING)}）】》」』]")
SHELL = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.?)""")  # a shell's quotes
FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(?=/)", re.IGNORECASE)


def find_pictures(line: str) -> tuple[str, list[Path], list[str]]:
    """Finds the files that a line names, at each place the longest.

    A file counts where it is named with an ending, with a folder, or in quotes.

    Returns:
        What is left of the line as the question (empty where only punctuation is), the files in order, and what
        looks like a picture or a path but is no file: "NAME: why" each.
    """
    line = line.replace(MARK, " ")
    ends = [match.start() for match in ENDS.finditer(line)]
    named = [end for end in ends if NAMED.search(line, max(0, end - 8), end)]
    # Of 'my cat.jpg' in quotes cat.jpg is no part.
    inside = {place for match in re.finditer(QUOTED, line, re.I) for place in range(match.start() + 2, match.end())}
    paths, pieces, done = [], [], 0
    for start in (match.start() for match in STARTS.finditer(line)):
        end, path = longest_path(line, start, ends, named) if start >= done and start not in inside else (0, None)
        if path:
            paths.append(path)
            pieces += [line[done:start], MARK]
            done = end
    rest = "".join([*pieces, line[done:]])
    words = (word.strip("'\"“”").rstrip(".:!?…") for word in WORD.findall(rest))
    missing = [f"{word}: {why_no_file(word)}" for word in words if LOOKS.search(word) or ROOTED.match(word)]
    rest = " ".join(rest.split())
    return as_question(rest) if paths else rest, paths, missing


def longest_path(line: str, start: int, ends: list[int], named: list[int]) -> tuple[int, Path | None]:
    """Returns where the longest path from `start` ends, one of `ends` (`named` if it has no folder), and its file."""
    begin = start + (line[start] in "'\"")
    url = FILE_URL.match(line, begin)
    name = first = url.end() if url else begin
    # The name begins after the last slash up to which there is a folder, and ends before the next slash.
    for _ in range(MOST_FOLDERS):
        slash = line.find("/", name, name + LONGEST_NAME)
        if slash < 0 or not any(map(os.path.isdir, spellings(line[begin : slash + 1]))):
            break
        name = slash + 1
    has_folder = name > first and not line[name : name + 1].isspace()
    places, most = (ends, None) if has_folder else (named, MOST_ENDS)
    limit = slash if slash >= 0 else name + LONGEST_NAME
    for end in reversed(places[bisect_right(places, start) : bisect_right(places, limit)][:most]):
        path = file_of(line[start:end])
        if path and (has_folder or "." in path.name or begin > start):
            return end, path
    return start, None


def file_of(text: str) -> Path | None:
    """Returns the regular file that a text spells as a path; None where there is none."""
    return next((Path(path) for path in spellings(text) if os.path.isfile(path)), None)


def spellings(text: str) -> list[str]:
    """Returns the paths that a text may mean: as it stands, without a shell's quotes, and of a file:// address."""
    texts = [text]
    if any(mark in text for mark in "'\"\\"):
        texts.append(SHELL.sub(lambda found: found[1] or found[2] or found[3] or "", text))
    texts += [unquote(text[match.end() :]) for text in texts if (match := FILE_URL.match(text))]
    if not text.isascii():  # é is one character or two
        texts += [unicodedata.normalize(form, text) for text in texts for form in ("NFC", "NFD")]
    return [os.path.expanduser(text) for text in texts]


def why_no_file(word: str) -> str:
    if re.match(r"https?://|ftp://", word, re.IGNORECASE):
        return "an address: download the file and name it here"
    if any(map(os.path.isdir, spellings(word))):
        return "a folder: name a picture in it"
    return "no regular file" if any(map(os.path.exists, spellings(word))) else "no such file"


def as_question(rest: str) -> str:
    """Returns a line without its pictures, and without the quotes, commas and spaces that were theirs."""
    for _ in range(2):  # "(`a.jpg`)"
        rest = PAIR.sub(MARK, rest)
    rest = re.sub(rf"{MARK}(?: ?[,;，、；]? ?{MARK})+", MARK, rest)
    rest = re.sub(rf" ?{MARK}(?=[.,;:!?。，；：！？、])", "", rest).replace(MARK, "")
    rest = " ".join(rest.split()).lstrip(" .,;:，。、；：")
    return rest if rest.strip(" .,;:!?…。，、；：！？") else ""
