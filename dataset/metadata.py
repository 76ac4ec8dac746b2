"""What a picture's file says beside its pixels: its orientation is read, and nothing else decides anything."""

import struct
import zlib
from collections.abc import Collection, Iterator

from PIL import ExifTags, Image

# What a file with damaged metadata is cut down to: a PNG's chunks, and a TIFF's tags.
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
PIXEL_TAGS = {*range(254, 533)} - {*range(269, 273), 274, 282, 283, *range(285, 288), 290, 291, 296, 305, 306, 315, 316}
TURNS = {  # by EXIF orientation: what makes a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Returns what makes a decoded image upright by its EXIF orientation; None where nothing does, or EXIF is damaged.

    No other field is read: cameras and editors write many that break the EXIF specification.
    """
    try:
        exif = Image.Exif()
        exif.load(bare_tiff(image.info.get("exif", b"").removeprefix(b"Exif\0\0"), ()))
        orientation = exif.get(ExifTags.Base.Orientation)
        if orientation is None:  # of a TIFF, or in XMP
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        return TURNS.get(orientation)
    except Exception:  # metadata never decides whether a picture can be read
        return None


def without_metadata(content: bytes) -> bytes | None:
    """Returns a JPEG, PNG or TIFF with only its pixels and its EXIF orientation; None for any other file."""
    try:
        if content.startswith(b"\xff\xd8"):
            return b"".join(jpeg_parts(content))
        if content.startswith(b"\x89PNG"):
            return b"".join(png_parts(content))
    except (IndexError, struct.error):  # it is cut off
        return None
    return bare_tiff(content, PIXEL_TAGS) if content[:4] in (b"II*\0", b"MM\0*") else None


def jpeg_parts(content: bytes) -> Iterator[bytes]:
    """Yields a JPEG without comments and the segments of applications, but for JFIF's, Adobe's and EXIF's, cut down."""
    at = 2
    yield content[:at]
    while content[at + 1] != 0xDA:  # the scans
        marker, size = struct.unpack_from(">HH", content, at)
        segment = content[at + 4 : at + 2 + size]
        if segment.startswith(b"Exif\0\0"):
            segment = segment[:6] + bare_tiff(segment[6:], ())
        elif 0xFFE1 <= marker <= 0xFFED or marker in (0xFFEF, 0xFFFE):
            segment = b""
        yield struct.pack(">HH", marker, 2 + len(segment)) + segment
        at += 2 + size
    yield content[at:]


def png_parts(content: bytes) -> Iterator[bytes]:
    """Yields a PNG's chunks that matter; EXIF's with a checksum that fits, for Pillow would refuse the whole file."""
    at = 8
    yield content[:at]
    while at < len(content):
        size, name = struct.unpack_from(">I4s", content, at)
        chunk, checksum = content[at : at + 8 + size], content[at + 8 + size : at + 12 + size]
        if name in PIXEL_CHUNKS:
            yield chunk + (struct.pack(">I", zlib.crc32(chunk[4:])) if name == b"eXIf" else checksum)
        at += 12 + size


def bare_tiff(content: bytes, tags: Collection[int]) -> bytes:
    """Returns a TIFF, or an EXIF block, with no entries in its first directory but these tags and the orientation."""
    order, kept = "<" if content.startswith(b"I") else ">", []
    try:
        start = struct.unpack_from(f"{order}I", content, 4)[0]
        count = struct.unpack_from(f"{order}H", content, start)[0]
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", content, at)
            if tag in tags or (tag == ExifTags.Base.Orientation and kind in (3, 4) and values == 1):  # one integer
                kept.append(content[at : at + 12])
    except struct.error:
        return content
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:start] + directory + content[start + len(directory) :]
