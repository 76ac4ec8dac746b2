"""Reading a vision tower's folder: what its files say, and errors that say what to do."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PretrainedConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.activations import ACT2FN
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from common.errors import UsageError
from common.files import FLOATS, load_tensors
from common.paths import TOWER_3V_DIR
from common.schema import Range, SchemaError, check, read_json


@dataclass(frozen=True)
class TowerKind:
    """What the program must know of a family of towers.

    Attributes:
        config, model: transformers' classes.
        model_types: What its config.json says it is, alone or as the vision half of a whole model.
        mean, std: What pixels are normalised by where its files do not say.
        crops: Whether pictures are cropped to a square, not squashed, where its files do not say.
        any_size: Whether it takes pictures of the size that its preprocessor crops to, not only of its training's.
        settings: What its config.json may say beyond `TOWER`, a schema by key.
    """

    config: type
    model: type
    model_types: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crops: bool
    any_size: bool = False
    settings: dict = field(default_factory=dict)


RATE = Range(float, 0, 1)
DINO = {f"{name}?": bool for name in ("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")}
DINO |= {"use_swiglu_ffn?": bool, "use_gated_mlp?": bool, "num_register_tokens?": Range(int, 0, 1 << 6)}
DINO |= {
    "mlp_ratio?": Range(float, 1, 16),
    "layerscale_value?": Range(float, 0, 16),
    "rope_theta?": Range(float, 1, 1e6),
}
IMAGENET = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
TOWERS = {
    "CLIP": TowerKind(
        CLIPVisionConfig, CLIPVisionModel, ("clip", "clip_vision_model"), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, crops=True
    ),
    "SigLIP": TowerKind(
        SiglipVisionConfig, SiglipVisionModel, ("siglip", "siglip_vision_model"), [0.5] * 3, [0.5] * 3, crops=False
    ),
    # Their class token and registers come first, and are left out.
    "DINOv2": TowerKind(Dinov2Config, Dinov2Model, ("dinov2",), *IMAGENET, True, True, DINO),
    "DINOv2 with registers": TowerKind(
        Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ("dinov2_with_registers",), *IMAGENET, True, True, DINO
    ),
    "DINOv3": TowerKind(DINOv3ViTConfig, DINOv3ViTModel, ("dinov3_vit",), *IMAGENET, False, True, DINO),
}
SIZE, HEADS = Range(int, 1, 1 << 16), Range(int, 1, 1 << 10)
TOWER = {  # only these keys of a config.json are used
    **{f"{name}?": SIZE for name in ("hidden_size", "intermediate_size")},
    **{f"{name}?": HEADS for name in ("num_hidden_layers", "num_attention_heads")},
    **{f"{name}?": Range(int, 1, 1 << 12) for name in ("image_size", "patch_size")},
    **{f"{name}?": RATE for name in ("attention_dropout", "layer_norm_eps")},
    "num_channels?": frozenset({3}),
    "hidden_act?": frozenset(ACT2FN),
    # Not used, but part of what features are kept under. The published CLIP has null for some.
    **{f"{name}?": (Range(float, 0, 1 << 16), None) for name in ("initializer_range", "initializer_factor")},
    **{"projection_dim?": (SIZE, None), "architectures?": ([str], None)},
    "dtype?": frozenset({"float32", "float16", "bfloat16", None}),
}
# What old versions of transformers wrote of no use to a tower, as the published CLIP has it: the hash that features and
# checkpoints are kept under takes it in.
UNUSED = dict.fromkeys(("add_cross_attention", "is_decoder", "torchscript", "use_bfloat16"), False) | {"dropout": 0.0}
UNUSED |= dict.fromkeys(("cross_attention_hidden_size", "decoder_start_token_id", "finetuning_task"))
UNUSED |= dict.fromkeys(("bos_token_id", "eos_token_id"))
READING_ERRORS = (OSError, RuntimeError, ValueError, LookupError, SafetensorError)
PIXELS, EDGES = Range(int, 1, 1 << 12), ("shortest_edge", "height", "width")
PREPROCESSOR = {
    "image_mean?": [Range(float, -100, 100)] * 3,
    "image_std?": [Range(float, 1e-3, 1e3)] * 3,
    "resample?": frozenset(map(int, Image.Resampling)),
    "do_center_crop?": (bool, None),
    **{f"{name}?": (PIXELS, {f"{edge}?": PIXELS for edge in EDGES}, None) for name in ("size", "crop_size")},
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
        """Returns how images are resized, for `dataset.pictures.PictureFormat`."""
        edges = {"crop": self.crop, "shortest_edge": self.shortest_edge}
        return {"size": self.size, "resample": self.resample} | edges


def unusable(path: Path, problem: str) -> TowerError:
    """Returns the error that says what is wrong with a folder, and what to do."""
    part = "tower_3v" if path == TOWER_3V_DIR else "tower"
    return TowerError(
        f"{problem}. It must be a folder with config.json and model.safetensors (or pytorch_model.bin) of a tower "
        f"({', '.join(TOWERS)}); `python scripts/download.py {part}` fetches the published one, --vision_model_path "
        "names another."
    )


def unreadable(path: Path, reason: str) -> TowerError:
    return unusable(path, f"the vision tower in {path} cannot be read ({reason})")


def read_tower_settings(path: str | Path) -> TowerSettings:
    """Reads config.json and preprocessor_config.json of a tower, or of a whole CLIP or SigLIP model, not its weights.

    Raises:
        TowerError: If a file is missing or unreadable, or the tower is of another kind.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise unusable(path, f"no vision tower in {path}: {path / 'config.json'} is missing")
    try:
        whole = read_json(path / "config.json", {"vision_config?": (dict, None)})
        content = whole.get("vision_config") or whole
        check(content, {"model_type?": str})
        found = content.get("model_type", "clip")
        kind = next((name for name, kind in TOWERS.items() if found in kind.model_types), None)
        if kind is None:
            raise unusable(path, f"the vision tower in {path} is a {found:.40}, none of {', '.join(TOWERS)}")
        schema = TOWER | TOWERS[kind].settings
        check(content, schema)
        known = {name: content.get(name) for name in (name.removesuffix("?") for name in schema)}
        known = {name: value for name, value in known.items() if value is not None}
        unused = {name: value for name, value in UNUSED.items() if repr(content.get(name, "")) == repr(value)}
        config = TOWERS[kind].config(**known, **unused)
        if config.hidden_size % config.num_attention_heads:  # transformers 5.0 says so only when the model is built
            raise ValueError(f"{config.num_attention_heads} heads do not divide {config.hidden_size} channels")
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).splitlines()[0].rstrip(": .")
        raise unreadable(path, f"config.json: {reason}") from error
    if kind == "SigLIP":
        config.vision_use_head = False  # its pooled output is not used
    settings = TowerSettings(kind, config, **read_preprocessing(path, TOWERS[kind], config.image_size))
    if settings.size < config.patch_size:
        raise unusable(path, f"the vision tower in {path} has patches larger than its images")
    return settings


