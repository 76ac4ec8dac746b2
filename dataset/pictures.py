"""A picture's file to the 224 x 224 uint8 tensor the vision tower takes."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_SIZE = 224
# A picture so long and thin that it grows beyond this when its short edge becomes 224 pixels is refused.
MAX_RESIZED_PIXELS = 50_000_000
DRAFT_FROM = 4 * IMAGE_SIZE
# Not all that Pillow knows: for EPS it starts another program, whatever the file is called.
Image.init()
PICTURE_FORMATS = tuple(sorted({"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"} & Image.OPEN.keys()))
# What Pillow's decoders raise on a file that is cut off, garbled, or not a picture at all.
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,  # AVIF
    MemoryError,  # a garbled size
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class PictureError(ValueError):
    """A picture that is missing or cannot be decoded: `name` says which, the message why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):
        # So that it survives the way from a loader's worker process.
        return PictureError, (self.name, self.reason)


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with what is transparent laid on white."""
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def in_8_bits(image: Image.Image, kind: str) -> Image.Image:
    """A picture of 16 bits of grey in 8 (Pillow would make white of all above 255); others as they are."""
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # before Pillow 11 a PNG's is "I"
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def preprocess_image(image: Image.Image) -> np.ndarray:
    """CLIP's preprocessing up to normalisation: RGB, shortest edge to 224 bicubic, centre crop.

    Args:
        image: A Pillow image of any mode and size.

    Returns:
        uint8 (3, 224, 224), the same bytes as transformers' CLIPImageProcessorPil before it rescales and normalises
        (which is done on the device, by the tower's own mean and std).

    Raises:
        ValueError: If the picture is too long and thin to be resized.
    """
    image = to_rgb(image)
    short, long = sorted(image.size)
    long = int(IMAGE_SIZE * long / short)
    if long * IMAGE_SIZE > MAX_RESIZED_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels is too long and thin")
    width, height = (IMAGE_SIZE, long) if image.width <= image.height else (long, IMAGE_SIZE)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - IMAGE_SIZE) // 2, (height - IMAGE_SIZE) // 2
    image = image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    return np.asarray(image).transpose(2, 0, 1)


def read_picture_file(source: Path | bytes, name: str) -> bytes:
    """The bytes of a picture's file.

    Raises:
        PictureError: If it is missing or cannot be read.
    """
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except FileNotFoundError as error:
        raise PictureError(name, "no such file") from error
    except OSError as error:
        raise PictureError(name, str(error)) from error


def load_picture(source: str | Path | bytes, name: str | None = None) -> torch.Tensor:
    """Reads one picture, upright by its EXIF orientation.

    Args:
        source: A path, or the bytes of a picture's file.
        name: What errors call it; by default the path.

    Returns:
        uint8 (3, 224, 224).

    Raises:
        PictureError: If it is missing or cannot be decoded.
    """
    name = str(name or source)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=PICTURE_FORMATS) as image:
            if min(image.size) >= DRAFT_FROM:
                # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, several times as fast; never below this.
                image.draft("RGB", (DRAFT_FROM // 2, DRAFT_FROM // 2))
            pixels = preprocess_image(in_8_bits(ImageOps.exif_transpose(image), image.format))
    except FileNotFoundError as error:
        raise PictureError(name, "no such file") from error
    except DECODING_ERRORS as error:
        reason = (
            f"not a picture of a known format ({', '.join(PICTURE_FORMATS)})"
            if isinstance(error, Image.UnidentifiedImageError)
            else str(error)
        )
        raise PictureError(name, reason or type(error).__name__) from error
    return torch.from_numpy(np.ascontiguousarray(pixels))
