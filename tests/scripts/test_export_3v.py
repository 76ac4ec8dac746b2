"""minimind-3v leaves: as an LFM2-VL of transformers, and as GGUF files with the same features."""

import math

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from test_export_gguf import gelu, projected, read
from tiny import turn
from tiny_models import save_siglip, save_tokenizer_3v
from transformers import AutoModelForImageTextToText, AutoTokenizer

from common.errors import UsageError
from dataset.chat import IMAGE_PAD, ChatEncoder, load_tokenizer
from dataset.pictures import PictureFormat, load_picture
from dataset.prompts import prompt_batch
from model.answers import generate
from model.model_vlm import CONFIG_3V, MiniMindVLM, VLMConfig
from scripts import export
from trainer.answering.assistant import find_model

pytest_plugins = ["tiny"]
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SHAPE |= {"vocab_size": 300, "qk_norm": True, "n_shared_experts": 0, "vision_hidden_size": 64}
CHATS = [
    [turn("user", "What?")],
    [turn("user", "<image>\nHi"), turn("assistant", "a"), turn("user", "And?")],
    [turn("system", "Be brief"), turn("user", "<image><image>\n?")],
]


def save_3v(root, **shape) -> tuple[MiniMindVLM, list[str]]:
    """Writes weights of minimind-3v's form with tower and tokenizer; returns the model and the flags that name them."""
    tower = save_siglip(root / "tower", 64, intermediate_size=160)
    torch.manual_seed(0)
    model = MiniMindVLM(VLMConfig(**CONFIG_3V | SHAPE | shape), vision_model_path=tower).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        parameter.data = parameter.data.half().float()
    (root / "out").mkdir()
    file = root / "out" / f"sft_vlm_64{'_moe' * model.config.use_moe}.pth"
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, file)
    paths = {"--save_dir": root / "out", "--vision_model_path": tower}
    paths["--tokenizer_path"] = save_tokenizer_3v(root / "tokenizer")
    return model, [str(word) for pair in paths.items() for word in pair]


def patches(pixels: torch.Tensor) -> dict:
    """Returns what Lfm2VlImageProcessor makes of (N, 3, 256, 256) uint8 images."""
    normal = (pixels.float() / 255 - 0.5) / 0.5
    values = normal.view(-1, 3, 8, 32, 8, 32).permute(0, 2, 4, 3, 5, 1).reshape(-1, 64, 32 * 32 * 3)
    mask = torch.ones(len(values), 64, dtype=torch.long)
    return {
        "pixel_values": values,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[8, 8]] * len(values)),
    }


@pytest.mark.parametrize("use_moe", [False, True])
def test_transformers_reads_it_as_an_lfm2_vl_with_the_same_tokens_and_logits(tmp_path, use_moe):
    model, flags = save_3v(tmp_path, use_moe=use_moe)
    folder, again = tmp_path / "hf", tmp_path / "again"
    export.main([*flags, "--folder", str(folder)])
    theirs, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "Lfm2VlForConditionalGeneration"
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), ChatEncoder(load_tokenizer(tmp_path / "tokenizer"), 64)
    pixels = torch.randint(0, 256, (3, 3, 256, 256), dtype=torch.uint8)
    inputs = prompt_batch(encoder, CHATS, [[], [pixels[0]], [pixels[1], pixels[2]]])
    shown = [[one | {"content": one["content"].replace("<image>", IMAGE_PAD)} for one in chat] for chat in CHATS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in shown]
    # As Lfm2VlProcessor writes images: between two tokens that this model has never seen.
    texts = [text.replace(IMAGE_PAD, f"<|image_start|>{IMAGE_PAD * 64}<|image_end|>") for text in texts]
    ids = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(ids["input_ids"], inputs["input_ids"])
    with torch.inference_mode():
        ours = model(**inputs).logits
        new = theirs.generate(**ids, **patches(pixels), max_new_tokens=8, do_sample=False)
        difference = (theirs(**ids, **patches(pixels)).logits - ours)[ids["attention_mask"].bool()]
    assert float(difference.abs().max()) < 1e-4
    model.generation_config.eos_token_id = 2
    assert torch.equal(new[:, ids["input_ids"].shape[1] :], generate(model, inputs, 8))
    export.main(["--load_from", str(folder), "--folder", str(again)])
    for path in folder.iterdir():
        if path.name not in ("training.json", "complete.json"):
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_text_in_parts_is_joined_and_thinking_can_be_asked_for(tmp_path):
    _, flags = save_3v(tmp_path)
    export.main([*flags, "--folder", str(tmp_path / "hf")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    parts = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
    text = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>user\nWhat?\n{IMAGE_PAD}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    text = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True, open_thinking=True)
    assert text.endswith("<|im_start|>assistant\n<think>\n")


def test_the_processor_gives_the_pixels_of_square_images(tmp_path):
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    _, flags = save_3v(tmp_path)
    export.main([*flags, "--folder", str(tmp_path / "hf")])
    processor, picture_format = AutoProcessor.from_pretrained(tmp_path / "hf"), PictureFormat(**SQUASHED)
    for side in (3, 100, 256, 301, 777):
        Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
            path := tmp_path / f"{side}.png"
        )
        found = processor(text=IMAGE_PAD, images=[Image.open(path)], return_tensors="pt")
        assert found["spatial_shapes"].tolist() == [[8, 8]] and int((found["input_ids"] == 12).sum()) == 64
        expected = patches(load_picture(path, picture_format=picture_format)[None])["pixel_values"]
        assert float((found["pixel_values"][:, :64] - expected).abs().max()) < 2.1 / 127.5  # torch rounds otherwise


