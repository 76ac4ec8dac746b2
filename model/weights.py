"""Weight files: plain state dicts in half precision, without the tower, as the original's; and transformers' folders.

The JSON beside a file, its "sidecar", describes it. A file without one is the original's: tensors tell its shape.

In transformers a MiniMind decoder is a Llama, with experts a Qwen2-MoE; with norms per head a Qwen3 or Qwen3-MoE.
"""

import datetime
import json
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors

from common.errors import UsageError
from common.files import FLOATS, load_tensors
from common.paths import ROOT, WEIGHT_NAMES, display_path
from common.schema import Range, SchemaError, check, read_json
from model.model_vlm import CONFIG_3V, PROMPT_FORMS, MiniMindVLM, VLMConfig, config_fields
from model.projectors import PROJECTORS
from model.vision_tower import tower_weights_sha256

CONFIG_ERRORS = (ValueError, ArithmeticError, StrictDataclassError)  # what VLMConfig raises on impossible settings
ORIGINAL_HEADS = 8  # of all models without per-head norms: their tensors do not show the number
SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "intermediate_size", "use_moe")
SHAPE_KEYS += ("qk_norm",)
EXPERT_KEYS = ("n_routed_experts", "n_shared_experts")
EARLIER_3V_WIDTH = 4 * 768  # the projection of earlier minimind-3v takes four of the tower's patches at once
EXPORTED = ("llava", "lfm2_vl", "llama", "qwen2_moe", "qwen3", "qwen3_moe")
TRAINING = "training.json"  # in an exported folder: the sidecar of the exported weights
# The schema of VLMConfig's settings. (It refuses settings that do not fit together.)
SIZE, COUNT, ID = Range(int, 1, 1 << 20), Range(int, 1, 1 << 10), Range(int, 0, 1 << 20)
FACTOR, SHARE = Range(float, 1e-3, 1e12), Range(float, 0, 1)
LAYERS_AND_HEADS = dict.fromkeys(("num_hidden_layers?", "num_attention_heads?"), COUNT)
# The schema of another language model's configuration.
LLM = {"model_type": str, **dict.fromkeys(("hidden_size?", "vocab_size?", "intermediate_size?"), SIZE)}
LLM |= LAYERS_AND_HEADS
KINDS = {bool: bool, str: str, int: SIZE, float: FACTOR, type(None): None}
CONFIG = {f"{name}?": KINDS[type(default)] for name, default in VLMConfig.defaults().items()} | LAYERS_AND_HEADS
CONFIG |= dict.fromkeys(("num_key_value_heads?", "num_experts_per_tok?", "n_routed_experts?", "pixel_shuffle?"), COUNT)
CONFIG |= dict.fromkeys(("n_shared_experts?", *(f"{name}_token_id?" for name in ("image", "bos", "eos", "pad"))), ID)
CONFIG |= dict.fromkeys(("rms_norm_eps?", "dropout?", "aux_loss_alpha?"), SHARE)
CONFIG |= {"intermediate_size?": SIZE, "yarn_attention_factor?": FACTOR, "llm?": (LLM, None), "*": frozenset()}
PLAIN, PATH = (str, bool, int, float, None), (str, None)
SIDECAR = {  # what `describe` writes, and checkpoints add
    "config": CONFIG,
    **{f"{name}?": str for name in ("stage", "title", "assets", "tokenizer_sha256", "tower_sha256", "written")},
    "arguments?": {"data_path?": PATH, "tokenizer_path?": PATH, "vision_model_path?": PATH, "*": PLAIN},
    "versions?": {"*": str},
    "git_commit?": (str, None),
    **dict.fromkeys(("step?", "rows?", "pictures?"), Range(int, 0, 1 << 53)),
    "prompt_form?": frozenset(PROMPT_FORMS),
}
EXPORTED_CONFIG = {f"{name}?": (dict, None) for name in ("text_config", "vision_config")} | {"model_type?": (str, None)}
EXPORTED_CONFIG["projector_hidden_act?"] = frozenset({"linear", "gelu", None})
NAME = re.compile(r"(.+)_(\d+)(_moe)?")  # of a weight file, see `weight_name`
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "pillow", "numpy")
LORA_SCALE = 2  # of an adapter's product: peft's lora_alpha by the rank
# Names in transformers' LLaVA and LFM2-VL: the beginnings, a tensor of the tower, and the projectors' layers.
DECODER, PROJECTOR, TOWER = "language_model.", "multi_modal_projector.", "vision_tower."
PATCHES = "embeddings.patch_embedding.weight"
LLAVA_LAYERS = {"linear_1": "vision_proj.vision_proj.0", "linear_2": "vision_proj.vision_proj.2"}
LFM2_LAYERS = {"layer_norm": "vision_proj.mlp.0", "linear_1": "vision_proj.mlp.1", "linear_2": "vision_proj.mlp.3"}


