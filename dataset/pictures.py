"""A picture's file to the uint8 tensor the vision tower takes, and random views of pictures to train a tower on."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from common.paths import printable

# A picture so long and thin that resizing its short edge makes it larger than this is refused.
MAX_RESIZED_PIXELS = 50_000_000
# Not every format Pillow reads: for EPS it starts another program, even if the file's name is a.jpg.
Image.init()
PICTURE_FORMATS = tuple(sorted({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"} & Image.OPEN.keys()))
HEIC_CURE = "HEIC is not read: convert it to JPEG, as with `magick a.heic a.jpg` or `sips -s format jpeg a.heic`"
BLANK_BYTES, NEARLY_BLACK = 4096, 16  # limits of a placeholder picture: bytes of its file, and levels of 255
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error here, after a JPEG's reduction
# By EXIF orientation: the transposition that makes a picture upright.
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
TURNS = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(TURNS, start=2)}
SMALLEST, STRETCH = 0.35, 4 / 3  # of a view: its least share of the picture's area, and its largest aspect ratio
LIGHT = 0.3  # how far a view's saturation, contrast and brightness change; each colour by half of it


@dataclass(frozen=True)
class PictureFormat:
    """Settings for resizing pictures for a vision tower."""

    size: int = 224  # width and height in pixels
    resample: int = Image.Resampling.BICUBIC  # the filter, by Pillow's number
    crop: bool = True  # the centre is cropped to `size` (CLIP, DINO); False: squashed to a square (SigLIP)
    shortest_edge: int | None = None  # what the shortest edge is resized to before the crop; None: `size`


CLIP_FORMAT = PictureFormat()


@dataclass(eq=False)
class PictureError(ValueError):
    """A picture that is missing or cannot be decoded: `name` says which, `reason` why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)}: {self.reason}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB, transparency over white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def resized_to(size: int, width: int, height: int) -> tuple[int, int]:
    """Returns width and height with the shorter one made `size`; raises ValueError for a picture too long and thin."""
    long = int(size * max(width, height) / min(width, height))
    if long * size > MAX_RESIZED_PIXELS:
        raise ValueError(f"{width} x {height} pixels is too long and thin")
    return (size, long) if width <= height else (long, size)


def preprocess_image(image: Image.Image, picture_format: PictureFormat = CLIP_FORMAT) -> np.ndarray:
    """Returns uint8 (3, size, size), as transformers' image processor (Pillow backend) before it normalises."""
    image, size = to_rgb(image), picture_format.size
    shortest = picture_format.shortest_edge or size
    width, height = resized_to(shortest, *image.size) if picture_format.crop else (size, size)
    image = image.resize((width, height), picture_format.resample)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@contextlib.contextmanager
def decoding(name: str):
    """Raises PictureError of this name for any error that a damaged or missing file causes inside the block."""
    try:
        yield
    except Exception as error:  # Pillow's decoders and the libraries below them raise anything
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not a picture of a known format ({', '.join(PICTURE_FORMATS)})"
            reason += f". {HEIC_CURE}" if name.lower().endswith((".heic", ".heif")) else ""
        raise PictureError(name, reason) from error


@contextlib.contextmanager
def open_picture(source: str | Path | bytes, name: str) -> Iterator[Image.Image]:
    """Yields a picture's file as Pillow opens it; raises PictureError for any error inside the block."""
    with decoding(name):
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=PICTURE_FORMATS) as image:
            yield image


def is_blank(content: bytes) -> bool:
    """Tells whether a file is the black 8 x 8 placeholder of published rows without a picture."""
    if len(content) <= BLANK_BYTES:
        with contextlib.suppress(PictureError), open_picture(content, "a small picture") as image:
            return image.size == (8, 8) and max(to_rgb(image).tobytes()) < NEARLY_BLACK
    return False


