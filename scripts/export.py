"""Export a trained model to transformers, or to llama.cpp and Ollama.

Neither needs code of this repository.

    python scripts/export.py --weight sft_vlm
        out/sft_vlm_512-hf/: a LLaVA, with tower, tokenizer and processor
    python scripts/export.py --weight llm
        out/llm_512-hf/: a Llama
    python scripts/export.py --weight sft_vlm --to gguf
        out/sft_vlm_512-gguf/: text model, mmproj, Modelfile
    python scripts/export.py --weight sft_vlm --picture a.jpg
        out/a_224.png: the picture as llama.cpp takes it untouched

    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained("out/sft_vlm_512-hf")

`python eval_vlm.py --load_from out/sft_vlm_512-hf` reads such a folder back.
"""

import argparse
import json
import re
import sys
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from safetensors.torch import save_file

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.errors import UsageError, run_script
from common.files import whole_folder, write_together
from common.paths import SAVE_3V_DIR, SAVE_DIR, display_path
from dataset.chat import has_image_pad
from dataset.conversation import IMAGE_TAG
from dataset.pictures import PictureError, PictureFormat, load_picture
from model.projectors import PROJECTORS
from model.tower_files import read_tower_weights
from model.transformers_names import DECODER, TOWER, projector_to_llava, to_transformers
from model.vlm_config import VLMConfig
from model.weights import TRAINING
from trainer.answering.loaded_model import LoadedModel, add_model_flags, find_model

SHARE = Path(__file__).parent / "share"
UNUSED_BYTE = "ÿ"  # how a byte-level BPE writes 0xFF, which is in no UTF-8 text


def chat_template(trained: LoadedModel) -> str:
    """Returns the prompt as a Jinja template; parts of a content are joined as in most training rows.

    Templates keep every line break and space that is not Jinja's, so those that indent the files are removed.
    """
    name = "chat_template_3v.jinja" if has_image_pad(trained.tokenizer) else "chat_template.jinja"
    template = re.sub(r"\n +", "", (SHARE / name).read_text(encoding="utf-8")).rstrip()
    return template.replace("SEPARATOR", "\\n" if "\n" in trained.prompt_form else "")


def text_config(config: VLMConfig) -> dict:
    """Returns the decoder as transformers' Llama, or Qwen2-MoE where it has experts; with norms per head, as Qwen3.

    Raises:
        UsageError: If they cannot express it.
    """
    if config.inference_rope_scaling:
        raise UsageError("stretched positions (inference_rope_scaling) are not exported: train and export without")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    names += ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    names += ("bos_token_id", "eos_token_id", "pad_token_id")
    shape = {name: getattr(config, name) for name in names}
    shape |= {"head_dim": config.head_dim, "hidden_act": "silu", "tie_word_embeddings": True, "dtype": "float32"}
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if not config.use_moe:
        kind, name = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")
        return {"model_type": kind, "architectures": [name], "attention_bias": False} | shape
    shape |= {"num_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok}
    shape |= {"norm_topk_prob": True, "moe_intermediate_size": config.intermediate_size}
    shape |= {"router_aux_loss_coef": config.aux_loss_alpha}
    if config.n_shared_experts != (0 if config.qk_norm else 1):
        fits = "Qwen3-MoE, which has norms per head, has none" if config.qk_norm else "Qwen2-MoE has one"
        raise UsageError(f"{config.n_shared_experts} shared experts are not exported: {fits}")
    if config.qk_norm:
        return {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False} | shape
    shared = {"shared_expert_intermediate_size": config.intermediate_size, "qkv_bias": False}
    return {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]} | shared | shape