@dataclass
class Weights:
    """A weight file's content: tensors by name, the model's shape, and its sidecar ({} for the original's files)."""

    path: Path
    tensors: dict[str, torch.Tensor]
    config: VLMConfig
    sidecar: dict

    def __post_init__(self):
        self.has_projection = any(name.startswith("vision_proj.") for name in self.tensors)


def weight_name(name: str, hidden_size: int, use_moe: bool) -> str:
    return f"{name}_{hidden_size}{'_moe' if use_moe else ''}"


def list_weights(save_dir: Path) -> dict[Path, tuple[str, int, bool]]:
    """Returns (name, hidden_size, use_moe) of each weight file in a folder; no states, no files of earlier runs."""
    named = {path: NAME.fullmatch(path.stem) for path in sorted(save_dir.glob("*.pth")) if path.is_file()}
    return {path: (name[1], int(name[2]), bool(name[3])) for path, name in named.items() if name}


def matching_weights(save_dir: Path, name: str, hidden_size=None, use_moe=None) -> list[Path]:
    """Returns the weight files of a name (or path), size and kind, the best first: the exact name, then the newest."""
    if Path(name).suffix == ".pth":
        return [Path(name)] if Path(name).is_file() else []
    names = WEIGHT_NAMES.get(name, (name,))
    matching = {
        path: its_name
        for path, (its_name, size, moe) in list_weights(save_dir).items()
        if its_name in names and hidden_size in (None, size) and use_moe in (None, moe)
    }
    return sorted(matching, key=lambda path: (matching[path] != name, -path.stat().st_mtime))


def read_sidecar_or_empty(path: Path) -> dict:
    """Reads the JSON beside a weight file; {} where it is missing or unreadable (`read_weights` says why)."""
    try:
        return read_json(path.with_suffix(".json"), SIDECAR)
    except (OSError, SchemaError):
        return {}


def read_training(folder: Path) -> dict:
    """Reads the sidecar in an exported folder, {} where there is none; raises UsageError if it is unreadable."""
    path = folder / TRAINING
    try:
        sidecar = read_json(path, dict) if path.exists() else {}
        if sidecar:  # {} if the weights had none
            check(sidecar, SIDECAR)
        sidecar.pop("tower_sha256", None)  # the tower was exported with the weights, in another precision
        return sidecar
    except SchemaError as error:
        raise UsageError(f"{display_path(path)} cannot be read: {error}. Export the weights again") from error


def read_weights(path: Path) -> Weights:
    """Reads a weight file and its sidecar; raises UsageError if one is unreadable or they contradict each other."""
    tensors, sidecar_path = load_tensors(path), path.with_suffix(".json")
    if not sidecar_path.is_file():
        return Weights(path, tensors, config_of(tensors, path), {})
    try:
        sidecar = read_json(sidecar_path, SIDECAR)
        config = VLMConfig(**sidecar["config"])
    except CONFIG_ERRORS as error:
        raise UsageError(
            f"{display_path(sidecar_path)}, which describes {path.name}, cannot be read: {error}. Delete it if the "
            "weights are the original project's (their shape is then read from the tensors), else restore it."
        ) from error
    shown = config if config.llm else config_of(tensors, path)  # another language model has its own names
    for key in SHAPE_KEYS + (EXPERT_KEYS if shown.use_moe else ()):
        if (claimed := getattr(config, key)) != (actual := getattr(shown, key)):
            found = f"{display_path(sidecar_path)} says {key} {claimed}, but {path.name} has {actual}"
            raise UsageError(f"{found}: they do not belong together")
    return Weights(path, tensors, config, sidecar)


