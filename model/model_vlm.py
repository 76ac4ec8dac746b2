"""MiniMind-V: a frozen vision tower, a projection, and the MiniMind decoder.

An image is a run of placeholder tokens in the text; their embeddings are replaced by the tower's projected features.
"""

import copy
import math
from pathlib import Path

import torch
from transformers import AutoConfig

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.projectors import PROJECTORS
from model.vision_tower import TowerError, TowerSettings, encode_images, load_vision_tower

# Settings that minimind-3v's tensors do not show. Its per-head norms, which no older model has, identify it.
CONFIG_3V = {
    "rms_norm_eps": 1e-6,
    "yarn_attention_factor": 1.0,
    "num_experts_per_tok": 1,
    "aux_loss_alpha": 5e-4,
    "balance_over_batch": True,
    "image_token_id": 12,
    "vision_patches": 64,
    "projector": "norm_mlp",
}
# Image positions in a prompt; the first is the default.
PROMPT_FORMS = ("{prompt}\n<image>", "{prompt}<image>", "<image>{prompt}", "<image>\n{prompt}")
# Settings that another language model's configuration has too, with what is taken where it has none.
SHARED_SETTINGS = {"hidden_size": None, "num_hidden_layers": None, "vocab_size": None, "max_position_embeddings": 2048}


class VLMConfig(MiniMindConfig):
    """The decoder's shape (see `MiniMindConfig`) and how images enter it; raises ValueError if these do not fit."""

    model_type = "minimind-v"
    image_token_id: int = 34  # the placeholder: `@` in the published tokenizer; 12 in minimind-3v's
    vision_hidden_size: int = 768  # width of the tower's features; taken from the tower's own files where one is loaded
    vision_patches: int = 196
    projector: str = "linear"  # a name of PROJECTORS: "linear" as published, "norm_mlp" in minimind-3v
    pixel_shuffle: int = 1  # N x N neighbouring patches become one token, N^2 times as wide
    llm: dict | None = None  # another language model's configuration in transformers, which gives the decoder's shape

    def __init__(self, **settings):
        llm = settings.get("llm")
        if llm:
            its = AutoConfig.for_model(**llm)  # which knows its own names for these
            shape = {name: getattr(its, name, default) for name, default in SHARED_SETTINGS.items()}
            settings |= shape | {"num_attention_heads": 1, "num_key_value_heads": 1}
        super().__init__(**settings)
        if llm:
            self.head_dim = getattr(its, "head_dim", None) or self.hidden_size // getattr(its, "num_attention_heads", 1)
        if self.projector not in PROJECTORS:
            known = ", ".join(PROJECTORS)
            raise ValueError(f"no projector {self.projector!r} among {known}: --import names the file that adds one")
        _ = self.image_tokens  # raises where projection and patches do not fit

    @property
    def image_tokens(self) -> int:
        """Placeholders per image in the text."""
        return PROJECTORS[self.projector].tokens(self.vision_patches, self.pixel_shuffle)


def config_fields(config: VLMConfig) -> dict:
    """Returns everything that makes this configuration: `VLMConfig(**config_fields(config))` is the same."""
    return {name: getattr(config, name) for name in VLMConfig.defaults() if name != "llm" or config.llm}


def fit_config_to_tower(config: VLMConfig, tower: TowerSettings, from_tensors: bool = False) -> VLMConfig:
    """Returns the configuration with the tower's width and number of patches.

    With `from_tensors`, it was read from a weight file's tensors: vision_hidden_size is then the projection's input
    width (N^2 times the tower's means a pixel shuffle of N before it), and a norm_mlp is minimind-3v's, for a tower
    with 64 patches. Raises ValueError if the patches do not fit the projection.
    """
    config, factor = copy.deepcopy(config), math.isqrt(config.vision_hidden_size // tower.hidden_size)
    if from_tensors and config.projector == "norm_mlp" and tower.patches != config.vision_patches:
        raise ValueError(
            f"the projection is minimind-3v's, for the {config.vision_patches} patches of a SigLIP ViT-B/32 at 256 "
            f"pixels, and this tower has {tower.patches}: name that one with --vision_model_path"
        )
    takes_shuffle = from_tensors and PROJECTORS[config.projector].takes_pixel_shuffle
    if takes_shuffle and config.vision_hidden_size == tower.hidden_size * factor**2:
        config.pixel_shuffle = factor
    config.vision_hidden_size, config.vision_patches = tower.hidden_size, tower.patches
    _ = config.image_tokens  # raises where they do not fit
    return config


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


class ImageInputs:
    """Gives a decoder the tower, the projection and images in its text.

    Its state dict and its parameters are the projection's and the decoder's alone. Without `vision_model_path`, the
    tower's folder, the model takes no pictures. Raises TowerError if the tower is missing or cannot be read.
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
        """Returns the tower's features (images, patches, width) of (..., 3, size, size): see `vision_tower`."""
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
        """
        if inputs_embeds is None:
            if image_features is None:
                image_starts = self.match_images(input_ids, pixel_values, image_starts)
                image_features = self.encode_images(pixel_values) if len(image_starts) else None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if image_features is not None:  # even of zero images: every batch then reaches the projection
                inputs_embeds = self.splice_images(inputs_embeds, image_features, image_starts)
        text = input_ids, attention_mask, position_ids, past_key_values if cache is None else cache
        return super().forward(*text, inputs_embeds, labels, logits_to_keep=logits_to_keep, **kwargs)

    def match_images(self, input_ids, pixel_values, image_starts):
        """Returns the images' starts, searched for if not given; raises ValueError unless there are as many images."""
        given = 0 if pixel_values is None else math.prod(pixel_values.shape[:-3])
        if image_starts is not None and len(image_starts) == given:  # comparing more would sync a GPU
            return image_starts
        if image_starts is None:
            image_starts = find_image_starts(input_ids, self.config.image_token_id, self.config.image_tokens)
        runs = torch.bincount(image_starts[:, 0], minlength=len(input_ids)).tolist()
        per_sample = pixel_values is not None and pixel_values.dim() == 5
        expected = [pixel_values.shape[1]] * len(pixel_values) if per_sample else runs
        if runs == expected and sum(runs) == given:
            return image_starts
        counts = ", ".join(f"sample {sample}: {run}" for sample, run in enumerate(runs))
        each = f", {pixel_values.shape[1]} in each of {len(pixel_values)} samples" if per_sample else ""
        raise ValueError(
            f"{given} image(s) were given{each}, but there are placeholders for {sum(runs)} ({counts}), "
            f"{self.config.image_tokens} in a row each: was a text cut off?"
        )

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
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
