"""A row's conversation and its pictures: what is kept, changed, and refused."""

import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image
from tiny import as_file, turn

from dataset.chat import RowError
from dataset.pictures import PictureError, load_picture
from scripts.data.sources import make_row, picture_file

ANSWER = {"from": "gpt", "value": "A cat."}
PICTURE = as_file(Image.new("RGB", (8, 8), "red"), "PNG")


@pytest.fixture
def make(tmp_path):
    """Returns a function that makes a row; the pictures a.png and "a, b.png" lie in `from`."""
    for folder in ("from", "to"):
        (tmp_path / folder).mkdir()
    for name in ("a.png", "a, b.png"):
        (tmp_path / "from" / name).write_bytes(PICTURE)
    (tmp_path / "from" / "broken.jpg").write_bytes(b"no picture")
    return lambda **row: make_row(row, tmp_path / "from", "Describe it.", 256, tmp_path / "to")


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8)).convert(mode)


def turned(orientation: int) -> dict:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return {"exif": exif}


def test_small_plain_pictures_are_kept_byte_for_byte():
    for kind, options in (("JPEG", {"quality": 30, "progressive": True}), ("PNG", {}), ("JPEG", turned(1))):
        for size in ((256, 256), (1000, 256), (1, 1)):
            content = as_file(noise(*size), kind, **options)
            assert picture_file(content, "a", 256) == (kind, content)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "transparent", "turned", "GIF", "WEBP"])
def test_other_small_pictures_become_a_png_that_training_sees_alike(mode):
    image, kind, options = noise(40, 30), "PNG", {}
    if mode == "transparent":
        options = {"transparency": image.getpixel((0, 0))}
    elif mode == "turned":
        kind, options = "JPEG", turned(6)
    elif mode in ("GIF", "WEBP"):
        kind = mode
    elif mode == "I;16":
        image = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54)
    else:
        image, kind = image.convert(mode), "TIFF" if mode == "CMYK" else "PNG"
    content = as_file(image, kind, **options)
    made_kind, made = picture_file(content, "a", 256)
    with Image.open(io.BytesIO(made)) as opened:
        assert (made_kind, opened.format, opened.mode) == ("PNG", "PNG", "RGB")
        assert opened.size == ((30, 40) if mode == "turned" else (40, 30)) and not opened.getexif()
    assert load_picture(made).equal(load_picture(content))


@pytest.mark.parametrize(("width", "height"), [(3000, 1500), (257, 900), (600, 600)])
@pytest.mark.parametrize("orientation", [1, 8])
def test_large_pictures_are_resized_once_to_an_upright_jpeg(width, height, orientation):
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    kind, made = picture_file(as_file(image, "JPEG", **turned(orientation)), "a", 256)
    with Image.open(io.BytesIO(made)) as opened:
        width, height = (width, height) if orientation == 1 else (height, width)
        assert (kind, opened.mode, min(opened.size), opened.getexif().get(ExifTags.Base.Orientation)) == (
            *("JPEG", "RGB", 256),
            None,
        )
        assert (opened.width < opened.height) == (width < height)
        assert opened.width / opened.height == pytest.approx(width / height, rel=0.01)
        tables = opened.quantization
    again = io.BytesIO()
    Image.new("RGB", (8, 8)).save(again, "JPEG", quality=90)
    assert max(tables[0]) <= max(Image.open(again).quantization[0])  # of quality 90 or better
    difference = load_picture(made).float() - load_picture(as_file(image, "PNG", **turned(orientation))).float()
    assert difference.abs().mean() < 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture of a known format"),
        (as_file(noise(300, 300), "JPEG")[:2000], "truncated"),
        (as_file(noise(30, 30), "PNG")[:300], "truncated"),
        (as_file(Image.new("RGB", (2000, 1)), "PNG"), "2000 x 1 pixels is too long and thin"),
    ],
)
def test_broken_pictures_are_named(content, reason):
    with pytest.raises(PictureError, match=f"^my.jpg: .*{reason}"):
        picture_file(content, "my.jpg", 256)


def test_each_distinct_picture_is_written_once(make, tmp_path):
    rows = [make(image=name, caption="A cat.") for name in ("a.png", ["a, b.png"])] + [make(image=PICTURE, caption="b")]
    [name] = {name for row in rows for name in row["image"]}
    assert [path.name for path in (tmp_path / "to").iterdir()] == [name]
    assert (tmp_path / "to" / name).read_bytes() == PICTURE


def test_a_caption_is_asked_for_and_a_name_with_a_comma_is_one_where_it_is_there(make):
    row = make(image="a, b.png", caption="A cat.")
    assert len(row["image"]) == 1
    assert row["conversations"] == [turn("user", "Describe it.\n<image>"), turn("assistant", "A cat.")]
    assert len(make(image="a.png, a.png", caption="Two.")["image"]) == 2


