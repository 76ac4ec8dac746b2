"""Renames weights to those of transformers' LLaVA and LFM2-VL, and back.

A MiniMind decoder is a Llama, with experts a Qwen2-MoE; one with norms per head is a Qwen3, with experts a Qwen3-MoE.
LLaVA's projector is Linear, activation, Linear: a single linear layer is followed by the identity. LFM2-VL's has a
LayerNorm before the first, and its tower takes patches as vectors (row, column, channel), not through a convolution.
"""

import torch

DECODER, PROJECTOR, TOWER = "language_model.", "multi_modal_projector.", "vision_tower."
# The layers of the projectors by their names there.
LLAVA_LAYERS = {"linear_1": "vision_proj.vision_proj.0", "linear_2": "vision_proj.vision_proj.2"}
LFM2_LAYERS = {"layer_norm": "vision_proj.mlp.0", "linear_1": "vision_proj.mlp.1", "linear_2": "vision_proj.mlp.3"}
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


def to_vision_language(tensors: dict[str, torch.Tensor], tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a model's tensors, and its tower's (without `vision_model.`), to the class that has its projector."""
    renamed = to_transformers(tensors)
    if "vision_proj.mlp.0.weight" in tensors:
        layers, base = LFM2_LAYERS, "model."
        tower = tower | {PATCHES: tower[PATCHES].permute(0, 2, 3, 1).flatten(1)}
        names = {name: f"{base}{DECODER}{name.removeprefix(base)}" for name in renamed if name != "lm_head.weight"}
        renamed = {names.get(name, name): tensor for name, tensor in renamed.items()}
    else:
        layers, base = LLAVA_LAYERS, ""
        renamed = {f"{DECODER}{name}": tensor for name, tensor in renamed.items()}
        first, second = layers.values()
        if f"{second}.weight" not in tensors:  # one linear layer
            bias = tensors[f"{first}.bias"]
            identity = {"weight": torch.eye(len(bias)).to(bias), "bias": torch.zeros_like(bias)}
            tensors = tensors | {f"{second}.{part}": tensor for part, tensor in identity.items()}
    for layer, ours in layers.items():
        renamed |= {f"{base}{PROJECTOR}{layer}.{part}": tensors[f"{ours}.{part}"] for part in ("weight", "bias")}
    return renamed | {f"{base}{TOWER}vision_model.{name}": tensor for name, tensor in tower.items()}


def from_transformers(tensors: dict[str, torch.Tensor], projector_act: str | None) -> dict[str, torch.Tensor]:
    """Renames the tensors of an exported folder back to this project's; the tower's are left out.

    LLaVA's activation between the projector's two layers is `projector_act`: "linear" means there is one layer.
    """
    is_lfm2 = any(name.startswith(f"model.{DECODER}") for name in tensors)
    layers, renamed = LFM2_LAYERS if is_lfm2 else LLAVA_LAYERS, {}
    for name, tensor in tensors.items():
        if PROJECTOR in name:
            layer, part = name.split(".")[-2:]
            if layer in layers and (layer, projector_act) != ("linear_2", "linear"):
                renamed[f"{layers[layer]}.{part}"] = tensor
        elif TOWER not in name and "mlp.shared_expert_gate." not in name:
            name = name.replace(f"model.{DECODER}", "model.").removeprefix(DECODER)
            name = name.replace("mlp.shared_expert.", "mlp.shared_experts.0.")
            renamed[name] = tensor / 2 if name.endswith("mlp.shared_experts.0.down_proj.weight") else tensor
    return renamed