def read_preprocessing(path: Path, kind: TowerKind, image_size: int) -> dict:
    """Reads how pictures are prepared from preprocessor_config.json; the kind's own way where there is no such file."""
    processor = path / "preprocessor_config.json"
    try:
        found = read_json(processor, PREPROCESSOR) if processor.is_file() else {}
    except SchemaError as error:
        raise unreadable(path, f"{processor.name}: {error}") from error
    crop = bool(found.get("do_center_crop", kind.crops))
    cropped, resized = (shortest(found.get(name)) for name in ("crop_size", "size"))
    size = ((cropped if crop else resized) or image_size) if kind.any_size else image_size
    return {
        "size": size,
        "mean": tuple(found.get("image_mean", kind.mean)),
        "std": tuple(found.get("image_std", kind.std)),
        "resample": int(found.get("resample", Image.Resampling.BICUBIC)),
        "crop": crop,
        "shortest_edge": resized if crop and kind.any_size and resized not in (None, size) else None,
    }


def shortest(size: int | dict | None) -> int | None:
    """Returns the shortest edge that a preprocessor's size or crop_size means."""
    return min(size.values(), default=None) if isinstance(size, dict) else size


def read_tower_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads the vision tensors of a folder, by their names without `vision_model.`; a text half stays on disk.

    Raises:
        TowerError: If the file is missing or damaged.
    """
    safetensors, pickled = path / "model.safetensors", path / "pytorch_model.bin"
    if not (safetensors.is_file() or pickled.is_file()):
        raise unusable(path, f"no vision tower in {path}: {safetensors} is missing")
    try:
        if safetensors.is_file():
            with safe_open(safetensors, framework="pt") as checkpoint:
                tensors = {name: checkpoint.get_tensor(name) for name in vision_names(checkpoint.keys())}
        else:
            checkpoint = load_tensors(pickled)
            tensors = {name: checkpoint[name] for name in vision_names(checkpoint)}
    except READING_ERRORS as error:
        raise unreadable(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    except UsageError as error:
        raise unusable(path, str(error).partition(". Delete")[0]) from error
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
