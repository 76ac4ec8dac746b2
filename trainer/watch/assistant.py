"""A trained model that answers questions about pictures, for the terminal and for the web page."""

from pathlib import Path

import torch

from dataset.chat import ChatEncoder
from dataset.pictures import PictureFormat, load_picture
from dataset.prompts import prompt_batch, with_images
from trainer.support.trained import Trained
from trainer.watch.answers import generate
from trainer.watch.looking import word_maps


class Assistant:
    """A model on a device, with its tokenizer and the form of its prompts."""

    def __init__(self, trained: Trained, device: torch.device | str):
        self.trained, self.tokenizer = trained, trained.tokenizer
        self.encoder = ChatEncoder(self.tokenizer, trained.config.image_tokens)
        self.picture_format = PictureFormat(**trained.tower.picture_settings)
        self.model = trained.load_model().to(device)

    def load_picture(self, path: Path) -> torch.Tensor:
        """Returns the picture as the tower takes it, uint8 (3, size, size); raises PictureError."""
        return load_picture(path, picture_format=self.picture_format)

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
    def answer(
        self,
        conversation: list[dict],
        pictures: list[torch.Tensor],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        **settings,
    ) -> torch.Tensor:
        """Returns the token ids of the next turn.

        Args:
            conversation, pictures: Turns, and the images of all their placeholders.
            temperature: 0 always takes the likeliest token.
            top_p: Draw from the likeliest tokens with this share.
            top_k: Draw from this many of the likeliest; 0: from all; None: as the weights' recipe does.
            settings: For transformers' `generate`: a streamer, stopping criteria.

        Raises:
            ValueError: If that is too long for the model.
        """
        self.check_length(conversation, max_new_tokens)
        if temperature > 0:
            top_k = self.trained.sampling["top_k"] if top_k is None else top_k
            settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        inputs = prompt_batch(self.encoder, [conversation], [pictures])
        return generate(self.model, inputs, max_new_tokens, **settings)[0]

    def look(self, conversation: list[dict], pictures: list[torch.Tensor], ids: torch.Tensor) -> list[tuple]:
        """Returns the words of an answer, each with its map over the pictures; see `trainer.watch.looking`."""
        return word_maps(self.model, self.tokenizer, prompt_batch(self.encoder, [conversation], [pictures]), ids)
