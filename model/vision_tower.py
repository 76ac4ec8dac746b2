"""The frozen vision tower: the table of ViT families, their files, and an image to one feature per patch."""

import functools
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights
from transformers.utils import constants

from common.errors import UsageError, first_line
from common.files import FLOATS, load_tensors, sha256_of
from common.schema import Range, check, read_json


@dataclass(frozen=True)
class TowerKind:
    """What the program must know of a family of towers.

    If it has its blocks in one ModuleList and a Conv2d in its "embeddings", it can be compiled; others run as they are.
    """

    model: type  # transformers' class; its configuration's model_type is the one in config.json
    mean: tuple[float, ...]  # what pixels are normalised by, where the preprocessor file does not say
    std: tuple[float, ...]
    crops: bool  # whether pictures are cropped to a square or squashed, where that file does not say
    any_size: bool = False  # whether the preprocessor file says the pictures' size; else config.json, as image_size
    settings: dict = field(default_factory=dict)  # schema of the keys of config.json that it needs beyond `TOWER`
    overrides: dict = field(default_factory=dict)  # values of its configuration, whatever config.json says
    arguments: dict = field(default_factory=dict)  # further arguments of `model`


RATE, SIZE, COUNT, SIDE = Range(float, 0, 1), Range(int, 1, 1 << 16), Range(int, 1, 1 << 10), Range(int, 1, 1 << 12)
SWITCHES = ("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")
DINO_SETTINGS = {f"{name}?": bool for name in (*SWITCHES, "use_swiglu_ffn", "use_gated_mlp")}
DINO_SETTINGS |= {"mlp_ratio?": Range(float, 1, 16), "layerscale_value?": Range(float, 0, 16)}
DINO_SETTINGS |= {"rope_theta?": Range(float, 1, 1e6), "num_register_tokens?": Range(int, 0, 1 << 6)}
DINO = {"any_size": True, "settings": DINO_SETTINGS}
CLIP = constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD
IMAGENET = constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD
HALF = [0.5] * 3, [0.5] * 3
TOWERS = {
    "CLIP": TowerKind(transformers.CLIPVisionModel, *CLIP, crops=True),
    "SigLIP": TowerKind(transformers.SiglipVisionModel, *HALF, crops=False, overrides={"vision_use_head": False}),
    "DINOv2": TowerKind(transformers.Dinov2Model, *IMAGENET, crops=True, **DINO),
    "DINOv2 with registers": TowerKind(transformers.Dinov2WithRegistersModel, *IMAGENET, crops=True, **DINO),
    "DINOv3": TowerKind(transformers.DINOv3ViTModel, *IMAGENET, crops=False, **DINO),
}
HEADS = ("pooler.", "classifier.", "head.")  # in names of tensors that are not loaded: the features do not need them
TOWER = {  # only these keys of a config.json are used
    **{f"{name}?": SIZE for name in ("hidden_size", "intermediate_size")},
    **{f"{name}?": COUNT for name in ("num_hidden_layers", "num_attention_heads")},
    **{f"{name}?": SIDE for name in ("image_size", "patch_size")},
    **{f"{name}?": RATE for name in ("attention_dropout", "layer_norm_eps")},
    "num_channels?": frozenset({3}),
    "hidden_act?": frozenset(ACT2FN),
    # Without effect on the features, but part of the hash that they are cached under; null for some in published CLIP.
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
    """What a tower's own files say."""

    kind: str  # a name of `TOWERS`
    config: transformers.PretrainedConfig
    mean: tuple[float, ...]  # what its pixels are normalised by, a number per channel
    std: tuple[float, ...]
    hidden_size: int  # width of the features
    picture_settings: dict  # how pictures are resized, for `dataset.pictures.PictureFormat`

    @property
    def size(self) -> int:
        """Width and height of its pictures in pixels."""
        return self.picture_settings["size"]

    @property
    def patches(self) -> int:
        """Features per image; class token and registers do not count."""
        return (self.size // self.config.patch_size) ** 2


def unreadable(path: Path, reason: str) -> TowerError:
    return TowerError(
        f"the vision tower in {path} cannot be read: {reason}. --vision_model_path must be a folder with config.json "
        f"and model.safetensors (or pytorch_model.bin) of a tower ({', '.join(TOWERS)})"
    )


def read_tower_settings(path: str | Path) -> TowerSettings:
    """Reads config.json and preprocessor_config.json of a tower, or a whole CLIP or SigLIP model; raises TowerError."""
    path, name = Path(path), "config.json"
    try:
        whole = read_json(path / name, {"vision_config?": (dict, None)})
        content = whole.get("vision_config") or whole
        check(content, {"model_type?": str})
        model_type = content.get("model_type", "clip").removesuffix("_vision_model")
        if model_type == "siglip2":  # a SigLIP, whose patches are counted, and are vectors
            check(content, {"num_patches?": SIZE, "patch_size?": SIDE})
            side = math.isqrt(content.get("num_patches", 256)) * content.get("patch_size", 16)
            model_type, content = "siglip", content | {"image_size": side}
        kinds = {it.model.config_class.model_type.removesuffix("_vision_model"): kind for kind, it in TOWERS.items()}
        if model_type not in kinds:
            raise unreadable(path, f"it is a {model_type:.40}, none of {', '.join(TOWERS)}")
        tower = TOWERS[kinds[model_type]]
        schema = TOWER | tower.settings
        check(content, schema)
        known = {key: value for key, value in content.items() if f"{key}?" in schema and value is not None}
        known |= {key: value for key, value in UNUSED.items() if repr(content.get(key, "")) == repr(value)}
        config = tower.model.config_class(**known | tower.overrides)
        if config.hidden_size % config.num_attention_heads:  # transformers 5.0 says so only when the model is built
            raise ValueError(f"{config.num_attention_heads} heads do not divide {config.hidden_size} channels")
        name = "preprocessor_config.json"
        preprocessor = read_json(path / name, PREPROCESSOR) if (path / name).is_file() else {}
    except FileNotFoundError as error:
        raise unreadable(path, f"{path / name} is missing") from error
    except (ValueError, StrictDataclassError) as error:
        raise unreadable(path, f"{name}: {str(error).splitlines()[0].rstrip(': .')}") from error
    mean, std = (tuple(preprocessor.get(f"image_{key}", getattr(tower, key))) for key in ("mean", "std"))
    crop, size, shortest = bool(preprocessor.get("do_center_crop", tower.crops)), config.image_size, None
    if tower.any_size:
        edges = (preprocessor.get(key) for key in ("size", "crop_size"))
        edge, cropped = (min(edge.values(), default=None) if isinstance(edge, dict) else edge for edge in edges)
        size = (cropped if crop else edge) or size
        shortest = edge if crop and edge != size else None
    if size < config.patch_size:
        raise unreadable(path, "its patches are larger than its images")
    pictures = {"size": size, "resample": int(preprocessor.get("resample", Image.Resampling.BICUBIC))}
    pictures |= {"crop": crop, "shortest_edge": shortest}
    return TowerSettings(kinds[model_type], config, mean, std, config.hidden_size, pictures)


def load_vision_tower(path: str | Path) -> torch.nn.Module:
    """Loads a frozen tower, in eval mode and float32, from the folder of a vision tower or a whole model.

    Returns transformers' model, with its `settings` (TowerSettings) and the buffers `pixel_mean`, `pixel_std`
    (1, 3, 1, 1). Raises TowerError if a file is missing or unreadable, or they do not fit together.
    """
    settings = read_tower_settings(path)
    kind, config = TOWERS[settings.kind], settings.config
    tensors = read_tower_weights(Path(path))
    with torch.device("meta"), no_init_weights():  # costs no memory, whatever sizes the configuration names
        wanted = kind.model(config, **kind.arguments).state_dict()
    ours = {name.removeprefix("vision_model."): name for name in wanted}
    tensors = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    wrong = {name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape}
    # `from_pretrained` knows the names of other releases of transformers, but would make up whatever the file lacks.
    if not wrong and sum(map(torch.numel, wanted.values())) > 2 * sum(map(torch.numel, tensors.values())):
        wrong = wanted.keys() - tensors.keys()
    elif not wrong and wanted.keys() != tensors.keys():
        transformers.utils.logging.disable_progress_bar()
        how = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True} | kind.arguments
        with torch.device("cpu"):
            tower, found = kind.model.from_pretrained(None, config=config, state_dict=tensors, **how)
        names = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[key]]
        wrong, tensors = {name if isinstance(name, str) else name[0] for name in names}, tower.state_dict()
    if wrong:
        many = f"{len(wrong)} tensor(s) are missing, unexpected or of another shape, the first is {min(wrong)}"
        raise unreadable(path, f"it does not fit its config.json: {many}")
    with torch.device("cpu"), no_init_weights():  # also where transformers builds the model around it without memory
        tower = kind.model(config, **kind.arguments).float()
    tower.load_state_dict(tensors)
    for name, values in (("pixel_mean", settings.mean), ("pixel_std", settings.std)):
        tower.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)
    tower.settings = settings
    return tower.requires_grad_(False).eval()


