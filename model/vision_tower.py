"""The frozen vision tower: any ViT of the table in model/tower_files.py, an image to one feature per patch."""

import functools
from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from model.tower_files import (
    READING_ERRORS,
    TOWERS,
    TowerError,
    TowerSettings,
    read_tower_settings,
    read_tower_weights,
    unreadable,
    unusable,
)

__all__ = ["TowerError", "TowerSettings", "encode_images", "load_vision_tower", "read_tower_settings"]


def load_vision_tower(path: str | Path) -> torch.nn.Module:
    """Loads a frozen tower, in eval mode and float32.

    Args:
        path: A folder with config.json and model.safetensors or pytorch_model.bin, of a vision tower or a whole model.

    Returns:
        transformers' model, with its `settings` (TowerSettings) and the buffers `pixel_mean`, `pixel_std` (1, 3, 1, 1).

    Raises:
        TowerError: If a file is missing or unreadable, or weights and configuration do not fit.
    """
    path = Path(path)
    settings = read_tower_settings(path)
    kind = TOWERS[settings.kind]
    tower = (load_renamed if kind.any_size else load_by_name)(path, kind.model, settings.config)
    for name, values in (("pixel_mean", settings.mean), ("pixel_std", settings.std)):
        tower.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)
    tower.settings = settings
    return tower.requires_grad_(False).eval()


def load_by_name(path: Path, model: type, config) -> torch.nn.Module:
    """Loads the vision tensors of a folder, which may hold a whole model, under the names that they have there."""
    tensors = read_tower_weights(path)
    with torch.device("meta"), no_init_weights():  # costs no memory, whatever sizes the configuration names
        wanted = {name.removeprefix("vision_model."): tensor for name, tensor in model(config).state_dict().items()}
    wrong = wanted.keys() ^ tensors.keys()
    wrong |= {name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape}
    if wrong:
        problem = (
            f"the vision tower in {path} does not fit its config.json: {len(wrong)} tensor(s) are missing, too many "
        )
        raise unusable(path, f"{problem}or of another shape, the first is {min(wrong)}")
    # On the CPU, and filled here, also where transformers builds the model around it without memory.
    with torch.device("cpu"), no_init_weights():
        tower = model(config).float()
    wanted = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    return tower


def load_renamed(path: Path, model: type, config) -> torch.nn.Module:
    """Loads a folder of the tower alone by transformers, which knows the names that its earlier releases had."""
    try:
        tower, found = model.from_pretrained(
            path, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (*READING_ERRORS, AttributeError, TypeError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    wrong = [str(name) for keys in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[keys]]
    wrong += [name for name, weight in tower.named_parameters() if not weight.isfinite().all()]
    if wrong:
        raise unusable(path, f"the vision tower in {path} does not fit its config.json, the first is {min(wrong)}")
    return tower


@torch.no_grad()
def encode_images(tower: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns a tower's features: its last hidden state (CLIP's is before the final layer norm), patches only.

    Args:
        pixel_values: (images, 3, size, size), uint8 as decoded or float as already normalised; uint8 of smaller squares
            are enlarged here.

    Returns:
        (images, patches, hidden_size).
    """
    if len(pixel_values) == 0:
        shape = 0, tower.settings.patches, tower.settings.hidden_size
        return torch.empty(shape, dtype=tower.dtype, device=pixel_values.device)
    if pixel_values.dtype == torch.uint8:
        pixel_values = normalise(pixel_values, *pixel_constants(tower, pixel_values))
    features = tower(pixel_values=pixel_values.to(tower.dtype)).last_hidden_state
    return features[:, features.shape[1] - tower.settings.patches :]


def pixel_constants(tower: torch.nn.Module, pixels: torch.Tensor) -> tuple:
    """Returns what `normalise` needs beside these pixels: weights that enlarge them (None for none), mean and std."""
    source, size = pixels.shape[-1], tower.settings.size
    weights = bicubic_weights(source, size, pixels.device) if source < size else None
    return weights, tower.pixel_mean.float(), tower.pixel_std.float()


def normalise(pixels: torch.Tensor, weights: torch.Tensor | None, mean: torch.Tensor, std: torch.Tensor):
    """Enlarges uint8 images where they are small, and normalises them, to float32."""
    pixels = pixels.float() if weights is None else enlarge(pixels, weights)
    return (pixels / 255 - mean) / std


def enlarge(pixels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Enlarges squares by bicubic interpolation as two matrix products, to what Pillow's `resize` gives.

    Args:
        pixels: uint8 (images, 3, n, n).
        weights: (2 * size, n) `bicubic_weights`.

    Returns:
        float32 (images, 3, size, size), whole numbers of 0 to 255.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        rows = weighted(pixels.float() @ weights.T, dim=3)
        return weighted(weights @ rows, dim=2)


def weighted(high_and_low: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns floor(high * 2^-11 + low * 2^-22 + 1/2) within 0 to 255: whole numbers below 2^24, exact in float32."""
    high, low = high_and_low.chunk(2, dim)
    return low.add(2**21).mul_(2**-11).floor_().add_(high).mul_(2**-11).floor_().clamp_(0, 255)


@functools.cache  # CUDA graphs keep the addresses
def bicubic_weights(source: int, target: int, device: torch.device) -> torch.Tensor:
    """Returns Pillow's 22-bit fixed-point weights of `source` pixels for `target` larger ones, as high and low 11 bits.

    11 bits times a byte are exact in float32 and in TF32. (2 * target, source) float32.
    """
    scale = source / target
    places = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    first, end = (places - 2 + 0.5).long().clamp(min=0), (places + 2 + 0.5).long().clamp(max=source)
    columns = torch.arange(source)
    x = (columns + 0.5 - places).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys' kernel with a = -1/2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * ((columns >= first) & (columns < end))
    weights = weights / weights.sum(dim=1, keepdim=True) * 2**22
    weights = (weights + torch.where(weights < 0, -0.5, 0.5)).long()  # rounded as Pillow does; long() cuts towards 0
    return torch.cat((weights >> 11, weights & 2047)).float().to(device)