SQUASHED = {"size": 256, "resample": 2, "crop": False, "shortest_edge": None}


@torch.no_grad()
def test_llama_cpp_gets_a_layer_that_is_the_towers_last_norm(tmp_path):
    model, flags = save_3v(tmp_path)
    export.main([*flags, "--to", "gguf", "--folder", str(tmp_path / "gguf")])
    fields, tensors = read(tmp_path / "gguf" / "mmproj-sft_vlm_64-f32.gguf")
    assert fields["clip.vision.block_count"] == 3 and list(fields["clip.vision.feature_layer"]) == [3]
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    state = model.vision_encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    part = {name: torch.from_numpy(array) for name, array in tensors.items()}

    def norm(x, name, eps):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"], eps)

    assert not part["v.blk.2.attn_out.weight"].any() and not part["v.blk.2.attn_out.bias"].any()
    hidden = gelu(norm(state, "v.blk.2.ln2", 1e-6) @ part["v.blk.2.ffn_up.weight"].T + part["v.blk.2.ffn_up.bias"])
    state = state + hidden @ part["v.blk.2.ffn_down.weight"].T + part["v.blk.2.ffn_down.bias"]
    found = projected(tensors, norm(state, "v.post_ln", 1e-6), torch.nn.functional.gelu)
    expected = model.vision_proj(model.encode_images(pixels)).double()
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    text, matrices = read(tmp_path / "gguf" / "sft_vlm_64-f16.gguf")
    assert text["general.architecture"] == "qwen3" and text["qwen3.rope.dimension_count"] == 16
    ours = model.state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy()
    assert np.array_equal(matrices["blk.1.attn_q.weight"], ours) and "blk.1.attn_q_norm.weight" in matrices


def test_what_the_other_tower_has_is_refused(tmp_path):
    _, flags = save_3v(tmp_path)
    trained = find_model(export.parse_arguments(flags))
    trained.config.projector = "linear"
    with pytest.raises(UsageError, match="a SigLIP tower is not exported: linear projections are with CLIP only"):
        export.check_exportable(trained, "transformers")
    trained.config.projector, trained.config.pixel_shuffle = "norm_mlp", math.isqrt(4)
    with pytest.raises(UsageError, match="pixel shuffle"):
        export.check_exportable(trained, "transformers")


def test_think_marks_of_the_template_stay_tokens_in_llama_cpp(tmp_path):
    _, flags = save_3v(tmp_path)
    export.main([*flags, "--to", "gguf", "--folder", str(tmp_path / "gguf")])
    fields, _ = read(tmp_path / "gguf" / "sft_vlm_64-f16.gguf")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (tokens[25], kinds[25]) == ("<think>", gguf.TokenType.USER_DEFINED)
    assert (tokens[12], kinds[12]) == (IMAGE_PAD, gguf.TokenType.CONTROL)
