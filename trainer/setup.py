"""Finds, checks and loads what a run needs before training."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import torch

from common.errors import UsageError
from common.paths import BUILTIN_HIDDEN_SIZE, display_path, is_builtin_data
from dataset.chat import check_tokenizer, encoder_for, has_image_pad, image_token_id, load_tokenizer, tokenizer_hash
from dataset.features import FeatureFolder
from dataset.file_kinds import quiet_libraries
from dataset.holdout import hold_out, rows_in_both, showing_the_same
from dataset.lm_dataset import VLMDataset
from dataset.pictures import PictureFormat
from dataset.row_forms import EXAMPLE_ROW
from dataset.rows import Variation
from dataset.scenes.draw import draw_builtin_dataset
from model import weights as weight_io
from model.language_model import add_lora, build, read_language_model
from model.model_vlm import MiniMindVLM, VLMConfig, fit_config_to_tower
from model.vision_tower import TowerSettings
from trainer.bundles import BUILTIN, BUNDLES, MINIMIND2, find_weights, read_tower
from trainer.resume import BAD_ROWS, STATE, RunFiles, read_state
from trainer.stage import Stage
from trainer.support.processes import Processes, pick_dtype

SHOWN_BAD_ROWS = 20


class Run:
    """Everything a run needs, found and checked; UsageError if something is missing or unfit."""

    def __init__(self, stage: Stage, args, processes: Processes):
        self.started = time.perf_counter()
        self.stage, self.args, self.processes = stage, args, processes
        self.device, self.log, self.bundle = processes.device, processes.log, BUNDLES[args.assets]
        self.learns_scenes = is_builtin_data(args.data_path)
        quiet_libraries(processes.is_main)
        if args.deterministic:
            be_deterministic()
        if self.device.type == "cuda" and args.dtype == "float32":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if self.learns_scenes:
            with processes.main_first():
                draw_builtin_dataset()
        self.tokenizer = load_tokenizer(args.tokenizer_path)
        self.tokenizer_sha256 = tokenizer_hash(self.tokenizer)
        # None: the model starts from random weights. `load_model` moves their tensors into the model.
        self.weights = weights = find_starting_weights(args, self.log, self.tokenizer)
        if weights is not None:
            weight_io.check_shape_flags(weights, args)
            check_tokenizer(weights, self.tokenizer_sha256, args.tokenizer_path, self.tokenizer)
        self.tower = read_tower(args.vision_model_path)
        self.config = config = model_config(args, weights, self.tower, self.tokenizer)  # the model's shape
        name = weight_io.weight_name(args.save_weight, config.hidden_size, config.use_moe)
        self.files = RunFiles(args.save_dir, name)
        # Not with experts, whose routing breaks the graph, nor with another language model.
        self.compiles = bool(args.compile) and not config.use_moe and config.llm is None
        if args.compile and not self.compiles:
            self.log("--compile 1 is ignored: models with experts cannot be compiled, nor are other language models")
        if weights is not None and weights.path.resolve() == self.files.weights.resolve():
            raise UsageError(
                f"--save_weight {args.save_weight} would overwrite {display_path(weights.path)}, which this run starts "
                "from: give it another name"
            )
        self.files.lock(processes.is_main)
        self.state = read_state(self.files.state, STATE, args.from_resume, self.log)  # to resume from, or None
        dtype = args.dtype or (self.state and self.state["arguments"].get("dtype"))
        self.dtype = getattr(torch, dtype) if dtype else pick_dtype(None, self.device, config.head_dim)
        # The flags in effect, for sidecar, checkpoint and wandb.
        self.settings = vars(args) | {"dtype": str(self.dtype).removeprefix("torch."), "compile": self.compiles}


def be_deterministic():
    """Makes torch use deterministic algorithms only, and raise where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in another order
    torch.use_deterministic_algorithms(True)  # warn_only leaves flash attention's backward nondeterministic
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # no deterministic backward


def find_starting_weights(args, log, tokenizer=None) -> weight_io.Weights | None:
    """Reads the weights that --llm_path or --from_weight names, None for `none`."""
    if args.llm_path is not None:
        encoder = encoder_for(tokenizer, 1)
        ids = {"image_token_id": encoder.image_token_id, "eos_token_id": encoder.end_id, "pad_token_id": encoder.pad_id}
        return read_language_model(args.llm_path, len(tokenizer), **ids)
    if args.from_weight == "none":
        return None
    is_builtin = BUNDLES[args.assets] is BUILTIN
    save_dir = BUILTIN.weights_dir if is_builtin and args.from_weight == "llm" else args.save_dir
    hidden_size = args.hidden_size or (BUILTIN_HIDDEN_SIZE if is_builtin else None)
    path = find_weights(save_dir, args.from_weight, hidden_size, args.use_moe, is_builtin, log)
    return weight_io.read_weights(path)