def read_folder(folder: Path) -> Weights:
    """Reads a transformers folder (config.json and its weights); raises UsageError if missing or unreadable."""
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not (folder / "config.json").is_file() or not files:
        raise UsageError(
            f"--load_from {folder}: `model` means the weight files in --save_dir; anything else must be a "
            "transformers folder with config.json and model.safetensors or pytorch_model.bin"
        )
    try:
        config = read_json(folder / "config.json", EXPORTED_CONFIG)
        tensors = load_safetensors(files[0]) if files[0].suffix == ".safetensors" else load_tensors(files[0])
        if config.get("model_type") in EXPORTED:  # by scripts/export.py
            tensors = from_transformers(tensors, config.get("projector_hidden_act"))
        sidecar = read_training(folder)
        if sidecar.get("config", {}).get("llm"):
            shape = VLMConfig(**sidecar["config"])
        else:
            config |= config.get("text_config") or {}
            check(config, {"hidden_act?": frozenset({"silu", None})})
            names = [name for name in VLMConfig.defaults() if not name.endswith("token_id")]
            known = {name: config[name] for name in names if config.get(name) is not None}
            check(known, CONFIG)
            shape = config_of(tensors, files[0], known)
    except (OSError, SafetensorError, *CONFIG_ERRORS) as error:
        raise UsageError(f"{display_path(folder)} cannot be read: {error}") from error
    # Such a folder may hold the tower too, and holds tied tensors once.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_encoder.")}
    if "model.embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return Weights(files[0], tensors, shape, sidecar)


def config_of(tensors: dict[str, torch.Tensor], path: Path, known: dict | None = None) -> VLMConfig:
    """Returns the shape that tensors show, overridden by `known`; raises UsageError unless they are a MiniMind's."""
    first = tensors.get("vision_proj.mlp.0.weight")
    if first is not None and (first.dim() != 1 or len(first) == EARLIER_3V_WIDTH):
        raise UsageError(
            f"{display_path(path)} belongs to an earlier minimind-3v, whose projection takes four patches at once "
            f"(vision_proj.mlp.0.weight is {tuple(first.shape)}). Only its later form, (768,), is supported"
        )
    block = "model.layers.0."
    router, head_norm = tensors.get(f"{block}mlp.gate.weight"), tensors.get(f"{block}self_attn.q_norm.weight")
    try:
        vocab_size, hidden_size = tensors["model.embed_tokens.weight"].shape
        heads = ORIGINAL_HEADS if head_norm is None else hidden_size // head_norm.shape[0]
        gate = tensors[f"{block}mlp.{'' if router is None else 'experts.0.'}gate_proj.weight"]
        shape = {
            "hidden_size": hidden_size,
            "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("model.layers.")}),
            "num_attention_heads": heads,
            "num_key_value_heads": tensors[f"{block}self_attn.k_proj.weight"].shape[0] // (hidden_size // heads),
            "vocab_size": vocab_size,
            "intermediate_size": gate.shape[0],
            "use_moe": router is not None,
            "qk_norm": head_norm is not None,
        }
        if head_norm is not None:
            shape |= CONFIG_3V
        if router is not None:
            shared = {name.split(".")[5] for name in tensors if f"{block}mlp.shared_experts." in name}
            shape |= {"n_routed_experts": router.shape[0], "n_shared_experts": len(shared)}
        # An mlp has the tensors of a linear projection too: the kind with the most, or the first of these.
        kinds = {name: kind.identified_by for name, kind in PROJECTORS.items() if kind.identified_by}
        if fitting := [name for name, tensors_of_it in kinds.items() if tensors.keys() >= {*tensors_of_it}]:
            name = max(fitting, key=lambda name: len(kinds[name]))
            shape |= {"projector": name, "vision_hidden_size": tensors[kinds[name][0]].shape[-1]}
        return VLMConfig(**shape | (known or {}))
    except (LookupError, *CONFIG_ERRORS) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UsageError(f"{display_path(path)} is no MiniMind weight file: {reason}") from error


def check_shape_flags(weights: Weights, args):
    """Raises UsageError if a flag contradicts the file."""
    for flag in ("hidden_size", "num_hidden_layers", "use_moe"):
        value, actual = getattr(args, flag), getattr(weights.config, flag)
        if value not in (None, actual):
            raise UsageError(
                f"--{flag} {int(value)} contradicts {display_path(weights.path)}, which has {int(actual)}: leave it out"
            )


