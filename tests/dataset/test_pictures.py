"""An image file to uint8 pixels: equal to transformers' own; every broken file is a PictureError."""

import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import as_file, png

from dataset.pictures import PictureError, load_picture, preprocess_image
from scripts.data.sources import picture_file

try:
    from transformers import CLIPImageProcessorPil

    LAYS_TRANSPARENCY_ON_WHITE = True
except ImportError:  # early releases of transformers 5 use this name and ignore transparency
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

    LAYS_TRANSPARENCY_ON_WHITE = False

MODES = ["RGB", "L", "P", "CMYK", "I;16", "1", "YCbCr", "I", "F"]
TRANSPARENT_MODES = ["RGBA", "LA", "PA", "P one colour", "P levels", "L one level", "RGB one colour"]
SIZES = [(1, 1), (224, 224), (128, 128), (500, 30), (30, 500), (333, 101), (225, 223), (320, 240)]


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil()


def drawn(mode, size):
    """Draws noise, in which a misplaced pixel shows."""
    width, height = size
    rng = np.random.default_rng(width * 1000 + height)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8))
    base, _, transparency = mode.partition(" ")
    if base in ("P", "PA"):
        image = image.convert("RGB").quantize(17).convert(base)
    image = image.convert(base)
    if transparency:
        image.info["transparency"] = {"P one colour": 3, "P levels": bytes(range(0, 255, 15)), "L one level": 7}.get(
            mode, image.getpixel((0, 0))
        )
    return image


def expected(processor, image):
    options = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_last"}
    pixels = processor(image, **options, return_tensors="np")["pixel_values"][0]
    assert pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES + TRANSPARENT_MODES * LAYS_TRANSPARENCY_ON_WHITE)
def test_pixels_are_those_of_transformers(processor, mode, size):
    image = drawn(mode, size)
    pixels = preprocess_image(image)
    assert (pixels.shape, pixels.dtype) == ((3, 224, 224), np.uint8)
    np.testing.assert_array_equal(pixels, expected(processor, image))


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    assert (preprocess_image(image) == 255).all()


@settings(max_examples=60, deadline=None, database=None)  # no database: writes nothing into the project
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_pixels_are_those_of_transformers_at_any_size(processor, width, height):
    image = drawn("RGB", (width, height))
    np.testing.assert_array_equal(preprocess_image(image), expected(processor, image))


def test_load_picture_takes_a_path_and_bytes(tmp_path):
    image = drawn("RGB", (90, 70))
    path = tmp_path / "图.png"
    path.write_bytes(as_file(image, "PNG"))
    pixels = torch.from_numpy(preprocess_image(image).copy())
    for source in (path, str(path), path.read_bytes()):
        loaded = load_picture(source, "a name")
        assert (loaded.shape, loaded.dtype) == ((3, 224, 224), torch.uint8)
        assert torch.equal(loaded, pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "stored_by"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation_is_applied(kind, orientation, stored_by):
    upright = Image.new("RGB", (40, 60), "red")
    upright.paste("blue", (0, 0, 40, 20))
    stored = upright if stored_by is None else upright.transpose(stored_by)
    exif = Image.Exif()
    exif[0x112] = orientation
    loaded = load_picture(as_file(stored, kind, exif=exif), "rotated")
    difference = loaded.int() - torch.from_numpy(preprocess_image(upright).astype(np.int32))
    assert difference.abs().float().mean() < 3  # JPEG is lossy


NOISE = drawn("RGB", (64, 48))


def exif_block(*fields: tuple[int, int, int, bytes]) -> bytes:
    """Writes EXIF fields as they are given: tag, type, count and the four bytes of a value or its offset."""
    entries = b"".join(struct.pack(">HHI", *field[:3]) + field[3] for field in fields)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(fields)) + entries + bytes(4)


TURNED = (0x112, 3, 1, b"\0\x06\0\0")
ODD_FIELDS = {
    "text for a number": (TURNED, (0x11A, 2, 4, b"abc\0")),
    "bytes for a number": (TURNED, (0x11A, 1, 1, b"a\0\0\0")),
    "a number for text": ((0x10E, 3, 1, b"\0\6\0\0"), TURNED),
    "an offset outside": ((0x10E, 2, 500, b"\xff\0\0\0"), TURNED),
    "a type that nothing has": ((0x10E, 99, 1, bytes(4)), TURNED),
    "a directory that holds itself": (TURNED, (0x8769, 4, 1, b"\0\0\0\x08")),
    "an infinite resolution": (TURNED, (0x11A, 11, 1, b"\x7f\x80\0\0"), (0x128, 3, 1, b"\0\2\0\0")),
}


