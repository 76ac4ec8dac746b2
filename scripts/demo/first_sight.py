"""Draw the picture at the top of the README: a scene, a model's answer, and where each word of it looked.

python scripts/demo/first_sight.py --weight sft_vlm
"""

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.errors import run_script
from common.files import write_atomically
from common.paths import ROOT, display_path
from dataset.scenes.draw import JPEG_QUALITY, draw, heldout_scenes
from dataset.scenes.language import ENGLISH
from trainer.answering.assistant import Assistant
from trainer.answering.loaded_model import add_model_flags, find_model
from trainer.report.page import mask_of

WIDTH, EDGE, SCENE, THUMB, GAP = 1200, 24, 240, 112, 12  # pixels
WORDS = (WIDTH - 3 * EDGE - SCENE + GAP) // (THUMB + GAP)  # the strongest maps, as many as there is room for
TOKENS = 64
INK, QUIET, PAPER = "#1e293b", "#64748b", "#ffffff"


def layout(scene: Image.Image, question: str, answer: str, looks: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Returns the picture; `looks` are the words to show with their maps."""
    sheet = Image.new("RGB", (WIDTH, SCENE + 2 * EDGE), PAPER)
    pen, left = ImageDraw.Draw(sheet), SCENE + 2 * EDGE
    sheet.paste(scene.resize((SCENE, SCENE), Image.Resampling.LANCZOS), (EDGE, EDGE))
    pen.text((left, EDGE), question, QUIET, ImageFont.load_default(20))
    room = sheet.width - left - EDGE
    size = next(size for size in range(22, 0, -1) if pen.textlength(answer, ImageFont.load_default(size)) <= room)
    pen.text((left, EDGE + 34), answer, INK, ImageFont.load_default(size))
    for number, (word, of_word) in enumerate(looks):
        x, y = left + number * (THUMB + GAP), 108
        mask = mask_of([of_word]).resize((THUMB, THUMB), Image.Resampling.NEAREST)
        thumb = scene.resize((THUMB, THUMB)).convert("RGBA")
        sheet.paste(Image.alpha_composite(thumb, mask.convert("RGBA")).convert("RGB"), (x, y))
        pen.text((x + THUMB / 2, y + THUMB + 6), word.strip(), INK, ImageFont.load_default(18), anchor="ma")
    return sheet


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument_group("the picture").add_argument
    add("--scene", type=int, default=3, choices=range(200), metavar="N", help="which held-out scene, from 0 to 199")
    add("--question", default=ENGLISH.requests[0], help="in English: the built-in font has no other letters")
    default = ROOT / "scripts" / "first_sight.png"
    add("--out", type=file_path, default=default, help=f"the PNG to write (default: {display_path(default)})")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    assistant = Assistant(find_model(args), "cpu")
    scene = draw(heldout_scenes()[args.scene])
    file = io.BytesIO()
    scene.save(file, "jpeg", quality=JPEG_QUALITY)
    picture = assistant.load_picture(file.getvalue())
    conversation = [assistant.turn(args.question, images=1)]
    ids = assistant.answer(conversation, [picture], TOKENS)
    answer = assistant.tokenizer.decode(ids, skip_special_tokens=True)
    looks = [(word, maps[0].numpy()) for word, maps in assistant.look(conversation, [picture], ids)]
    least = sorted((of_word.max() for _, of_word in looks), reverse=True)[:WORDS][-1]
    sheet = layout(scene, args.question, answer, [(word, of_word) for word, of_word in looks if of_word.max() >= least])
    write_atomically(args.out.absolute(), lambda file: sheet.save(file, "png", optimize=True))
    print(f"{answer}\nwrote {display_path(args.out.absolute())}")


if __name__ == "__main__":
    run_script(main)