def load_into(model: MiniMindVLM, weights: Weights):
    """Loads the weights; raises UsageError unless every tensor fits, and the tower is that of their training run."""
    expected_tower, tower = weights.sidecar.get("tower_sha256"), model.vision_encoder
    if None not in (expected_tower, tower) and expected_tower != tower_weights_sha256(tower):
        recorded = weights.sidecar.get("arguments", {}).get("vision_model_path")
        raise UsageError(
            f"{display_path(weights.path)} was trained with another vision tower than this one: name the right one "
            f"by --vision_model_path (it was {recorded}); a new tower needs stages 1 and 2 anew, from a language model"
        )
    expected, found = model.state_dict(), dict(weights.tensors)
    if not weights.has_projection:  # a language model's
        found |= {name: tensor for name, tensor in expected.items() if name.startswith("vision_proj.")}
    problems = mismatches(expected, found)
    tied = [found.get(f"{name}.weight") for name in ("model.embed_tokens", "lm_head")]
    is_tied = model.config.tie_word_embeddings and None not in tied
    if not problems and is_tied and not torch.equal(*tied):
        problems = ["lm_head.weight differs from model.embed_tokens.weight, which the model shares"]
    if problems:
        message = f"{display_path(weights.path)} does not fit the model: {'; '.join(problems[:5])}"
        message += f" (and {len(problems) - 5} more)." if len(problems) > 5 else "."
        if any(problem.startswith("vision_proj.") for problem in problems):
            message += " The projection fits one tower: name the tower it was trained with by --vision_model_path."
        raise UsageError(message)
    model.load_state_dict(found)


def load_learned(model: MiniMindVLM, state: dict, path: Path):
    """Loads the trainable parameters of a checkpoint; raises UsageError if their names or shapes differ now."""
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    learned, saved = state["learned"], state["optimizer"]["state"]
    for number, parameter in enumerate(list(expected.values())):
        if number in saved:
            moments = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            expected |= {(number, part): tensor for part, tensor in moments.items()}
    moments = {(number, part): saved[number][part] for number in saved for part in saved[number]}
    if problems := mismatches(expected, learned | moments):
        flags = {flag: state["arguments"].get(flag, "None") for flag in ("freeze_llm", "lora", "projector")}
        its = " ".join(f"--{flag} {value}" for flag, value in flags.items() if value != "None")
        what = f"{display_path(path)} belongs to another run: {problems[0]}"
        raise UsageError(f"{what}. Repeat that run's flags{its and f' ({its})'}, or start over with --from_resume 0")
    model.load_state_dict(model.state_dict() | learned)


