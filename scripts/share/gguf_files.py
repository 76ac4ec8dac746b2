"""Write a trained model as the two GGUF files of llama.cpp.

The text model is a `llama`, with norms per head a `qwen3`; tower and projection are a `clip` with the projector `mlp`.
"""

import json
from pathlib import Path

import gguf
import torch
from torch.nn import functional as F

from model.projectors import PROJECTORS
from model.vision_tower import load_vision_tower, read_tower_weights
from model.weights import to_transformers
from trainer.answering.assistant import LoadedModel

GELU_SCALE = 2.0**12  # |x| times this is beyond llama.cpp's half-precision GELU table, where its GELU is exact
LOUD = 2.0**30  # times a norm's output, it leaves nothing of what is added to it
# A token's dot product with the class token's state, divided by that state's square, is 1 for the class token and lower
# for patches. The gate opens above CLASS_TOKEN_FROM; a tenth more or less outweighs any value of the projection.
CLASS_TOKEN_FROM, STEEPNESS = 0.9, 2.0**12


def write(path: Path, kind: str, settings: dict, tensors: dict[str, torch.Tensor], quantization=None, layers=()):
    """Writes a file: each setting by the writer's method add_NAME; matrices quantized if asked for, others float32."""
    writer = gguf.GGUFWriter(path, kind)
    for setting, value in settings.items():
        getattr(writer, f"add_{setting}")(value)
    if layers:  # whose outputs, one after another, are the projection's input; the writer has no method for them
        # Without the last one's number, llama.cpp leaves the last layer out.
        writer.add_array("clip.vision.feature_layer", layers)
    for name, tensor in tensors.items():
        array, quantized = tensor.float().contiguous().numpy(), quantization if tensor.ndim > 1 else None
        writer.add_tensor(name, array if quantized is None else gguf.quantize(array, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_text(trained: LoadedModel, path: Path, name: str, quant: str, chat_template: str):
    """Writes the decoder and its tokenizer; ids of the model that the tokenizer lacks become padding."""
    config, content = trained.config, json.loads(trained.tokenizer.backend_tokenizer.to_str())
    kind, types = gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA, gguf.TokenType
    tokens = {number: (token, types.NORMAL) for token, number in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        tokens[token["id"]] = (token["content"], types.CONTROL if token["special"] else types.USER_DEFINED)
    tokens = [tokens.get(number, (f"[PAD{number}]", types.UNUSED)) for number in range(config.vocab_size)]

    settings = {"name": name, "file_type": gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"]}
    settings |= {"vocab_size": config.vocab_size, "context_length": config.max_position_embeddings}
    settings |= {"embedding_length": config.hidden_size, "block_count": config.num_hidden_layers}
    settings |= {"feed_forward_length": config.intermediate_size, "rope_dimension_count": config.head_dim}
    settings |= {"head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads}
    settings |= {"layer_norm_rms_eps": config.rms_norm_eps, "rope_freq_base": config.rope_theta}
    settings |= {"tokenizer_model": "gpt2", "tokenizer_pre": "gpt-2"}  # a byte-level BPE
    settings |= {"token_list": [token for token, _ in tokens], "token_types": [kind for _, kind in tokens]}
    settings["token_merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    settings |= {f"{token}_token_id": getattr(config, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    settings |= {"add_bos_token": False, "add_eos_token": False, "chat_template": chat_template}

    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    rotated = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    rotated = {} if config.qk_norm else rotated  # llama.cpp rotates a qwen3 as transformers does
    tensors = {}
    for ours, tensor in to_transformers(trained.weights.tensors).items():
        heads = rotated.get(ours.rpartition("self_attn.")[2])
        if heads:  # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        tensors[names.get_name(ours, (".weight",))] = tensor
    write(path, gguf.MODEL_ARCH_NAMES[kind], settings, tensors, gguf.GGMLQuantizationType[quant.upper()])


def write_mmproj(trained: LoadedModel, path: Path, name: str):
    config, parts = trained.tower.config, {"CLIP": clip_parts, "SigLIP": siglip_parts}[trained.tower.kind]
    tensors = {name: tensor for name, tensor in trained.weights.tensors.items() if name.startswith("vision_proj.")}
    tensors = {name.split(".", 2)[2]: tensor.float() for name, tensor in tensors.items()}
    tower, projection, layers = parts(trained, read_tower_weights(trained.tower_path), tensors)
    settings = {"name": name, "type": "mmproj", "file_type": gguf.LlamaFileType.ALL_F32}
    settings |= {"clip_has_vision_encoder": True, "clip_projector_type": "mlp"}
    vision = {"image_size": config.image_size, "patch_size": config.patch_size, "embedding_length": config.hidden_size}
    vision |= {"feed_forward_length": config.intermediate_size, "block_count": layers[-1]}
    vision |= {"head_count": config.num_attention_heads, "attention_layernorm_eps": config.layer_norm_eps}
    vision |= {"projection_dim": trained.config.hidden_size, "image_mean": list(trained.tower.mean)}
    vision |= {"image_std": list(trained.tower.std), "use_gelu": config.hidden_act != "quick_gelu"}
    settings |= {f"vision_{name}": value for name, value in vision.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers[-1])
    tower = {f"vision_tower.vision_model.{name}": tensor for name, tensor in tower.items()}
    tower = {names.get_name(name, (".weight", ".bias")): tensor for name, tensor in tower.items()}
    tensors = tower | {f"mm.{name}": tensor for name, tensor in projection.items()}
    write(path, "clip", settings, tensors, layers=layers)


@torch.no_grad()
def clip_parts(trained: LoadedModel, tower: dict, projection: dict) -> tuple[dict, dict, list[int]]:
    """Returns a CLIP tower's tensors, the projection's, and the layers whose outputs it takes.

    llama.cpp puts the class token after the patches but numbers positions as if it came first. Its position embedding
    therefore moves to the end. The first patch is lost, and the class token, then the last image token, is projected
    to zero if the projection is linear.
    """
    tower["embeddings.position_embedding.weight"] = tower["embeddings.position_embedding.weight"].roll(-1, 0)
    tower = {name: tensor for name, tensor in tower.items() if not name.startswith("post_layernorm")}
    layers, side = [trained.tower.config.num_hidden_layers], trained.tower.config.image_size
    if PROJECTORS[trained.config.projector].llava_activation != "linear":
        return tower, projection, layers
    # The class token's state before the first layer is the same for all images. The gate can tell it apart unless the
    # state of some patch of plain and noisy images is so similar that the gate could open for it.
    model = load_vision_tower(trained.tower_path)
    colours = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)  # black, white and the six between them
    noise = torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    pixels = torch.cat((colours[:, :, None, None].expand_as(noise), noise))
    pixels = (pixels - model.pixel_mean) / model.pixel_std
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states[0]
    class_state = states[0, 0]
    nearest = float((states[:, 1:] @ class_state).max() / class_state.square().sum())
    if nearest >= 2 * CLASS_TOKEN_FROM - 1:
        return tower, linear_as_mlp(projection["0.weight"], projection["0.bias"]), layers
    return tower, linear_as_mlp(projection["0.weight"], projection["0.bias"], class_state), [0, *layers]


def siglip_parts(trained: LoadedModel, tower: dict, layers: dict) -> tuple[dict, dict, list[int]]:
    """Returns a SigLIP tower's tensors, minimind-3v's projection, and the layer whose output it takes.

    llama.cpp's own `lfm2` projector has the same layers, but not for unmerged patches, and writes texts around images.
    As an `mlp` there is room for one norm after the tower, and the model has two: the tower's last, y, and the
    projection's. So a further layer, whose attention gives zero, adds LOUD * y to its input x by its own norm and its
    GELU layers, which as in `linear_as_mlp` give y exactly. The norm that follows does not see a scale, so it is the
    projection's, of y + x / LOUD.
    """
    tower = {name: tensor.float() for name, tensor in tower.items()}
    number, width = trained.tower.config.num_hidden_layers, trained.tower.hidden_size
    layer, zeros = f"encoder.layers.{number}", torch.zeros(width, width)
    as_mlp = linear_as_mlp(torch.eye(width), zeros[0])
    for part in ("q", "k", "v", "out"):
        tower |= {f"{layer}.self_attn.{part}_proj.weight": zeros, f"{layer}.self_attn.{part}_proj.bias": zeros[0]}
    tower |= {f"{layer}.layer_norm1.weight": zeros[0], f"{layer}.layer_norm1.bias": zeros[0]}
    tower |= {f"{layer}.layer_norm2.{part}": tower[f"post_layernorm.{part}"] for part in ("weight", "bias")}
    tower |= {f"{layer}.mlp.fc1.{part}": as_mlp[f"0.{part}"] for part in ("weight", "bias")}
    tower |= {f"{layer}.mlp.fc2.{part}": as_mlp[f"2.{part}"] * LOUD for part in ("weight", "bias")}
    tower |= {f"post_layernorm.{part}": layers[f"0.{part}"] for part in ("weight", "bias")}
    projection = {f"{int(name[0]) - 1}{name[1:]}": tensor for name, tensor in layers.items() if name[0] != "0"}
    return tower, projection, [number + 1]


def linear_as_mlp(weight: torch.Tensor, bias: torch.Tensor, class_state: torch.Tensor | None = None) -> dict:
    """Returns a linear layer y(x) = weight @ x + bias as llama.cpp's Linear, GELU, Linear, exactly.

    y = gelu(y) - gelu(-y), as gelu(a) - gelu(-a) = a. With a class state, llama.cpp's input is a token's state s before
    the first layer, then its last state x, and gelu(gate - y) - gelu(gate) is added: gate(s) is far above every y for
    the class token, where that is -y, and far below for patches, where it is 0. `class_state` is the class token's s.
    """
    size, width = weight.shape
    identity = torch.eye(size)
    first, biases, second = [weight, -weight], [bias, -bias], [identity, -identity]
    if class_state is not None:
        gate = (STEEPNESS * class_state / class_state.square().sum()).expand(size, -1)
        closed = torch.full((size,), -STEEPNESS * CLASS_TOKEN_FROM)
        first = [F.pad(rows, (width, 0)) for rows in first]  # y does not depend on s
        first += [torch.cat((gate, -weight), dim=1), F.pad(gate[:1], (0, width))]
        biases += [closed - bias, closed[:1]]
        second += [identity, -torch.ones(size, 1)]
    return {
        "0.weight": torch.cat(first) * GELU_SCALE,
        "0.bias": torch.cat(biases) * GELU_SCALE,
        "2.weight": torch.cat(second, dim=1) / GELU_SCALE,
        "2.bias": torch.zeros(size),
    }
