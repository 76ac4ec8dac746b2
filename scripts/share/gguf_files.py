"""Write a trained model as the two GGUF files of llama.cpp, and Ollama's Modelfile.

The text model is a `llama`; the vision tower and the projection are a `clip` with the projector `mlp`.
"""

import json
from pathlib import Path
from string import Template

import gguf
import torch
from PIL import Image

from dataset.chat import SYSTEM_PROMPT
from dataset.pictures import PictureFormat, preprocess_image
from dataset.scenes.draw import draw, heldout_scenes
from model.tower_files import read_tower_weights
from model.vision_tower import load_vision_tower
from trainer.answering.loaded_model import LoadedModel

# |x| times this is beyond the range of llama.cpp's half-precision GELU table, where its GELU is exact.
GELU_SCALE = 2.0**12
# Dot product with the class token's state, as a share of its own square: 1 for the class token, less for patches. The
# gate opens at this share, so steeply that a tenth above or below outweighs any value of the projection.
CLASS_TOKEN_FROM, STEEPNESS = 0.9, 2.0**12
QUANTS = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
MODELFILE = Template(
    '''FROM ./$text
${mmproj}TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
SYSTEM "$system"
PARAMETER stop "<|im_end|>"
PARAMETER repeat_penalty 1
'''
)


def modelfile(text: str, mmproj: str | None) -> str:
    """Returns Ollama's Modelfile for files in the same folder."""
    return MODELFILE.substitute(text=text, mmproj=f"FROM ./{mmproj}\n" if mmproj else "", system=SYSTEM_PROMPT)


