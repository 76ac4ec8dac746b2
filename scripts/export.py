"""Export a trained model to transformers, or to llama.cpp and Ollama. Neither needs code of this repository.

    python scripts/export.py --weight sft_vlm                   out/sft_vlm_512-hf/: a LLaVA, with its processor
    python scripts/export.py --weight llm                       out/llm_512-hf/: a Llama
    python scripts/export.py --weight sft_vlm --to gguf         out/sft_vlm_512-gguf/: text model, mmproj, Modelfile
    python scripts/export.py --weight sft_vlm --picture a.jpg   out/a_224.png, which llama.cpp does not resize

AutoModelForImageTextToText.from_pretrained("out/sft_vlm_512-hf") loads such a folder, and so does
`python eval_vlm.py --load_from out/sft_vlm_512-hf`.
"""

import argparse
import json
import sys
from io import BytesIO
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from common.cli import ArgumentParser, file_path
from common.errors import UsageError, run_script
from common.files import whole_folder, write_atomically
from common.paths import SAVE_DIR, display_path
from dataset.chat import SYSTEM_PROMPT
from dataset.pictures import PictureError, PictureFormat, load_picture
from model.projectors import PROJECTORS
from model.transformers_names import to_transformers, to_vision_language
from model.vision_tower import read_tower_weights
from model.weights import TRAINING
from scripts.share.forms import FORMS, chat_template, check_exportable, text_config, tokenizer_files
from trainer.answering.loaded_model import LoadedModel, add_model_flags, find_model

SHARE = Path(__file__).parent / "share"


def write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_transformers(trained: LoadedModel, folder: Path):
    """Writes the model in its form, or the decoder alone where the weights have no projection."""
    files, image_token_id = tokenizer_files(trained)
    if trained.weights.has_projection:
        files |= FORMS[PROJECTORS[trained.config.projector].exported_as].files(trained, image_token_id)
        tensors = to_vision_language(trained.weights.tensors, read_tower_weights(trained.tower_path))
    else:
        files["config.json"] = text_config(trained.config)
        tensors = to_transformers(trained.weights.tensors)
    ids = {name: getattr(trained.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sidecar = {name: value for name, value in trained.weights.sidecar.items() if name != "tokenizer_sha256"}
    for name, content in (files | {"generation_config.json": ids, TRAINING: sidecar}).items():
        write_json(folder / name, content)
    (folder / "chat_template.jinja").write_text(chat_template(trained), encoding="utf-8")
    for name, tensor in tensors.items():
        half = tensor.half()
        tensors[name] = (half if torch.equal(half.to(tensor.dtype), tensor) else tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if trained.config.llm:
        check_written(trained, folder)


@torch.inference_mode()
def check_written(trained: LoadedModel, folder: Path):
    """Raises UsageError unless transformers computes the logits of another language model from its export.

    What such a model does beside its blocks and its head (a bias, a scale, a cap) is not part of the form.
    """
    kind = AutoModelForImageTextToText if trained.weights.has_projection else AutoModelForCausalLM
    theirs, loading = kind.from_pretrained(folder, output_loading_info=True)
    wrong = sorted(map(str, (*loading["missing_keys"], *loading["unexpected_keys"])))
    ids = torch.arange(4, 12)[None]
    expected = trained.load_model()(input_ids=ids, image_starts=torch.zeros(0, 2, dtype=torch.long)).logits
    difference = 0.0 if wrong else float((theirs(input_ids=ids).logits - expected).abs().max())
    if wrong or difference > 1e-3 * float(expected.abs().max()):
        reason = f"{wrong[0]} has no place" if wrong else f"its logits would differ by {difference:.2g}"
        raise UsageError(f"a {trained.config.llm['model_type']} is not exported with images: {reason}")


def write_gguf(trained: LoadedModel, folder: Path, name: str, quant: str) -> list[str]:
    """Writes the text model, the mmproj where there is a projection, Ollama's Modelfile and the sidecar.

    Returns:
        The names of text model and mmproj.
    """
    try:
        from scripts.share import gguf_files
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UsageError("--to gguf needs a package: pip install -r scripts/requirements-export.txt") from error
    names = [f"{name}-{quant}.gguf"]
    gguf_files.write_text(trained, folder / names[0], name, quant, chat_template(trained))
    if trained.weights.has_projection:
        names.append(f"mmproj-{name}-f32.gguf")
        gguf_files.write_mmproj(trained, folder / names[1], name)
    template = Template((SHARE / "Modelfile.template").read_text(encoding="utf-8"))
    mmproj = "".join(f"FROM ./{mmproj}\n" for mmproj in names[1:])
    modelfile = template.substitute(text=names[0], mmproj=mmproj, system=SYSTEM_PROMPT)
    (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
    write_json(folder / TRAINING, trained.weights.sidecar)
    return names


def write_pictures(trained: LoadedModel, pictures: list[Path], folder: Path) -> list[Path]:
    """Writes pictures as the tower takes them, PNGs that llama.cpp neither resizes nor pads; returns their paths.

    Raises:
        UsageError: If one cannot be read, or a file of its name holds something else.
    """
    paths, picture_format = [], PictureFormat(**trained.tower.picture_settings)
    for picture in pictures:
        try:
            pixels = load_picture(picture, picture_format=picture_format)
        except PictureError as error:
            raise UsageError(f"--picture {error}") from error
        png = BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(png, format="png")
        content, path = png.getvalue(), folder / f"{picture.stem}_{pixels.shape[-1]}.png"
        if path.is_file() and path.read_bytes() != content:
            raise UsageError(
                f"--picture {display_path(picture)} would overwrite {display_path(path)}, which holds something else: "
                "name another --folder for it"
            )
        write_atomically(path, lambda file, content=content: file.write(content))
        paths.append(path)
    return paths


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
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
        if args.to == "gguf":
            names = write_gguf(trained, part, name, args.quant)
        else:
            write_transformers(trained, part)
    print(f"{display_path(folder)}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")
    if names:
        print(f"try it: llama-server -m {' --mmproj '.join(display_path(folder / name) for name in names)}")
    elif trained.weights.has_projection:
        print(f"try it: python eval_vlm.py --load_from {display_path(folder)}")


if __name__ == "__main__":
    run_script(main)
