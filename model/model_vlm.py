"""MiniMind-V: a frozen CLIP vision tower, one linear layer, and the MiniMind decoder.

An image is 196 placeholder tokens in the text; their embeddings are replaced by the tower's 196 projected patches.
"""

import json
import math
import pickle
import zipfile
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.initialization import no_init_weights
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from common.errors import UsageError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

TOKENS_PER_IMAGE = 196
IMAGE_SIZE = 224


class TowerError(UsageError):
    """The vision tower is missing or cannot be read."""


class VLMConfig(MiniMindConfig):
    """The decoder's shape (see `MiniMindConfig`) and how pictures enter it.

    Args:
        image_token_id: The placeholder's id, `@` in the published tokenizer.
        vision_hidden_size: Width of the tower's features; read from the tower where there is one.
    """

    model_type = "minimind-v"

    def __init__(self, image_token_id: int = 34, vision_hidden_size: int = 768, **kwargs):
        self.image_token_id = image_token_id
        self.vision_hidden_size = vision_hidden_size
        super().__init__(**kwargs)


class VisionProj(nn.Module):
    """One linear layer from the tower's width to the decoder's: (..., ve_hidden_size) to (..., hidden_size)."""

    def __init__(self, ve_hidden_size: int = 768, hidden_size: int = 512):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(ve_hidden_size, hidden_size))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.vision_proj(image_features)


# What damaged files were seen to raise on their way through transformers.
DAMAGED_FILE_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)


def read_vision_half(path: Path) -> dict[str, torch.Tensor]:
    """The vision tensors of a checkpoint's folder, by their names without `vision_model.`; the text half is not read."""
    if (path / "model.safetensors").is_file():
        with safe_open(path / "model.safetensors", framework="pt") as checkpoint:
            tensors = {name: checkpoint.get_tensor(name) for name in of_vision_half(checkpoint.keys())}
    else:
        file = path / "pytorch_model.bin"
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        tensors = {name: checkpoint[name] for name in of_vision_half(checkpoint.keys())}
    return {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}


def of_vision_half(names) -> list[str]:
    """What of a checkpoint, of the tower alone or of whole CLIP, is a weight of the tower (position_ids only counts)."""
    names = [name for name in names if not name.endswith("position_ids")]
    return [name for name in names if name.startswith("vision_model.")] or names


def read_pixel_statistics(path: Path) -> dict[str, torch.Tensor]:
    """Mean and standard deviation (1, 3, 1, 1) from preprocessor_config.json, or CLIP's where there is no such file."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    published = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    statistics = {name: torch.tensor(settings.get(name, values)) for name, values in published.items()}
    return {name: values.float().view(1, 3, 1, 1) for name, values in statistics.items()}


def load_vision_tower(path: str | Path) -> CLIPVisionModel:
    """Reads the vision half of a CLIP checkpoint (its text half stays on disk), frozen, in eval mode.

    Args:
        path: A folder with config.json and model.safetensors or pytorch_model.bin, of the vision tower or whole CLIP.

    Returns:
        The tower, float32, with the `pixel_mean` and `pixel_std` (1, 3, 1, 1) its pictures are normalised by.

    Raises:
        TowerError: If the folder or a file in it is missing, unreadable, or not a tower of 196 patches.
    """
    path = Path(path)
    remedy = (
        "It must be a folder with config.json and model.safetensors (or pytorch_model.bin) of a CLIP ViT with patch 16; "
        "`python scripts/download.py tower` fetches the published one, --vision_model_path names another."
    )
    if not (path / "config.json").is_file():
        raise TowerError(f"no vision tower in {path}: {path / 'config.json'} is missing. {remedy}")
    if not any((path / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        raise TowerError(f"no vision tower in {path}: {path / 'model.safetensors'} is missing. {remedy}")
    try:
        config = CLIPVisionConfig.from_pretrained(path, local_files_only=True)
        patches = (config.image_size // config.patch_size) ** 2
        # On the CPU and filled here also where transformers lays out the model around it without memory
        # (`MiniMindVLM.from_pretrained`).
        with torch.device("cpu"), no_init_weights():
            tower = CLIPVisionModel(config).float()
            tensors = read_vision_half(path)
            statistics = read_pixel_statistics(path / "preprocessor_config.json")
        wanted = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
        wrong = wanted.keys() ^ tensors.keys()
        wrong |= {name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape}
    except DAMAGED_FILE_ERRORS as error:
        # The first sentence: what follows it is advice to programmers, some of it unsafe (to load any pickle).
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0].rstrip(": .")
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
            reason = "it holds something else than tensors, which could run code when loaded"
        raise TowerError(f"the vision tower in {path} cannot be read ({reason}). {remedy}") from error
    if patches != TOKENS_PER_IMAGE or config.image_size != IMAGE_SIZE:
        raise TowerError(
            f"the vision tower in {path} makes {patches} patches of a {config.image_size} px picture; MiniMind-V takes "
            f"{TOKENS_PER_IMAGE} of {IMAGE_SIZE} px. {remedy}"
        )
    if wrong:
        raise TowerError(
            f"the vision tower in {path} does not fit its config.json: {len(wrong)} tensor(s) are missing, too many or of "
            f"another shape, the first is {min(wrong)}. {remedy}"
        )
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])
    tower.register_buffer("pixel_mean", statistics["image_mean"], persistent=False)
    tower.register_buffer("pixel_std", statistics["image_std"], persistent=False)
    return tower.requires_grad_(False).eval()


def find_image_starts(input_ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Where images begin: every 196th placeholder of a run, from the run's first.

    Args:
        input_ids: (B, L). What is left of a run (a user's own `@`) is text.

    Returns:
        (images, 2) sample and first column of each image, in reading order.
    """
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    is_placeholder = input_ids == image_token_id
    last_other = torch.where(is_placeholder, -1, column).cummax(dim=1).values
    # Counted within its run, the 1st, 197th, ... placeholder begins an image if 195 more follow it.
    ends = is_placeholder & ((column - last_other) % TOKENS_PER_IMAGE == 0)
    starts = ends.nonzero()
    starts[:, 1] -= TOKENS_PER_IMAGE - 1
    return starts