def model_config(args, weights, tower: TowerSettings, tokenizer) -> VLMConfig:
    """Returns the model's shape, of the weights or else of the flags; UsageError if invalid or contradictory."""
    hidden_size = args.hidden_size or (next(iter(MINIMIND2.layers)) if weights is None else weights.config.hidden_size)
    projector = {flag: value for flag in ("projector", "pixel_shuffle") if (value := getattr(args, flag)) is not None}
    try:
        if weights is None:
            layers = args.num_hidden_layers or MINIMIND2.layers.get(hidden_size, 8)
            shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "use_moe": bool(args.use_moe)}
            of_tower = {"vision_hidden_size": tower.hidden_size, "vision_patches": tower.patches}
            config = VLMConfig(**shape, **of_tower, **projector, vocab_size=len(tokenizer))
        else:
            config = fit_config_to_tower(weights.config, tower, weights.has_projection and not weights.sidecar)
            if not weights.has_projection:  # a language model: the projection does not exist yet
                config = VLMConfig(**weight_io.config_fields(config) | projector)
    except ValueError as error:
        tower_flag = f"--vision_model_path {display_path(args.vision_model_path)}"
        raise UsageError(f"--hidden_size {hidden_size} and {tower_flag} make no valid model: {error}") from error
    for flag, value in projector.items():
        if (actual := getattr(config, flag)) != value:
            source = display_path(weights.path)
            raise UsageError(f"--{flag} {value} contradicts {source}, which has {actual}: leave it out")
    config.image_token_id = image_token_id(tokenizer)
    if args.max_seq_len > (most := config.max_position_embeddings):
        raise UsageError(f"--max_seq_len {args.max_seq_len}: the model has {most} positions; use --max_seq_len {most}")
    return config


def load_data(run: Run) -> tuple[VLMDataset, VLMDataset | None]:
    """Returns tokenised training and evaluation rows (or None); UsageError if too many are bad or none is left."""
    args = run.args
    data = open_data(run, args.data_path, args.images_path)
    report_bad_rows(run, data)
    for kind, rule in data.rules.items():
        run.log(f"{kind}: {rule}")
    if len(data) == 0:
        raise UsageError(f"{data.data_path} has no usable rows")
    if data.image_count == 0 and args.freeze_llm == "all":
        raise UsageError(
            f"no row of {display_path(args.data_path)} has a picture: --freeze_llm all trains only the projection, "
            "and text rows give it no gradient. Use rows with pictures, or train the decoder too (--freeze_llm none)"
        )
    return (data, None) if args.eval_data == "none" else split(run, data)


def split(run: Run, data: VLMDataset) -> tuple[VLMDataset, VLMDataset | None]:
    """Returns training and evaluation rows; reports which are left out, and which are in both."""
    args = run.args
    if args.eval_data is None:
        training, heldout = hold_out(data)
        both = 0 if heldout is None else len(showing_the_same(training, heldout))
        if left_out := len(data) - len(training) - len(heldout or ()):
            run.log(f"{left_out:,} rows show a held-out image beside others: used for neither training nor evaluation")
    else:
        flag = f"--eval_data {display_path(args.eval_data)}"
        training, heldout = data, open_data(run, args.eval_data, args.eval_images_path or args.images_path)
        if bad := heldout.bad_rows:
            first = f"the first is {bad[0].line}: {bad[0].reason}"
            run.log(f"{flag}: {len(bad)} rows cannot be used and are left out, {first}")
        if len(heldout) == 0:
            raise UsageError(f"{flag} has no usable rows")
        both = rows_in_both(data, heldout)
    if both:
        run.log(f"warning: {both:,} held-out rows or images are trained on too: the held-out loss will look too good")
    return training, heldout


def open_data(run: Run, path: Path, images_path: Path | None) -> VLMDataset:
    args, more = run.args, {}
    if path == args.data_path and (args.empty_think_ratio, args.add_system_ratio) != (None, None):
        if not has_image_pad(run.tokenizer):
            raise UsageError("--empty_think_ratio and --add_system_ratio are for minimind-3v's prompt form")
        keeps = 1.0 if args.empty_think_ratio is None else args.empty_think_ratio
        more["variation"] = Variation(keeps, args.add_system_ratio or 0.0, args.seed)
    how = run.tokenizer, args.max_seq_len, run.config.image_tokens, PictureFormat(**run.tower.picture_settings)
    with run.processes.main_first():  # the others find its tokens in the cache
        return run.stage.dataset(path, images_path, *how, **more)


