"""Export a trained model to transformers, or to llama.cpp and Ollama. Neither needs code of this repository.

    python scripts/export.py --weight sft_vlm                   out/sft_vlm_512-hf/: a LLaVA, with its processor
    python scripts/export.py --weight llm                       out/llm_512-hf/: a Llama
    python scripts/export.py --weight sft_vlm --to gguf         out/sft_vlm_512-gguf/: text model, mmproj, Modelfile
    python scripts/export.py --weight sft_vlm --picture a.jpg   out/a_224.png, which llama.cpp does not resize

`python eval_vlm.py --load_from out/sft_vlm_512-hf` loads such a folder, as transformers does.
"""

import argparse
import json
import math
import sys
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.cli import ArgumentParser, file_path
from common.errors import UsageError, run_script
from common.files import whole_folder, write_atomically
from common.paths import SAVE_DIR, display_path
from dataset.chat import IMAGE_CHARACTER, IMAGE_TAG, SYSTEM_PROMPT, has_image_pad, image_placeholder, uses_template
from dataset.file_kinds import quiet_libraries
from dataset.pictures import PictureError, PictureFormat, load_picture
from model.model_vlm import VLMConfig
from model.projectors import PROJECTORS
from model.vision_tower import read_tower_weights
from model.weights import TRAINING, to_transformers, to_vision_language
from trainer.answering.assistant import LoadedModel, add_model_flags, find_model

SHARE = Path(__file__).parent / "share"
UNUSED_BYTE = "ÿ"  # how a byte-level BPE writes 0xFF, which is in no UTF-8 text
# By (use_moe, qk_norm): the model type in transformers. Only qwen2_moe has a shared expert, one.
DECODERS = {(False, False): "llama", (False, True): "qwen3", (True, False): "qwen2_moe", (True, True): "qwen3_moe"}


def check_exportable(trained: LoadedModel, to: str):
    """Raises UsageError if transformers or, for `to` "gguf", llama.cpp has no such model."""
    config, tower, kind, is_gguf = trained.config, trained.tower.kind, trained.config.projector, to == "gguf"
    model_type = DECODERS[config.use_moe, config.qk_norm]
    shared = int(model_type == "qwen2_moe")
    has_other_shared = config.use_moe and config.n_shared_experts != shared
    refused = {
        "YaRN positions (inference_rope_scaling) are not exported: export without": config.inference_rope_scaling,
        f"{config.n_shared_experts} shared experts are not exported: {model_type} has {shared}": has_other_shared,
        "experts are not exported to GGUF: use --to transformers": is_gguf and config.use_moe,
        "another language model is not exported to GGUF: export it to transformers, and convert that with llama.cpp's "
        "convert_hf_to_gguf.py": is_gguf and config.llm,
    }
    if trained.weights.has_projection:
        form = PROJECTORS[kind].exported_as
        refused[f"a {kind} projection is not exported: transformers has none of its kind"] = form not in FORMS
        its, *_ = FORMS.get(form, (tower,))
        refused[f"a {tower} tower is not exported: {kind} projections are with {its} only"] = tower != its
        refused["a projection with pixel shuffle is not exported"] = config.pixel_shuffle != 1
    for what, is_there in refused.items():
        if is_there:
            raise UsageError(what)


def chat_template(trained: LoadedModel) -> str:
    """Returns the prompt as a Jinja template; parts of a content are joined as in most training rows."""
    its, is_3v = trained.tokenizer.chat_template or "", has_image_pad(trained.tokenizer)
    name = "chat_template_3v.jinja" if is_3v else "chat_template.jinja"
    goes_before_its = uses_template(trained.tokenizer) or (is_3v and "tools" in its)
    path = SHARE / ("chat_template_parts.jinja" if goes_before_its else name)
    template = path.read_text(encoding="utf-8").rstrip().replace("IMAGE", image_placeholder(trained.tokenizer))
    template = template.replace("SEPARATOR", "\\n" if "\n" in trained.prompt_form else "")
    if not goes_before_its:
        return template
    return its if its.startswith(template) else template + its  # from an export, it has them


