"""The Chinese README and recipe say what the English ones say: headings, commands, tables, figures and links."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAIRS = (("README.md", "README_zh.md"), ("trainer/README.md", "trainer/README_zh.md"))
FILES = tuple(chain(*PAIRS))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TREE_LINE = re.compile(r"([\w./]+) +.*")


@dataclass
class Section:
    """A heading and what stands below it, up to the next heading."""

    level: int
    title: str
    prose: list[str] = field(default_factory=list)
    blocks: list[list[str]] = field(default_factory=list)
    tables: list[list[str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All but the code blocks and the title."""
        return "\n".join(chain(self.prose, *self.tables))


def read_sections(text: str) -> list[Section]:
    """Splits Markdown at its headings, and what stands below each into code blocks, tables and prose."""
    sections, before, fenced = [Section(0, "top of the file")], "", False
    for line in text.splitlines():
        fence, section = line.startswith("```"), sections[-1]
        heading = re.fullmatch(r"(#+) (.+)", line)
        if fenced:
            section.blocks[-1].append(line)
            fenced = not fence
        elif fence:
            section.blocks.append([line])
            fenced = True
        elif heading:
            sections.append(Section(len(heading[1]), heading[2]))
        elif line.startswith(("    ", "|")):
            kind = section.tables if line.startswith("|") else section.blocks
            if before[:1] == line[0]:
                kind[-1].append(line)
            else:
                kind.append([line])
        else:
            section.prose.append(line)
        before = "" if fence or fenced else line
    return sections


def numbers(text: str) -> list[str]:
    """The figures written in digits: 1,000 is 1000; digits inside of names (float32, llm_512) are none."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return re.findall(r"(?<![A-Za-z_\d.])-?\d+(?:\.\d+)*(?:e-?\d+)?(?![\d_])", text)


def bare(block: list[str]) -> list[str]:
    """The lines of a code block without what is translated: comments, labels of a diagram, words of the file tree."""
    if block[0] == "```mermaid":
        return [re.sub('"[^"]*"', lambda label: repr(numbers(label[0])), line) for line in block]
    if block[0] == "```" and all(TREE_LINE.fullmatch(line) for line in block[1:-1]):
        return [re.sub(" +", " ", TREE_LINE.sub(r"\1", line)) for line in block]
    return [re.sub(r"(^|\s+)# .*", "", line) for line in block]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def anchor(title: str) -> str:
    """The anchor GitHub gives a heading: lower case, no punctuation, hyphens for blanks."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def lacking(what: str, english: Iterable[str], chinese: Iterable[str]) -> list[str]:
    """Says what only one side has, or has more often."""
    english, chinese = Counter(english), Counter(chinese)
    sides = (("Chinese", english - chinese), ("English", chinese - english))
    return [f"{what} missing in the {side} file: {', '.join(more.elements())}" for side, more in sides if more]


def code_differences(english: Section, chinese: Section) -> list[str]:
    blocks = [["\n".join(bare(block)) for block in side.blocks] for side in (english, chinese)]
    if blocks[0] == blocks[1]:
        return []
    lines = [chain.from_iterable(block.splitlines() for block in side) for side in blocks]
    return lacking("line of code", *lines) or ["the same lines of code in another order or other blocks"]


def table_differences(english: Section, chinese: Section) -> list[str]:
    shapes = [[[len(cells(row)) for row in table] for table in side.tables] for side in (english, chinese)]
    if shapes[0] != shapes[1]:
        return [f"columns of each row of each table: English {shapes[0]}, Chinese {shapes[1]}"]
    pairs = zip(chain(*english.tables), chain(*chinese.tables), strict=True)
    return [
        f"row {ours!r}, column {number}: {problem}"
        for theirs, ours in pairs
        for number, cell in enumerate(zip(cells(theirs), cells(ours), strict=True), 1)
        for problem in lacking("figure", *map(numbers, cell))
    ]


def prose_differences(english: Section, chinese: Section) -> list[str]:
    def figures(section: Section) -> list[str]:
        text = "\n".join((section.title, *section.prose))
        return numbers(re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text))

    def names(section: Section) -> set[str]:
        return set(re.findall(r"`[^`]+`", section.text))

    return lacking("figure", figures(english), figures(chinese)) + lacking("name", names(english), names(chinese))


def paragraph_differences(english: Section, chinese: Section) -> list[str]:
    def paragraphs(section: Section) -> list[str]:  # without comments, and what explains Chinese words in English
        found = "\n".join(section.prose).split("\n\n")
        return [text.strip()[:20] for text in found if text.strip() and not re.match(r"\s*(<!--|\([一-鿿])", text)]

    starts = paragraphs(english), paragraphs(chinese)
    return [] if len(starts[0]) == len(starts[1]) else [f"paragraphs: English {starts[0]}, Chinese {starts[1]}"]


