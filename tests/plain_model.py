"""MiniMind-V in plain mathematics, the reference for the fast model.

Loops and whole matrices in float64 from the papers' formulas, sharing no code with `model/`. Also the formula for the
weights behind the recorded figures in tests/data.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).resolve().parent / "data"
PATCHES = 196
PLACEHOLDER = 34


def fill_by_name(name: str, tensor: torch.Tensor):
    """Fills a tensor with the weights behind the recorded figures: a sine that depends on the parameter's name."""
    phase = zlib.crc32(name.encode()) % 1000
    wave = np.sin(np.arange(tensor.numel(), dtype=np.float64) * 0.37 * (1 + phase / 1000) + phase)
    norms = ("layernorm.weight", "layrnorm.weight", "layer_norm1.weight", "layer_norm2.weight")
    is_norm = name.endswith("norm.weight") or any(norm in name for norm in norms)
    values = 1 + 0.1 * wave if is_norm else 0.08 * wave
    tensor.data.copy_(torch.from_numpy(values.astype(np.float32)).view(tensor.shape))


def fill_tower(tower):
    """Fills a vision tower by the names of the published checkpoint, whatever transformers calls them."""
    for name, tensor in tower.state_dict().items():
        fill_by_name("vision_model." + name.removeprefix("vision_model."), tensor)


def fill_decoder(model):
    """Fills the rest by name; of the tied tensor's two names, lm_head.weight is the one that counts."""
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: item[0] == "lm_head.weight"):
        fill_by_name(name, tensor)


def recorded(case: str, side: int = 224) -> dict:
    """Loads one recorded case: shape, input_ids (B, L), pixel_values or None, columns, logits, loss."""
    arrays = np.load(DATA / f"{case}.npz")
    images = len(arrays["spans"])
    index = np.arange(images * 3 * side * side, dtype=np.float64)
    pixels = np.sin(index * 0.013 + float(arrays["pixel_offset"])).astype(np.float32)
    return {
        "shape": json.loads(str(arrays["config"])),
        "input_ids": torch.from_numpy(arrays["input_ids"]).long(),
        "image_starts": torch.from_numpy(arrays["spans"]).long(),
        "pixel_values": torch.from_numpy(pixels).view(images, 3, side, side) if images else None,
        "columns": torch.from_numpy(arrays["columns"]).long(),
        "logits": torch.from_numpy(arrays["logits"]),
        "loss": float(arrays["loss" if "loss" in arrays else "loss_all_text_targets"]),
    }


