"""Renames weights to those of transformers' LLaVA, and back.

A MiniMind decoder is a Llama, with experts a Qwen2-MoE; one with norms per head is a Qwen3, with experts a Qwen3-MoE.
LLaVA's projector is Linear, activation, Linear: a single linear layer is followed by the identity.
"""

import torch

DECODER, PROJECTOR, TOWER = "language_model.", "multi_modal_projector.", "vision_tower."


def to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a decoder's tensors to those of LlamaForCausalLM, or of Qwen2MoeForCausalLM where it has shared experts.

    Qwen3's have the same names as ours. The tied head is left out. Qwen2-MoE weighs its shared expert by the sigmoid of
    a gate: a gate of zeros makes that one half, and a doubled down projection makes it whole again, exactly.
    """
    renamed, shares_an_expert = {}, any(".shared_experts." in name for name in tensors)
    for name, tensor in tensors.items():
        if name.startswith("vision_proj.") or name == "lm_head.weight":
            continue
        name = name.replace("mlp.shared_experts.0.", "mlp.shared_expert.")
        renamed[name] = tensor * 2 if name.endswith("mlp.shared_expert.down_proj.weight") else tensor
        if shares_an_expert and name.endswith("mlp.gate.weight"):
            renamed[name.replace("mlp.gate.", "mlp.shared_expert_gate.")] = torch.zeros_like(tensor[:1])
    return renamed


def projector_to_llava(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a projection's tensors to those of LlavaMultiModalProjector."""
    first, second = (
        {part: tensors.get(f"vision_proj.vision_proj.{number}.{part}") for part in ("weight", "bias")}
        for number in (0, 2)
    )
    if second["weight"] is None:  # one linear layer
        second = {"weight": torch.eye(len(first["bias"])).to(first["bias"]), "bias": torch.zeros_like(first["bias"])}
    layers = {"linear_1": first, "linear_2": second}
    return {f"{PROJECTOR}{name}.{part}": layer[part] for name, layer in layers.items() for part in layer}


def from_transformers(tensors: dict[str, torch.Tensor], projector_act: str | None) -> dict[str, torch.Tensor]:
    """Renames the tensors of an exported folder back to this project's; the tower's are left out.

    Args:
        projector_act: LLaVA's activation between the projector's two layers: "linear" means there is one layer.
    """
    layers = {"linear_1": 0} if projector_act == "linear" else {"linear_1": 0, "linear_2": 2}
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(PROJECTOR):
            _, layer, part = name.split(".")
            if layer in layers:
                renamed[f"vision_proj.vision_proj.{layers[layer]}.{part}"] = tensor
        elif not name.startswith(TOWER) and "mlp.shared_expert_gate." not in name:
            name = name.removeprefix(DECODER).replace("mlp.shared_expert.", "mlp.shared_experts.0.")
            renamed[name] = tensor / 2 if name.endswith("mlp.shared_experts.0.down_proj.weight") else tensor
    return renamed
