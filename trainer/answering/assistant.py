"""A trained model, found by the flags that eval_vlm.py and the scripts share, that answers questions about pictures."""

import argparse
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from common.cli import file_path, number, temperature
from common.errors import UsageError
from common.files import not_a_file
from common.paths import SAVE_DIR, display_path, is_builtin_data
from common.schema import read_json
from dataset.chat import check_tokenizer, encoder_for, load_tokenizer, tokenizer_hash
from dataset.pictures import PICTURE_FORMATS, PictureError, PictureFormat, load_picture
from dataset.prompts import DEFAULT_FORM, prompt_batch, with_images
from model import weights as weight_io
from model.answers import generate, quantize, word_maps
from model.language_model import build
from model.model_vlm import MiniMindVLM, VLMConfig, fit_config_to_tower
from model.vision_tower import TowerSettings
from trainer.bundles import BUILTIN, BUNDLES, MINIMIND2, bundle_of, find_weights, read_tower, recorded_folders

PRECISIONS = ("float32", "bfloat16", "int8")
DARKEST = 0.75  # opacity over a patch that does nothing for a word
BRIGHT = 1.0  # nats: a word whose peak is lower stays darker

# Chinese, Japanese and Korean text has no spaces: a path may start and end beside any of its characters.
WIDE = "\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U0001f000-\U0003ffff"
OPENING, CLOSING = re.escape("'\"`“‘«([{<（【《「『"), re.escape("'\"`”’»)]}>）】》」』")
KINDS = (ending[1:] for ending, kind in Image.registered_extensions().items() if kind in PICTURE_FORMATS)
ENDING = rf"\.(?:{'|'.join(KINDS)}|heic|heif|jxl|jp2|svg|psd|ico|tga)"
STARTS = re.compile(rf"(?<![^\s{WIDE}{OPENING}{CLOSING},;:=|·—…])(?<!\\\s)(?=\S)(?!['\"]{{2}})")
MOST_STARTS = 64  # tried for a path: keeps the time in proportion to the line's length
ENDS = re.compile(rf"(?<=[^/\\]){ENDING}(?![A-Za-z0-9]|\.\w)", re.IGNORECASE)  # in "a.jpg.bak" there is no a.jpg
QUOTED = re.compile(rf"""(?<!\w)(?:"[^"]*{ENDING}"|'[^']*{ENDING}'|“[^“”]*{ENDING}”)(?!\w)""", re.IGNORECASE)
MARK = "\ufffc"  # stands for a picture in the line
WORD = re.compile(rf"{QUOTED.pattern}|(?:\\\s|[^\s{OPENING}{CLOSING},;|，。、；！？{MARK}])+", re.IGNORECASE)
LOOKS_LIKE_PATH = re.compile(
    rf"(?:~[\w.-]*/|\.\.?/|[a-z]:[\\/]|/[^/]+/)[^/]|.*[^/\\]{ENDING}(?![a-z0-9])", re.IGNORECASE
)
SHELL = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.?)""")  # a shell's quotes
AROUND = re.compile(rf"[\s{OPENING}]*{MARK}[\s{CLOSING}]*[,;，、；]?\s*")


def add_model_flags(parser: argparse.ArgumentParser, runs: bool = False):
    """Adds the flags that name a trained model, and if it `runs`, those that say on what and in which precision."""
    add = parser.add_argument_group("the model").add_argument
    what = "model: the weight files in --save_dir; anything else: a transformers folder"
    add("--load_from", default="model", help=what)
    add("--save_dir", type=file_path, help=f"where the weight files lie (default: {display_path(SAVE_DIR)})")
    add("--weight", default="sft_vlm", help="NAME of NAME_{hidden_size}.pth, or a path to a .pth")
    add("--hidden_size", type=int, help="which of several files of that name (default: the newest)")
    add("--num_hidden_layers", type=int, help="layers (default: what the file says)")
    add("--use_moe", type=int, choices=(0, 1), help="1: the file with experts (default: what the file says)")
    trained_with = "(default: what the weights were trained with)"
    add("--tokenizer_path", type=file_path, help=f"the tokenizer's folder {trained_with}")
    add("--vision_model_path", type=file_path, help=f"the vision tower's folder {trained_with}")
    if not runs:
        return
    add("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    what = "int8: the matrices in a quarter of the memory, CPU only; bfloat16: for hardware that is fast at it"
    add("--dtype", choices=PRECISIONS, default=PRECISIONS[0], help=what)
    what = "1: compile the step of one token; takes half a minute, worth it for long talks"
    add("--compile", "--use_compile", type=int, choices=(0, 1), default=0, help=what)


def add_generation_flags(group, max_new_tokens: int):
    """Adds the flags of sampling, which default to the weights' recipe."""
    add = group.add_argument
    add("--open_thinking", type=int, choices=(0, 1), default=0, help="1: think before the answer (minimind-3v)")
    add("--max_new_tokens", type=number(int, 1), default=max_new_tokens, help="longest answer in tokens")
    for name, kind, what in (
        ("temperature", temperature, "0: always the likeliest token"),
        ("top_p", number(float, 1e-3, 1), "sample from the likeliest tokens of this share"),
        ("top_k", number(int, 0), "sample from this many of the likeliest tokens; 0: from all"),
    ):
        default = MINIMIND2.sampling[name]
        add(f"--{name}", type=kind, help=f"{what} (default: {default}, or as the recipe of the weights says)")