def text_config(config: VLMConfig) -> dict:
    if config.llm:
        return config.llm | {"dtype": "float32"}
    model_type = DECODERS[config.use_moe, config.qk_norm]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    names += ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    names += ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = {"model_type": model_type, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}
    fields |= {name: getattr(config, name) for name in names}
    fields |= {"hidden_act": "silu", "tie_word_embeddings": True, "dtype": "float32"}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    fields["qkv_bias" if model_type == "qwen2_moe" else "attention_bias"] = False
    if config.use_moe:
        fields |= {"num_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok}
        fields |= {"norm_topk_prob": True, "moe_intermediate_size": config.intermediate_size}
        fields["router_aux_loss_coef"] = config.aux_loss_alpha
    if model_type == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = config.intermediate_size
    return fields


def tokenizer_files(trained: LoadedModel) -> tuple[dict[str, dict], int | None]:
    """Returns the tokenizer's files by name, and the id of an image's placeholder, None for a language model.

    `@` cannot be LLaVA's image token, as its processor refuses texts with more of them than images: `<image>` gets the
    id of a byte that no text has. LFM2-VL's processor writes tokens around an image that the model has never seen: they
    are taken out of the text.
    """
    tokenizer, image_token_id = json.loads(trained.tokenizer.backend_tokenizer.to_str()), None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    settings |= {name: value for name in names if (value := getattr(trained.tokenizer, name))}
    settings.setdefault("pad_token", trained.tokenizer.convert_ids_to_tokens(trained.config.pad_token_id))
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": trained.config.max_position_embeddings}
    if uses_template(trained.tokenizer):
        tokenizer["post_processor"] = None  # the template writes the token that begins a text
    if trained.weights.has_projection:
        image_token_id, placeholder = trained.config.image_token_id, image_placeholder(trained.tokenizer)
        settings["image_token"] = IMAGE_TAG if placeholder == IMAGE_CHARACTER else placeholder
        if PROJECTORS[trained.config.projector].exported_as == "LFM2-VL":
            its, texts = tokenizer["normalizer"] or {}, ("<|image_start|>", "<|image_end|>")
            marks = [{"type": "Replace", "pattern": {"String": text}, "content": ""} for text in texts]
            if its.get("normalizers", [])[: len(marks)] != marks:  # an export has them already
                tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [*marks, *([its] if its else [])]}
    if settings.get("image_token") == IMAGE_TAG and not uses_template(trained.tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        image_token_id = vocabulary.get(IMAGE_TAG, vocabulary.get(UNUSED_BYTE))
        tokenizer["model"]["vocab"] = {IMAGE_TAG if i == image_token_id else name: i for name, i in vocabulary.items()}
        image_token = {"id": image_token_id, "content": IMAGE_TAG, "special": True}
        image_token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        others = [token for token in tokenizer["added_tokens"] if token["id"] != image_token_id]
        tokenizer["added_tokens"] = sorted([*others, image_token], key=lambda token: token["id"])
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}, image_token_id


def llava_files(trained: LoadedModel, text: dict, image_token_id: int) -> dict[str, dict]:
    """Returns the files of LlavaForConditionalGeneration, CLIPImageProcessor and LlavaProcessor by name."""
    tower, side = trained.tower, trained.tower.config.image_size
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}
    config["vision_config"] = tower.config.to_diff_dict() | {"model_type": "clip_vision_model", "dtype": "float32"}
    config |= {"image_token_index": image_token_id, "image_seq_length": trained.config.image_tokens}
    config["vision_feature_layer"] = -1  # the last layer's output, before the final norm
    config["vision_feature_select_strategy"] = "default"  # without the class token
    config["projector_hidden_act"] = PROJECTORS[trained.config.projector].llava_activation
    config["multimodal_projector_bias"] = True
    pixels = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    pixels |= {f"do_{step}": True for step in ("convert_rgb", "resize", "center_crop", "rescale", "normalize")}
    pixels |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    pixels |= {"rescale_factor": 1 / 255, "resample": tower.picture_settings["resample"]}
    pixels |= {"image_mean": tower.mean, "image_std": tower.std}
    tokens = {"patch_size": tower.config.patch_size, "num_additional_image_tokens": 1, "image_token": IMAGE_TAG}
    tokens |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"}
    return {"config.json": config, "preprocessor_config.json": pixels, "processor_config.json": tokens}


