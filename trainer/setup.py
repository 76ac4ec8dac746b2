"""What comes before the first step: files found and checked, data and model loaded, and the header that says so."""

import hashlib
import math
import shutil
import time
from pathlib import Path

import datasets
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common import files
from common.errors import RankError, UsageError
from common.paths import BUILTIN_MODEL_DIR, display_path
from dataset.chat import ChatEncoder
from dataset.features import FeatureCacheError, cache_bytes, tower_sha256
from dataset.lm_dataset import DataError, VLMDataset, tokenizer_hash
from dataset.scenes.draw import draw_builtin_dataset
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer import weights as checkpoint
from trainer.flags import Stage
from trainer.support.assets import BUILTIN_HIDDEN_SIZE
from trainer.support.processes import Processes, cores, pick_dtype

SHOWN_BAD_ROWS = 20
HINTS = {
    "llm": "`python scripts/download.py llm` fetches the published language model",
    "pretrain_vlm": "Train it first: python trainer/train_pretrain_vlm.py",
    "sft_vlm": "Train it first: python trainer/train_sft_vlm.py",
}


def load_tokenizer(path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer's folder.

    Raises:
        UsageError: If it is missing, unreadable, or not of the project's form.
    """
    if not (path / "tokenizer.json").is_file():
        raise UsageError(
            f"no tokenizer in {display_path(path)}: tokenizer.json is missing (python scripts/download.py tokenizer)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        ChatEncoder(tokenizer)
    except Exception as error:  # the tokenizers library raises plain Exception on a garbled file
        has_code = "trust_remote_code" in str(error)  # else transformers would advise to run it
        reason = "it brings code of its own, which is never run" if has_code else error
        raise UsageError(f"the tokenizer in {display_path(path)} cannot be used: {reason}") from error
    return tokenizer


def quiet_libraries(is_main: bool):
    """Leaves the terminal to the run: the libraries' own progress bars stay only where they tell of a long wait."""
    transformers.utils.logging.disable_progress_bar()
    if not is_main:
        datasets.disable_progress_bars()


class Run:
    """One run of a training script: its processes, files and settings.

    Args:
        stage: Which stage it is.
        args: The flags, as `parse_arguments` gives them.

    Raises:
        UsageError: If a file is missing or does not fit.
    """

    def __init__(self, stage: Stage, args):
        self.stage, self.args = stage, args
        self.started = time.perf_counter()
        self.processes = Processes.start(args.device, args.timeout_minutes)
        quiet_libraries(self.processes.is_main)
        self.device, self.dtype = self.processes.device, pick_dtype(args.dtype, self.processes.device)
        args.device, args.dtype = str(self.device), str(self.dtype).removeprefix("torch.")  # for sidecar and state
        if self.dtype == torch.float32 and self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if args.num_workers is None:
            args.num_workers = min(16, max(1, cores() // self.processes.world_size))
        if args.assets == "built-in":
            with self.processes.main_first():
                draw_builtin_dataset()
        self.tokenizer = load_tokenizer(args.tokenizer_path)
        self.tokenizer_sha256 = tokenizer_hash(self.tokenizer)
        self.weights = self._find_weights()
        self.config = self._config()
        self.name = checkpoint.weight_name(args.save_weight, self.config.hidden_size, self.config.use_moe)
        self.weights_path = args.save_dir / f"{self.name}.pth"
        self.state_path = args.save_dir / f"{self.name}_resume.pth"
        self.metrics_path = args.save_dir / f"{self.name}.metrics.jsonl"
        self.state = self._read_state()
        self._prepare_save_dir()
        # Which expert a token goes to is known only when it is computed: such a model is no single graph.
        if args.compile and self.config.use_moe:
            self.say("--compile 1: a model with experts cannot be compiled, so this one is not")
        wanted = self.device.type == "cuda" if args.compile is None else bool(args.compile)
        args.compile = wanted and not self.config.use_moe

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        if kind is None or not issubclass(kind, RankError):  # where another one is gone, leaving might wait for it
            self.processes.stop()

    def say(self, message: str = ""):
        """A line from the main process."""
        if self.processes.is_main:
            print(message, flush=True)

    def _prepare_save_dir(self):
        try:
            self.args.save_dir.mkdir(parents=True, exist_ok=True)
            probe = self.args.save_dir / f".writable.{self.processes.rank}"
            probe.touch()
            probe.unlink()
            if self.processes.is_main:
                files.remove_temporaries(self.args.save_dir, self.name)
        except OSError as error:
            raise UsageError(f"--save_dir {self.args.save_dir} cannot be written to: {error.strerror}") from error

    def _find_weights(self) -> checkpoint.Weights | None:
        args = self.args
        if args.from_weight == "none":
            return None
        is_builtin = args.assets == "built-in"
        save_dir = BUILTIN_MODEL_DIR if is_builtin and args.from_weight == "llm" else args.save_dir
        use_moe = None if args.use_moe is None else bool(args.use_moe)
        hidden_size = args.hidden_size or (BUILTIN_HIDDEN_SIZE if is_builtin else None)
        hint = HINTS.get(args.from_weight, "")
        path = checkpoint.find_weights(save_dir, args.from_weight, hidden_size, use_moe, hint, is_builtin, self.say)
        weights = checkpoint.read_weights(path)
        checkpoint.check_shape_flags(weights, args.hidden_size, args.num_hidden_layers, use_moe)
        checkpoint.check_tokenizer(weights, self.tokenizer_sha256, args.tokenizer_path, len(self.tokenizer))
        return weights

    def _config(self) -> VLMConfig:
        """The model's shape: the weights', or without weights the flags' (published sizes: 512 x 8, 768 x 16)."""
        if self.weights is not None:
            config = self.weights.config
        else:
            hidden_size = self.args.hidden_size or 512
            layers = self.args.num_hidden_layers or (16 if hidden_size == 768 else 8)
            try:
                config = VLMConfig(
                    hidden_size=hidden_size,
                    num_hidden_layers=layers,
                    use_moe=bool(self.args.use_moe),
                    vocab_size=len(self.tokenizer),
                )
            except ValueError as error:
                raise UsageError(f"--hidden_size {hidden_size}: {error}") from error
        config.image_token_id = ChatEncoder(self.tokenizer).image_token_id
        if self.args.max_seq_len > config.max_position_embeddings:
            raise UsageError(
                f"--max_seq_len {self.args.max_seq_len}: the model has {config.max_position_embeddings} positions"
            )
        return config

    def _read_state(self) -> dict | None:
        """The state to go on from, or None to start anew."""
        if not self.args.from_resume:
            return None
        if not self.state_path.is_file():
            self.say(f"--from_resume 1: no {display_path(self.state_path)} yet, so this run starts from the beginning")
            return None
        state = files.load_file(self.state_path)
        if not isinstance(state, dict) or not checkpoint.STATE_KEYS <= state.keys():
            raise UsageError(
                f"{display_path(self.state_path)} is no training state of this version of the project; leave --from_resume out"
            )
        return state

    def load_data(self) -> VLMDataset:
        """The tokenised rows; prints the report on bad ones.

        Raises:
            UsageError: If there are more bad rows than --max_bad_rows.
        """
        args = self.args
        with self.processes.main_first():
            data = VLMDataset(args.data_path, args.images_path, self.tokenizer, args.max_seq_len)
        report_path = args.save_dir / f"{self.name}.bad_rows.txt"
        limit = bad_rows_limit(data, args.max_bad_rows)
        if data.bad_rows:
            report = bad_rows_report(data)
            if self.processes.is_main:
                report_path.write_text("\n".join(report) + "\n", encoding="utf-8")
            shown_rows = report[: SHOWN_BAD_ROWS + 1]
            if len(report) > len(shown_rows):
                shown_rows.append(f"  ... and {len(report) - len(shown_rows)} more, all in {display_path(report_path)}")
            if len(data.bad_rows) > limit:
                given = "1 % of the rows" if args.max_bad_rows is None else f"--max_bad_rows {limit}"
                shown_rows.append(f"More than {given}: training does not start. Mend them, or raise --max_bad_rows.")
                raise UsageError("\n".join(shown_rows))
            self.say("\n".join([*shown_rows, "They are left out."]))
        elif self.processes.is_main:
            report_path.unlink(missing_ok=True)
        if len(data) == 0:
            raise DataError(f"{data.data_path} has no row to learn from")
        return data

    def load_heldout(self, data: VLMDataset) -> VLMDataset | None:
        """The rows to measure on: those of --eval_data, or some that are taken out of `data`; None for none.

        Raises:
            UsageError: If no row of --eval_data can be measured on.
        """
        args = self.args
        if args.eval_data == "none":
            return None
        if args.eval_data is None:
            return data.hold_out()
        path, images = Path(args.eval_data).expanduser().resolve(), args.eval_images_path or args.images_path
        with self.processes.main_first():
            heldout = VLMDataset(path, images, self.tokenizer, args.max_seq_len)
        if heldout.bad_rows:
            first = heldout.bad_rows[0]
            self.say(f"--eval_data {display_path(path)}: {len(heldout.bad_rows)} rows cannot be measured on and are left out, the "
                     f"first is {first.line}: {first.reason}")  # fmt: skip
        if len(heldout) == 0:
            raise UsageError(f"--eval_data {display_path(path)} has no row to measure on")
        return heldout

    def load_model(self) -> MiniMindVLM:
        """Tower, projection and decoder on the device, with the weights in, frozen as --freeze_llm says.

        `self.frozen_weights` then has what of the weights does not learn, as it goes into the weight files, and
        `self.tower_sha256` the tower's hash.

        Raises:
            UsageError: If the weights do not fit.
        """
        torch.manual_seed(self.args.seed)  # the same first projection on every rank
        model = MiniMindVLM(self.config, vision_model_path=self.args.vision_model_path)
        if self.weights is not None:
            checkpoint.load_into(model, self.weights)
            self.weights.tensors.clear()  # they are in the model now
        freeze(model, self.args.freeze_llm)
        if self.state is not None:
            checkpoint.load_learned(model, self.state["learned"], self.state_path)
        frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.frozen_weights = checkpoint.in_half_precision(
            {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor in frozen}
        )
        self.tower_sha256 = tower_sha256(model.vision_encoder)
        hold_frozen_in(model, self.dtype)
        return model.to(self.device).train()

    def fingerprint(self, data: VLMDataset) -> dict[str, str]:
        """What must be the same for a run to go on: with anything else its samples or its model would be others."""
        frozen = files.sha256_of(self.frozen_weights)[:12] if self.frozen_weights else "none"
        config = self.config
        return {
            "model": f"hidden_size {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} and "
            f"{config.num_key_value_heads} heads, {config.vocab_size} tokens{', experts' if config.use_moe else ''}",
            "max_seq_len": str(self.args.max_seq_len),
            "seed": str(self.args.seed),
            "tokenizer": self.tokenizer_sha256[:12],
            "data": f"{len(data):,} rows, {hashlib.sha256(data.content_sha256.encode() + data.left_out.tobytes()).hexdigest()[:12]}",
            "vision tower": self.tower_sha256[:12],
            "frozen weights": frozen,
        }

    def cache_features(self, model: MiniMindVLM, data: VLMDataset):
        """Lets the data set keep the tower's features on disk, where --cache_vision or its default says so.

        Raises:
            FeatureCacheError: If a folder was named, and has no room for them.
        """
        wish, width = self.args.cache_vision, model.config.vision_hidden_size
        folder = self.args.save_dir / "vision_features" if wish is None else Path(wish).expanduser().resolve()
        if wish == "off" or data.picture_count == 0 or (wish is None and self.device.type == "cuda"):
            return
        size = cache_bytes(len(data.rows), data.picture_count, width)
        if wish is None and size > shutil.disk_usage(self.args.save_dir).free / 10:
            return
        try:
            with self.processes.main_first():
                # A tower that was rounded gives other features, which lie in a file of their own.
                kind = "" if self.dtype == torch.float32 else str(self.dtype)
                data.use_feature_cache(folder, hashlib.sha256(f"{self.tower_sha256}{kind}".encode()).hexdigest(), width)
        except FeatureCacheError as error:
            if wish is not None:
                raise
            self.say(f"the tower's features are not kept: {error}")

    def header(self, model: MiniMindVLM, data: VLMDataset, heldout: VLMDataset | None, steps: int):
        """Prints what this run is about to do."""
        args, builtin = self.args, self.args.assets == "built-in"
        self.say(self.stage.story)
        if builtin:
            self.say(
                "nothing was downloaded and no path given, so this run uses the small built-in set of drawn scenes"
            )
        total, learned = count_parameters(model)
        tower = sum(parameter.numel() for parameter in model.vision_encoder.parameters())
        cut = f"; {data.cut_rows:,} rows are cut at max_seq_len" if data.cut_rows else ""
        start = "random weights" if self.weights is None else display_path(self.weights.path)
        if self.weights is not None and not self.weights.has_projection:
            start += " (a language model: the projection starts untrained)"
        per_step = args.batch_size * args.accumulation_steps * self.processes.world_size
        recipe = " (the built-in set's own recipe)" if builtin else ""
        rows = {
            "starts from": start,
            "writes": display_path(self.weights_path),
            "data": f"{display_path(args.data_path)}: {len(data):,} rows, {data.picture_count:,} pictures, "
            f"{int(data.learned_tokens.sum()):,} learned tokens, longest row {int(data.lengths.max())} tokens{cut}",
            "held out": "nothing: no loss is measured on rows that are not trained on"
            if heldout is None
            else f"{len(heldout):,} rows of {display_path(heldout.data_path)}, measured every {args.eval_interval} steps",
            "tower": f"{display_path(args.vision_model_path)}: {tower / 1e6:.3f} M parameters, frozen",
            "features": "computed anew every epoch"
            if data.feature_cache is None
            else f"kept in {display_path(data.feature_cache.path)} ({data.feature_cache.size / 1e9:.2f} GB; --cache_vision off does without)",
            "model": f"hidden_size {self.config.hidden_size}, {self.config.num_hidden_layers} layers"
            f"{', experts' if self.config.use_moe else ''}: {total / 1e6:.3f} M parameters, {learned / 1e6:.3f} M learn",
            "settings": f"epochs {args.epochs}, batch_size {args.batch_size}, learning_rate {args.learning_rate:g}{recipe}; "
            f"accumulation_steps {args.accumulation_steps}, grad_clip {args.grad_clip:g}, max_seq_len {args.max_seq_len}, "
            f"freeze_llm {args.freeze_llm}, seed {args.seed}",
            "steps": f"{steps:,} of {per_step} samples ({math.ceil(len(data) / per_step):,} an epoch)",
            "device": f"{device_name(self.device)}, {self.processes.world_size} process(es), "
            f"{str(self.dtype).removeprefix('torch.')}{', compiled' if args.compile else ''}, {args.num_workers} worker(s) each",
        }
        for name, value in rows.items():
            self.say(f"  {name:<12} {value}")


def freeze(model: MiniMindVLM, mode: int):
    """Sets what learns: mode 0 everything, 1 the projection, 2 the projection and the first and last layer.

    The tower is frozen in every mode.
    """
    model.requires_grad_(mode == 0)
    model.vision_proj.requires_grad_(True)
    if mode == 2:
        model.model.layers[0].requires_grad_(True)
        model.model.layers[-1].requires_grad_(True)


def hold_frozen_in(model: MiniMindVLM, dtype: torch.dtype):
    """Rounds the tower, and the decoder's frozen matrices (not its norms), to what they are multiplied in."""
    for parameter in model.vision_encoder.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, parameter in model.named_parameters():
        # Not the experts' router either, which decides between near-equal scores.
        if not parameter.requires_grad and parameter.dim() > 1 and not name.endswith(".mlp.gate.weight"):
            parameter.data = parameter.data.to(dtype)


def count_parameters(model: MiniMindVLM) -> tuple[int, int]:
    """(all, learned) parameters of projection and decoder; the tied head counts once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def bad_rows_limit(data: VLMDataset, max_bad_rows: int | None) -> int:
    """How many bad rows are left out without refusing the file: as typed, else a hundredth of all rows."""
    return data.row_count // 100 if max_bad_rows is None else max_bad_rows


def bad_rows_report(data: VLMDataset) -> list[str]:
    """A heading and a line for each bad row."""
    place = "row" if data.is_parquet else "line"
    heading = f"{data.data_path}: {len(data.bad_rows)} of {data.row_count} rows cannot be learned from"
    return [heading, *(f"  {place} {row.line}: {row.reason}" for row in data.bad_rows)]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
