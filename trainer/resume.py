"""Checkpoints: weights, sidecar and training state, written together. A run resumes bit-identically."""

import hashlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import files
from common.errors import UsageError
from common.paths import display_path
from dataset.features import tower_sha256
from dataset.lm_dataset import VLMDataset
from dataset.prompts import usual_form
from model import weights as weight_io
from model.model_vlm import MiniMindVLM
from model.vision_tower import tower_weights_sha256
from trainer.setup import Run
from trainer.support.run_files import REPORTED, SAVED, is_unfinished

RESUMES = "the same command with --from_resume 1 resumes from there"
MAY_CHANGE = ("epochs", "learning_rate", "batch_size", "accumulation_steps", "grad_clip", "dtype", "device")


class Checkpoints:
    """Saves a run; restores its model where it resumes (UsageError if the checkpoint belongs to another run).

    Construct before `round_frozen_weights`: weight files keep them unrounded. `companions` are the stage's, `settings`
    the flags in effect, for sidecar and state.
    """

    def __init__(self, run: Run, model: MiniMindVLM, companions: dict, data: VLMDataset, settings: dict):
        self.run, self.model, self.settings, config = run, model, settings, run.config
        self.rows = {"rows": len(data), "pictures": len(np.unique(data.shown_pictures))}
        self.rows["prompt_form"] = usual_form(data, run.tokenizer)
        self.picture_keys = data.picture_keys if run.processes.is_main else None  # reads all pictures
        if run.state is not None:
            weight_io.load_learned(model, run.state, run.files.state)
        named = model.state_dict(keep_vars=True).items()
        self.frozen = weight_io.in_half_precision({name: weight for name, weight in named if not weight.requires_grad})
        self.tower_sha256 = tower_sha256(model.vision_encoder)
        self.tower_weights = tower_weights_sha256(model.vision_encoder)
        content = hashlib.sha256(data.content_sha256.encode() + data.left_out.tobytes()).hexdigest()
        self.fingerprint = {  # what must not change on resume: samples and model depend on it
            "model": f"hidden_size {config.hidden_size}, {config.num_hidden_layers} layers, "
            f"{config.num_attention_heads} and {config.num_key_value_heads} heads, "
            f"{config.vocab_size} tokens{', experts' if config.use_moe else ''}",
            "max_seq_len": str(run.args.max_seq_len),
            "seed": str(run.args.seed),
            "tokenizer": run.tokenizer_sha256[:12],
            "data": f"{len(data):,} rows, {content[:12]}",
            "vision tower": self.tower_sha256[:12],
            "frozen weights": files.sha256_of(self.frozen)[:12] if self.frozen else "none",
        }
        for name, companion in companions.items():
            is_model = isinstance(companion, torch.nn.Module)
            self.fingerprint[name] = files.sha256_of(companion.state_dict())[:12] if is_model else str(companion)
        if run.state is not None:
            check_same_run(run.state, self.fingerprint, len(data), run.files.state)
            written = weight_io.read_sidecar_or_empty(run.files.weights).get("step")
            if run.processes.is_main and (written != run.state["step"] or not run.files.weights.is_file()):
                # The run was killed between the renames of state and weights.
                files.write_together(self._weight_files(run.state["step"]))
        run.processes.barrier(patient=True)  # reading all pictures may take long
        self.earlier = SAVED if run.state is None else ()  # files to rename at the first save

    def _weight_files(self, step: int) -> dict:
        run = self.run
        made_by = (run.stage.name, run.args.assets, run.tokenizer_sha256, self.settings, run.stage.title)
        sidecar = weight_io.describe(run.config, *made_by) | {"step": step} | self.rows
        sidecar["tower_sha256"] = self.tower_weights
        return weight_io.weight_files(run.files.weights, self.model, self.frozen, sidecar)

    def save(self, parts: list, is_last: bool):
        """Writes what the parts' `state_dict` return, weights and sidecar, all or none; all ranks call it.

        Raises UsageError if nothing was learned yet, the weights are not finite, or the run's last save cannot be
        written (the disk is full); other failed saves are logged and keep the previous files.
        """
        run, args, largest = self.run, self.run.args, torch.finfo(torch.float16).max
        learned = {name: weight.detach() for name, weight in self.model.named_parameters() if weight.requires_grad}
        state = {name: value for part in parts for name, value in part.state_dict().items()}
        if state["units"] == 0:
            raise UsageError(
                f"nothing was learned in {state['step']:,} step(s), so nothing is saved: none of the "
                f"{state['skipped_pictures']:,} pictures so far can be read (python -m dataset.check "
                f"{display_path(args.data_path)} --pictures says why)"
            )
        if not all(bool((weight.abs() <= largest).all()) for weight in learned.values()):
            raise UsageError(
                f"the weights became NaN or larger than {largest:g} by step {state['step']}, so they are not saved: a "
                f"lower --learning_rate than {args.learning_rate:g} or a lower --grad_clip than {args.grad_clip:g} "
                "may help"
            )
        random, failure = run.processes.gather(random_state(run.device)), None
        if run.processes.is_main:
            state |= {
                "learned": {name: weight.cpu() for name, weight in learned.items()},
                "random": random,
                "arguments": {key: str(value) for key, value in self.settings.items()},
                "processes": run.processes.world_size,
                "fingerprint": self.fingerprint,
                "pictures": torch.from_numpy(self.picture_keys),
            }
            try:
                # The state first: if the process dies between the renames, the weights can be made from it.
                state_file = {run.files.state: lambda file: torch.save(state, file)}
                rename = partial(run.files.keep_aside, *self.earlier)
                files.write_together(state_file | self._weight_files(state["step"]), rename)
                self.earlier = ()  # they are this run's now
            except UsageError as error:
                failure = error
        run.processes.barrier()
        if failure is not None:
            if is_last:
                raise failure
            run.log(f"warning: step {state['step']} could not be saved, training continues: {failure}")


