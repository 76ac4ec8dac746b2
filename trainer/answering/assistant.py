"""A trained model that answers questions about pictures, for the terminal and for the web page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.cli import number, temperature
from common.errors import UsageError
from common.files import not_a_file
from dataset.chat import encoder_for
from dataset.pictures import PictureError, PictureFormat, load_picture
from dataset.prompts import prompt_batch, with_images
from dataset.scenes.draw import draw, heldout_scenes
from model.answers import generate, quantize, word_maps
from model.model_vlm import MiniMindVLM
from trainer.answering.loaded_model import LoadedModel
from trainer.bundles import MINIMIND2, bundle_of

PRECISIONS = ("float32", "bfloat16", "int8")
DARKEST = 0.75  # opacity over a patch that does nothing for a word
BRIGHT = 1.0  # nats: a word whose peak is lower stays darker


def add_speed_flags(group):
    group.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    what = "int8: the matrices in a quarter of the memory, CPU only; bfloat16: for hardware that is fast at it"
    group.add_argument("--dtype", choices=PRECISIONS, default=PRECISIONS[0], help=what)
    what = "1: compile the step of one token; takes half a minute, worth it for long talks"
    group.add_argument("--compile", "--use_compile", type=int, choices=(0, 1), default=0, help=what)


def add_generation_flags(group, max_new_tokens: int):
    """Adds the flags of sampling, which default to the weights' recipe: see `sampling_of`."""
    add = group.add_argument
    add("--open_thinking", type=int, choices=(0, 1), default=0, help="1: think before the answer (minimind-3v)")
    add("--max_new_tokens", type=number(int, 1), default=max_new_tokens, help="longest answer in tokens")
    for name, kind, what in (
        ("temperature", temperature, "0: always the likeliest token"),
        ("top_p", number(float, 1e-3, 1), "sample from the likeliest tokens of this share"),
        ("top_k", number(int, 0), "sample from this many of the likeliest tokens; 0: from all"),
    ):
        default = MINIMIND2.sampling[name]
        add(f"--{name}", type=kind, help=f"{what} (default: {default}, or as the recipe of the weights says)")


def sampling_of(args: argparse.Namespace, loaded: LoadedModel) -> dict:
    """Returns the sampling settings: those of the flags, else of the weights' recipe."""
    usual = bundle_of(loaded.weights).sampling
    return usual | {name: getattr(args, name) for name in usual if getattr(args, name) is not None}


def draw_heldout(folder: Path, count: int) -> list[Path]:
    """Draws scenes of the built-in set that were never trained on; returns their files."""
    folder.mkdir(parents=True)
    paths = [folder / f"scene_{number}.jpg" for number in range(count)]
    for path, scene in zip(paths, heldout_scenes(), strict=False):
        draw(scene).save(path, quality=92)
    return paths


class Assistant:
    """A model on a device, with its tokenizer and the form of its prompts.

    Raises UsageError if `dtype` is not for that device, or the model cannot think before it answers.
    """

    def __init__(
        self, loaded: LoadedModel, device, dtype: str = "float32", compiles: bool = False, thinks: bool = False
    ):
        self.loaded, self.tokenizer, self.compiles = loaded, loaded.tokenizer, compiles
        self.encoder = encoder_for(self.tokenizer, loaded.config.image_tokens)
        self.encoder.open_thinking = thinks
        if thinks and not self.encoder.can_think:
            raise UsageError("--open_thinking: the prompt form of these weights has no think block")
        self.picture_format = PictureFormat(**loaded.tower.picture_settings)
        self.model = in_precision(loaded.load_model().to(device), dtype)

    def load_picture(self, source: Path | bytes) -> torch.Tensor:
        """Returns a picture's file as the tower takes it, uint8 (3, size, size); raises PictureError."""
        if isinstance(source, Path) and (reason := not_a_file(source)):
            raise PictureError(str(source), reason)
        return load_picture(source, picture_format=self.picture_format)

    def turn(self, question: str, images: int, before: Sequence[dict] = (), max_new_tokens: int = 1) -> dict:
        """Returns a user's turn, with its images where the model expects them.

        Raises UsageError if the question has `<image>` tags, but not one per image; or if the turns before, this one
        and the answer need more tokens than the model has positions.
        """
        try:
            turn = {"role": "user", "content": with_images(question, images, self.loaded.prompt_form)}
        except ValueError as error:
            raise UsageError(str(error)) from error
        length = len(self.encoder.encode([[*before, turn]], add_generation_prompt=True)[0].input_ids)
        most = self.model.config.max_position_embeddings
        if length + max_new_tokens > most:
            raise UsageError(
                f"{length:,} tokens and --max_new_tokens {max_new_tokens:,} are more than the model's {most:,} "
                "positions: ask less at once"
            )
        return turn

    @torch.inference_mode()
    def answers(
        self,
        conversations: list[list[dict]],
        pictures: list[list[torch.Tensor]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        **settings,
    ) -> list[torch.Tensor]:
        """Returns the token ids of each conversation's next turn, up to its end token; all in one batch.

        Temperature 0 takes the likeliest token, others draw from the likeliest: of the share `top_p`, and `top_k` of
        them (0: all). `settings` are for transformers' `generate`: a streamer, stopping criteria.
        """
        if temperature > 0:
            settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        inputs = prompt_batch(self.encoder, conversations, pictures)
        rows = generate(self.model, inputs, max_new_tokens, self.compiles, **settings)
        ends = (rows == self.model.config.eos_token_id).int()
        # A row that ended is padded until the longest has.
        lengths = torch.where(ends.any(dim=1), ends.argmax(dim=1) + 1, rows.shape[1])
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def answer(self, conversation: list[dict], pictures: list[torch.Tensor], *args, **settings) -> torch.Tensor:
        """Returns the token ids of one conversation's next turn; arguments as in `answers`."""
        return self.answers([conversation], [pictures], *args, **settings)[0]

    def look(self, conversation: list[dict], pictures: list[torch.Tensor], ids: torch.Tensor, *stops):
        """Returns the words of an answer, each with its map over the pictures; see `word_maps`."""
        inputs = prompt_batch(self.encoder, [conversation], [pictures])
        return word_maps(self.model, self.tokenizer, inputs, ids, *stops)


def mask_of(maps: np.ndarray) -> Image.Image:
    """Returns maps (H, W) of a word as a mask that darkens where it does not look, scaled by its own peak."""
    maps = np.nan_to_num(maps).clip(0)
    # A word that no patch makes more probable stays dark.
    shade = np.rint(255 * DARKEST * (1 - maps / max(maps.max(), BRIGHT))).astype(np.uint8)
    return Image.fromarray(np.dstack((np.zeros_like(shade), shade)), "LA")


def in_precision(model: MiniMindVLM, dtype: str) -> MiniMindVLM:
    """Returns the model in one of PRECISIONS; raises UsageError for int8 on another device than a CPU."""
    if dtype != "int8":
        return model.to(getattr(torch, dtype))
    if model.device.type != "cpu":
        raise UsageError(f"--dtype int8 is for the CPU, not for {model.device}: use bfloat16 there")
    quantize(model)
    return model