def angular_frequencies(config) -> tuple[list[float], float]:
    """Returns the radians per position of each pair of a head, and the factor on queries and keys.

    YaRN (https://arxiv.org/abs/2309.00071): a pair that turns more than beta_fast times within the original context
    stays, one that turns less than beta_slow times is divided by the factor, and in between (pair indices rounded
    outwards, as in the authors' code) the two are blended linearly.
    """
    size, theta = config.hidden_size // config.num_attention_heads, config.rope_theta
    plain = [theta ** (-2 * pair / size) for pair in range(size // 2)]
    if not config.inference_rope_scaling:
        return plain, 1.0

    def pair_with(turns):
        return size / 2 * math.log(config.original_max_position_embeddings / (2 * math.pi * turns), theta)

    low = max(0, math.floor(pair_with(config.yarn_beta_fast)))
    high = min(size - 1, math.ceil(pair_with(config.yarn_beta_slow)))
    scaled = []
    for pair, frequency in enumerate(plain):
        kept = 1.0 if pair <= low else 0.0 if pair >= high else (high - pair) / (high - low)
        scaled.append(kept * frequency + (1 - kept) * frequency / config.yarn_factor)
    return scaled, config.yarn_attention_factor


def rms_norm(x_LD, weight, eps):
    return x_LD / (x_LD.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_LHE, frequencies, scale):
    """Rotates each pair (i, i + E/2) of a head as one complex number by position times frequency."""
    half = x_LHE.shape[-1] // 2
    pairs = torch.complex(x_LHE[..., :half], x_LHE[..., half:])
    angles = torch.arange(len(x_LHE), dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    turned = pairs * torch.polar(torch.full_like(angles, scale), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


def attention(x_LD, weights, config):
    length, heads, groups = len(x_LD), config.num_attention_heads, config.num_key_value_heads
    frequencies, scale = angular_frequencies(config)
    q_LHE = (x_LD @ weights["q_proj.weight"].T).view(length, heads, -1)
    k_LHE = (x_LD @ weights["k_proj.weight"].T).view(length, groups, -1).repeat_interleave(heads // groups, dim=1)
    v_LHE = (x_LD @ weights["v_proj.weight"].T).view(length, groups, -1).repeat_interleave(heads // groups, dim=1)
    if config.qk_norm:
        q_LHE = rms_norm(q_LHE, weights["q_norm.weight"], config.rms_norm_eps)
        k_LHE = rms_norm(k_LHE, weights["k_norm.weight"], config.rms_norm_eps)
    q_LHE, k_LHE = rotate(q_LHE, frequencies, scale), rotate(k_LHE, frequencies, scale)
    scores = torch.einsum("qhe,khe->hqk", q_LHE, k_LHE) / math.sqrt(q_LHE.shape[-1])
    scores = scores + torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
    weight_HQK = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("hqk,khe->qhe", weight_HQK, v_LHE).reshape(length, -1) @ weights["o_proj.weight"].T


def feed_forward(x, weights):
    gate = x @ weights["gate_proj.weight"].T
    return (gate / (1 + (-gate).exp()) * (x @ weights["up_proj.weight"].T)) @ weights["down_proj.weight"].T


def experts(x_LD, weights, config, is_token):
    """Sums each token's best experts, weighted to sum 1, and the shared ones; also returns the balancing loss."""
    number, best = config.n_routed_experts, config.num_experts_per_tok
    out, choices, probability = [], [0] * number, [0.0] * number
    for x_D, counts in zip(x_LD, is_token, strict=True):
        raw = (weights["gate.weight"] @ x_D).exp()
        scores = (raw / raw.sum()).tolist()
        chosen = sorted(range(number), key=lambda expert: -scores[expert])[:best]
        total = sum(scores[expert] for expert in chosen)
        routed = sum(scores[e] / total * feed_forward(x_D, below(weights, f"experts.{e}.")) for e in chosen)
        shared = sum(feed_forward(x_D, below(weights, f"shared_experts.{e}.")) for e in range(config.n_shared_experts))
        out.append(routed + shared)
        if counts:
            for expert in range(number):
                choices[expert] += expert in chosen
                probability[expert] += scores[expert]
    tokens = max(sum(map(bool, is_token)), 1)
    fractions = [number / (best * tokens) * chosen for chosen in choices]
    balance = config.aux_loss_alpha * sum(f * p / tokens for f, p in zip(fractions, probability, strict=True))
    return torch.stack(out), balance


def below(weights: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def embed(model, input_ids: list[int]) -> torch.Tensor:
    """Returns one sample's float64 embeddings (L, D)."""
    return model.state_dict()["model.embed_tokens.weight"].double()[input_ids]


def decode(model, x_LD: torch.Tensor, is_token=None) -> tuple[torch.Tensor, float]:
    """Returns one sample's logits (L, V) from its embeddings, and its balancing loss; `is_token` is 0 at pads."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    is_token = [1] * len(x_LD) if is_token is None else is_token
    balance = 0.0
    for index in range(config.num_hidden_layers):
        layer = below(weights, f"model.layers.{index}.")
        normed = rms_norm(x_LD, layer["input_layernorm.weight"], config.rms_norm_eps)
        x_LD = x_LD + attention(normed, below(layer, "self_attn."), config)
        normed = rms_norm(x_LD, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        if config.use_moe:
            fed, loss = experts(normed, below(layer, "mlp."), config, is_token)
            balance += loss
        else:
            fed = feed_forward(normed, below(layer, "mlp."))
        x_LD = x_LD + fed
    return rms_norm(x_LD, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T, balance


def norm_mlp(x_PW, weights) -> torch.Tensor:
    """Projects the patches of an image as minimind-3v does: layer norm, linear, GELU (the exact one), linear."""
    centred = x_PW - x_PW.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed * weights["mlp.0.weight"] + weights["mlp.0.bias"]
    hidden = normed @ weights["mlp.1.weight"].T + weights["mlp.1.bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return hidden @ weights["mlp.3.weight"].T + weights["mlp.3.bias"]


def splice(x_LD: torch.Tensor, starts: list[int], projected: list[torch.Tensor]) -> torch.Tensor:
    """Writes row j of image i at `starts[i] + j` of one sample's embeddings, patch by patch."""
    x_LD = x_LD.clone()
    for start, image in zip(starts, projected, strict=True):
        for patch in range(PATCHES):
            x_LD[start + patch] = image[patch]
    return x_LD


def image_starts(ids: list[int]) -> list[int]:
    """Returns where images begin in one sample: from left to right, 196 placeholders in a row are one."""
    starts, position = [], 0
    while position < len(ids):
        if ids[position : position + PATCHES] == [PLACEHOLDER] * PATCHES:
            starts.append(position)
            position += PATCHES
        else:
            position += 1
    return starts


def cross_entropy(logits_NV: torch.Tensor, targets: list[int]) -> float:
    """Returns the mean of -log p over the learned targets."""
    losses = [
        -math.log(torch.softmax(row.detach().double(), 0)[target])
        for row, target in zip(logits_NV, targets, strict=True)
        if target != -100
    ]
    return sum(losses) / len(losses)
