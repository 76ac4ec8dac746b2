"""Renames weights to those of transformers' LLaVA and LFM2-VL, and back.

A MiniMind decoder is a Llama, with experts a Qwen2-MoE; one with norms per head is a Qwen3, with experts a Qwen3-MoE.
LLaVA's projector is Linear, activation, Linear: a single linear layer is followed by the identity. LFM2-VL's has a
LayerNorm before the first, and its tower takes patches as vectors (row, column, channel), not through a convolution.
"""

import torch

DECODER, PROJECTOR, TOWER = "language_model.", "multi_modal_projector.", "vision_tower."
LFM2_LAYERS = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}
PATCHES = "embeddings.patch_embedding.weight"


def to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a decoder's tensors to those of LlamaForCausalLM, or of Qwen2MoeForCausalLM where it has shared experts.

    Qwen3's have the same names as ours, and another language model's are its own. A tied head is left out. Qwen2-MoE
    weighs its shared expert by the sigmoid of a gate: a gate of zeros makes that one half, and a doubled down
    projection makes it whole again, exactly.
    """
    renamed, shares_an_expert = {}, any(".shared_experts." in name for name in tensors)
    head, embedding = (tensors.get(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    is_tied = None not in (head, embedding) and torch.equal(head, embedding)
    for name, tensor in tensors.items():
        if name.startswith("vision_proj.") or (name == "lm_head.weight" and is_tied):
            continue
        name = name.replace("mlp.shared_experts.0.", "mlp.shared_expert.")
        renamed[name] = tensor * 2 if name.endswith("mlp.shared_expert.down_proj.weight") else tensor
        if shares_an_expert and name.endswith("mlp.gate.weight"):
            renamed[name.replace("mlp.gate.", "mlp.shared_expert_gate.")] = torch.zeros_like(tensor[:1])
    return renamed


def to_llava(tensors: dict[str, torch.Tensor], tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a model's tensors and its tower's (without `vision_model.`) to LlavaForConditionalGeneration's."""
    first, second = (
        {part: tensors.get(f"vision_proj.vision_proj.{number}.{part}") for part in ("weight", "bias")}
        for number in (0, 2)
    )
    if second["weight"] is None:  # one linear layer
        second = {"weight": torch.eye(len(first["bias"])).to(first["bias"]), "bias": torch.zeros_like(first["bias"])}
    renamed = {f"{DECODER}{name}": tensor for name, tensor in to_transformers(tensors).items()}
    for name, layer in {"linear_1": first, "linear_2": second}.items():
        renamed |= {f"{PROJECTOR}{name}.{part}": layer[part] for part in layer}
    return renamed | {f"{TOWER}vision_model.{name}": tensor for name, tensor in tower.items()}


def to_lfm2_vl(tensors: dict[str, torch.Tensor], tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a model's tensors and its tower's (without `vision_model.`) to Lfm2VlForConditionalGeneration's."""
    decoder = {name.removeprefix("model."): tensor for name, tensor in to_transformers(tensors).items()}
    renamed = {f"model.{DECODER}{name}": tensor for name, tensor in decoder.items() if name != "lm_head.weight"}
    renamed |= {name: tensor for name, tensor in decoder.items() if name == "lm_head.weight"}
    for layer, number in LFM2_LAYERS.items():
        for part in ("weight", "bias"):
            renamed[f"model.{PROJECTOR}{layer}.{part}"] = tensors[f"vision_proj.mlp.{number}.{part}"]
    tower = tower | {PATCHES: tower[PATCHES].permute(0, 2, 3, 1).flatten(1)}
    return renamed | {f"model.{TOWER}vision_model.{name}": tensor for name, tensor in tower.items()}


def from_transformers(tensors: dict[str, torch.Tensor], projector_act: str | None) -> dict[str, torch.Tensor]:
    """Renames the tensors of an exported folder back to this project's; the tower's are left out.

    LLaVA's activation between the projector's two layers is `projector_act`: "linear" means there is one layer.
    """
    if is_lfm2 := any(name.startswith(f"model.{DECODER}") for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    numbers = {"linear_1": 0} if projector_act == "linear" else {"linear_1": 0, "linear_2": 2}
    layers = {name: f"vision_proj.{number}" for name, number in numbers.items()}
    layers = {name: f"mlp.{number}" for name, number in LFM2_LAYERS.items()} if is_lfm2 else layers
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(PROJECTOR):
            _, layer, part = name.split(".")
            if layer in layers:
                renamed[f"vision_proj.{layers[layer]}.{part}"] = tensor
        elif not name.startswith(TOWER) and "mlp.shared_expert_gate." not in name:
            if is_lfm2 and name.startswith(DECODER):
                name = f"model.{name.removeprefix(DECODER)}"
            name = name.removeprefix(DECODER).replace("mlp.shared_expert.", "mlp.shared_experts.0.")
            renamed[name] = tensor / 2 if name.endswith("mlp.shared_experts.0.down_proj.weight") else tensor
    return renamed
