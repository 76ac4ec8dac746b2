"""Makes a row of any known form one of this project: its conversation, and its pictures as files of a folder."""

import base64
import binascii
import hashlib
import io
import os
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from dataset import foreign, forms
from dataset.conversation import IMAGE_TAG, TOOL_CALLS, RowError, check_images, parse_picture_names
from dataset.formats import why_missing
from dataset.pictures import (
    CLIP_FORMAT,
    PictureError,
    decoding,
    is_blank,
    open_picture,
    resized_to,
    to_rgb,
    turn_of,
    upright,
)

IMAGE_FOLDERS = ("images", "Images", "image", "pictures", "photos")  # looked into beside a source
ENDINGS = {"JPEG": ".jpg", "PNG": ".png"}
QUALITY = 95


def make_row(row: dict | RowError, images_path: Path, question: str | None, size: int, folder: Path) -> dict | RowError:
    """Makes a row of this project, and writes each distinct picture once, under the hash of its content, to `folder`.

    Several threads may call it at once: they write the same content under the same name. `question` is asked where
    there is only a caption or a label (None: the form's own). Pictures get a shorter side of at most `size` pixels.
    Returns {"image": names in `folder`, "conversations"}; a RowError if the row cannot be learned from.
    """
    if isinstance(row, RowError):
        return row
    names, contents = [], {}
    try:
        turns, sources = conversation_of(row, question, images_path)
        for source in sources:
            name = source if isinstance(source, str) else "in the row"
            with decoding(name):
                content = (images_path / source).read_bytes() if isinstance(source, str) else source
            digest = hashlib.blake2b(content, digest_size=10).hexdigest()
            written = (f"{digest}{ending}" for ending in ENDINGS.values() if (folder / f"{digest}{ending}").is_file())
            file = next(written, None)
            if file is None:
                kind, content = picture_file(content, name, size)
                file = f"{digest}{ENDINGS[kind]}"
                contents[file] = content
            names.append(file)
    except PictureError as error:
        return RowError(f"broken picture: {error}")
    except RowError as error:
        return error
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    return {"image": names, "conversations": turns}


def picture_file(content: bytes, name: str, size: int) -> tuple[str, bytes]:
    """Returns the kind (JPEG or PNG) and content of a picture's file as training is to read it.

    A picture whose shorter side is longer than `size` becomes a JPEG of that size. Others lose nothing: an upright RGB
    JPEG or PNG stays as it is, anything else becomes an RGB PNG. Raises PictureError if it cannot be decoded.
    """
    with open_picture(content, name) as image:
        kind, is_small = image.format, min(image.size) <= size
        is_plain = image.mode == "RGB" and image.info.get("transparency") is None and kind in ENDINGS
        picture = to_rgb(upright(image, size))  # decodes all of it, so that a broken one is found now
        dimensions = resized_to(CLIP_FORMAT.size if is_small else size, *picture.size)
        if is_small and is_plain and turn_of(image) is None:
            return kind, content
        kind, file = "PNG" if is_small else "JPEG", io.BytesIO()
        picture = picture if is_small else picture.resize(dimensions, Image.Resampling.BICUBIC)
        picture.info.clear()
        picture.save(file, kind, quality=QUALITY)
        return kind, file.getvalue()


def conversation_of(row: dict, question: str | None, images_path: Path) -> tuple[list[dict], list[str | bytes]]:
    """Returns a row's turns, with an `<image>` for each picture, and its pictures: names or files' bytes.

    Raises RowError if it cannot be learned from, or a picture is missing.
    """
    named, form = forms.field(row, forms.PICTURE_FIELDS), forms.form_of_row(row)
    if named and form != forms.NUMBERED:
        row = row | {named: as_pictures(row[named], images_path)}
    if question and form in forms.QUESTIONS:
        row = row | {"question": question}
    turns, pictures = forms.read_row(row)
    if any("tool" in turn for turn in turns):
        raise RowError(TOOL_CALLS)
    pictures = as_pictures(pictures, images_path)
    has_tag = any(IMAGE_TAG in turn["content"] for turn in turns)
    if len(pictures) == 1 and not has_tag and isinstance(pictures[0], bytes) and is_blank(pictures[0]):
        return turns, []
    check_images(forms.images_first(turns, pictures), len(pictures))
    for name in (picture for picture in pictures if isinstance(picture, str)):
        parse_picture_names([name])
        if reason := why_missing(images_path, name):
            raise RowError(reason)
    return turns, pictures


def as_pictures(value, images_path: Path) -> list[str | bytes]:
    """Returns the names or files' bytes of the pictures that a field holds: one, several with commas, or a list."""
    if isinstance(value, str) and not value.startswith("data:") and found(value, images_path) is None:
        value = parse_picture_names(value)
    pictures = []
    for picture in value if isinstance(value, list) else [value]:
        if picture in (None, ""):
            continue
        if isinstance(picture, dict):  # as `datasets` writes it
            picture = picture.get("bytes") or picture.get("path")
        if not isinstance(picture, (bytes, str)) or picture == "":
            raise RowError("the picture is neither a name nor a file's bytes")
        if isinstance(picture, str) and picture.startswith(("http:", "https:")):
            raise RowError("a picture on the web is not fetched: download it, and name its file")
        if isinstance(picture, str) and (picture.startswith("data:") or foreign.is_base64(picture)):
            try:
                picture = base64.b64decode("".join(picture.rpartition(",")[2].split()), validate=True)
            except binascii.Error as error:
                raise RowError(f"a data: URL that is no base64: {error}") from error
        elif isinstance(picture, str):
            path = unquote(picture.removeprefix("file://")) if picture.startswith("file:") else picture
            picture = found(path, images_path) or path
        pictures.append(picture)
    return pictures


def found(name: str, images_path: Path) -> str | None:
    """Returns where a picture lies in the folder: as named, also with backslashes, or in its images/; None: nowhere."""
    slashed = name.replace("\\", "/")
    places = (name, slashed, *(f"{folder}/{slashed}" for folder in IMAGE_FOLDERS))
    return next((place for place in places if os.path.isfile(images_path / place)), None)
