"""Write a trained model as the two GGUF files of llama.cpp, and Ollama's Modelfile.

The text model is a `llama`, the vision tower and the projection are a `clip` with the projector `mlp`. llama.cpp's mlp
is always Linear, GELU, Linear; since gelu(x) - gelu(-x) = x, a single linear layer is still exact.
"""

import json
from pathlib import Path

import gguf
import torch
from PIL import Image

from dataset.chat import SYSTEM_PROMPT
from dataset.pictures import PictureFormat, preprocess_image
from dataset.scenes.draw import draw, heldout_scenes
from model.tower_files import read_tower_weights
from model.vision_tower import load_vision_tower
from trainer.support.trained import Trained

# |x| times this is beyond the range of llama.cpp's half-precision GELU table, where its GELU is exact.
GELU_SCALE = 2.0**12
# The class token is known by its state before the first layer: a token goes all the way towards it, patches less. At
# this share of the way it is shut off, so steeply that a tenth of the way outweighs any value of the projection.
CLASS_TOKEN_FROM, STEEPNESS = 0.9, 2.0**12
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TEXT_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
TOWER_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm": "v.pre_ln",
}
TOWER_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
}
QUANTS = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
MODELFILE = """FROM ./{text}
{mmproj}TEMPLATE \"\"\"{{{{- range .Messages }}}}<|im_start|>{{{{ .Role }}}}
{{{{ .Content }}}}<|im_end|>
{{{{ end }}}}<|im_start|>assistant
\"\"\"
SYSTEM "{system}"
PARAMETER stop "<|im_end|>"
PARAMETER repeat_penalty 1
"""


def rotary_to_gguf(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders a projection's rows: llama.cpp rotates neighbouring pairs, transformers the two halves of a head."""
    head_size = weight.shape[0] // heads
    return weight.view(heads, 2, head_size // 2, -1).transpose(1, 2).reshape(weight.shape)


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, quant: str | None):
    """Adds a matrix in the wanted precision, and whatever is no matrix (or not asked for) in float32."""
    array = tensor.float().contiguous().numpy()
    if quant is None or array.ndim < 2:
        writer.add_tensor(name, array)
        return
    writer.add_tensor(name, gguf.quantize(array, QUANTS[quant]), raw_dtype=QUANTS[quant])


def write(writer: gguf.GGUFWriter):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_text(trained: Trained, path: Path, name: str, quant: str, chat_template: str):
    """Writes the decoder and its tokenizer."""
    config = trained.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[quant])
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
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for ours, tensor in trained.weights.tensors.items():
        if ours.startswith("vision_proj.") or ours == "lm_head.weight":  # the head is tied
            continue
        theirs = TEXT_NAMES.get(ours)
        if theirs is None:
            _, _, layer, part = ours.removesuffix(".weight").split(".", 3)
            tensor = rotary_to_gguf(tensor, heads[LAYER_NAMES[part]]) if LAYER_NAMES[part] in heads else tensor
            theirs = f"blk.{layer}.{LAYER_NAMES[part]}.weight"
        add_tensor(writer, theirs, tensor, quant)
    write(writer)


def add_tokenizer(writer: gguf.GGUFWriter, trained: Trained):
    content = json.loads(trained.tokenizer.backend_tokenizer.to_str())
    ids, special = content["model"]["vocab"], {token["id"] for token in content["added_tokens"] if token["special"]}
    names = {number: name for name, number in ids.items()}
    names |= {token["id"]: token["content"] for token in content["added_tokens"]}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(trained.config.vocab_size)]
    types = [
        gguf.TokenType.CONTROL
        if number in special
        else gguf.TokenType.NORMAL
        if number in names
        else gguf.TokenType.UNUSED
        for number in range(len(tokens))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(trained.config.bos_token_id)
    writer.add_eos_token_id(trained.config.eos_token_id)
    writer.add_pad_token_id(trained.config.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)


def write_mmproj(trained: Trained, path: Path, name: str, class_token: str):
    """Writes the tower and the projection, in float32.

    Args:
        class_token: "last": llama.cpp puts the class token behind the patches, but numbers all as if it were first. Its
            row of the position embedding is put last, so that every patch gets its own; the first patch is lost, and
            the class token, which becomes the last image token, is projected to zero if the projection is linear.
            "first": as published, for a llama.cpp in which that is corrected.
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
    class_state = None
    if class_token == "last" and trained.config.projector == "linear":
        class_state = find_class_state(trained)
    # Without the number of the last layer, that layer would be left out.
    writer.add_array("clip.vision.feature_layer", [0] * (class_state is not None) + [tower.num_hidden_layers])
    for ours, tensor in read_tower_weights(trained.tower_path).items():
        if ours.startswith("post_layernorm"):
            continue
        if ours == "embeddings.position_embedding.weight" and class_token == "last":
            tensor = tensor.roll(-1, 0)
        add_tensor(writer, tower_name(ours), tensor, None)
    for theirs, tensor in projector(trained, class_state).items():
        add_tensor(writer, theirs, tensor, None)
    write(writer)


def tower_name(ours: str) -> str:
    if ours in TOWER_NAMES:
        return TOWER_NAMES[ours]
    stem, ending = ours.rsplit(".", 1)
    if stem in TOWER_NAMES:
        return f"{TOWER_NAMES[stem]}.{ending}"
    _, _, layer, part = stem.split(".", 3)
    return f"v.blk.{layer}.{TOWER_LAYER_NAMES[part]}.{ending}"


@torch.no_grad()
def find_class_state(trained: Trained) -> torch.Tensor | None:
    """Returns the class token's state before the first layer, (width,), the same for all images.

    None where patches of drawn, grey or noisy images come near it: they could be taken for it.
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


def projector(trained: Trained, class_state: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Returns llama.cpp's mm.0 and mm.2 of the projection.

    Args:
        class_state: Where given, each token is its first state and its last one after another, and the class token,
            which this state tells, is projected to zero.
    """
    ours = {name.removeprefix("vision_proj.vision_proj."): t.float() for name, t in trained.weights.tensors.items()}
    if trained.config.projector == "mlp":
        return {f"mm.{name}": ours[name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    weight, bias = ours["0.weight"], ours["0.bias"]
    first, second = torch.cat((weight, -weight)), torch.cat((torch.eye(len(bias)), -torch.eye(len(bias))), dim=1)
    biases = torch.cat((bias, -bias))
    if class_state is not None:
        # GELU(g - y) - GELU(g), with g far below zero for patches, is 0; with g far above, for the class token, it is
        # -y, and y was what the rest of the rows gives.
        gate = STEEPNESS * class_state / class_state.square().sum()
        threshold = -STEEPNESS * CLASS_TOKEN_FROM
        of_first = torch.cat((torch.zeros_like(first), gate.expand(len(bias) + 1, -1)))
        first = torch.cat((of_first, torch.cat((first, -weight, torch.zeros_like(weight[:1])))), dim=1)
        biases = torch.cat((biases, threshold - bias, torch.tensor([threshold])))
        second = torch.cat((second, torch.eye(len(bias)), -torch.ones(len(bias), 1)), dim=1)
    return {
        "mm.0.weight": first * GELU_SCALE,
        "mm.0.bias": biases * GELU_SCALE,
        "mm.2.weight": second / GELU_SCALE,
        "mm.2.bias": torch.zeros(len(bias)),
    }


def modelfile(text: str, mmproj: str | None) -> str:
    """Returns Ollama's Modelfile for files beside it."""
    return MODELFILE.format(text=text, mmproj=f"FROM ./{mmproj}\n" if mmproj else "", system=SYSTEM_PROMPT)