def read_tower_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads a folder's vision tensors, by their names without `vision_model.`, but no text half; raises TowerError."""
    file, pickled = path / "model.safetensors", path / "pytorch_model.bin"
    if not (file.is_file() or pickled.is_file()):
        raise unreadable(path, f"{file} is missing")
    try:
        checkpoint = safe_open(file, framework="pt") if file.is_file() else load_tensors(pickled)
        read = checkpoint.get_tensor if file.is_file() else checkpoint.get
        names = [name for name in checkpoint.keys() if not name.endswith("position_ids")]  # they only count
        of_tower = re.compile(r"(model\.)?(vision_tower\.)?vision_model\.")  # also in a LLaVA
        names = [name for name in names if of_tower.match(name)] or names
        tensors = {name: read(name) for name in names if not any(f".{part}" in f".{name}" for part in HEADS)}
    except (OSError, RuntimeError, ValueError, LookupError, SafetensorError, UsageError) as error:
        raise unreadable(path, first_line(error).partition(". Delete")[0]) from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not tensor.isfinite().all():
            raise unreadable(path, f"{name} holds something else than finite numbers")
    tensors = {name.split("vision_model.")[-1]: tensor for name, tensor in tensors.items()}
    patches = tensors.get("embeddings.patch_embedding.weight")
    if patches is not None and patches.dim() == 2:  # vectors of (row, column, channel)
        side = math.isqrt(patches.shape[1] // 3)
        tensors["embeddings.patch_embedding.weight"] = patches.view(-1, side, side, 3).permute(0, 3, 1, 2)
    return tensors


@torch.no_grad()
def encode_images(tower: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Returns (images, patches, hidden_size) features of (images, 3, size, size), of patches only.

    They are the tower's last hidden state (CLIP's is before the final layer norm). Pixels are float as already
    normalised, or uint8 as decoded, of smaller squares too.
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
    """Normalises uint8 images to float32, enlarged to the bytes of Pillow's `resize` by `bicubic_weights` if given."""
    pixels = pixels.float()
    if weights is not None:
        with torch.autocast(pixels.device.type, enabled=False):
            for dim in (3, 2):
                product = pixels @ weights.T if dim == 3 else weights @ pixels
                high, low = product.chunk(2, dim)
                # floor(high * 2^-11 + low * 2^-22 + 1/2): whole numbers below 2^24, exact in float32.
                pixels = low.add(2**21).mul_(2**-11).floor_().add_(high).mul_(2**-11).floor_().clamp_(0, 255)
    return (pixels / 255 - mean) / std


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
    tensors = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    return sha256_of({name: tensor for name, tensor in tensors.items() if "position_ids" not in name})
