"""A picture's file to the uint8 tensor the vision tower takes."""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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
TURNS = {  # by EXIF orientation: the transposition that makes a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PictureFormat:
    """Settings for resizing pictures for a vision tower.

    Attributes:
        size: Width and height in pixels.
        resample: The filter, by Pillow's number.
        crop: True: the shortest edge is resized, then the centre is cropped to `size` (CLIP, DINO); False: the picture
            is squashed to a square (SigLIP).
        shortest_edge: What the shortest edge is resized to before the crop; None for `size`.
    """

    size: int = 224
    resample: int = Image.Resampling.BICUBIC
    crop: bool = True
    shortest_edge: int | None = None


CLIP_FORMAT = PictureFormat()


class PictureError(ValueError):
    """A picture that is missing or cannot be decoded: `name` says which, the message why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{printable(name)}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        # Lets it be pickled: it comes back from a loader's worker process.
        return PictureError, (self.name, self.reason)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB, transparency over white."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_8_bits(image: Image.Image, kind: str) -> Image.Image:
    """Converts grey of 16 bits to 8, where Pillow would clip everything above 255; returns others unchanged.

    Raises ValueError for grey of 32 bits, integers or floats, which has no fixed range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):  # Pillow opens these as "I"
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("grey of 32 bits is not read: save it with 8 or 16")
    return image


def resized_to(size: int, width: int, height: int) -> tuple[int, int]:
    """Returns width and height with the shorter one made `size`; raises ValueError for a picture too long and thin."""
    short, long = sorted((width, height))
    long = int(size * long / short)
    if long * size > MAX_RESIZED_PIXELS:
        raise ValueError(f"{width} x {height} pixels is too long and thin")
    return (size, long) if width <= height else (long, size)


def preprocess_image(image: Image.Image, picture_format: PictureFormat = CLIP_FORMAT) -> np.ndarray:
    """Does the tower's preprocessing up to normalisation, which is left to the device.

    Returns:
        uint8 (3, size, size): the same bytes as transformers' image processor (Pillow backend) before it rescales and
        normalises.

    Raises:
        ValueError: If the picture is too long and thin to be resized.
    """
    size = picture_format.size
    image = to_rgb(image)
    shortest = picture_format.shortest_edge or size
    width, height = resized_to(shortest, *image.size) if picture_format.crop else (size, size)
    image = image.resize((width, height), picture_format.resample)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def resize_pixels(pixels: torch.Tensor, picture_format: PictureFormat) -> torch.Tensor:
    """Resizes a decoded picture, uint8 (3, H, W), as `preprocess_image` does."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return torch.from_numpy(np.ascontiguousarray(preprocess_image(image, picture_format)))


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
    if len(content) > BLANK_BYTES:
        return False
    try:
        with open_picture(content, "a small picture") as image:
            return image.size == (8, 8) and max(to_rgb(image).tobytes()) < NEARLY_BLACK
    except PictureError:
        return False


def upright(image: Image.Image, size: int) -> Image.Image:
    """Decodes an opened image, turned by its EXIF orientation and in 8 bits; a large JPEG only to twice `size`."""
    if min(image.size) >= 4 * size:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, several times as fast; never below this.
        image.draft("RGB", (2 * size, 2 * size))
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels is too large: make it smaller")
    image.load()
    turn = turn_of(image)
    return to_8_bits(image if turn is None else image.transpose(turn), image.format)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Returns the transposition that makes a decoded image upright by EXIF; None if none does, or EXIF is damaged."""
    try:
        orientation = orientation_of(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
        return TURNS.get(orientation or image.getexif().get(ExifTags.Base.Orientation))  # of a TIFF, or in XMP
    except Exception:  # metadata never decides whether a picture can be read
        return None


def orientation_of(exif: bytes) -> int | None:
    # Pillow's own reader stops at the first field that breaks the specification; cameras and editors write many.
    order = "<" if exif.startswith(b"I") else ">"
    try:
        start = struct.unpack_from(f"{order}I", exif, 4)[0]
        count = struct.unpack_from(f"{order}H", exif, start)[0]
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", exif, at)
            if tag == ExifTags.Base.Orientation and kind in (3, 4) and values == 1:  # one integer of 16 or 32 bits
                return struct.unpack_from(f"{order}H" if kind == 3 else f"{order}I", exif, at + 8)[0]
    except struct.error:  # it is cut off, or there is none
        pass
    return None


def load_picture(
    source: str | Path | bytes,
    name: str | None = None,
    picture_format: PictureFormat = CLIP_FORMAT,
    leaves_small: bool = False,
) -> torch.Tensor:
    """Reads one picture, upright by its EXIF orientation.

    Args:
        source: A path, or the bytes of a picture's file.
        name: Its name in errors; by default the path.
        picture_format: How it is resized.
        leaves_small: Leave a square as it is if it is smaller and the filter is one that `encode_images` knows.

    Returns:
        uint8 (3, size, size), or (3, n, n) of a small square.

    Raises:
        PictureError: If it is missing or cannot be decoded.
    """
    with open_picture(source, str(name or source)) as file:
        image = to_rgb(upright(file, picture_format.size))
        is_small = image.width == image.height < picture_format.size and picture_format.shortest_edge is None
        if leaves_small and is_small and picture_format.resample == Image.Resampling.BICUBIC:
            pixels = np.asarray(image).transpose(2, 0, 1)
        else:
            pixels = preprocess_image(image, picture_format)
        return torch.from_numpy(np.ascontiguousarray(pixels))
