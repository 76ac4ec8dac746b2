"""Checkpoints: weights, sidecar and training state, written together. A run resumes bit-identically."""

import hashlib
import signal
import time
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from common import files
from common.errors import Stopped, UsageError
from common.paths import display_path
from dataset.features import tower_sha256
from dataset.lm_dataset import VLMDataset
from dataset.prompts import usual_form
from model import weights as weight_io
from model.model_vlm import MiniMindVLM
from trainer.setup import REPORTED, SAVED, Run, is_unfinished

MAY_CHANGE = ("epochs", "learning_rate", "batch_size", "accumulation_steps", "grad_clip", "dtype", "device")


class Checkpoints:
    """Saves a run; restores its model where it resumes (UsageError if the checkpoint is of another run).

    Make it before the frozen weights are rounded: weight files keep them as they were loaded.

    Args:
        settings: The flags in effect, for sidecar and state.
    """

    def __init__(self, run: Run, model: MiniMindVLM, data: VLMDataset, settings: dict):
        self.run, self.model, self.settings = run, model, settings
        if run.state is not None:
            weight_io.load_learned(model, run.state, run.files.state)
        named = model.state_dict(keep_vars=True).items()
        self.frozen = weight_io.in_half_precision({name: weight for name, weight in named if not weight.requires_grad})
        self.tower_sha256 = tower_sha256(model.vision_encoder)
        self.learned_from = {"rows": len(data), "pictures": len(np.unique(data.shown_pictures))}
        self.learned_from["prompt_form"] = usual_form(data, run.tokenizer)
        self.fingerprint = self._fingerprint(data)
        if run.state is not None:
            saved, step = run.state["fingerprint"], run.state["step"]
            for name, value in self.fingerprint.items():
                if saved.get(name) != value:
                    raise UsageError(
                        f"{display_path(run.files.state)} is of a run with other {name} ({saved.get(name)}; now "
                        f"{value}): repeat that run's flags, or leave --from_resume out to begin anew"
                    )
            check_place(run.state, len(data), run.files.state)
            written = weight_io.read_sidecar_or_empty(run.files.weights).get("step")
            if run.processes.is_main and (written != step or not run.files.weights.is_file()):
                # The run was killed between the renames of state and weights.
                files.write_together(self._weight_files(step))
        self.pictures = torch.from_numpy(data.picture_keys) if run.processes.is_main else None
        run.processes.barrier(patient=True)  # reading all pictures may take long
        self.keep_earlier_weights = partial(run.files.keep_aside, *(SAVED if run.state is None else ()))
        self.saved_at = time.monotonic()

    def _fingerprint(self, data: VLMDataset) -> dict[str, str]:
        """Returns what must not change on resume: samples and model depend on it."""
        run, config = self.run, self.run.config
        rows = hashlib.sha256(data.content_sha256.encode() + data.left_out.tobytes()).hexdigest()[:12]
        return {
            "model": f"hidden_size {config.hidden_size}, {config.num_hidden_layers} layers, "
            f"{config.num_attention_heads} and {config.num_key_value_heads} heads, {config.vocab_size} tokens"
            f"{', experts' if config.use_moe else ''}",
            "max_seq_len": str(run.args.max_seq_len),
            "seed": str(run.args.seed),
            "tokenizer": run.tokenizer_sha256[:12],
            "data": f"{len(data):,} rows, {rows}",
            "vision tower": self.tower_sha256[:12],
            "frozen weights": files.sha256_of(self.frozen)[:12] if self.frozen else "none",
        }

    def _weight_files(self, step: int) -> dict:
        run, config = self.run, self.model.config
        made_by = (run.stage.name, run.args.assets, run.tokenizer_sha256, self.settings, run.stage.title)
        sidecar = weight_io.describe(config, *made_by) | {"step": step} | self.learned_from
        return weight_io.weight_files(run.files.weights, self.model, self.frozen, sidecar)

    def minutes_are_up(self) -> bool:
        """Tells whether --save_minutes have passed since the last save."""
        return time.monotonic() - self.saved_at >= 60 * self.run.args.save_minutes

    def save(self, state: dict) -> UsageError | None:
        """Writes `state`, weights and sidecar, all or none; all ranks call it, the main one writes.

        Returns:
            Why they could not be written (the disk is full); the files are then those of the save before.

        Raises:
            UsageError: If the weights are not finite.
        """
        run, args, error = self.run, self.run.args, None
        learned, largest = weight_io.learned_parameters(self.model), torch.finfo(torch.float16).max
        if not all(bool((parameter.detach().abs() <= largest).all()) for parameter in learned.values()):
            raise UsageError(
                f"the weights became NaN or larger than {largest:g} by step {state['step']}, so they are not saved: a "
                f"lower --learning_rate than {args.learning_rate:g} or a lower --grad_clip than {args.grad_clip:g} "
                "may help"
            )
        random = run.processes.gather(random_state(run.device))
        self.saved_at = time.monotonic()  # also when the save fails: do not retry at every step
        if run.processes.is_main:
            state = state | {
                "learned": {name: parameter.detach().cpu() for name, parameter in learned.items()},
                "random": random,
                "arguments": {key: str(value) for key, value in self.settings.items()},
                "processes": run.processes.world_size,
                "fingerprint": self.fingerprint,
                "pictures": self.pictures,
            }
            try:
                # The state first: if the process dies between the renames, the weights can be made from it.
                state_file = {run.files.state: lambda file: torch.save(state, file)}
                files.write_together(state_file | self._weight_files(state["step"]), self.keep_earlier_weights)
                self.keep_earlier_weights = lambda: None  # they are this run's now
            except UsageError as failure:
                error = failure
        run.processes.barrier()
        return error


