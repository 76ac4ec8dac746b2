"""The texts of the built-in scenes: captions, questions with answers, and the rows of the data set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle
from random import Random

COLOURS = ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "黑色", "灰色")
SHAPES = ("圆形", "正方形", "三角形", "五角星", "菱形", "十字形")
SIZES = ("大", "小")
PLACES = ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角")  # in reading order

DESCRIBE = "描述这张图片"


@dataclass(frozen=True)
class Facts:
    """The attributes of one object, in the Chinese words above whatever language it is spoken of."""

    colour: str
    shape: str
    size: str
    place: str


@dataclass(frozen=True)
class Language:
    """How scenes are spoken of. The templates' fields are those of `Facts`, and `things`."""

    words: dict[str, str]  # for the Chinese ones above; {} for Chinese itself
    requests: tuple[str, ...]  # for a description; the first is the usual one
    requests_for_two: tuple[str, ...]
    captions: tuple[str, str, str]  # of no, one and two objects
    thing: str  # one object of a caption
    separator: str  # between two of them
    captions_of_two: str  # the answer to a request for two images
    count: tuple[str, str, str, str]  # the question for the number of objects, and its answers
    about: tuple[tuple[str, str], ...]  # questions with answers about one object; the question says which
    presence: tuple[str, str, str]  # the question whether there is such an object, the answer yes and the answer no

    def say(self, template: str, thing: Facts) -> str:
        """Returns the template with the object's attributes filled in."""
        said = {name: self.words.get(word, word) for name, word in vars(thing).items()}
        return template.format(**said).replace(" a orange", " an orange")