def llava_config(trained: LoadedModel, image_token_id: int) -> dict:
    """Returns the whole model as transformers' LLaVA.

    Raises:
        UsageError: If LLaVA cannot express it.
    """
    config, tower = trained.config, trained.tower
    if has_image_pad(trained.tokenizer):
        alone = f"python scripts/export.py --save_dir {display_path(SAVE_3V_DIR)} --weight llm"
        raise UsageError(f"of minimind-3v the language model alone is exported, not the one with images: {alone}")
    if tower.kind != "CLIP":
        raise UsageError(f"a {tower.kind} tower is not exported: LLaVA takes features before the last norm")
    if config.pixel_shuffle != 1:
        raise UsageError("a projection with pixel shuffle is not exported: LLaVA has none")
    if PROJECTORS[config.projector].llava_activation is None:
        raise UsageError(f"a {config.projector} projection is not exported: LLaVA has none of its kind")
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": text_config(config),
        "vision_config": tower.config.to_diff_dict() | {"model_type": "clip_vision_model", "dtype": "float32"},
        "image_token_index": image_token_id,
        "image_seq_length": config.image_tokens,
        "vision_feature_layer": -1,  # the last layer's output, before the final norm
        "vision_feature_select_strategy": "default",  # without the class token
        "projector_hidden_act": PROJECTORS[config.projector].llava_activation,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def tokenizer_files(trained: LoadedModel, sees_images: bool) -> tuple[dict[str, dict], int | None]:
    """Returns the tokenizer's files by name, and the id of `<image>`: the token of a byte that no text has.

    `@` cannot be LLaVA's image token: its processor refuses a text with more of them than images.
    """
    tokenizer, image_token_id = json.loads(trained.tokenizer.backend_tokenizer.to_str()), None
    vocabulary = tokenizer["model"]["vocab"]
    if sees_images:
        image_token_id = vocabulary.get(IMAGE_TAG, vocabulary.get(UNUSED_BYTE))
        tokenizer["model"]["vocab"] = {IMAGE_TAG if i == image_token_id else name: i for name, i in vocabulary.items()}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [token for token in tokenizer["added_tokens"] if token["id"] != image_token_id]
        tokenizer["added_tokens"] = sorted(
            [*added, {"id": image_token_id, "content": IMAGE_TAG, **flags}], key=lambda token: token["id"]
        )
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    settings |= {name: getattr(trained.tokenizer, name) for name in names}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": trained.config.max_position_embeddings}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}, image_token_id


def processor_files(trained: LoadedModel) -> dict[str, dict]:
    """Returns what LlavaProcessor and its image processor are made of, by file name."""
    tower, side = trained.tower, trained.tower.config.image_size
    pixels = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    pixels |= {f"do_{step}": True for step in ("convert_rgb", "resize", "center_crop", "rescale", "normalize")}
    pixels |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pixels |= {"rescale_factor": 1 / 255, "resample": tower.resample, "image_mean": tower.mean, "image_std": tower.std}
    tokens = {"patch_size": tower.config.patch_size, "num_additional_image_tokens": 1, "image_token": IMAGE_TAG}
    tokens |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"}
    return {"preprocessor_config.json": pixels, "processor_config.json": tokens}