def write(writer: gguf.GGUFWriter, tensors: dict[str, torch.Tensor], quant: str | None = None):
    """Writes the settings and the tensors: matrices as `quant` says, all others in float32."""
    for name, tensor in tensors.items():
        array, quantization = tensor.float().contiguous().numpy(), None
        if quant is not None and array.ndim > 1:
            quantization, _ = QUANTS[quant]
            array = gguf.quantize(array, quantization)
        writer.add_tensor(name, array, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_text(trained: LoadedModel, path: Path, name: str, quant: str, chat_template: str):
    """Writes the decoder and its tokenizer."""
    config = trained.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(QUANTS[quant][1])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    add_tokenizer(writer, trained)
    writer.add_chat_template(chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {}
    for ours, tensor in trained.weights.tensors.items():
        if ours.startswith("vision_proj.") or ours == "lm_head.weight":  # the head is tied
            continue
        if ours.endswith("q_proj.weight"):
            tensor = rotary_to_gguf(tensor, config.num_attention_heads)
        elif ours.endswith("k_proj.weight"):
            tensor = rotary_to_gguf(tensor, config.num_key_value_heads)
        tensors[names.get_name(ours, (".weight",))] = tensor
    write(writer, tensors, quant)


def rotary_to_gguf(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders a projection's rows: llama.cpp rotates neighbouring pairs, transformers the two halves of a head."""
    head_size = weight.shape[0] // heads
    return weight.view(heads, 2, head_size // 2, -1).transpose(1, 2).reshape(weight.shape)


def add_tokenizer(writer: gguf.GGUFWriter, trained: LoadedModel):
    """Adds the vocabulary and merges of a byte-level BPE; ids of the model that the tokenizer lacks become padding."""
    content, types = json.loads(trained.tokenizer.backend_tokenizer.to_str()), gguf.TokenType
    tokens = {number: (name, types.NORMAL) for name, number in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        tokens[token["id"]] = (token["content"], types.CONTROL if token["special"] else types.NORMAL)
    tokens = [tokens.get(number, (f"[PAD{number}]", types.UNUSED)) for number in range(trained.config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([name for name, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(trained.config.bos_token_id)
    writer.add_eos_token_id(trained.config.eos_token_id)
    writer.add_pad_token_id(trained.config.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def write_mmproj(trained: LoadedModel, path: Path, name: str, class_token: str):
    """Writes the tower and the projection, in float32.

    Args:
        class_token: "last": for today's llama.cpp, which puts the class token after the patches but numbers positions
            as if it came first. Its row of the position embedding moves to the end, so that every patch gets its own;
            the first patch is lost, and the class token, now the last image token, is projected to zero if the
            projection is linear. "first": as published, for a llama.cpp without that bug.
    """
    tower = trained.tower.config
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name(name)
    writer.add_type("mmproj")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(tower.num_hidden_layers)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_projection_dim(trained.config.hidden_size)
    writer.add_vision_image_mean(list(trained.tower.mean))
    writer.add_vision_image_std(list(trained.tower.std))
    writer.add_vision_use_gelu(tower.hidden_act == "gelu")
    is_linear = trained.config.projector == "linear"
    class_state = find_class_state(trained) if class_token == "last" and is_linear else None
    # The outputs of these layers, one after another, are the projection's input. Without the last one's number,
    # llama.cpp leaves the last layer out.
    writer.add_array("clip.vision.feature_layer", [0] * (class_state is not None) + [tower.num_hidden_layers])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, tower.num_hidden_layers)
    tensors = {}
    for ours, tensor in read_tower_weights(trained.tower_path).items():
        if ours == "embeddings.position_embedding.weight" and class_token == "last":
            tensor = tensor.roll(-1, 0)
        if not ours.startswith("post_layernorm"):
            tensors[names.get_name(f"vision_tower.vision_model.{ours}", (".weight", ".bias"))] = tensor
    weights = {name.removeprefix("vision_proj.vision_proj."): t.float() for name, t in trained.weights.tensors.items()}
    if is_linear:
        projection = linear_as_mlp(weights["0.weight"], weights["0.bias"], class_state)
    else:
        projection = {name: weights[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    write(writer, tensors | {f"mm.{name}": tensor for name, tensor in projection.items()})


@torch.no_grad()
def find_class_state(trained: LoadedModel) -> torch.Tensor | None:
    """Returns the class token's state before the first layer, (width,), the same for all images.

    None where patches of drawn, grey or noisy images come so near to it that they could be taken for it.
    """
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = [draw(scene) for scene in heldout_scenes()[:8]]
    images += [Image.new("RGB", (64, 64), (grey,) * 3) for grey in (0, 64, 128, 192, 255)]
    images += [Image.fromarray((255 * one).byte().permute(1, 2, 0).numpy()) for one in noise]
    picture_format = PictureFormat(**trained.tower.picture_settings)
    pixels = torch.stack([torch.from_numpy(preprocess_image(image, picture_format).copy()) for image in images])
    tower = load_vision_tower(trained.tower_path)
    pixels = (pixels / 255 - tower.pixel_mean) / tower.pixel_std
    states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[0]
    state = states[0, 0]
    nearest = float((states[:, 1:] @ state).max() / state.square().sum())
    return state if nearest < 2 * CLASS_TOKEN_FROM - 1 else None


def linear_as_mlp(weight: torch.Tensor, bias: torch.Tensor, class_state: torch.Tensor | None) -> dict:
    """Returns the exact Linear, GELU, Linear of one linear layer y(x) = weight @ x + bias.

    Since gelu(a) - gelu(-a) = a, it is gelu(y) - gelu(-y). With a class state, llama.cpp's input is a token's first
    state s before its last one x, and the gate g(s) is far below zero for patches and far above for the class token.
    Then gelu(g - y) - gelu(g) is added, which is 0 for patches and -y for the class token.

    Args:
        weight: (hidden, width)
        bias: (hidden,)
        class_state: (width,), of `find_class_state`; None projects the class token like the patches.
    """
    size = len(bias)
    first, biases = torch.cat((weight, -weight)), torch.cat((bias, -bias))
    second = torch.cat((torch.eye(size), -torch.eye(size)), dim=1)
    if class_state is not None:
        gate, threshold = STEEPNESS * class_state / class_state.square().sum(), -STEEPNESS * CLASS_TOKEN_FROM
        of_state = torch.cat((torch.zeros_like(first), gate.expand(size + 1, -1)))
        of_features = torch.cat((first, -weight, torch.zeros_like(weight[:1])))
        first = torch.cat((of_state, of_features), dim=1)
        biases = torch.cat((biases, threshold - bias, torch.tensor([threshold])))
        second = torch.cat((second, torch.eye(size), -torch.ones(size, 1)), dim=1)
    return {
        "0.weight": first * GELU_SCALE,
        "0.bias": biases * GELU_SCALE,
        "2.weight": second / GELU_SCALE,
        "2.bias": torch.zeros(size),
    }
