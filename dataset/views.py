"""Random views of pictures for training a tower: what a picture shows stays, where and how it looks changes."""

import math

import torch
import torch.nn.functional as F

SMALLEST, STRETCH = 0.35, 4 / 3  # of a crop: its least share of the picture's area, and its largest aspect ratio
LIGHT = 0.3  # how far saturation, contrast and brightness change; each colour by half of it


def random_views(pixels: torch.Tensor, size: int, may_flip: torch.Tensor) -> torch.Tensor:
    """Returns a random crop of each picture, resized to a square, in other light; random numbers are the CPU's.

    Args:
        pixels: uint8 (images, 3, n, n).
        size: Width and height of the views.
        may_flip: bool (images,): which may be mirrored; half of them are.

    Returns:
        float32 (images, 3, size, size), 0 to 255 but for what is too bright or dark.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape) * (high - low) + low

    area, ratio = uniform(SMALLEST, 1), uniform(-math.log(STRETCH), math.log(STRETCH)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)  # of its centre; the picture is -1 to 1
    width = width * torch.where((uniform(0, 1) < 0.5) & may_flip, -1.0, 1.0)
    matrices = torch.zeros(count, 2, 3)
    matrices[:, 0, 0], matrices[:, 0, 2], matrices[:, 1, 1], matrices[:, 1, 2] = width, left, height, top
    grid = F.affine_grid(matrices, [count, 3, size, size], align_corners=False).to(device)
    views = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    saturation, contrast, brightness = (uniform(1 - LIGHT, 1 + LIGHT, 1, 1, 1).to(device) for _ in range(3))
    colours = uniform(1 - LIGHT / 2, 1 + LIGHT / 2, 3, 1, 1).to(device)
    mean, grey = views.mean((2, 3), keepdim=True), views.mean(1, keepdim=True)
    return ((torch.lerp(grey, views, saturation) - mean) * contrast + mean * brightness) * colours
