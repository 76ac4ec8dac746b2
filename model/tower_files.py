"""Reading a vision tower's folder: the table of families, and what their files may say."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PretrainedConfig,
    SiglipVisionModel,
)
from transformers.activations import ACT2FN
from transformers.utils import constants

from common.errors import UsageError
from common.files import FLOATS, load_tensors
from common.schema import Range, check, read_json


@dataclass(frozen=True)
class TowerKind:
    """What the program must know of a family of towers.

    Attributes:
        model: transformers' class.
        model_type: What config.json says it is; with _vision_model, as the vision half of a whole model.
        mean, std, crops: Where its files do not say, what pixels are normalised by, and whether pictures are cropped to
            a square or squashed.
        any_size: Whether it takes pictures of the size that its preprocessor crops to, not only of its training's.
        settings: What config.json may say beyond `TOWER`, a schema by key.
    """

    model: type
    model_type: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crops: bool
    any_size: bool = False
    settings: dict = field(default_factory=dict)


RATE, SIZE, COUNT, SIDE = Range(float, 0, 1), Range(int, 1, 1 << 16), Range(int, 1, 1 << 10), Range(int, 1, 1 << 12)
SWITCHES = ("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")
DINO_SETTINGS = {f"{name}?": bool for name in (*SWITCHES, "use_swiglu_ffn", "use_gated_mlp")}
DINO_SETTINGS |= {"mlp_ratio?": Range(float, 1, 16), "layerscale_value?": Range(float, 0, 16)}
DINO_SETTINGS |= {"rope_theta?": Range(float, 1, 1e6), "num_register_tokens?": Range(int, 0, 1 << 6)}
DINO = {"any_size": True, "settings": DINO_SETTINGS}
CLIP = constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD
IMAGENET = constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD
TOWERS = {
    "CLIP": TowerKind(CLIPVisionModel, "clip", *CLIP, crops=True),
    "SigLIP": TowerKind(SiglipVisionModel, "siglip", [0.5] * 3, [0.5] * 3, crops=False),
    "DINOv2": TowerKind(Dinov2Model, "dinov2", *IMAGENET, crops=True, **DINO),
    "DINOv2 with registers": TowerKind(
        Dinov2WithRegistersModel, "dinov2_with_registers", *IMAGENET, crops=True, **DINO
    ),
    "DINOv3": TowerKind(DINOv3ViTModel, "dinov3_vit", *IMAGENET, crops=False, **DINO),
}
TOWER = {  # only these keys of a config.json are used
    **{f"{name}?": SIZE for name in ("hidden_size", "intermediate_size")},
    **{f"{name}?": COUNT for name in ("num_hidden_layers", "num_attention_heads")},
    **{f"{name}?": SIDE for name in ("image_size", "patch_size")},
    **{f"{name}?": RATE for name in ("attention_dropout", "layer_norm_eps")},
    "num_channels?": frozenset({3}),
    "hidden_act?": frozenset(ACT2FN),
    # Without effect on the features, but part of the hash that they are cached under. The published CLIP has null for
    # some.
    **{f"{name}?": (Range(float, 0, 1 << 16), None) for name in ("initializer_range", "initializer_factor")},
    **{"projection_dim?": (SIZE, None), "architectures?": ([str], None)},
    "dtype?": frozenset({"float32", "float16", "bfloat16", None}),
}
# Further settings in that hash, of old versions of transformers, with the values that the published CLIP has.
UNUSED = dict.fromkeys(("add_cross_attention", "is_decoder", "torchscript", "use_bfloat16"), False) | {"dropout": 0.0}
UNUSED |= dict.fromkeys(("cross_attention_hidden_size", "decoder_start_token_id", "finetuning_task"))
UNUSED |= dict.fromkeys(("bos_token_id", "eos_token_id"))
PREPROCESSOR = {
    "image_mean?": [Range(float, -100, 100)] * 3,
    "image_std?": [Range(float, 1e-3, 1e3)] * 3,
    "resample?": frozenset(map(int, Image.Resampling)),
    "do_center_crop?": (bool, None),
    **dict.fromkeys(("size?", "crop_size?"), (SIDE, {"shortest_edge?": SIDE, "height?": SIDE, "width?": SIDE}, None)),
}


class TowerError(UsageError):
    """The vision tower is missing or cannot be read."""


@dataclass(frozen=True)
class TowerSettings:
    """What a tower's own files say.

    Attributes:
        kind: A name of `TOWERS`.
        config: transformers' configuration.
        size: Width and height of the pictures that it takes.
        mean, std: What its pixels are normalised by, a number per channel.
        resample: The filter its images are resized with, by Pillow's number.
        crop: True: shortest edge, then centre crop; False: squashed to a square.
        shortest_edge: What the shortest edge is resized to before the crop; None for `size`.
    """

    kind: str
    config: PretrainedConfig
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    crop: bool
    shortest_edge: int | None

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return self.config.hidden_size

    @property
    def patches(self) -> int:
        """Features per image; class token and registers do not count."""
        return (self.size // self.config.patch_size) ** 2

    @property
    def picture_settings(self) -> dict:
        """How images are resized, for `dataset.pictures.PictureFormat`."""
        return {name: getattr(self, name) for name in ("size", "resample", "crop", "shortest_edge")}


def unreadable(path: Path, reason: str) -> TowerError:
    return TowerError(
        f"the vision tower in {path} cannot be read: {reason}. --vision_model_path must be a folder with config.json "
        f"and model.safetensors (or pytorch_model.bin) of a tower ({', '.join(TOWERS)})"
    )


def read_tower_settings(path: str | Path) -> TowerSettings:
    """Reads config.json and preprocessor_config.json of a tower, or of a whole CLIP or SigLIP model, not its weights.

    Raises:
        TowerError: If a file is missing or unreadable, or the tower is of another kind.
    """
    path, name = Path(path), "config.json"
    try:
        whole = read_json(path / name, {"vision_config?": (dict, None)})
        content = whole.get("vision_config") or whole
        check(content, {"model_type?": str})
        found = content.get("model_type", "clip").removesuffix("_vision_model")
        kind = next((kind for kind in TOWERS if TOWERS[kind].model_type == found), None)
        if kind is None:
            raise unreadable(path, f"it is a {found:.40}, none of {', '.join(TOWERS)}")
        schema = TOWER | TOWERS[kind].settings
        check(content, schema)
        known = {key: content.get(key) for key in (key.removesuffix("?") for key in schema)}
        known = {key: value for key, value in known.items() if value is not None}
        unused = {key: value for key, value in UNUSED.items() if repr(content.get(key, "")) == repr(value)}
        config = TOWERS[kind].model.config_class(**known, **unused)
        if config.hidden_size % config.num_attention_heads:  # transformers 5.0 says so only when the model is built
            raise ValueError(f"{config.num_attention_heads} heads do not divide {config.hidden_size} channels")
        if kind == "SigLIP":
            config.vision_use_head = False  # its pooled output is not used
        name = "preprocessor_config.json"
        preprocessor = read_json(path / name, PREPROCESSOR) if (path / name).is_file() else {}
    except FileNotFoundError as error:
        raise unreadable(path, f"{path / name} is missing") from error
    except (ValueError, StrictDataclassError) as error:
        raise unreadable(path, f"{name}: {str(error).splitlines()[0].rstrip(': .')}") from error
    settings = TowerSettings(kind, config, **picture_settings(preprocessor, TOWERS[kind], config.image_size))
    if settings.size < config.patch_size:
        raise unreadable(path, "its patches are larger than its images")
    return settings


def picture_settings(preprocessor: dict, kind: TowerKind, image_size: int) -> dict:
    """Returns how pictures are prepared by a preprocessor_config.json; the kind's own way where it does not say."""
    edges = {}
    for name in ("crop_size", "size"):
        edge = preprocessor.get(name)
        edges[name] = min(edge.values(), default=None) if isinstance(edge, dict) else edge
    crop = bool(preprocessor.get("do_center_crop", kind.crops))
    size = ((edges["crop_size"] if crop else edges["size"]) if kind.any_size else None) or image_size
    return {
        "size": size,
        "mean": tuple(preprocessor.get("image_mean", kind.mean)),
        "std": tuple(preprocessor.get("image_std", kind.std)),
        "resample": int(preprocessor.get("resample", Image.Resampling.BICUBIC)),
        "crop": crop,
        "shortest_edge": edges["size"] if crop and kind.any_size and edges["size"] != size else None,
    }


