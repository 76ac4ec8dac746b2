"""What transformers calls a trained model: its configuration, tokenizer, processors and the names of its tensors.

A model with images is a LLaVA if its tower is a CLIP, and an LFM2-VL if it has minimind-3v's projection after a SigLIP.
Another form is one more entry in FORMS.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.errors import UsageError
from dataset.chat import IMAGE_CHARACTER, has_image_pad
from dataset.chat_template import image_placeholder, uses_template
from dataset.conversation import IMAGE_TAG
from model.model_vlm import VLMConfig
from model.projectors import PROJECTORS
from trainer.answering.loaded_model import LoadedModel

UNUSED_BYTE = "ÿ"  # how a byte-level BPE writes 0xFF, which is in no UTF-8 text
SIDES = ("start", "end")
DECODERS = {  # (use_moe, qk_norm) -> model type and class in transformers, shared experts
    (False, False): ("llama", "LlamaForCausalLM", 0),
    (False, True): ("qwen3", "Qwen3ForCausalLM", 0),
    (True, False): ("qwen2_moe", "Qwen2MoeForCausalLM", 1),
    (True, True): ("qwen3_moe", "Qwen3MoeForCausalLM", 0),
}


def check_exportable(trained: LoadedModel, to: str):
    """Raises UsageError if transformers or, for `to` "gguf", llama.cpp has no such model."""
    config, tower, kind = trained.config, trained.tower.kind, trained.config.projector
    model_type, _, shared = DECODERS[config.use_moe, config.qk_norm]
    has_other_shared = config.use_moe and config.n_shared_experts != shared
    is_gguf, is_other = to == "gguf", config.llm is not None
    refused = {
        "YaRN positions (inference_rope_scaling) are not exported: export without": config.inference_rope_scaling,
        f"{config.n_shared_experts} shared experts are not exported: {model_type} has {shared}": has_other_shared,
        "experts are not exported to GGUF: use --to transformers": is_gguf and config.use_moe,
        "another language model is not exported to GGUF: export it to transformers, and convert that with llama.cpp's "
        "convert_hf_to_gguf.py": is_gguf and is_other,
    }
    if trained.weights.has_projection:
        form = FORMS.get(PROJECTORS[kind].exported_as)
        refused[f"a {kind} projection is not exported: transformers has none of its kind"] = form is None
        refused[f"a {tower} tower is not exported: {kind} projections are with {form and form.tower} only"] = (
            form is not None and form.tower != tower
        )
        refused["a projection with pixel shuffle is not exported"] = config.pixel_shuffle != 1
    for what, is_there in refused.items():
        if is_there:
            raise UsageError(what)


def chat_template(trained: LoadedModel) -> str:
    """Returns the prompt as a Jinja template; parts of a content are joined as in most training rows."""
    its, is_3v = trained.tokenizer.chat_template or "", has_image_pad(trained.tokenizer)
    name = "chat_template_3v.jinja" if is_3v else "chat_template.jinja"
    if uses_template(trained.tokenizer) or (is_3v and "tools" in its):
        name = "chat_template_parts.jinja"  # before the tokenizer's own
    template = Path(__file__).with_name(name).read_text(encoding="utf-8").rstrip()
    template = template.replace("SEPARATOR", "\\n" if "\n" in trained.prompt_form else "")
    if name == "chat_template_parts.jinja":
        template = template.replace("IMAGE", image_placeholder(trained.tokenizer))
        template = its if its.startswith(template) else template + its  # from an export, it has them
    return template


def text_config(config: VLMConfig) -> dict:
    """Returns the decoder as transformers describes it."""
    if config.llm:
        return config.llm | {"dtype": "float32"}
    model_type, architecture, shared_experts = DECODERS[config.use_moe, config.qk_norm]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    names += ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    names += ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = {"model_type": model_type, "architectures": [architecture]}
    fields |= {name: getattr(config, name) for name in names}
    fields |= {"hidden_act": "silu", "tie_word_embeddings": True, "dtype": "float32"}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    fields["qkv_bias" if model_type == "qwen2_moe" else "attention_bias"] = False
    if config.use_moe:
        fields |= {"num_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok}
        fields |= {"norm_topk_prob": True, "moe_intermediate_size": config.intermediate_size}
        fields["router_aux_loss_coef"] = config.aux_loss_alpha
    if shared_experts:
        fields["shared_expert_intermediate_size"] = config.intermediate_size
    return fields


def tokenizer_files(trained: LoadedModel) -> tuple[dict[str, dict], int | None]:
    """Returns the tokenizer's files by name, and the id of an image's placeholder, None for a language model.

    `@` cannot be LLaVA's image token, as its processor refuses texts with more of them than images: `<image>` gets the
    id of a byte that no text has. LFM2-VL's processor writes tokens around an image that the model has never seen: they
    are taken out of the text.
    """
    tokenizer, image_token_id = json.loads(trained.tokenizer.backend_tokenizer.to_str()), None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    settings |= {name: value for name in names if (value := getattr(trained.tokenizer, name))}
    settings.setdefault("pad_token", trained.tokenizer.convert_ids_to_tokens(trained.config.pad_token_id))
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": trained.config.max_position_embeddings}
    if uses_template(trained.tokenizer):
        tokenizer["post_processor"] = None  # the template writes the token that begins a text
    if trained.weights.has_projection:
        image_token_id, placeholder = trained.config.image_token_id, image_placeholder(trained.tokenizer)
        settings["image_token"] = IMAGE_TAG if placeholder == IMAGE_CHARACTER else placeholder
        if PROJECTORS[trained.config.projector].exported_as == "LFM2-VL":
            marks = [{"type": "Replace", "pattern": {"String": f"<|image_{mark}|>"}, "content": ""} for mark in SIDES]
            others = [tokenizer["normalizer"]] if tokenizer["normalizer"] else []
            if not others or others[0].get("normalizers", [])[: len(marks)] != marks:  # an export has them already
                tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [*marks, *others]}
    if settings.get("image_token") == IMAGE_TAG and not uses_template(trained.tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        image_token_id = vocabulary.get(IMAGE_TAG, vocabulary.get(UNUSED_BYTE))
        tokenizer["model"]["vocab"] = {IMAGE_TAG if i == image_token_id else name: i for name, i in vocabulary.items()}
        image_token = {"id": image_token_id, "content": IMAGE_TAG, "special": True}
        image_token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        others = [token for token in tokenizer["added_tokens"] if token["id"] != image_token_id]
        tokenizer["added_tokens"] = sorted([*others, image_token], key=lambda token: token["id"])
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}, image_token_id


def llava_files(trained: LoadedModel, image_token_id: int) -> dict[str, dict]:
    """Returns the files of LlavaForConditionalGeneration, CLIPImageProcessor and LlavaProcessor by name."""
    tower, side = trained.tower, trained.tower.config.image_size
    text = text_config(trained.config)
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": tower.config.to_diff_dict() | {"model_type": "clip_vision_model", "dtype": "float32"},
        "image_token_index": image_token_id,
        "image_seq_length": trained.config.image_tokens,
        "vision_feature_layer": -1,  # the last layer's output, before the final norm
        "vision_feature_select_strategy": "default",  # without the class token
        "projector_hidden_act": PROJECTORS[trained.config.projector].llava_activation,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": "float32",
    }
    pixels = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    pixels |= {f"do_{step}": True for step in ("convert_rgb", "resize", "center_crop", "rescale", "normalize")}
    pixels |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pixels |= {"rescale_factor": 1 / 255, "resample": tower.picture_settings["resample"]}
    pixels |= {"image_mean": tower.mean, "image_std": tower.std}
    tokens = {"patch_size": tower.config.patch_size, "num_additional_image_tokens": 1, "image_token": IMAGE_TAG}
    tokens |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"}
    return {"config.json": config, "preprocessor_config.json": pixels, "processor_config.json": tokens}


def lfm2_vl_files(trained: LoadedModel, image_token_id: int) -> dict[str, dict]:
    """Returns the files of Lfm2VlForConditionalGeneration, Lfm2VlImageProcessor and Lfm2VlProcessor by name.

    The processor keeps an image's aspect ratio, where this project squashes it: only square images give the same
    pixels. Its least and most tokens lie between a square and the next, so that no square is rounded to another size.
    """
    tower, side, text = trained.tower, math.isqrt(trained.tower.patches), text_config(trained.config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    names += ("patch_size", "hidden_act", "layer_norm_eps")
    vision = {"model_type": "siglip2_vision_model", "num_patches": tower.patches, "vision_use_head": False}
    config = {
        "model_type": "lfm2_vl",
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision | {name: getattr(tower.config, name) for name in names} | {"dtype": "float32"},
        "image_token_id": image_token_id,
        "projector_hidden_size": trained.config.hidden_size,
        "projector_hidden_act": "gelu",
        "downsample_factor": 1,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": "float32",
    }
    processor = {"processor_class": "Lfm2VlProcessor"}
    pixels = {"image_processor_type": "Lfm2VlImageProcessor"} | processor
    pixels |= {f"do_{step}": True for step in ("convert_rgb", "resize", "rescale", "normalize", "pad")}
    pixels |= {"do_image_splitting": False, "use_thumbnail": False, "downsample_factor": 1, "rescale_factor": 1 / 255}
    pixels |= {"encoder_patch_size": tower.config.patch_size, "tile_size": tower.size}
    pixels |= {"min_image_tokens": side**2 - side + 1, "max_image_tokens": side**2 + side - 1}
    pixels |= {"resample": tower.picture_settings["resample"], "image_mean": tower.mean, "image_std": tower.std}
    return {"config.json": config, "preprocessor_config.json": pixels, "processor_config.json": processor}


class Form(NamedTuple):
    """A class of transformers that models with images become."""

    tower: str  # the kind of tower that it takes
    files: Callable[[LoadedModel, int], dict[str, dict]]  # config.json and its processors' files, by name


# By name: see `Projector.exported_as`.
FORMS = {"LLaVA": Form("CLIP", llava_files), "LFM2-VL": Form("SigLIP", lfm2_vl_files)}