@pytest.mark.parametrize("fields", ODD_FIELDS)
@pytest.mark.parametrize("kind", ["JPEG", "JPEG of a camera", "PNG", "WEBP"])
def test_only_the_orientation_of_exif_is_read(kind, fields):
    upright = Image.new("RGB", (40, 60), "red")
    upright.paste("blue", (0, 0, 40, 20))
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    content = as_file(stored, kind.split()[0], exif=exif_block(*ODD_FIELDS[fields]))
    if "camera" in kind:  # no JFIF: Pillow looks for the resolution in EXIF
        content = content[:2] + content[20:]
    expected = preprocess_image(upright).astype(int)
    assert np.abs(load_picture(content).numpy() - expected).mean() < 3
    _, converted = picture_file(content, "odd", 64)
    assert np.abs(load_picture(converted).numpy() - expected).mean() < 3


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("kind", ["JPEG", "JPEG of a camera", "WEBP"])
def test_damaged_exif_never_decides_whether_a_picture_can_be_read(kind):
    """Every byte of it is changed. (A PNG or TIFF has its pixels' own structure there: Pillow may refuse the file.)"""
    fields = (0x10E, 2, 3, b"hi\0\0"), TURNED, (0x11A, 5, 1, b"\0\0\0\x3e"), (0x10F, 2, 4, b"abc\0")
    exif = exif_block(*fields) + struct.pack(">II", 72, 1)
    content = as_file(NOISE.resize((16, 8)), kind.split()[0], exif=exif)
    if "camera" in kind:
        content = content[:2] + content[20:]
    turned, start = load_picture(content), content.index(b"MM\0*")
    others = 0
    for place in range(start, start + 70):
        for value in (b"\0", b"\1", b"\x7f", b"\xff"):
            others += not torch.equal(load_picture(replaced(content, place, value)), turned)
    assert 10 < others < 100  # the orientation's own bytes, and those that lead to it


@pytest.mark.parametrize("error", [TypeError, KeyError("x"), AttributeError, RecursionError, NotImplementedError])
def test_whatever_decoding_raises_is_the_pictures_fault(monkeypatch, error):
    def failing(self):
        raise error

    content = as_file(NOISE, "BMP")
    monkeypatch.setattr(Image.Image, "load", failing)
    for read in (load_picture, lambda content, name: picture_file(content, name, 64)):
        with pytest.raises(PictureError, match="odd: "):
            read(content, "odd")


def png_of_size(width, height):
    """Writes a grey PNG that is small on disk whatever size it claims."""
    return png(width, height, 8, 0, b"\0" * min(height * (width + 1), 10**6))


def replaced(data, position, value):
    return data[:position] + value + data[position + len(value) :]


BROKEN = {
    "cut off.jpg": (as_file(NOISE, "JPEG")[:-500], "truncated"),
    "cut off.png": (as_file(NOISE, "PNG")[:-500], "truncated"),
    "only a header.jpg": (as_file(NOISE, "JPEG")[:20], "."),
    "zero bytes.jpg": (b"", "not a picture"),
    "text.jpg": ("描述这张图片".encode(), "not a picture"),
    "page.jpg": (b"<html>404</html>", "not a picture"),
    "bomb.png": (png_of_size(20_000, 20_000), "decompression bomb"),
    "thin.png": (png_of_size(1, 100_000), "1 x 100000 pixels is too long and thin"),
    "wide.png": (png_of_size(2000, 1), "2000 x 1 pixels is too long and thin"),
    "no pixels.png": (png_of_size(0, 0), "."),
    # The bytes decide the format, not the name, so Pillow's rarer decoders are reached too.
    "dds.jpg": (replaced(as_file(NOISE, "DDS"), 80, b"\0\0\0\0"), "known format"),
    "blp.jpg": (replaced(as_file(NOISE.quantize(), "BLP"), 8, b"\x09"), "known format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_a_picture_error(tmp_path, name):
    content, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    for source, called in ((path, str(path)), (content, name)):
        with pytest.raises(PictureError, match=f"(?s){name}: .*{reason}") as error:
            load_picture(source, None if source is path else name)
        assert error.value.name == called
        assert str(error.value) == f"{called}: {error.value.reason}"


def test_a_missing_picture_and_a_folder_are_picture_errors(tmp_path):
    with pytest.raises(PictureError, match=r"a\.jpg: no such file") as error:
        load_picture(tmp_path / "a.jpg", "a.jpg")
    assert (error.value.name, error.value.reason) == ("a.jpg", "no such file")
    for path in (tmp_path, f"{tmp_path}/a\0b.jpg", tmp_path / ("a" * 5000)):
        with pytest.raises(PictureError, match=": ."):
            load_picture(path)


def with_exif(kind):
    exif = Image.Exif()
    exif[0x112] = 6
    exif[0x10E] = "text"
    return as_file(NOISE, kind, exif=exif)


FILES = [with_exif(kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF")] + [
    as_file(NOISE.quantize(), "PNG", transparency=3),
    as_file(drawn("I;16", (20, 10)), "PNG"),
    as_file(NOISE.quantize(), "GIF"),
    as_file(NOISE.convert("CMYK"), "JPEG"),
    as_file(NOISE, "TIFF", compression="tiff_lzw"),
    as_file(NOISE, "BMP"),
]


# Pillow warns of the sizes and tags that a changed byte makes up.
@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=200, deadline=None, database=None)
@given(data=st.data())
def test_a_damaged_file_gives_pixels_or_a_picture_error(data):
    damaged = data.draw(st.sampled_from(FILES))
    places = st.integers(0, len(damaged) - 1) | st.integers(0, 60)
    for position in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged = replaced(damaged, position, data.draw(st.sampled_from([b"\0", b"\xff", b"\xff\xff", b"\x7f", b"\1"])))
    damaged = damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))]
    try:
        assert load_picture(damaged, "damaged").shape == (3, 224, 224)
    except PictureError as error:
        assert error.name == "damaged"
        assert error.reason