@dataclass(frozen=True)
class LoadedModel:
    """Weights, and the tokenizer and tower they were trained with."""

    weights: weight_io.Weights
    config: VLMConfig  # fitted to the tower
    tokenizer: PreTrainedTokenizerBase
    tokenizer_path: Path
    tower: TowerSettings
    tower_path: Path

    @property
    def prompt_form(self) -> str:
        """Image position in most training rows."""
        return self.weights.sidecar.get("prompt_form", DEFAULT_FORM)

    @property
    def knows_only_scenes(self) -> bool:
        """Whether it was trained on the built-in set and nothing else."""
        data = self.weights.sidecar.get("arguments", {}).get("data_path")
        return bundle_of(self.weights) is BUILTIN and is_builtin_data(data)

    def sampling(self, args: argparse.Namespace) -> dict:
        """Returns the sampling settings: those of the flags, else of the weights' recipe."""
        usual = bundle_of(self.weights).sampling
        return usual | {name: getattr(args, name) for name in usual if getattr(args, name) is not None}

    def load_model(self) -> MiniMindVLM:
        """Builds the model on the CPU in float32; a projection that the weights lack is drawn at random."""
        model = build(self.config, self.tower_path)
        weight_io.load_into(model, self.weights)
        return model.eval()


def find_model(args: argparse.Namespace) -> LoadedModel:
    """Reads the weights that the flags name, with tokenizer and tower; raises UsageError if one is missing or unfit."""
    if args.load_from != "model":
        weights = weight_io.read_folder(Path(args.load_from).expanduser())
    else:
        save_dir, name = args.save_dir or SAVE_DIR, os.path.expanduser(args.weight)
        towers = (bundle.folders["vision_model_path"] for bundle in BUNDLES.values() if bundle is not BUILTIN)
        has_downloads = weight_io.matching_weights(save_dir, name) or any(tower.exists() for tower in towers)
        if name == "llm" and not has_downloads:
            save_dir = BUILTIN.weights_dir  # the built-in language model if no other was downloaded
        weights = weight_io.read_weights(find_weights(save_dir, name, args.hidden_size, args.use_moe))
    weight_io.check_shape_flags(weights, args)
    folder, bundle = weights.path.parent, bundle_of(weights)
    recorded = recorded_folders(weights.sidecar, weights.path)
    folders = bundle.folders | {flag: it for flag, it in recorded.items() if it.is_dir() or bundle is not BUILTIN}
    if args.load_from != "model" and (folder / "tokenizer.json").is_file():
        folders["tokenizer_path"] = folder
    if args.load_from != "model" and read_json(folder / "config.json", weight_io.EXPORTED_CONFIG).get("vision_config"):
        folders["vision_model_path"] = folder
    folders |= {flag: typed.resolve() for flag in folders if (typed := getattr(args, flag))}
    tokenizer_path, tower_path = folders["tokenizer_path"], folders["vision_model_path"]
    tokenizer = load_tokenizer(tokenizer_path)
    check_tokenizer(weights, tokenizer_hash(tokenizer), tokenizer_path, tokenizer)
    tower = read_tower(tower_path)
    try:
        config = fit_config_to_tower(weights.config, tower, weights.has_projection and not weights.sidecar)
    except ValueError as error:
        raise UsageError(f"{display_path(weights.path)} does not fit {display_path(tower_path)}: {error}") from error
    return LoadedModel(weights, config, tokenizer, tokenizer_path, tower, tower_path)