CHINESE = Language(
    words={},
    requests=(
        DESCRIBE,
        *"请描述这张图片的内容。 请说一说画面上都有些什么。 这张图片里有什么？ 图中有哪些物体？ 你看到了什么？".split(),
    ),
    requests_for_two=("描述这两张图片", "请依次描述这两张图片的内容。", "这两张图片里分别有什么？"),
    captions=("", "图中有一个物体：{things}。", "图中有两个物体：{things}。"),
    thing="{place}有一个{size}的{colour}{shape}",
    separator="，",
    captions_of_two="第一张{}第二张{}",
    count=("图中有几个物体？", "", "一个。", "两个。"),
    about=(
        ("{place}有什么？", "一个{size}的{colour}{shape}。"),
        ("{place}的物体是什么颜色的？", "{colour}。"),
        ("{place}的物体是什么形状的？", "{shape}。"),
        ("{place}的物体是大的还是小的？", "{size}的。"),
        ("{shape}是什么颜色的？", "{colour}。"),
        ("{shape}在哪里？", "在{place}。"),
        ("{colour}的物体是什么形状的？", "{shape}。"),
        ("{colour}的物体在哪里？", "在{place}。"),
    ),
    presence=("图中有{colour}的{shape}吗？", "有。", "没有。"),
)
_ENGLISH_WORDS = (
    *"red orange yellow green blue purple black gray circle square triangle star diamond cross large small".split(),
    *("at the top left", "at the top", "at the top right", "on the left", "in the middle", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
ENGLISH = Language(
    words=dict(zip((*COLOURS, *SHAPES, *SIZES, *PLACES), _ENGLISH_WORDS, strict=True)),
    requests=(
        "Describe this image.",
        "Please describe what is in this image.",
        "What is in this image?",
        "Which objects are there?",
        "What do you see?",
    ),
    requests_for_two=(
        "Describe these two images.",
        "Describe both images in order.",
        "What is in each of these images?",
    ),
    captions=("", "There is one object: {things}.", "There are two objects: {things}."),
    thing="{place} a {size} {colour} {shape}",
    separator=", ",
    captions_of_two="First image: {} Second image: {}",
    count=("How many objects are there?", "", "There is one.", "There are two."),
    about=(
        ("What is {place}?", "It is a {size} {colour} {shape}."),
        ("What color is the object {place}?", "It is {colour}."),
        ("What shape is the object {place}?", "It is a {shape}."),
        ("Is the object {place} large or small?", "It is {size}."),
        ("What color is the {shape}?", "It is {colour}."),
        ("Where is the {shape}?", "It is {place}."),
        ("What shape is the {colour} object?", "It is a {shape}."),
        ("Where is the {colour} object?", "It is {place}."),
    ),
    presence=("Is there a {colour} {shape}?", "Yes, there is.", "No, there is not."),
)
LANGUAGES = (CHINESE, ENGLISH)


def caption(objects: Sequence[Facts], language: Language = CHINESE) -> str:
    """Returns the canonical description of a scene: its objects in reading order."""
    things = language.separator.join(language.say(language.thing, thing) for thing in objects)
    return language.captions[len(objects)].format(things=things)


def questions(objects: Sequence[Facts], rng: Random, language: Language = CHINESE) -> list[tuple[str, str]]:
    """Returns short questions about a scene with their answers, in random order; each has only one right answer."""
    asked = [(language.count[0], language.count[1 + len(objects)])]
    for thing in objects:
        for question, answer in language.about:
            text = language.say(question, thing)
            if [language.say(question, other) for other in objects].count(text) == 1:  # no other object fits
                asked.append((text, language.say(answer, thing)))
    # One question with the answer yes and one with no, which differs from the scene in one word.
    thing = rng.choice(objects)
    question, yes, no = language.presence
    asked.append((language.say(question, thing), yes))
    seen = {(other.colour, other.shape) for other in objects}
    absent = [(colour, thing.shape) for colour in COLOURS] + [(thing.colour, shape) for shape in SHAPES]
    colour, shape = rng.choice([pair for pair in absent if pair not in seen])
    asked.append((language.say(question, replace(thing, colour=colour, shape=shape)), no))
    rng.shuffle(asked)
    return asked


def conversation(
    scenes: Sequence[Sequence[Facts]], shown: Sequence[str], rng: Random, language: Language, is_dialogue: bool = False
) -> list[dict]:
    """Returns a conversation that asks for the captions of one or two scenes, or a dialogue about one.

    A dialogue has two to four questions. `rng` chooses the wording, and whether the first request comes before or after
    what is `shown` of the scenes: images' placeholders, or descriptions that stand in their place.
    """
    if len(scenes) == 2:
        image = rng.choice(("", "\n")).join(shown)
        captions = language.captions_of_two.format(*(caption(objects, language) for objects in scenes))
        pairs = [(rng.choice(language.requests_for_two), captions)]
    else:
        [objects], [image] = scenes, shown
        pairs = questions(objects, rng, language)[: rng.randint(2, 4)] if is_dialogue else []
        if not is_dialogue or rng.random() < 0.25:
            pairs[:1] = [(rng.choice(language.requests), caption(objects, language))]
    turns = [{"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), chain(*pairs))]
    request = turns[0]["content"]
    turns[0]["content"] = f"{request}\n{image}" if rng.random() < 0.5 else f"{image}\n{request}"
    return turns


def scene_rows(stage: str, scenes: Sequence[Sequence[Facts]], names: Sequence[str]) -> Iterator[dict]:
    """Yields a row for each scene, given its objects and its image's file name; Chinese and English take turns.

    Those of "pretrain" are descriptions; of "sft" descriptions and dialogues, some of two images, some of text only; of
    "heldout" descriptions, all with the usual request of their language.
    """
    for index, (objects, name, spoken) in enumerate(zip(scenes, names, cycle(LANGUAGES))):
        rng, image = Random(f"{stage} row {index}"), name
        if stage == "heldout":
            request = {"role": "user", "content": f"{spoken.requests[0]}\n<image>"}
            talk = [request, {"role": "assistant", "content": caption(objects, spoken)}]
        elif stage == "pretrain":
            talk = conversation([objects], ["<image>"], rng, spoken)
        elif (kind := rng.random()) < 0.03:  # no image: the scene is described in words
            talk, image = conversation([objects], [caption(objects, spoken)], rng, spoken, is_dialogue=True), None
        elif kind < 0.08:
            other = rng.randrange(len(scenes))
            talk = conversation([objects, scenes[other]], ["<image>", "<image>"], rng, spoken)
            image = f"{name}, {names[other]}"
        else:
            talk = conversation([objects], ["<image>"], rng, spoken, is_dialogue=kind >= 0.55)
        yield {"conversations": talk, "image": image} if image else {"conversations": talk}