def check_place(state: dict, rows: int, path):
    """Raises UsageError unless a run over so many rows can be at the state's step, epoch and sample."""
    step, epoch, sample, epochs = state["step"], state["epoch"], state["sample"], state["arguments"].get("epochs", "")
    is_place = sample < rows and epochs.isdecimal() and (epoch, sample) <= (int(epochs), 0)
    if not (is_place and epoch + (sample > 0) <= step <= epoch * rows + sample):  # a step takes a sample at least
        raise UsageError(
            f"{display_path(path)} is damaged: step {step:,}, epoch {epoch:,}, sample {sample:,} is no place in a run "
            f"of {epochs} epochs over {rows:,} rows. --from_resume 0 begins anew"
        )


def random_state(device: torch.device) -> dict:
    """Returns this rank's random state, on the CPU and on its GPU."""
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
                f"the checkpoint's random state is damaged ({error}): --from_resume 0 begins anew"
            ) from error


def changed_settings(state: dict, args, world_size: int) -> str:
    """Describes which of the settings that may change differ from the saved run's."""
    before = state["arguments"] | {"processes": str(state["processes"])}
    now = {name: str(getattr(args, name)) for name in MAY_CHANGE} | {"processes": str(world_size)}
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    return f"; changed: {', '.join(changed)}" if changed else ""


def changed_pictures(state: dict, data: VLMDataset) -> str:
    """Says how many pictures hold something else than when a run was saved; empty for none.

    A parquet's would make it other data; in a jsonl the rows are the same, which only name them.
    """
    before = state.get("pictures", torch.empty(0))  # old checkpoints lack it
    changed = [] if before.shape != data.picture_keys.shape else np.flatnonzero(before.numpy() != data.picture_keys)
    if len(changed) == 0:
        return ""
    return (
        f"warning: {len(changed):,} of the {len(before):,} pictures changed since this run was saved, the first is "
        f"{data.picture_source(changed[0])[1]}: it continues with what they show now. To continue with what it learned "
        "before, put the old ones back; --from_resume 0 starts over with the new ones"
    )


@dataclass
class TrainState:
    """How far a run is: optimizer steps done, and the epoch and sample that come next."""

    step: int = 0
    epoch: int = 0
    sample: int = 0
    skipped_pictures: int = 0
    learned_tokens: int = 0

    def advance(self, skipped_pictures: int, learned: int, epoch: int, sample: int):
        """Counts a step; `epoch` and `sample` come next."""
        self.step, self.epoch, self.sample = self.step + 1, epoch, sample
        self.skipped_pictures += skipped_pictures
        self.learned_tokens += learned

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict):
        for name in asdict(self):
            setattr(self, name, state.get(name, 1))  # old checkpoints lack `learned_tokens`


def keep_earlier_run(run: Run):
    """Renames what an earlier run of this name reported, before this one reports; unless this one resumes it.

    Weights and state follow when this run's own are written, so that a run that fails before leaves them; those of an
    unfinished run at once, so that nobody resumes it with another's reports. The main rank does it.

    Raises:
        UsageError: If a file cannot be renamed.
    """
    files = run.files
    if run.state is not None or not run.processes.is_main:
        return
    was_stopped = run.args.from_resume == 0 and is_unfinished(files.state)
    has_weights = files.weights.exists() or files.state.exists()
    if files.keep_aside(*REPORTED, *(SAVED if was_stopped else ())) or has_weights:
        run.log(f"kept the {'unfinished' if was_stopped else 'earlier'} run as {display_path(files.aside)}")


def save_if_due(checkpoints: Checkpoints, state: TrainState, parts: tuple, asked: int | None, total_steps: int):
    """Saves at --save_interval, after --save_minutes, at an epoch's end, and on a signal; all ranks call it.

    Args:
        parts: What else has a state_dict to save; the last of them is the Progress, which logs.
        asked: The signal this rank received, or None.

    Raises:
        Stopped: If any rank received one.
        UsageError: If the run's last save fails.
    """
    run, progress = checkpoints.run, parts[-1]
    # All ranks must decide the same: by the main rank's clock and any rank's signal.
    minutes_are_up = run.processes.is_main and checkpoints.minutes_are_up()
    minutes_are_up, anybody = run.processes.sum(minutes_are_up, asked is not None)
    if state.step % run.args.save_interval == 0 or state.sample == 0 or minutes_are_up or anybody:
        if state.learned_tokens == 0:
            raise UsageError(
                f"nothing was learned in {state.step:,} step(s), so nothing is saved: none of the "
                f"{state.skipped_pictures:,} pictures so far can be read (python -m dataset.check "
                f"{display_path(run.args.data_path)} --pictures says why)"
            )
        error = checkpoints.save({name: value for part in (state, *parts) for name, value in part.state_dict().items()})
        if error is not None and (anybody or state.step == total_steps):
            raise error
        if error is not None:
            progress.log(f"warning: step {state.step} could not be saved, training continues: {error}")
    if anybody and state.step < total_steps:
        progress.log(
            f"stopped after step {state.step:,} of {total_steps:,}, which is saved: the same command with "
            "--from_resume 1 resumes from there"
        )
        raise Stopped(asked or signal.SIGTERM)
