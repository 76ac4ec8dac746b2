"""MiniMind-V: a frozen vision tower, a projection, and the MiniMind decoder.

An image is a run of placeholder tokens in the text (196 with the published tower); their embeddings are replaced by the
tower's projected patch features.
"""

import math
from pathlib import Path

import torch

from model.model_minimind import MiniMindForCausalLM
from model.projectors import PROJECTORS, VisionProj
from model.vision_tower import TowerError, encode_images, load_vision_tower
from model.vlm_config import VLMConfig, fit_config_to_tower

__all__ = ["MiniMindVLM", "VLMConfig", "VisionProj", "find_image_starts"]


def find_image_starts(input_ids: torch.Tensor, image_token_id: int, image_tokens: int) -> torch.Tensor:
    """Returns the sample and first column of each image in (B, L) ids, (images, 2), in reading order.

    Every `image_tokens` placeholders of a run are an image; the rest of a run (a user's own `@`) is text.
    """
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    is_placeholder = input_ids == image_token_id
    last_other = torch.where(is_placeholder, -1, column).cummax(dim=1).values
    # The placeholder that completes an image is the image_tokens-th of its run, or twice that, and so on.
    ends = is_placeholder & ((column - last_other) % image_tokens == 0)
    starts = ends.nonzero()
    starts[:, 1] -= image_tokens - 1
    return starts


def count_images(pixel_values: torch.Tensor | None) -> int:
    """Returns how many images (..., 3, height, width) holds."""
    return 0 if pixel_values is None else math.prod(pixel_values.shape[:-3])


class ImageInputs:
    """Gives a decoder the tower, the projection and images in its text.

    Its state dict and its parameters are the projection's and the decoder's alone.

    Args:
        config: The decoder's shape, with VLMConfig's settings of images.
        vision_model_path: The tower's folder; None builds the model without one (it then takes no pictures).

    Raises:
        TowerError: If the tower is missing or cannot be read.
    """

    def __init__(self, config, vision_model_path: str | Path | None = None):
        tower = None if vision_model_path is None else load_vision_tower(vision_model_path)
        if tower is not None:
            config = fit_config_to_tower(config, tower.settings)
        super().__init__(config)
        projector = PROJECTORS[config.projector]
        self.vision_proj = projector(config.vision_hidden_size, config.hidden_size, config.pixel_shuffle)
        # Not a registered submodule: it is in no weight file and no optimizer, and `train()` does not reach it.
        object.__setattr__(self, "vision_encoder", tower)
        self.post_init()

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        if self.vision_encoder is not None:
            self.vision_encoder._apply(fn, *args, **kwargs)
        return self

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the tower's features (images, patches, width) of (..., 3, size, size): see `vision_tower`.

        Raises:
            TowerError: If the model was built without a tower.
        """
        if self.vision_encoder is None:
            raise TowerError("pictures were given, but this model was built without a vision tower (vision_model_path)")
        return encode_images(self.vision_encoder, pixel_values.flatten(0, -4))

    def splice_images(self, inputs_embeds, image_features, image_starts) -> torch.Tensor:
        """Writes projected features (N, patches, width) over the placeholders of (B, L, D) that begin at (N, 2)."""
        # The features may be in another precision than the rest: the tower's own, or that of a file of features.
        projected = self.vision_proj(image_features.to(inputs_embeds.dtype))
        first = image_starts[:, 0] * inputs_embeds.shape[1] + image_starts[:, 1]
        positions = first[:, None] + torch.arange(self.config.image_tokens, device=first.device)
        flat = inputs_embeds.flatten(0, 1)
        flat = flat.index_copy(0, positions.flatten(), projected.flatten(0, 1).to(flat.dtype))
        return flat.view_as(inputs_embeds)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_starts: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache=None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        image_features: torch.Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ):
        """Runs text and images through the model; see `MiniMindForCausalLM.forward` for the other arguments.

        (`generate` passes only what this signature names, so the arguments that it needs are repeated here.)

        Args:
            input_ids: (B, L); each image is a run of `config.image_tokens` placeholders.
            pixel_values: (B, images, 3, size, size), or (all images, 3, size, size) in reading order; uint8 as decoded,
                or float as already normalised.
            image_starts: (all images, 2) sample and column of each image's first placeholder; searched for in input_ids
                if not given, which syncs a GPU.
            image_features: (all images, patches, vision_hidden_size) of `encode_images`, instead of pixel_values; needs
                image_starts.

        Raises:
            ValueError: If the placeholders of a sample do not match its images.
        """
        if inputs_embeds is None:
            if image_features is None:
                image_starts = self.match_images(input_ids, pixel_values, image_starts)
                image_features = self.encode_images(pixel_values) if count_images(pixel_values) else None
            inputs_embeds = self.embed(input_ids)
            if image_features is not None:  # even of zero images: every batch then reaches the projection
                inputs_embeds = self.splice_images(inputs_embeds, image_features, image_starts)
        text = input_ids, attention_mask, position_ids, past_key_values if cache is None else cache
        return super().forward(*text, inputs_embeds, labels, logits_to_keep=logits_to_keep, **kwargs)

    def match_images(self, input_ids, pixel_values, image_starts):
        """Returns the images' starts, searched for if not given; raises ValueError if there are more or fewer images.

        Given starts may be on a GPU, so only their number is compared, which needs no sync.
        """
        given, per_sample = count_images(pixel_values), pixel_values is not None and pixel_values.dim() == 5
        if image_starts is not None and len(image_starts) == given:
            return image_starts
        if image_starts is None:
            image_starts = find_image_starts(input_ids, self.config.image_token_id, self.config.image_tokens)
        runs = torch.bincount(image_starts[:, 0], minlength=len(input_ids)).tolist()
        expected = [pixel_values.shape[1]] * len(pixel_values) if per_sample else runs
        if runs == expected and sum(runs) == given:
            return image_starts
        counts = ", ".join(f"sample {sample}: {run}" for sample, run in enumerate(runs))
        each = f", {pixel_values.shape[1]} in each of {len(pixel_values)} samples" if per_sample else ""
        raise ValueError(
            f"{given} image(s) were given{each}, but there are placeholders for {sum(runs)} ({counts}), "
            f"{self.config.image_tokens} in a row each: was a text cut off?"
        )

    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if kwargs.get("use_cache", True) and not is_first_iteration:
            # The images are in the key/value cache; a generated placeholder is text.
            inputs |= {"pixel_values": None, "image_starts": input_ids.new_zeros(0, 2)}
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, **kwargs):
        if expand_size > 1:  # transformers would repeat pixel_values and image_starts as if they had a row per sample
            raise ValueError("num_beams and num_return_sequences must be 1: repeat the prompt with its images instead")
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)


class MiniMindVLM(ImageInputs, MiniMindForCausalLM):
    """The vision-language model around the MiniMind decoder."""

    config_class = VLMConfig

    def __init__(self, config: VLMConfig | None = None, vision_model_path: str | Path | None = None):
        super().__init__(config or VLMConfig(), vision_model_path)