def count_images(pixel_values: torch.Tensor | None) -> int:
    """How many images (..., 3, height, width) holds."""
    return 0 if pixel_values is None else math.prod(pixel_values.shape[:-3])


class MiniMindVLM(MiniMindForCausalLM):
    """The vision-language model. Its state dict and its parameters are the projection's and the decoder's alone.

    Args:
        config: The decoder's shape.
        vision_model_path: The tower's folder; None builds the model without one (it then takes no pictures).

    Raises:
        TowerError: If the tower is missing or cannot be read.
    """

    config_class = VLMConfig

    def __init__(self, config: VLMConfig | None = None, vision_model_path: str | Path | None = None):
        config = config or VLMConfig()
        tower = None if vision_model_path is None else load_vision_tower(vision_model_path)
        if tower is not None:
            config.vision_hidden_size = tower.config.hidden_size
        super().__init__(config)
        self.vision_proj = VisionProj(config.vision_hidden_size, config.hidden_size)
        # Not a registered submodule: so it is in no weight file, no optimizer, and `train()` does not reach it.
        object.__setattr__(self, "vision_encoder", tower)
        self.post_init()

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)
        if self.vision_encoder is not None:
            self.vision_encoder._apply(fn, *args, **kwargs)
        return self

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tower's features: its last hidden state before the final layer norm, without the class token.

        Args:
            pixel_values: (images, 3, 224, 224), uint8 as decoded or float as already normalised.

        Returns:
            (images, 196, vision_hidden_size).

        Raises:
            TowerError: If the model was built without a tower.
        """
        if self.vision_encoder is None:
            raise TowerError("pictures were given, but this model was built without a vision tower (vision_model_path)")
        tower = self.vision_encoder
        if len(pixel_values) == 0:
            shape = 0, TOKENS_PER_IMAGE, tower.config.hidden_size
            return torch.empty(shape, dtype=tower.dtype, device=pixel_values.device)
        if pixel_values.dtype == torch.uint8:
            pixel_values = (pixel_values.float() / 255 - tower.pixel_mean.float()) / tower.pixel_std.float()
        return tower(pixel_values=pixel_values.to(tower.dtype)).last_hidden_state[:, 1:]

    def splice_images(self, inputs_embeds, image_features, image_starts) -> torch.Tensor:
        """Writes the projected (N, 196, vision width) over the placeholders of (B, L, D) that begin at (N, 2)."""
        # The features may be in another precision than the rest: the tower's own, or a cache's.
        projected = self.vision_proj(image_features.to(inputs_embeds.dtype))
        first = image_starts[:, 0] * inputs_embeds.shape[1] + image_starts[:, 1]
        positions = first[:, None] + torch.arange(TOKENS_PER_IMAGE, device=first.device)
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
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        image_features: torch.Tensor | None = None,
        **kwargs,
    ):
        """One pass over text and pictures; see `MiniMindForCausalLM.forward` for the rest of the arguments.

        `generate` hands over only what this signature names, so those that it needs stand here too.

        Args:
            input_ids: (B, L); each image is a run of 196 placeholders.
            pixel_values: (B, images, 3, 224, 224), or (all images, 3, 224, 224) in reading order; uint8 as decoded, or
                float as already normalised.
            image_starts: (all images, 2) sample and column of each image's first placeholder, as the collate function
                gives it. Without it they are looked for in input_ids, which on a GPU waits for the device.
            image_features: (all images, 196, vision_hidden_size), what `encode_images` made of the pictures before; with
                it come image_starts, and no pixel_values.

        Raises:
            ValueError: If the placeholders of a sample do not match its pictures.
        """
        if inputs_embeds is None:
            if image_features is None:
                image_features, image_starts = self.look_at(input_ids, pixel_values, image_starts)
            inputs_embeds = self.embed(input_ids)
            if image_features is not None and len(image_features):
                inputs_embeds = self.splice_images(inputs_embeds, image_features, image_starts)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def look_at(self, input_ids, pixel_values, image_starts):
        """The pictures' features (None where there are none) and where they belong, after checking that they match."""
        if image_starts is None and (pixel_values is not None or input_ids.shape[1] >= TOKENS_PER_IMAGE):
            image_starts = find_image_starts(input_ids, self.config.image_token_id)
            self.check_images(input_ids, pixel_values, image_starts)
        elif image_starts is not None and len(image_starts) != count_images(pixel_values):
            self.check_images(input_ids, pixel_values, image_starts)
        if count_images(pixel_values) == 0:
            return None, image_starts
        pixel_values = pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
        return self.encode_images(pixel_values), image_starts

    def check_images(self, input_ids, pixel_values, image_starts):
        """Raises ValueError, naming the sample, where placeholders and pictures do not match."""
        samples, given = input_ids.shape[0], count_images(pixel_values)
        runs = torch.bincount(image_starts[:, 0], minlength=samples).tolist()
        per_sample = pixel_values is not None and pixel_values.dim() == 5
        if per_sample and pixel_values.shape[0] != samples:
            raise ValueError(f"pixel_values holds {pixel_values.shape[0]} samples, input_ids {samples}")
        expected = [pixel_values.shape[1]] * samples if per_sample else None
        if runs == expected or (not per_sample and given == sum(runs)):
            return
        placeholders = (input_ids == self.config.image_token_id).sum(dim=1).tolist()
        leftovers = [count - run * TOKENS_PER_IMAGE for count, run in zip(placeholders, runs, strict=True)]
        if per_sample:
            sample = next(index for index, run in enumerate(runs) if run != expected[index])
            problem = f"sample {sample} has placeholders for {runs[sample]} image(s), but {expected[sample]} were given"
        else:
            # Pictures joined into one tensor do not say whose they are: most likely the longest remainder was cut off.
            sample = leftovers.index(max(leftovers))
            counts = ", ".join(f"sample {index}: {run}" for index, run in enumerate(runs))
            problem = f"{given} image(s) were given, but there are placeholders for {sum(runs)} ({counts})"
        if leftovers[sample]:
            problem += (
                f"; sample {sample} has {leftovers[sample]} placeholder(s) that are no whole image: was it cut off?"
            )
        raise ValueError(problem)

    def prepare_inputs_for_generation(self, input_ids, *args, is_first_iteration=False, **kwargs):
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if kwargs.get("use_cache", True) and not is_first_iteration:
            # The pictures are in the cache.
            inputs["pixel_values"] = inputs["image_starts"] = None
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        pixel_values, starts = kwargs.pop("pixel_values", None), kwargs.pop("image_starts", None)
        if expand_size > 1 and input_ids is not None:
            if starts is None:
                starts = find_image_starts(input_ids, self.config.image_token_id)
            # Here a sample still has the number that the caller knows it by.
            self.check_images(input_ids, pixel_values, starts)
        if expand_size > 1 and pixel_values is not None:
            if pixel_values.dim() == 5:
                pixel_values = pixel_values.flatten(0, 1)
            # Copy j of sample s is row s * expand_size + j: pictures follow their row, not each other.
            copies = torch.arange(expand_size, device=starts.device)
            rows = (starts[:, :1] * expand_size + copies).flatten()
            rows, order = rows.sort(stable=True)
            starts = torch.stack((rows, starts[:, 1].repeat_interleave(expand_size)[order]), dim=1)
            pixel_values = pixel_values.repeat_interleave(expand_size, dim=0)[order]
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | {"pixel_values": pixel_values, "image_starts": starts}
