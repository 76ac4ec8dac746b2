"""Draw the picture at the top of the README: a scene, a model's answer, and where each word of it looked.

python tests/checks/first_sight.py --weight sft_vlm
"""

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.cli import ArgumentParser
from common.errors import run_script
from common.files import write_atomically
from common.paths import ROOT, display_path
from dataset.scenes.draw import JPEG_QUALITY, draw, heldout_scenes
from dataset.scenes.language import ENGLISH
from trainer.answering.assistant import Assistant, add_model_flags, find_model, mask_of

WIDTH, EDGE, SCENE, THUMB, GAP = 1200, 24, 240, 112, 12  # pixels
WORDS = (WIDTH - 3 * EDGE - SCENE + GAP) // (THUMB + GAP)  # the strongest maps, as many as there is room for
OUT = ROOT / "scripts" / "first_sight.png"
QUESTION = ENGLISH.requests[0]  # Pillow's own font has no Chinese


def layout(scene: Image.Image, answer: str, words: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Returns the picture of a scene, its description, and words of it with their maps."""
    sheet = Image.new("RGB", (WIDTH, SCENE + 2 * EDGE), "#ffffff")
    pen, left = ImageDraw.Draw(sheet), SCENE + 2 * EDGE
    sheet.paste(scene.resize((SCENE, SCENE), Image.Resampling.LANCZOS), (EDGE, EDGE))
    pen.text((left, EDGE), QUESTION, "#64748b", ImageFont.load_default(20))
    fonts = (ImageFont.load_default(size) for size in range(22, 0, -1))
    font = next(font for font in fonts if pen.textlength(answer, font) <= WIDTH - left - EDGE)
    pen.text((left, EDGE + 34), answer, "#1e293b", font)
    for x, (word, of_word) in zip(range(left, WIDTH, THUMB + GAP), words, strict=False):
        mask = mask_of(of_word).resize((THUMB, THUMB), Image.Resampling.NEAREST).convert("RGBA")
        thumb = scene.resize((THUMB, THUMB)).convert("RGBA")
        sheet.paste(Image.alpha_composite(thumb, mask).convert("RGB"), (x, 108))
        pen.text((x + THUMB / 2, 108 + THUMB + 6), word.strip(), "#1e293b", ImageFont.load_default(18), anchor="ma")
    return sheet


def main():
    parser = ArgumentParser(description=__doc__)
    add_model_flags(parser)
    assistant = Assistant(find_model(parser.parse_args()), "cpu")
    scene, file = draw(heldout_scenes()[3]), io.BytesIO()
    scene.save(file, "jpeg", quality=JPEG_QUALITY)
    question, picture = [assistant.turn(QUESTION, images=1)], [assistant.load_picture(file.getvalue())]
    [ids] = assistant.answers([question], [picture], max_new_tokens=64)
    answer = assistant.tokenizer.decode(ids, skip_special_tokens=True)
    words = [(word, maps[0].numpy()) for word, maps in assistant.look(question, picture, ids)]
    least = sorted((of_word.max() for _, of_word in words), reverse=True)[:WORDS][-1]
    sheet = layout(scene, answer, [(word, of_word) for word, of_word in words if of_word.max() >= least])
    write_atomically(OUT, lambda file: sheet.save(file, "png", optimize=True))
    print(f"{answer}\nwrote {display_path(OUT)}")


if __name__ == "__main__":
    run_script(main)