def test_columns_of_roles_and_contents_and_empty_columns_of_others(make):
    spoken = {"from": ["human", "gpt"], "value": ["<image>?", "A cat."]}
    assert make(image="a.png", conversations=spoken)["conversations"][1] == turn("assistant", "A cat.")
    spoken = [{"role": None, "content": None, "from": "human", "value": "?"}, {"role": "assistant", "content": "!"}]
    assert make(image="a.png", conversations=spoken)["conversations"][0] == turn("user", "<image>\n?")


def parts(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, turn("assistant", "A cat.")]}


def test_parts_without_a_source_take_the_row_s_pictures(make):
    text = {"type": "text", "text": "What?"}
    row = make(images=["a.png"], **parts(text, {"type": "image"}))
    assert row["conversations"][0]["content"] == "What?\n<image>" and len(row["image"]) == 1
    assert len(make(**parts({"type": "image", "image": {"bytes": PICTURE, "path": None}}))["image"]) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "gone.png", "caption": "a"}, "no such picture: gone.png"),
        ({"image": "broken.jpg", "caption": "a"}, "broken picture: broken.jpg: not a picture of a known format"),
        ({"image": "../to/x.png", "caption": "a"}, "the picture's path leaves images_path"),
        ({"image": "/etc/x.png", "caption": "a"}, "the picture's path leaves images_path"),
        ({"image": "http://host/a.png", "caption": "a"}, "a picture on the web is not fetched"),
        ({"image": "data:image/png;base64,?", "caption": "a"}, "a data: URL that is not base64"),
        ({"image": 3, "caption": "a"}, "the picture is neither a name nor a file's bytes"),
        ({"image": "a.png", "caption": " "}, "the answer is empty"),
        ({"image": "a.png", "caption": None}, "turn 2 has no text as content"),
        ({"image": "a.png", "question": "What?", "answer": ""}, "the answer is empty"),
        ({"image": "", "caption": "a"}, "no picture is named"),
        ({"image": "a.png", "question": "<image><image>", "answer": "a"}, "has 2 <image> for 1 picture"),
        ({"image": "a.png", "words": 3}, "no known form has these fields: image, words"),
        ({"image": "a.png", "conversations": "["}, "conversations is not JSON"),
        (
            {"image": "a.png", "conversations": {"from": ["human"], "value": []}},
            "not read as conversations: ValueError",
        ),
        ({"image": "a.png", "conversations": None}, "not a list of turns"),
        ({"image": "a.png", "conversations": [ANSWER]}, "expected 'user'"),
        ({"image": "a.png", "conversations": ["Hi", ANSWER]}, "turn 1 has no role"),
        ({"conversations": [{"from": "human", "value": "<image>?"}, ANSWER]}, "1 <image> in the text, but 0 picture"),
        (parts({"type": "audio"}), "a part that is neither text nor picture: audio"),
        (parts("What?"), "a part that is neither text nor picture"),
        (parts({"type": "image_url", "image_url": {"detail": "low"}}), "neither a name nor a file's bytes"),
    ],
)
def test_rows_that_cannot_be_learned_from(make, tmp_path, row, reason):
    error = make(**row)
    assert isinstance(error, RowError) and reason in str(error)
    assert not list((tmp_path / "to").iterdir())


def test_a_row_with_a_broken_picture_leaves_none_of_its_others(make, tmp_path):
    error = make(image=["a.png", "broken.jpg"], caption="a")
    assert "broken picture" in str(error) and not list((tmp_path / "to").iterdir())


def test_conversations_as_json_text_are_decoded(make):
    spoken = json.dumps([{"from": "human", "value": "?"}, ANSWER])
    assert make(image="a.png", conversations=spoken)["conversations"] == [
        turn("user", "<image>\n?"),
        turn("assistant", "A cat."),
    ]


def test_rows_of_text_with_a_black_picture_become_rows_of_text(make):
    black, asked = as_file(Image.new("RGB", (8, 8)), "JPEG"), [turn("user", "Hi."), turn("assistant", "Hello.")]
    assert make(conversations=asked, image_bytes=black) == {"image": [], "conversations": asked}
    assert len(make(conversations=asked, image_bytes=PICTURE)["image"]) == 1
    shown = [turn("user", "<image>\nWhat?"), turn("assistant", "Nothing.")]
    assert len(make(conversations=shown, image_bytes=black)["image"]) == 1


def test_reasoning_is_kept_and_tool_calls_are_refused(make):
    thought = [turn("user", "Hi."), turn("assistant", "Hello.") | {"reasoning_content": "Greet."}]
    assert make(conversations=thought)["conversations"] == thought
    called = [turn("user", "Hi."), turn("assistant", "Wait.") | {"tool_calls": [{"name": "search"}]}]
    for turns in (called, [*called[:1], turn("tool", "{}")]):
        assert "calls tools" in str(make(conversations=turns))
