"""Other language models as the decoder: the causal ones of transformers that take `inputs_embeds`; and adapters."""

import inspect
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.errors import UsageError, first_line
from common.paths import display_path
from common.schema import read_json
from model.model_minimind import CACHE_NAME, causal_lm_loss, learned_loss
from model.model_vlm import ImageInputs, MiniMindVLM, VLMConfig
from model.weights import LLM, LORA_SCALE, Weights


class LanguageModel:
    """Gives a causal language model of transformers the `forward` of `MiniMindForCausalLM`."""

    compute_loss = staticmethod(causal_lm_loss)

    def forward(self, input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, logits_to_keep, **others):
        learned_positions, use_cache = others.get("learned_positions"), others.get("use_cache")
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        inputs |= {CACHE_NAME: cache, "use_cache": cache is not None if use_cache is None else use_cache}
        if learned_positions is None:
            output, picked = super().forward(**inputs, logits_to_keep=logits_to_keep), slice(None)
        else:  # it computes the same columns of all rows
            places = (learned_positions - 1).clamp(min=0)
            columns, column = (places % labels.shape[1]).unique(return_inverse=True)
            output, picked = super().forward(**inputs, logits_to_keep=columns), (places // labels.shape[1], column)
        logits = output.logits[picked]
        loss = learned_loss(self.compute_loss, logits, labels, learned_positions, others.get("reduction", "mean"))
        return MoeCausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: getattr(output, CACHE_NAME)})


def build(config: VLMConfig, vision_model_path: str | Path | None):
    """Builds the vision-language model of a configuration: MiniMind's, or around another language model."""
    if config.llm is None:
        return MiniMindVLM(config, vision_model_path)
    llm = AutoConfig.for_model(**config.llm)
    ours = {*VLMConfig.__annotations__, "image_tokens", "eos_token_id", "pad_token_id", "use_moe"} - {"llm"}
    for name in sorted(ours):
        setattr(llm, name, getattr(config, name))
    base = AutoModelForCausalLM._model_mapping[type(llm)]
    return type(f"{base.__name__}VLM", (ImageInputs, LanguageModel, base), {})(llm, vision_model_path)


def check_language_model(folder: Path):
    """Raises UsageError unless a folder's configuration is that of a language model."""
    try:
        config = read_json(folder / "config.json", LLM)
        if config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"{config['model_type']:.40} is no causal language model of transformers")
    except (OSError, ValueError) as error:
        reason = "config.json is missing" if isinstance(error, FileNotFoundError) else f"config.json: {error}"
        raise UsageError(f"--llm_path {display_path(folder)} is no folder of a language model: {reason}") from error


def read_language_model(folder: Path, tokens: int, **ids: int) -> Weights:
    """Reads another language model's folder, of `check_language_model`; its embedding gets rows for all `tokens`.

    `ids` are the VLMConfig's image_token_id, eos_token_id and pad_token_id. Raises UsageError if it cannot be used.
    """
    try:
        how = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.float32}
        model, loading = AutoModelForCausalLM.from_pretrained(folder, **how, output_loading_info=True)
        if missing := sorted(map(str, loading["missing_keys"])):
            raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
        if unknown := {"inputs_embeds", "logits_to_keep"} - inspect.signature(model.forward).parameters.keys():
            raise ValueError(f"{type(model).__name__} takes no {' and no '.join(sorted(unknown))}")
        if any(float(weight.detach().abs().max()) > torch.finfo(torch.float16).max for weight in model.parameters()):
            raise ValueError("a weight is larger than 65,504, and weight files are in float16")
        if tokens > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(tokens, mean_resizing=False)
    except Exception as error:  # whatever transformers raises on a folder
        raise UsageError(f"--llm_path {display_path(folder)} cannot be used: {first_line(error)}") from error
    return Weights(folder, model.state_dict(), VLMConfig(llm=model.config.to_dict(), **ids), {})


def add_lora(model: nn.Module, rank: int):
    """Freezes the decoder and adds low-rank adapters, https://arxiv.org/abs/2106.09685; `weight_files` merges them."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise UsageError("--lora needs a package: pip install -r scripts/requirements-lora.txt") from error
    model.requires_grad_(False)
    blocks = model.base_model
    names = {name.split(".")[-1] for name, part in blocks.named_modules() if isinstance(part, nn.Linear)}
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=sorted(names)), blocks)