class Assistant:
    """A model on a device; raises UsageError if `dtype` is not for that device, or if it is to think and cannot."""

    def __init__(self, loaded: LoadedModel, device, dtype="float32", compiles=False, thinks=False):
        self.loaded, self.tokenizer, self.compiles = loaded, loaded.tokenizer, compiles
        self.encoder = encoder_for(self.tokenizer, loaded.config.image_tokens)
        self.encoder.open_thinking = thinks
        if thinks and not self.encoder.can_think:
            raise UsageError("--open_thinking: the prompt form of these weights has no think block")
        self.picture_format = PictureFormat(**loaded.tower.picture_settings)
        model = loaded.load_model()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())  # int8 matrices are none
        self.model = in_precision(model.to(device), dtype)

    def load_picture(self, source: Path | bytes) -> torch.Tensor:
        """Returns a picture's file as the tower takes it, uint8 (3, size, size); raises PictureError."""
        if isinstance(source, Path) and (reason := not_a_file(source)):
            raise PictureError(str(source), reason)
        return load_picture(source, picture_format=self.picture_format)

    def turn(self, question: str, images: int, before: Sequence[dict] = (), max_new_tokens: int = 1) -> dict:
        """Returns a user's turn with its images in place; raises UsageError for wrong tags or too many tokens."""
        try:
            turn = {"role": "user", "content": with_images(question, images, self.loaded.prompt_form)}
            length = len(self.encoder.encode([[*before, turn]], add_generation_prompt=True)[0].input_ids)
        except ValueError as error:
            raise UsageError(str(error)) from error
        most = self.model.config.max_position_embeddings
        if length + max_new_tokens > most:
            raise UsageError(
                f"{length:,} tokens and --max_new_tokens {max_new_tokens:,} are more than the model's {most:,} "
                "positions: ask less at once"
            )
        return turn

    @torch.inference_mode()
    def answers(self, conversations, pictures, max_new_tokens: int, temperature=0.0, top_p=1.0, top_k=0, **settings):
        """Returns the token ids of each conversation's next turn, up to its end token; all in one batch.

        `conversations` are lists of messages, `pictures` the tensors of each. Temperature 0 takes the likeliest token,
        others draw from the likeliest: of the share `top_p`, and `top_k` of them (0: all). `settings` are for
        transformers' `generate`: a streamer, stopping criteria.
        """
        if temperature > 0:
            settings |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        inputs = prompt_batch(self.encoder, conversations, pictures)
        rows = generate(self.model, inputs, max_new_tokens, self.compiles, **settings)
        ends = (rows == self.model.config.eos_token_id).int()
        # A row that ended is padded until the longest has.
        lengths = torch.where(ends.any(dim=1), ends.argmax(dim=1) + 1, rows.shape[1])
        return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]

    def look(self, conversation: list[dict], pictures: list[torch.Tensor], ids: torch.Tensor, *stops):
        """Returns the words of an answer, each with its map over the pictures; see `word_maps`."""
        inputs = prompt_batch(self.encoder, [conversation], [pictures])
        return word_maps(self.model, self.tokenizer, inputs, ids, *stops)


def mask_of(maps: np.ndarray) -> Image.Image:
    """Returns maps (H, W) of a word as a mask that darkens where it does not look, scaled by its own peak."""
    maps = np.nan_to_num(maps).clip(0)
    # A word that no patch makes more probable stays dark.
    shade = np.rint(255 * DARKEST * (1 - maps / max(maps.max(), BRIGHT))).astype(np.uint8)
    return Image.fromarray(np.dstack((np.zeros_like(shade), shade)), "LA")


def in_precision(model: MiniMindVLM, dtype: str) -> MiniMindVLM:
    """Returns the model in one of PRECISIONS; raises UsageError for int8 on another device than a CPU."""
    if dtype != "int8":
        return model.to(getattr(torch, dtype))
    if model.device.type != "cpu":
        raise UsageError(f"--dtype int8 is for the CPU, not for {model.device}: use bfloat16 there")
    quantize(model)
    return model


def find_pictures(line: str) -> tuple[str, list[Path]]:
    """Returns the question that a line asks (empty where only punctuation is left), and its picture files in order.

    Raises ValueError if something looks like a picture or a path but is no file: "NAME: why" each.
    """
    line = line.replace(MARK, " ")
    # In a quoted 'my cat.jpg', cat.jpg is not a path of its own.
    inside = {place for match in QUOTED.finditer(line) for place in range(match.start() + 2, match.end())}
    starts = [match.start() for match in STARTS.finditer(line) if match.start() not in inside]
    paths, pieces, done, tried = [], [], 0, 0
    for match in ENDS.finditer(line):
        near = starts[bisect_left(starts, tried) : bisect_left(starts, match.start())][-MOST_STARTS:]
        tried = match.end()
        ends = [match.end() + 1] * line.startswith(("'", '"'), match.end()) + [match.end()]
        found = ((s, e, path) for s in near for e in ends for path in spellings(line[s:e]) if os.path.isfile(path))
        if first := next(found, None):
            start, end, path = first
            paths.append(path)
            pieces += [line[done:start], MARK]
            done = end
    rest = " ".join("".join([*pieces, line[done:]]).split())
    words = [word.strip("'\"“”").rstrip(".:!?…") for word in WORD.findall(rest)]
    missing = []
    for word in filter(LOOKS_LIKE_PATH.match, words):
        reasons = [not_a_file(path) or "no picture's ending" for path in spellings(word)]
        if re.match(r"(?!file:)\w+://", word):
            reasons = ["an address: download the file and name it here"]
        # Of several reasons, the longest knows of something there.
        missing.append(f"{word}: {max(reasons, key=len)}")
    if missing:
        raise ValueError("; ".join(missing))
    if not paths:
        return rest, []
    question = AROUND.sub(lambda found: " " * (" " in found[0]), rest)
    question = re.sub(r" (?=[.,;:!?。，；：！？、])", "", question).strip(" ,;:，、；：")
    return question if question.strip(" .,;:!?…。，、；：！？") else "", paths


def spellings(text: str) -> list[Path]:
    """Returns the paths that a text may mean: as typed, without a shell's quotes, or from a file:// address."""
    texts = [text, SHELL.sub(lambda found: found[1] or found[2] or found[3] or "", text)]
    texts += [unquote(text.removeprefix("file://")) for text in texts if text.startswith("file:///")]
    return [Path(os.path.expanduser(text)) for text in dict.fromkeys(texts)]
