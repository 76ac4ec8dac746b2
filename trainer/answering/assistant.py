"""A trained model that answers questions about pictures, for the terminal and for the web page."""

from pathlib import Path

import torch

from common.errors import UsageError
from common.files import not_a_file
from dataset.chat import ChatEncoder
from dataset.pictures import PictureError, PictureFormat, load_picture
from dataset.prompts import prompt_batch, with_images
from model.answers import generate
from model.int8 import quantize
from model.model_vlm import MiniMindVLM
from model.word_maps import word_maps
from trainer.answering.loaded_model import LoadedModel

PRECISIONS = ("float32", "bfloat16", "int8")


def add_speed_flags(group):
    """Adds the flags of how an assistant computes to an argument group."""
    group.add_argument("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    what = "int8: the decoder's matrices in a quarter of the memory, for a CPU; bfloat16: for what multiplies it fast"
    group.add_argument("--dtype", choices=PRECISIONS, default=PRECISIONS[0], help=what)
    what = "1: compile the step of one token, which takes half a minute and pays in a long talk (default: 0)"
    group.add_argument("--compile", type=int, choices=(0, 1), default=0, help=what)


def in_precision(model: MiniMindVLM, dtype: str) -> MiniMindVLM:
    """Returns the model in one of PRECISIONS; raises UsageError for int8 on another device than a CPU."""
    if dtype == "int8":
        if model.device.type != "cpu":
            raise UsageError(f"--dtype int8 is for the CPU, not for {model.device}: take bfloat16 there")
        quantize(model)
        return model
    return model.to(getattr(torch, dtype))


class Assistant:
    """A model on a device, with its tokenizer and the form of its prompts."""

    def __init__(
        self, trained: LoadedModel, device: torch.device | str, dtype: str = "float32", compiles: bool = False
    ):
        self.trained, self.tokenizer, self.compiles = trained, trained.tokenizer, compiles
        self.encoder = ChatEncoder(self.tokenizer, trained.config.image_tokens)
        self.picture_format = PictureFormat(**trained.tower.picture_settings)
        self.model = in_precision(trained.load_model().to(device), dtype)

    def load_picture(self, source: Path | bytes) -> torch.Tensor:
        """Returns a picture's file as the tower takes it, uint8 (3, size, size); raises PictureError."""
        if isinstance(source, Path) and (reason := not_a_file(source)):
            raise PictureError(str(source), reason)
        return load_picture(source, picture_format=self.picture_format)

    def turn(self, question: str, images: int) -> dict:
        """Returns a user's turn, with that many images where the model expects them."""
        return {"role": "user", "content": with_images(question, images, self.trained.prompt_form)}

    def check_length(self, conversation: list[dict], max_new_tokens: int):
        """Raises ValueError where the conversation and its answer have more tokens than the model has positions."""
        length = len(self.encoder.encode([conversation], add_generation_prompt=True)[0].input_ids)
        most = self.model.config.max_position_embeddings
        if length + max_new_tokens > most:
            raise ValueError(
                f"{length:,} tokens and --max_new_tokens {max_new_tokens:,} are more than the model's {most:,} "
                "positions: ask less at once"
            )

    @torch.inference_mode()
    def answers(
        self,
        conversations: list[list[dict]],
        pictures: list[list[torch.Tensor]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        **settings,
    ) -> list[torch.Tensor]:
        """Returns the token ids of each conversation's next turn, up to its end token.

        Args:
            conversations, pictures: Lists of turns, and for each the images of all its placeholders.
            temperature: 0 always takes the likeliest token.
            top_p: Draw from the likeliest tokens with this share.
            top_k: Draw from this many of the likeliest; 0: from all; None: as the weights' recipe does.
            settings: For transformers' `generate`: a streamer, stopping criteria.

        Raises:
            ValueError: If that is too long for the model.
        """
        for conversation in conversations:
            self.check_length(conversation, max_new_tokens)
        if temperature > 0:
            top_k = self.trained.sampling["top_k"] if top_k is None else top_k
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