def link_differences(english: Section, chinese: Section) -> list[str]:
    def targets(section: Section) -> list[str]:  # which heading an anchor means is another test's
        found = LINK.findall(section.text)
        return [re.sub("#.*", "#…", target.replace("_zh.md", ".md")) for target in found]

    return lacking("link or image", targets(english), targets(chinese))


CHECKS = (code_differences, table_differences, prose_differences, paragraph_differences, link_differences)


def differences(check: Callable, english: str, chinese: str) -> str:
    """Returns what a check finds, section by section, as lines of text; nothing if all is the same."""
    both = zip_longest(read_sections(english), read_sections(chinese), fillvalue=Section(0, "no such section"))
    return "\n".join(
        f"{ours.title} ({theirs.title}): {problem}" for theirs, ours in both for problem in check(theirs, ours)
    )


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_headings_are_the_same(english, chinese):
    outline = [[(section.level, section.title) for section in read_sections(read(name))] for name in (english, chinese)]
    for theirs, ours in zip_longest(*outline, fillvalue=(0, "nothing")):
        assert theirs[0] == ours[0], f"{english} has {theirs} where {chinese} has {ours}"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_content_is_the_same(english, chinese, check):
    found = differences(check, read(english), read(chinese))
    assert not found, f"{chinese} and {english} differ:\n{found}"


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    for target in LINK.findall("\n".join(section.text for section in read_sections(read(name)))):
        if "://" in target:
            continue
        path, _, place = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: no file {target}"
        if place:
            titles = [section.title for section in read_sections(file.read_text(encoding="utf-8"))]
            assert place in map(anchor, titles), f"{name}: no heading for #{place}"


def anchored_headings(name: str) -> list[int]:
    sections = read_sections(read(name))
    anchors = [anchor(section.title) for section in sections]
    places = re.findall(r"\]\(#([^)]+)\)", "\n".join(section.text for section in sections))
    return sorted(anchors.index(place) for place in places)


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_languages_link_to_each_other_and_stay_in_theirs(english, chinese):
    assert anchored_headings(english) == anchored_headings(chinese)
    switch = f"[English]({Path(english).name})"
    assert f"\n[中文]({Path(chinese).name})\n" in read(english)[:200] and f"\n{switch}\n" in read(chinese)[:200]
    for target in LINK.findall(read(chinese).replace(switch, "")):
        counterpart = (ROOT / chinese).parent / re.sub(r"(?<!_zh)\.md\b.*", "_zh.md", target)
        assert target.endswith("_zh.md") or not (target.endswith(".md") and counterpart.exists()), (
            f"{target}: link to {counterpart.name}"
        )


ENGLISH = """# Fast
Ten runs of 1,000 steps, `--epochs 2` ([more](a.md)).

    python a.py --x 1  # go

```mermaid
a["196 patches"] --> b
```

## Figures
| what | MB |
|---|---|
| size | 7.6 |

```
common/      shared
a.py         a file
```
"""
CHINESE = """# 快
1000 步，跑十次，`--epochs 2`（[更多](a_zh.md)）。

    python a.py --x 1     # 开始

```mermaid
a["196 个 patch"] --> b
```

## 数字
| 内容 | MB |
|---|---|
| 大小 | 7.6 |

```
common/      共用
a.py         一个文件
```
"""


def test_what_is_translated_is_no_difference():
    assert [differences(check, ENGLISH, CHINESE) for check in CHECKS] == [""] * len(CHECKS)


@pytest.mark.parametrize(
    ("check", "old", "new", "message"),
    [
        (prose_differences, "1000 步", "1001 步", "快 (Fast): figure missing in the Chinese file: 1000"),
        (prose_differences, "1000 步", "1000 步 7", "快 (Fast): figure missing in the English file: 7"),
        (prose_differences, "`--epochs 2`", "`--epochs 3`", "name missing in the Chinese file: `--epochs 2`"),
        (
            code_differences,
            "--x 1",
            "--x 2",
            "快 (Fast): line of code missing in the Chinese file:     python a.py --x 1",
        ),
        (code_differences, "196 个", "197 个", "line of code missing in the Chinese file: a[['196']] --> b"),
        (code_differences, "a.py    ", "b.py    ", "line of code missing in the Chinese file: a.py"),
        (table_differences, "7.6", "7.5", "row '| 大小 | 7.5 |', column 2: figure missing in the Chinese file: 7.6"),
        (table_differences, "| 大小 | 7.6 |\n", "", "数字 (Figures): columns of each row"),
        (table_differences, "| 大小 | 7.6 |", "| 大小 7.6 |", "数字 (Figures): columns of each row"),
        (paragraph_differences, "## 数字\n", "## 数字\n一段话。\n", "数字 (Figures): paragraphs: English [], Chinese"),
        (link_differences, "a_zh.md", "b_zh.md", "快 (Fast): link or image missing in the Chinese file: a.md"),
    ],
)
def test_a_difference_is_named_with_its_section(check, old, new, message):
    assert old in CHINESE
    assert message in differences(check, ENGLISH, CHINESE.replace(old, new))