def lfm2_vl_files(trained: LoadedModel, text: dict, image_token_id: int) -> dict[str, dict]:
    """Returns the files of Lfm2VlForConditionalGeneration, Lfm2VlImageProcessor and Lfm2VlProcessor by name.

    The processor keeps an image's aspect ratio, where this project squashes it: only square images give the same
    pixels. Its least and most tokens lie between a square and the next, so that no square is rounded to another size.
    """
    tower, side = trained.tower, math.isqrt(trained.tower.patches)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    names += ("patch_size", "hidden_act", "layer_norm_eps")
    vision = {"model_type": "siglip2_vision_model", "num_patches": tower.patches, "vision_use_head": False}
    config = {"model_type": "lfm2_vl", "architectures": ["Lfm2VlForConditionalGeneration"], "text_config": text}
    config["vision_config"] = vision | {name: getattr(tower.config, name) for name in names} | {"dtype": "float32"}
    config |= {"image_token_id": image_token_id, "projector_hidden_size": trained.config.hidden_size}
    config |= {"projector_hidden_act": "gelu", "downsample_factor": 1}
    processor = {"processor_class": "Lfm2VlProcessor"}
    pixels = {"image_processor_type": "Lfm2VlImageProcessor"} | processor
    pixels |= {f"do_{step}": True for step in ("convert_rgb", "resize", "rescale", "normalize", "pad")}
    pixels |= {"do_image_splitting": False, "use_thumbnail": False, "downsample_factor": 1, "rescale_factor": 1 / 255}
    pixels |= {"encoder_patch_size": tower.config.patch_size, "tile_size": tower.size}
    pixels |= {"min_image_tokens": side**2 - side + 1, "max_image_tokens": side**2 + side - 1}
    pixels |= {"resample": tower.picture_settings["resample"], "image_mean": tower.mean, "image_std": tower.std}
    return {"config.json": config, "preprocessor_config.json": pixels, "processor_config.json": processor}


# Of models with images: kind of tower, and what writes config.json and the processors' files.
FORMS = {"LLaVA": ("CLIP", llava_files), "LFM2-VL": ("SigLIP", lfm2_vl_files)}