def check_same_run(state: dict, fingerprint: dict[str, str], rows: int, path: Path):
    """Raises UsageError unless a checkpoint is of this run, and at a position that a run over so many rows can have."""
    for name, value in fingerprint.items():
        if (saved := state["fingerprint"].get(name)) != value:
            raise UsageError(
                f"{display_path(path)} was saved with another {name} ({saved}; now {value}): repeat that run's flags, "
                "or start over with --from_resume 0"
            )
    step, epoch, sample, epochs = state["step"], state["epoch"], state["sample"], state["arguments"].get("epochs", "")
    is_place = sample < rows and epochs.isdecimal() and (epoch, sample) <= (int(epochs), 0)
    if not (is_place and epoch + (sample > 0) <= step <= epoch * rows + sample):  # a step takes a sample at least
        raise UsageError(
            f"{display_path(path)} is damaged: step {step:,}, epoch {epoch:,}, sample {sample:,} is not a valid "
            f"position in a run of {epochs} epochs over {rows:,} rows. --from_resume 0 starts over"
        )


def random_state(device: torch.device) -> dict:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def restore_random_state(states: list[dict], rank: int, device: torch.device):
    """Restores this rank's random state; a rank that the saved run did not have keeps its own."""
    if rank < len(states):
        try:
            torch.set_rng_state(states[rank]["cpu"])
            if states[rank]["cuda"] is not None and device.type == "cuda":
                torch.cuda.set_rng_state(states[rank]["cuda"], device)
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                f"the checkpoint's random state is damaged ({error}): --from_resume 0 starts over"
            ) from error


def report_resume(run: Run, step: int, total_steps: int, data: VLMDataset):
    """Logs where the run continues, which settings changed since it was saved, and how many pictures changed."""
    before = run.state["arguments"] | {"processes": str(run.state["processes"])}
    now = {name: str(run.settings[name]) for name in MAY_CHANGE} | {"processes": str(run.processes.world_size)}
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    changed = f"; changed: {', '.join(changed)}" if changed else ""
    run.log(f"  resumes      after step {step:,}, {total_steps - step:,} to go{changed}")
    if not run.processes.is_main:
        return  # it would read all pictures
    pictures = run.state.get("pictures", torch.empty(0)).numpy()  # old checkpoints lack it
    is_comparable = pictures.shape == data.picture_keys.shape  # a parquet with other pictures is other data
    if is_comparable and len(changed := np.flatnonzero(pictures != data.picture_keys)):
        run.log(
            f"warning: {len(changed):,} of the {len(pictures):,} pictures changed since this run was saved, the first "
            f"is {data.picture_source(changed[0])[1]}: the run continues with their new content; restore the "
            "old files to avoid that, or --from_resume 0 starts over with the new ones"
        )


@dataclass
class TrainState:
    """Progress: optimizer steps done, and the epoch and sample that come next."""

    step: int = 0
    epoch: int = 0
    sample: int = 0
    skipped_pictures: int = 0
    units: int = 0

    def advance(self, skipped_pictures: int, units: int, epoch: int, sample: int):
        """Counts a step; `epoch` and `sample` come next."""
        self.step, self.epoch, self.sample = self.step + 1, epoch, sample
        self.skipped_pictures += skipped_pictures
        self.units += units

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        for name in asdict(self):
            setattr(self, name, state.get(name, 1))  # old checkpoints lack `units`


def keep_earlier_run(run: Run):
    """Renames an earlier run's reports out of the way (not on resume), on the main rank.

    Its weights and state are renamed at this run's first save; an unfinished run's at once.
    """
    files = run.files
    if run.state is not None or not run.processes.is_main:
        return
    was_stopped = run.args.from_resume == 0 and is_unfinished(files.state)
    has_weights = files.weights.exists() or files.state.exists()
    if files.keep_aside(*REPORTED, *(SAVED if was_stopped else ())) or has_weights:
        run.log(f"kept the {'unfinished' if was_stopped else 'earlier'} run as {display_path(files.aside)}")
