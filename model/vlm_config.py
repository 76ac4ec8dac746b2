"""The vision-language model's configuration: its settings, their schema, and how it is fitted to a tower."""

import copy
import math

from transformers import AutoConfig

from common.schema import Range
from model.model_minimind import MiniMindConfig
from model.projectors import PROJECTORS
from model.tower_files import TowerSettings

# Settings that minimind-3v's tensors do not show. Its per-head norms, which no older model has, identify it.
MINIMIND_3V = {
    "rms_norm_eps": 1e-6,
    "yarn_attention_factor": 1.0,
    "num_experts_per_tok": 1,
    "aux_loss_alpha": 5e-4,
    "balance_over_batch": True,
    "image_token_id": 12,
    "vision_patches": 64,
    "projector": "norm_mlp",
}
# Settings that another language model's configuration has too, with what is taken where it has none.
LANGUAGE_MODEL = {"hidden_size": None, "num_hidden_layers": None, "vocab_size": None, "max_position_embeddings": 2048}
# The schema of that configuration.
LLM = {"model_type": str} | {f"num_{name}?": Range(int, 1, 1 << 10) for name in ("hidden_layers", "attention_heads")}
LLM |= {f"{name}?": Range(int, 1, 1 << 20) for name in ("hidden_size", "vocab_size", "intermediate_size")}
# Image positions in a prompt; the first is the default.
PROMPT_FORMS = ("{prompt}\n<image>", "{prompt}<image>", "<image>{prompt}", "<image>\n{prompt}")


class VLMConfig(MiniMindConfig):
    """The decoder's shape (see `MiniMindConfig`) and how images enter it.

    Args:
        image_token_id: The placeholder's id: 34, `@`, in the published tokenizer, 12 in minimind-3v's.
        vision_hidden_size, vision_patches: Width and number of the tower's features per image; a tower's own win.
        projector: A name of `model.projectors.PROJECTORS`: "linear" as published, "norm_mlp" in minimind-3v.
        pixel_shuffle: N x N neighbouring patches become one token, N^2 times as wide.
        llm: Another language model's configuration in transformers, which then gives the decoder's shape.

    Raises:
        ValueError: If there is no such projector, or it cannot take the patches.
    """

    model_type = "minimind-v"
    image_token_id: int = 34
    vision_hidden_size: int = 768
    vision_patches: int = 196
    projector: str = "linear"
    pixel_shuffle: int = 1
    llm: dict | None = None

    def __init__(self, **settings):
        llm = settings.get("llm")
        if llm:
            its = AutoConfig.for_model(**llm)  # which knows its own names for these
            shape = {name: getattr(its, name, default) for name, default in LANGUAGE_MODEL.items()}
            settings |= shape | {"num_attention_heads": 1, "num_key_value_heads": 1}
        super().__init__(**settings)
        if llm:
            self.head_dim = getattr(its, "head_dim", None) or self.hidden_size // getattr(its, "num_attention_heads", 1)
        if self.projector not in PROJECTORS:
            raise ValueError(f"no projector {self.projector!r}, choose from {', '.join(PROJECTORS)}")
        PROJECTORS[self.projector].tokens(self.vision_patches, self.pixel_shuffle)  # raises where they do not fit

    @property
    def image_tokens(self) -> int:
        """Placeholders per image in the text."""
        return PROJECTORS[self.projector].tokens(self.vision_patches, self.pixel_shuffle)


def allowed(name: str, default):
    """Returns the schema of a setting in a file. (VLMConfig refuses settings that do not fit together.)"""
    if isinstance(default, bool | str):
        return type(default)
    if name.endswith("_token_id") or name == "n_shared_experts":
        return Range(int, 0, 1 << 20)
    if isinstance(default, int) or name == "intermediate_size":
        is_size = default is None or default > 16  # not a number of layers, heads or experts
        return Range(int, 1, 1 << 20 if is_size else 1 << 10)
    return Range(float, 0, 1) if default is not None and default < 1 else Range(float, 1e-3, 1e12)


CONFIG = {f"{name}?": allowed(name, default) for name, default in VLMConfig.defaults().items()} | {"*": frozenset()}
CONFIG["llm?"] = (LLM, None)


def config_fields(config: VLMConfig) -> dict:
    """Returns everything that makes this configuration: `VLMConfig(**config_fields(config))` is the same."""
    fields = {name: getattr(config, name) for name in VLMConfig.defaults()}
    return fields if config.llm else {name: value for name, value in fields.items() if name != "llm"}


def fit_config_to_tower(config: VLMConfig, tower: TowerSettings, from_tensors: bool = False) -> VLMConfig:
    """Returns the configuration with the tower's width and number of patches.

    Args:
        from_tensors: The configuration was read from a weight file's tensors, whose vision_hidden_size is the
            projection's input width: N^2 times the tower's width means a pixel shuffle of N before it. A norm_mlp is
            then minimind-3v's, for a tower with 64 patches.

    Raises:
        ValueError: If the pixel shuffle does not divide the tower's patches as a grid, or the weights are minimind-3v's
            and the tower is not.
    """
    config, factor = copy.deepcopy(config), math.isqrt(config.vision_hidden_size // tower.hidden_size)
    is_3v = config.projector == "norm_mlp"
    if from_tensors and is_3v and tower.patches != config.vision_patches:
        raise ValueError(
            f"the projection is minimind-3v's, for the {config.vision_patches} patches of a SigLIP ViT-B/32 at 256 "
            f"pixels, and this tower has {tower.patches}: name that one with --vision_model_path"
        )
    if from_tensors and not is_3v and config.vision_hidden_size == tower.hidden_size * factor**2:
        config.pixel_shuffle = factor
    config.vision_hidden_size, config.vision_patches = tower.hidden_size, tower.patches
    PROJECTORS[config.projector].tokens(config.vision_patches, config.pixel_shuffle)  # raises where they do not fit
    return config