def mismatches(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    """Returns why the found tensors cannot be loaded into the expected ones, a reason per tensor."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, tensor in found.items():
        if name not in expected:
            problems.append(f"{name} is unknown")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        elif tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:  # is_meta: without data
            problems.append(f"{name} is {tensor.dtype}, {tensor.layout}: plain floating point is expected")
        elif not tensor.isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    return problems


def in_half_precision(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors as float16 on the CPU; tied ones (the embedding and the head) stay one."""
    halves = {(it.device, it.data_ptr()): it.detach().to("cpu", torch.float16) for it in named.values()}
    return {name: halves[it.device, it.data_ptr()] for name, it in named.items()}


def weight_files(path: Path, model: MiniMindVLM, frozen: dict[str, torch.Tensor], sidecar: dict) -> dict:
    """Returns the weights in half precision, adapters added to their matrices, and the sidecar, for `write_together`.

    `frozen` are the frozen tensors as loaded: the model may hold them rounded to bfloat16.
    """
    tensors, merged = model.state_dict() | frozen, {}
    for name, tensor in tensors.items():
        layer, _, kind = name.partition(".base_layer.")
        if kind == "weight":
            up, down = (tensors[f"{layer}.lora_{part}.default.weight"] for part in "BA")
            # Frozen tensors are kept on the CPU, adapters are where they learn.
            tensor = tensor.float() + LORA_SCALE * (up.float() @ down.float()).to(tensor.device)
        if ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = tensor
    halves = in_half_precision(merged)
    text = json.dumps(sidecar, indent=2, ensure_ascii=False, default=str).encode("utf-8")
    return {path: lambda file: torch.save(halves, file), path.with_suffix(".json"): lambda file: file.write(text)}


def describe(config: VLMConfig, stage: str, assets: str, tokenizer_sha256: str, arguments: dict, title=None) -> dict:
    """Returns the sidecar: a weight file's configuration, and how it was made."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+"]  # + where files were changed
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # outside a git checkout
        commit = None
    return {
        "config": config_fields(config),
        "stage": stage,
        "title": title or stage,
        "assets": assets,
        "tokenizer_sha256": tokenizer_sha256,
        "arguments": {key: display_path(it) if isinstance(it, Path) else it for key, it in arguments.items()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "git_commit": commit,
        "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def to_transformers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a decoder's tensors to those of LlamaForCausalLM, or of Qwen2MoeForCausalLM where it has shared experts.

    Qwen3's have the same names as ours, and another language model's are its own. A tied head is left out. Qwen2-MoE
    weighs its shared expert by the sigmoid of a gate: a gate of zeros makes that one half, and a doubled down
    projection makes it whole again, exactly.
    """
    renamed, shares_an_expert = {}, any(".shared_experts." in name for name in tensors)
    head, embedding = (tensors.get(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    is_tied = None not in (head, embedding) and torch.equal(head, embedding)
    for name, tensor in tensors.items():
        if name.startswith("vision_proj.") or (name == "lm_head.weight" and is_tied):
            continue
        name = name.replace("mlp.shared_experts.0.", "mlp.shared_expert.")
        renamed[name] = tensor * 2 if name.endswith("mlp.shared_expert.down_proj.weight") else tensor
        if shares_an_expert and name.endswith("mlp.gate.weight"):
            renamed[name.replace("mlp.gate.", "mlp.shared_expert_gate.")] = torch.zeros_like(tensor[:1])
    return renamed


def to_vision_language(tensors: dict[str, torch.Tensor], tower: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames a model's tensors, and its tower's (without `vision_model.`), to the class that has its projector.

    LLaVA's projector is Linear, activation, Linear: a single linear layer is followed by the identity. LFM2-VL's has a
    LayerNorm before the first, and its tower takes patches as vectors (row, column, channel).
    """
    renamed = to_transformers(tensors)
    if "vision_proj.mlp.0.weight" in tensors:
        layers, base = LFM2_LAYERS, "model."
        tower = tower | {PATCHES: tower[PATCHES].permute(0, 2, 3, 1).flatten(1)}
        names = {name: f"{base}{DECODER}{name.removeprefix(base)}" for name in renamed if name != "lm_head.weight"}
        renamed = {names.get(name, name): tensor for name, tensor in renamed.items()}
    else:
        layers, base = LLAVA_LAYERS, ""
        renamed = {f"{DECODER}{name}": tensor for name, tensor in renamed.items()}
        bias = tensors["vision_proj.vision_proj.0.bias"]
        identity = {"weight": torch.eye(len(bias)).to(bias), "bias": torch.zeros_like(bias)}
        tensors = {f"vision_proj.vision_proj.2.{part}": tensor for part, tensor in identity.items()} | tensors
    for layer, ours in layers.items():
        renamed |= {f"{base}{PROJECTOR}{layer}.{part}": tensors[f"{ours}.{part}"] for part in ("weight", "bias")}
    return renamed | {f"{base}{TOWER}vision_model.{name}": tensor for name, tensor in tower.items()}


def from_transformers(tensors: dict[str, torch.Tensor], projector_act: str | None) -> dict[str, torch.Tensor]:
    """Renames an exported folder's tensors back, without the tower's; a `projector_act` of "linear" means one layer."""
    is_lfm2 = any(name.startswith(f"model.{DECODER}") for name in tensors)
    layers, renamed = LFM2_LAYERS if is_lfm2 else LLAVA_LAYERS, {}
    for name, tensor in tensors.items():
        if PROJECTOR in name:
            layer, part = name.split(".")[-2:]
            if layer in layers and (layer, projector_act) != ("linear_2", "linear"):
                renamed[f"{layers[layer]}.{part}"] = tensor
        elif TOWER not in name and "mlp.shared_expert_gate." not in name:
            name = name.replace(f"model.{DECODER}", "model.").removeprefix(DECODER)
            name = name.replace("mlp.shared_expert.", "mlp.shared_experts.0.")
            renamed[name] = tensor / 2 if name.endswith("mlp.shared_experts.0.down_proj.weight") else tensor
    return renamed