def upright(image: Image.Image, size: int) -> Image.Image:
    """Decodes an opened image, turned by its EXIF orientation and in 8 bits; a large JPEG only to twice `size`.

    Raises ValueError if it has too many pixels, or grey of 32 bits, integers or floats, which has no fixed range.
    """
    if min(image.size) >= 4 * size:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, several times as fast; never below this.
        image.draft("RGB", (2 * size, 2 * size))
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels is too large: make it smaller")
    image.load()
    turn = turn_of(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Grey of 16 bits, which Pillow opens as "I" from these: it would clip everything above 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("grey of 32 bits is not read: save it with 8 or 16")
    return image if turn is None else image.transpose(turn)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition that makes a decoded image upright by EXIF; None if none does, or EXIF is damaged."""
    try:
        # Pillow's own reader stops at the first field that breaks the specification; cameras and editors write many.
        exif, orientation = image.info.get("exif", b"").removeprefix(b"Exif\0\0"), None

        def number(at: int, size: int) -> int:
            return int.from_bytes(exif[at : at + size], "little" if exif.startswith(b"I") else "big")

        start = number(4, 4)
        for at in range(start + 2, start + 2 + 12 * number(start, 2), 12):
            if number(at, 2) == ExifTags.Base.Orientation and number(at + 2, 2) in (3, 4) and number(at + 4, 4) == 1:
                orientation = number(at + 8, 2 if number(at + 2, 2) == 3 else 4)  # an integer of 16 or 32 bits
                break
        return TURNS.get(orientation or image.getexif().get(ExifTags.Base.Orientation))  # of a TIFF, or in XMP
    except Exception:  # metadata never decides whether a picture can be read
        return None


def load_picture(
    source: str | Path | bytes, name: str | None = None, picture_format: PictureFormat = CLIP_FORMAT, leaves_small=False
) -> torch.Tensor:
    """Reads a picture's file or its bytes, upright by its EXIF orientation, to uint8 (3, size, size).

    With `leaves_small` a smaller square stays (3, n, n) if `encode_images` knows how to resize it. Raises PictureError,
    which calls it `name` (default: the path), if it is missing or cannot be decoded.
    """
    with open_picture(source, str(name or source)) as file:
        image = to_rgb(upright(file, picture_format.size))
        is_plain = picture_format.shortest_edge is None and picture_format.resample == Image.Resampling.BICUBIC
        if leaves_small and is_plain and image.width == image.height < picture_format.size:
            picture_format = replace(picture_format, size=image.width)
        return torch.from_numpy(preprocess_image(image, picture_format))


def random_views(pixels: torch.Tensor, size: int, may_flip: torch.Tensor) -> torch.Tensor:
    """Returns a random crop of each picture, resized to a square, in other light; random numbers are the CPU's.

    From uint8 (images, 3, n, n) and bool (images,): which may be mirrored; half of them are. To float32 (images, 3,
    size, size), 0 to 255 but for what is too bright or dark.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape) * (high - low) + low

    area, ratio = uniform(SMALLEST, 1), uniform(-math.log(STRETCH), math.log(STRETCH)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)  # of its centre; the picture is -1 to 1
    width = width * torch.where((uniform(0, 1) < 0.5) & may_flip, -1.0, 1.0)
    matrices = torch.zeros(count, 2, 3)
    matrices[:, 0, 0], matrices[:, 0, 2], matrices[:, 1, 1], matrices[:, 1, 2] = width, left, height, top
    grid = F.affine_grid(matrices, [count, 3, size, size], align_corners=False).to(device)
    views = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    saturation, contrast, brightness = (uniform(1 - LIGHT, 1 + LIGHT, 1, 1, 1).to(device) for _ in range(3))
    colours = uniform(1 - LIGHT / 2, 1 + LIGHT / 2, 3, 1, 1).to(device)
    mean, grey = views.mean((2, 3), keepdim=True), views.mean(1, keepdim=True)
    return ((torch.lerp(grey, views, saturation) - mean) * contrast + mean * brightness) * colours
