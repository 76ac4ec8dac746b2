"""The frozen vision tower: any CLIP or SigLIP ViT of transformers, an image to one feature per patch."""

from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from model.tower_files import CLASSES, TowerError, TowerSettings, read_tower_settings, read_tower_weights, unusable

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
    tensors = read_tower_weights(path)
    model = CLASSES[settings.kind][1]
    with torch.device("meta"), no_init_weights():  # costs no memory, whatever sizes the configuration names
        wanted = {
            name.removeprefix("vision_model."): tensor for name, tensor in model(settings.config).state_dict().items()
        }
    wrong = wanted.keys() ^ tensors.keys()
    wrong |= {name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape}
    if wrong:
        problem = (
            f"the vision tower in {path} does not fit its config.json: {len(wrong)} tensor(s) are missing, too many "
        )
        raise unusable(path, f"{problem}or of another shape, the first is {min(wrong)}")
    # On the CPU, and filled here, also where transformers builds the model around it without memory.
    with torch.device("cpu"), no_init_weights():
        tower = model(settings.config).float()
    wanted = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    for name, values in (("pixel_mean", settings.mean), ("pixel_std", settings.std)):
        tower.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)
    tower.settings = settings
    return tower.requires_grad_(False).eval()


@torch.no_grad()
def encode_images(tower: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns a tower's features: its last hidden state (CLIP's is before the final layer norm), without a class token.

    Args:
        pixel_values: (images, 3, size, size), uint8 as decoded or float as already normalised.

    Returns:
        (images, patches, hidden_size).
    """
    if len(pixel_values) == 0:
        shape = 0, tower.settings.patches, tower.settings.hidden_size
        return torch.empty(shape, dtype=tower.dtype, device=pixel_values.device)
    if pixel_values.dtype == torch.uint8:
        pixel_values = (pixel_values.float() / 255 - tower.pixel_mean.float()) / tower.pixel_std.float()
    features = tower(pixel_values=pixel_values.to(tower.dtype)).last_hidden_state
    return features[:, features.shape[1] - tower.settings.patches :]