def write_transformers(trained: LoadedModel, folder: Path):
    """Writes the model in its form, or the decoder alone where the weights have no projection.

    Raises UsageError if transformers computes other logits of another language model then: what such a model does
    beside its blocks and its head (a bias, a scale, a cap) is not part of the form.
    """
    files, image_token_id = tokenizer_files(trained)
    files["config.json"] = text = text_config(trained.config)
    kind, tensors = AutoModelForCausalLM, to_transformers(trained.weights.tensors)
    if trained.weights.has_projection:
        _, files_of = FORMS[PROJECTORS[trained.config.projector].exported_as]
        files |= files_of(trained, text, image_token_id)
        files["config.json"] |= {"tie_word_embeddings": text["tie_word_embeddings"], "dtype": "float32"}
        tensors = to_vision_language(trained.weights.tensors, read_tower_weights(trained.tower_path))
        kind = AutoModelForImageTextToText
    ids = {name: getattr(trained.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sidecar = {name: value for name, value in trained.weights.sidecar.items() if name != "tokenizer_sha256"}
    for name, content in (files | {"generation_config.json": ids, TRAINING: sidecar}).items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template(trained), encoding="utf-8")
    for name, tensor in tensors.items():
        half = tensor.half()
        tensors[name] = (half if torch.equal(half.to(tensor.dtype), tensor) else tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if trained.config.llm:
        theirs, loading = kind.from_pretrained(folder, output_loading_info=True)
        wrong = sorted(map(str, (*loading["missing_keys"], *loading["unexpected_keys"])))
        ids = torch.arange(4, 12)[None]
        with torch.inference_mode():
            expected = trained.load_model()(input_ids=ids, image_starts=torch.zeros(0, 2, dtype=torch.long)).logits
            difference = 0.0 if wrong else float((theirs(input_ids=ids).logits - expected).abs().max())
        if wrong or difference > 1e-3 * float(expected.abs().max()):
            reason = f"{wrong[0]} has no place" if wrong else f"its logits would differ by {difference:.2g}"
            raise UsageError(f"a {trained.config.llm['model_type']} is not exported with images: {reason}")


def write_gguf(trained: LoadedModel, folder: Path, name: str, quant: str) -> list[str]:
    """Writes text model, mmproj if there is a projection, Modelfile and sidecar; returns the names of the first two."""
    try:
        from scripts.share import gguf_files
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}: pip install -r scripts/requirements-export.txt installs what it needs") from error
    names = [f"{name}-{quant}.gguf"]
    gguf_files.write_text(trained, folder / names[0], name, quant, chat_template(trained))
    if trained.weights.has_projection:
        names.append(f"mmproj-{name}-f32.gguf")
        gguf_files.write_mmproj(trained, folder / names[1], name)
    modelfile = (SHARE / "Modelfile.template").read_text(encoding="utf-8").replace("$system", SYSTEM_PROMPT)
    (folder / "Modelfile").write_text("".join(f"FROM ./{file}\n" for file in names) + modelfile, encoding="utf-8")
    sidecar = json.dumps(trained.weights.sidecar, ensure_ascii=False, indent=2)
    (folder / TRAINING).write_text(sidecar + "\n", encoding="utf-8")
    return names


def write_pictures(trained: LoadedModel, pictures: list[Path], folder: Path) -> list[Path]:
    """Writes pictures as the tower takes them, PNGs that llama.cpp neither resizes nor pads; returns their paths."""
    paths, picture_format = [], PictureFormat(**trained.tower.picture_settings)
    for picture in pictures:
        try:
            pixels = load_picture(picture, picture_format=picture_format)
        except PictureError as error:
            raise UsageError(f"--picture {error}") from error
        png = BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(png, format="png")
        path = folder / f"{picture.stem}_{pixels.shape[-1]}.png"
        if path.is_file() and path.read_bytes() != png.getvalue():
            what = f"--picture {display_path(picture)} would overwrite {display_path(path)}, which holds something else"
            raise UsageError(f"{what}: name another --folder for it")
        write_atomically(path, lambda file, png=png: file.write(png.getvalue()))
        paths.append(path)
    return paths


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, imports=True)
    add_model_flags(parser)
    add = parser.add_argument_group("the export").add_argument
    add("--to", choices=("transformers", "gguf"), default="transformers", help="gguf: for llama.cpp and Ollama")
    add("--quant", choices=("f16", "q8_0"), default="f16", help="precision of the text model's matrices in a GGUF")
    add("--folder", type=file_path, help="where to write (default: NAME-hf or NAME-gguf in --save_dir)")
    add("--overwrite", action="store_true", help="replace the folder, if this script wrote all files in it")
    add("--picture", type=file_path, nargs="+", help="only crop these pictures to PNGs that llama.cpp leaves untouched")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    quiet_libraries(is_main=True)
    trained, save_dir = find_model(args), args.save_dir or SAVE_DIR
    if args.picture:
        for path in write_pictures(trained, args.picture, (args.folder or save_dir).absolute()):
            print(display_path(path))
        return
    check_exportable(trained, args.to)
    path, names = trained.weights.path, []
    name = path.stem if args.load_from == "model" else path.parent.name
    folder = (args.folder or save_dir / f"{name}-{'gguf' if args.to == 'gguf' else 'hf'}").absolute()
    with whole_folder(folder, {"exported_by": "scripts/export.py"}, args.overwrite, "--folder") as part:
        try:
            if args.to == "gguf":
                names = write_gguf(trained, part, name, args.quant)
            else:
                write_transformers(trained, part)
        except (OSError, SafetensorError) as error:
            # Neither safetensors nor numpy, which writes a GGUF's tensors ("... requested and ... written"), passes the
            # system's error on.
            if isinstance(error, OSError) and " written" not in str(error):
                raise
            raise OSError(f"the disk is probably full ({error})") from error
    print(f"{display_path(folder)}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")
    if names:
        print(f"try it: llama-server -m {' --mmproj '.join(display_path(folder / name) for name in names)}")
    elif trained.weights.has_projection:
        print(f"try it: python eval_vlm.py --load_from {display_path(folder)}")


if __name__ == "__main__":
    run_script(main)
