"""The texts of the built-in scenes: captions, questions with answers, and the rows of the data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

COLOURS = ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "黑色", "灰色")
SHAPES = ("圆形", "正方形", "三角形", "五角星", "菱形", "十字形")
SIZES = ("大", "小")
PLACES = ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角")  # in reading order

DESCRIBE = "描述这张图片"
DESCRIBE_REQUESTS = (
    DESCRIBE,
    *"请描述这张图片的内容。 请说一说画面上都有些什么。 这张图片里有什么？ 图中有哪些物体？ 你看到了什么？".split(),
)
DESCRIBE_TWO_REQUESTS = ("描述这两张图片", "请依次描述这两张图片的内容。", "这两张图片里分别有什么？")


@dataclass(frozen=True)
class Facts:
    """The attributes of one object."""

    colour: str
    shape: str
    size: str
    place: str


def caption(objects: Sequence[Facts]) -> str:
    """Returns the canonical description of a scene: its objects in reading order."""
    parts = "，".join(f"{thing.place}有一个{thing.size}的{thing.colour}{thing.shape}" for thing in objects)
    return f"图中有{_count(objects)}个物体：{parts}。"


def _count(objects: Sequence[Facts]) -> str:
    return "零一两"[len(objects)]


def questions(objects: Sequence[Facts], rng: Random) -> list[tuple[str, str]]:
    """Returns short questions about a scene with their answers, in random order; each has only one right answer."""
    asked = [("图中有几个物体？", f"{_count(objects)}个。")]
    for thing in objects:
        name = thing.colour + thing.shape
        asked += [
            (f"{thing.place}有什么？", f"一个{thing.size}的{name}。"),
            (f"{thing.place}的物体是什么颜色的？", f"{thing.colour}。"),
            (f"{thing.place}的物体是什么形状的？", f"{thing.shape}。"),
            (f"{thing.place}的物体是大的还是小的？", f"{thing.size}的。"),
        ]
        if sum(other.shape == thing.shape for other in objects) == 1:
            asked.append((f"{thing.shape}是什么颜色的？", f"{thing.colour}。"))
            asked.append((f"{thing.shape}在哪里？", f"在{thing.place}。"))
        if sum(other.colour == thing.colour for other in objects) == 1:
            asked.append((f"{thing.colour}的物体是什么形状的？", f"{thing.shape}。"))
            asked.append((f"{thing.colour}的物体在哪里？", f"在{thing.place}。"))
    # One question with the answer yes and one with no, which differs from the scene in one word.
    thing = rng.choice(objects)
    asked.append((f"图中有{thing.colour}的{thing.shape}吗？", "有。"))
    seen = {(other.colour, other.shape) for other in objects}
    absent = [(colour, thing.shape) for colour in COLOURS] + [(thing.colour, shape) for shape in SHAPES]
    colour, shape = rng.choice([pair for pair in absent if pair not in seen])
    asked.append((f"图中有{colour}的{shape}吗？", "没有。"))
    rng.shuffle(asked)
    return asked


def _turns(*pairs: tuple[str, str]) -> list[dict]:
    return [
        {"role": role, "content": content}
        for request, answer in pairs
        for role, content in (("user", request), ("assistant", answer))
    ]


def _beside(request: str, shown: str, rng: Random) -> str:
    return f"{request}\n{shown}" if rng.random() < 0.5 else f"{shown}\n{request}"


def description(objects: Sequence[Facts], rng: Random, shown: str = "<image>") -> list[dict]:
    """Returns a conversation of one question and answer: the caption.

    Args:
        objects: The scene.
        rng: Chooses the request's wording, and whether it comes before or after the image.
        shown: The image's placeholder, or a description that stands in its place.
    """
    return _turns((_beside(rng.choice(DESCRIBE_REQUESTS), shown, rng), caption(objects)))


def dialogue(objects: Sequence[Facts], rng: Random, shown: str = "<image>") -> list[dict]:
    """Returns a conversation of two to four questions about one scene; arguments as in `description`."""
    pairs = questions(objects, rng)[: rng.randint(2, 4)]
    if rng.random() < 0.25:
        pairs[0] = (rng.choice(DESCRIBE_REQUESTS), caption(objects))
    pairs[0] = (_beside(pairs[0][0], shown, rng), pairs[0][1])
    return _turns(*pairs)


def description_of_two(
    scenes: Sequence[Sequence[Facts]], rng: Random, shown: Sequence[str] = ("<image>", "<image>")
) -> list[dict]:
    """Returns a conversation that asks for the captions of two images; arguments as in `description`."""
    images = rng.choice(("", "\n")).join(shown)
    request = _beside(rng.choice(DESCRIBE_TWO_REQUESTS), images, rng)
    return _turns((request, f"第一张{caption(scenes[0])}第二张{caption(scenes[1])}"))


def pretrain_rows(scenes: Sequence[Sequence[Facts]], names: Sequence[str]) -> list[dict]:
    """Returns the rows of the first stage: a description of each image, given its objects and its file name."""
    return [
        {"conversations": description(objects, Random(f"pretrain row {index}")), "image": name}
        for index, (objects, name) in enumerate(zip(scenes, names, strict=True))
    ]


def sft_rows(scenes: Sequence[Sequence[Facts]], names: Sequence[str]) -> list[dict]:
    """Returns the rows of the second stage: descriptions and dialogues, some of two images, some of text only."""
    rows = []
    for index, (objects, name) in enumerate(zip(scenes, names, strict=True)):
        rng = Random(f"sft row {index}")
        kind = rng.random()
        if kind < 0.03:  # no image: the scene is described in words
            rows.append({"conversations": dialogue(objects, rng, shown=caption(objects))})
        elif kind < 0.08:
            other = rng.randrange(len(scenes))
            conversation = description_of_two((objects, scenes[other]), rng)
            rows.append({"conversations": conversation, "image": f"{name}, {names[other]}"})
        else:
            talk = description if kind < 0.55 else dialogue
            rows.append({"conversations": talk(objects, rng), "image": name})
    return rows


def heldout_rows(scenes: Sequence[Sequence[Facts]], names: Sequence[str]) -> list[dict]:
    """Returns one row per image, all with the same request."""
    return [
        {"conversations": _turns((f"{DESCRIBE}\n<image>", caption(objects))), "image": name}
        for objects, name in zip(scenes, names, strict=True)
    ]