def read_tower_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads the vision tensors of a folder, by their names without `vision_model.`; a text half stays on disk.

    Raises:
        TowerError: If the file is missing or damaged, or holds something else than finite numbers.
    """
    safetensors, pickled = path / "model.safetensors", path / "pytorch_model.bin"
    if not (safetensors.is_file() or pickled.is_file()):
        raise unreadable(path, f"{safetensors} is missing")
    try:
        if safetensors.is_file():
            with safe_open(safetensors, framework="pt") as checkpoint:
                tensors = {name: checkpoint.get_tensor(name) for name in vision_names(checkpoint.keys())}
        else:
            checkpoint = load_tensors(pickled)
            tensors = {name: checkpoint[name] for name in vision_names(checkpoint)}
    except (OSError, RuntimeError, ValueError, LookupError, SafetensorError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    except UsageError as error:
        raise unreadable(path, str(error).partition(". Delete")[0]) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not tensor.isfinite().all():
            raise unreadable(path, f"{name} holds something else than finite numbers")
    return {name.split("vision_model.")[-1]: tensor for name, tensor in tensors.items()}


def vision_names(names) -> list[str]:
    """Returns which of a checkpoint's names are the tower's weights (position_ids only count)."""
    names = [name for name in names if not name.endswith("position_ids")]
    # "vision_tower.vision_model." in a whole LLaVA.
    names = [name for name in names if name.removeprefix("vision_tower.").startswith("vision_model.")] or names
    return [name for name in names if not name.split("vision_model.")[-1].startswith("head.")]