def report_bad_rows(run: Run, data: VLMDataset):
    """Logs the unusable rows, lists them in {name}.bad_rows.txt; raises UsageError if there are too many."""
    args, path, bad = run.args, run.files.bad_rows, data.bad_rows
    title = f"{data.data_path}: {len(bad)} of {data.row_count} rows cannot be learned from"
    if any(row.reason.startswith("no such picture") for row in bad):
        title += f" (pictures are looked for in {display_path(data.images_path)})"
    report = [title, *(f"  {'row' if data.is_parquet else 'line'} {row.line}: {row.reason}" for row in bad)]
    if run.processes.is_main:
        if run.state is None and run.files.weights.is_file():
            run.files.keep_aside(BAD_ROWS)  # it belongs to those weights
        try:
            path.unlink(missing_ok=True)
            if bad:
                path.write_text("\n".join(report) + "\n", encoding="utf-8")
        except OSError as error:
            run.log(f"warning: {display_path(path)} cannot be written: {error.strerror}")
    if len(bad) > SHOWN_BAD_ROWS:
        report[SHOWN_BAD_ROWS + 1 :] = [f"  ... and {len(bad) - SHOWN_BAD_ROWS} more, all in {display_path(path)}"]
    limit = data.bad_rows_limit(args.max_bad_rows)
    if len(bad) <= limit:
        if bad:
            run.log("\n".join([*report, "They are left out."]))
        return
    if not data.is_parquet:
        report.append(f"A good line looks like this:\n  {EXAMPLE_ROW}")
    cut = data.column("cut_tokens")[data.left_out]
    if cut.any():
        report.append(f"{(cut > 0).sum()} of them are cut by --max_seq_len {args.max_seq_len}; {cut.max()} fits all.")
    share = "1 % of the rows" if args.max_bad_rows is None else f"--max_bad_rows {limit}"
    report.append(f"More than {share}: training does not start. Fix them, or raise --max_bad_rows.")
    raise UsageError("\n".join(report))


def load_model(run: Run) -> MiniMindVLM:
    """Builds tower, projection and decoder on the CPU in float32; raises UsageError if the weights do not fit."""
    torch.manual_seed(run.args.seed)  # same initial projection on every rank
    model = build(run.config, run.args.vision_model_path)
    if run.weights is not None:
        weight_io.load_into(model, run.weights)
        run.weights.tensors.clear()  # they are in the model now
    return model


def freeze(model: MiniMindVLM, frozen: str, lora: int | None = None):
    """Freezes none or all of the decoder, or all but its "ends"; `lora` is the rank of adapters that train instead."""
    if lora and frozen != "none":
        raise UsageError(f"--lora {lora} trains the decoder, and --freeze_llm {frozen} does not: use --freeze_llm none")
    model.requires_grad_(frozen == "none")
    if lora:
        add_lora(model, lora)
    model.vision_proj.requires_grad_(True)  # the projection always trains, the tower never
    if frozen == "ends":
        layers = next(part for part in model.base_model.modules() if isinstance(part, torch.nn.ModuleList))
        layers[0].requires_grad_(True)
        layers[-1].requires_grad_(True)


def round_frozen_weights(model: MiniMindVLM, dtype: torch.dtype):
    """Rounds the tower and the decoder's frozen matrices (not its norms) to the dtype they are multiplied in."""
    for parameter in model.vision_encoder.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, parameter in model.named_parameters():
        # Not the experts' router either, which decides between near-equal scores.
        if not parameter.requires_grad and parameter.dim() > 1 and not name.endswith(".mlp.gate.weight"):
            parameter.data = parameter.data.to(dtype)


def open_features(run: Run, data: VLMDataset, tower_key: str) -> FeatureFolder | None:
    """Opens the cache of the tower's features if it is used; UsageError if --cache_vision names a full disk."""
    flag = run.args.cache_vision
    if flag == "off" or data.image_count == 0 or (flag is None and run.device.type == "cuda"):
        return None
    folder = flag or run.files.save_dir / "vision_features"
    # Another tower, dtype or picture format gives other features.
    made_by = hashlib.sha256(f"{tower_key} {run.dtype} {data.picture_format}".encode()).hexdigest()
    features = FeatureFolder(folder, made_by, (run.tower.patches, run.tower.hidden_size))
    try:
        needed = features.make_room(data.picture_keys)
        has_room = flag is not None or needed <= shutil.disk_usage(folder).free / 10
    except UsageError as error:
        if flag is not None:
            raise
        run.log(f"warning: {error}")
        has_room = False
    run.processes.barrier(patient=True)  # each rank reads all pictures first
    # Free space may change between ranks' checks; all must decide alike.
    return features if run.processes.sum(not has_room) == [0] else None