def test_a_picture_error_survives_pickling():
    error = pickle.loads(pickle.dumps(PictureError("a.jpg", "no such file")))
    assert isinstance(error, PictureError)
    assert (str(error), error.name, error.reason) == ("a.jpg: no such file", "a.jpg", "no such file")


def test_a_large_jpeg_is_decoded_at_half_size_and_looks_the_same(tmp_path):
    columns, rows = np.meshgrid(np.linspace(0, 6, 1600), np.linspace(0, 4, 1200))
    waves = np.stack([np.sin(columns), np.cos(rows), np.sin(columns + rows)], axis=-1)
    picture = Image.fromarray((127 + 120 * waves).astype(np.uint8))
    picture.save(tmp_path / "large.jpg", quality=95)
    found = load_picture(tmp_path / "large.jpg").int()
    with Image.open(tmp_path / "large.jpg") as image:
        image.draft("RGB", (448, 448))
        assert image.size == (800, 600)  # what was decoded
    expected = preprocess_image(picture).astype(int)
    assert np.abs(found.numpy() - expected).max() <= 6


def grey(values, mode, kind) -> bytes:
    """Writes a grey image of 14 x 14 blocks of 16 x 16 equal pixels, which resizing leaves unchanged."""
    return as_file(Image.fromarray(np.kron(values, np.ones((16, 16))).astype(mode)), kind)


@pytest.mark.parametrize(
    ("mode", "kind", "scale"),
    [
        ("uint8", "PNG", lambda values: values),
        ("uint16", "PNG", lambda values: values // 256),
        ("uint16", "TIFF", lambda values: values // 256),
        ("uint16", "PPM", lambda values: values // 256),
    ],
)
def test_grey_of_16_bits_keeps_its_shades(mode, kind, scale):
    """Compared with arithmetic, as Pillow itself would make all above 255 white."""
    values = np.random.default_rng(0).integers(0, {"uint8": 255, "uint16": 65535}[mode], (14, 14))
    pixels = load_picture(grey(values, mode, kind)).numpy()
    expected = np.kron(scale(values.astype(np.float64)), np.ones((16, 16))).astype(np.uint8)
    assert (pixels == expected).all()


@pytest.mark.parametrize("mode", ["int32", "float32"])
def test_grey_of_32_bits_is_refused(mode):
    with pytest.raises(PictureError, match="32 bits is not read"):
        load_picture(grey(np.zeros((14, 14)), mode, "TIFF"))


def test_a_picture_of_too_many_pixels_is_refused_unless_a_jpeg_is_reduced(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500 * 1500)
    picture = Image.new("RGB", (2000, 2000), "red")
    with pytest.raises(PictureError, match="2000 x 2000 pixels is too large"):
        load_picture(as_file(picture, "PNG"))
    assert load_picture(as_file(picture, "JPEG")).shape == (3, 224, 224)