def in_half_where_exact(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as float16 where that loses nothing, else as it is."""
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor


def write_transformers(trained: LoadedModel, folder: Path):
    """Writes a LlavaForConditionalGeneration, or the decoder alone where the weights have no projection.

    Raises:
        UsageError: If transformers has no such model.
    """
    sees_images = trained.weights.has_projection
    files, image_token_id = tokenizer_files(trained, sees_images)
    tensors = to_transformers(trained.weights.tensors)
    if sees_images:
        config = llava_config(trained, image_token_id)
        files |= processor_files(trained)
        tensors = {f"{DECODER}{name}": tensor for name, tensor in tensors.items()}
        tensors |= projector_to_llava(trained.weights.tensors)
        tower = read_tower_weights(trained.tower_path)
        tensors |= {f"{TOWER}vision_model.{name}": tensor for name, tensor in tower.items()}
    else:
        config = text_config(trained.config)
    ids = {name: getattr(trained.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sidecar = {name: value for name, value in trained.weights.sidecar.items() if name != "tokenizer_sha256"}
    files |= {"config.json": config, "generation_config.json": ids, TRAINING: sidecar}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template(trained), encoding="utf-8")
    tensors = {name: in_half_where_exact(tensor).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_gguf(trained: LoadedModel, folder: Path, name: str, quant: str, class_token: str):
    """Writes the text model, the mmproj where the weights have a projection, Ollama's Modelfile, and the sidecar.

    Raises:
        UsageError: If llama.cpp has no such model.
    """
    try:
        from scripts.share import gguf_files
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UsageError("--to gguf needs a package: pip install -r scripts/requirements-export.txt") from error
    sees_images, mmproj = trained.weights.has_projection, f"mmproj-{name}-f32.gguf"
    if sees_images:  # first: what it refuses is in no form exported
        llava_config(trained, 0)
    if trained.config.use_moe:
        raise UsageError("experts are not exported to GGUF: use --to transformers")
    if trained.config.qk_norm:
        raise UsageError("norms per head (minimind-3v) are not exported to GGUF: use --to transformers")
    text_config(trained.config)  # refuses what a Llama cannot express
    text = f"{name}-{quant}.gguf"
    gguf_files.write_text(trained, folder / text, name, quant, chat_template(trained))
    if sees_images:
        gguf_files.write_mmproj(trained, folder / mmproj, name, class_token)
    (folder / "Modelfile").write_text(gguf_files.modelfile(text, mmproj if sees_images else None), encoding="utf-8")
    sidecar = json.dumps(trained.weights.sidecar, ensure_ascii=False, indent=2)
    (folder / TRAINING).write_text(sidecar + "\n", encoding="utf-8")


def write_pictures(trained: LoadedModel, pictures: list[Path], folder: Path) -> list[Path]:
    """Writes pictures as the tower takes them, PNGs that llama.cpp neither resizes nor pads; returns their paths.

    Raises:
        UsageError: If another picture, or any other file, has the name of one; nothing is written then.
    """
    files = {}
    for picture in pictures:
        pixels, file = load_picture(picture, picture_format=PictureFormat(**trained.tower.picture_settings)), BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, format="png")
        path, content = folder / f"{picture.stem}_{pixels.shape[-1]}.png", file.getvalue()
        if path.exists() or path in files:
            if content != (files[path] if path in files else path.is_file() and path.read_bytes()):
                raise UsageError(
                    f"--picture {display_path(picture)} would overwrite {display_path(path)}, which holds something "
                    "else: name another --folder for it"
                )
        files[path] = content
    write_together({path: lambda file, content=content: file.write(content) for path, content in files.items()})
    return list(files)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument_group("the export").add_argument
    add("--to", choices=("transformers", "gguf"), default="transformers", help="gguf: for llama.cpp and Ollama")
    add("--quant", choices=("f16", "q8_0"), default="f16", help="precision of the text model's matrices in a GGUF")
    what = "order of the tower's positions in a GGUF; first: for a llama.cpp that puts the class token first"
    add("--class_token", choices=("last", "first"), default="last", help=what)
    add("--folder", type=file_path, help="where to (default: NAME-hf or NAME-gguf in --save_dir)")
    add("--overwrite", action="store_true", help="replace the folder, if this script wrote all in it")
    what = "only crop these pictures to PNGs of the tower's size, which llama.cpp takes untouched"
    add("--picture", type=file_path, nargs="+", help=what)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    trained = find_model(args)
    if args.picture:
        folder = (args.folder or args.save_dir or SAVE_DIR).absolute()
        try:
            for path in write_pictures(trained, args.picture, folder):
                print(display_path(path))
        except PictureError as error:
            raise UsageError(f"--picture {error}") from error
        return
    path = trained.weights.path
    name = path.parent.name if args.load_from != "model" else path.stem
    kind = {"transformers": "hf", "gguf": "gguf"}[args.to]
    folder = (args.folder or (args.save_dir or SAVE_DIR) / f"{name}-{kind}").absolute()
    with whole_folder(folder, {"exported_by": "scripts/export.py"}, args.overwrite, "--folder") as part:
        if args.to == "gguf":
            write_gguf(trained, part, name, args.quant, args.class_token)
        else:
            write_transformers(trained, part)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{display_path(folder)}: {size / 1e6:.1f} MB")
    if args.to == "gguf":
        text = next(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj-"))
        mmproj = "".join(f" --mmproj {display_path(path)}" for path in folder.glob("mmproj-*.gguf"))
        print(f"try it: llama-server -m {display_path(text)}{mmproj}")
    elif trained.weights.has_projection:
        print(f"try it: python eval_vlm.py --load_from {display_path(folder)}")


if __name__ == "__main__":
    run_script(main)
