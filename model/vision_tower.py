"""The frozen vision tower: any ViT of the table in model/tower_files.py, an image to one feature per patch."""

import functools

import torch

from common.files import sha256_of
from model.tower_files import TowerError, TowerSettings, load_vision_tower, read_tower_settings

__all__ = [
    "TowerError",
    "TowerSettings",
    "encode_images",
    "load_vision_tower",
    "read_tower_settings",
    "tower_weights_sha256",
]


@torch.no_grad()
def encode_images(tower: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns a tower's features: its last hidden state (CLIP's is before the final layer norm), patches only.

    Args:
        pixel_values: (images, 3, size, size), float as already normalised or uint8 as decoded, of smaller squares too.

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
    """Enlarges squares by bicubic interpolation as two matrix products, to the bytes that Pillow's `resize` gives.

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
    """Returns Pillow's weights of `source` pixels for `target` larger ones, (2 * target, source) float32.

    They are 22-bit fixed-point numbers, given as high and low 11 bits: times a byte, these are exact in TF32 too.
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


def tower_weights_sha256(tower: torch.nn.Module) -> str:
    """Returns the SHA-256 (hex) of a tower's weights, the same in every release of transformers."""
    names = {name: name.removeprefix("vision_model.") for name in tower.state_dict() if "position_ids" not in name}
    return sha256_of({names[name]: tensor for name, tensor in tower.state_dict().items() if name in names})
