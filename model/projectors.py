"""The table of projections from the tower's features to the decoder.

A new one is a class with `@register("its_name")`, here or in a script of your own: tests/changes/test_resampler.py.
"""

import math

import torch
from torch import nn

PROJECTORS: dict[str, type["Projector"]] = {}


class Projector(nn.Module):
    """A projection of (images, patches, width) to (images, tokens, hidden_size)."""

    is_grid = True  # whether its tokens form a square grid over the image (word maps need that)
    takes_pixel_shuffle = False  # whether pixel_shuffle x pixel_shuffle patches can become one token
    # Tensors by which a weight file without a sidecar is recognised; the first one's last dimension is the input width.
    identified_by: tuple[str, ...] = ()
    exported_as: str | None = None  # transformers' form with an equal projector: a name of FORMS in scripts/export.py
    llava_activation: str | None = None  # transformers' name of the activation between two layers, if that is LLaVA

    def __init__(self, width: int, hidden_size: int, pixel_shuffle: int = 1):
        super().__init__()

    @classmethod
    def tokens(cls, patches: int, pixel_shuffle: int) -> int:
        """Returns the tokens of an image with this many patches; raises ValueError if it cannot take them."""
        side = math.isqrt(patches)
        if pixel_shuffle != 1 and not cls.takes_pixel_shuffle:
            raise ValueError(f"this projection takes no pixel_shuffle {pixel_shuffle}")
        if pixel_shuffle != 1 and (pixel_shuffle < 1 or side**2 != patches or side % pixel_shuffle):
            raise ValueError(f"pixel_shuffle {pixel_shuffle} does not divide the tower's {patches} patches as a grid")
        return patches // pixel_shuffle**2


def register(name: str):
    """Returns a decorator that puts a class into the table, as `--projector NAME`."""

    def put(kind: type[Projector]) -> type[Projector]:
        PROJECTORS[name] = kind
        return kind

    return put


@register("linear")
class VisionProj(Projector):
    """One linear layer with bias, as published, after `pixel_shuffle` x `pixel_shuffle` patches became one."""

    takes_pixel_shuffle, exported_as, llava_activation = True, "LLaVA", "linear"
    identified_by = ("vision_proj.vision_proj.0.weight",)

    def __init__(self, width: int = 768, hidden_size: int = 512, pixel_shuffle: int = 1):
        super().__init__(width, hidden_size, pixel_shuffle)
        self.pixel_shuffle = pixel_shuffle
        self.vision_proj = nn.Sequential(nn.Linear(width * pixel_shuffle**2, hidden_size))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        if self.pixel_shuffle > 1:  # each square of neighbouring patches becomes one, https://arxiv.org/abs/1609.05158
            side, n = math.isqrt(image_features.shape[1]) // self.pixel_shuffle, self.pixel_shuffle
            grid = image_features.unflatten(1, (side, n, side, n)).permute(0, 1, 3, 5, 2, 4)
            image_features = grid.flatten(3).flatten(1, 2)  # F.pixel_unshuffle leaves no images as they are
        return self.vision_proj(image_features)


@register("mlp")
class MLP(VisionProj):
    """Two linear layers with a GELU between them."""

    llava_activation = "gelu"
    identified_by = (*VisionProj.identified_by, "vision_proj.vision_proj.2.weight")

    def __init__(self, width: int, hidden_size: int, pixel_shuffle: int = 1):
        super().__init__(width, hidden_size, pixel_shuffle)
        self.vision_proj.extend([nn.GELU(), nn.Linear(hidden_size, hidden_size)])


@register("norm_mlp")
class NormMLP(Projector):
    """minimind-3v's: a LayerNorm before the MLP, under its names."""

    identified_by, exported_as = ("vision_proj.mlp.0.weight",), "LFM2-VL"

    def __init__(self, width: int, hidden_size: int, pixel_shuffle: int = 1):
        super().__init__(width, hidden_size, pixel_shuffle)
        layers = nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(nn.LayerNorm(width), *layers)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.mlp(image_features)
