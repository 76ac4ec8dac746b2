"""A run's files: checkpoints of weights, sidecar and training state, from which it resumes bit-identically."""

import contextlib
import glob
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
from filelock import Timeout

from common import files
from common.errors import RankError, UsageError
from common.paths import display_path
from common.schema import Range, SchemaError, check
from dataset.features import tower_key
from dataset.lm_dataset import VLMDataset
from dataset.prompts import usual_form
from model import weights as weight_io
from model.model_vlm import MiniMindVLM
from model.vision_tower import tower_weights_sha256

RESUMES = "the same command with --from_resume 1 resumes from there"
UNREPORTED = ("from_resume", "eval_interval")  # settings that always differ, and that follow from others
COUNT, SECONDS = Range(int, 0, 1 << 53), Range(float, 0, 1e12)
# Checkpoints are files from outside too. This is in those of every stage:
PROGRESS = {
    **dict.fromkeys(("step", "epoch", "sample", "skipped_pictures"), COUNT),
    "units?": COUNT,  # old checkpoints lack it
    **dict.fromkeys(("fingerprint", "arguments"), {"*": str}),
    "learned": {"*": torch.Tensor},
    "optimizer": {"state": {"*": {"*": torch.Tensor}}},
    "scaler": {"*": Range(float, 0, 1e300)},
    "random": [{"cpu": torch.Tensor, "cuda": (torch.Tensor, None)}],
}
STATE = PROGRESS | {
    "pictures?": torch.Tensor,  # old checkpoints lack it
    "bad_steps": [COUNT] * 3,
    "processes": Range(int, 1, 1 << 20),
    "wandb_id": (str, None),
    "swanlab_id?": (str, None),
    "progress": {
        **{"learned_from": [Range(float, -1e300, 1e300)] * 2, "samples": COUNT, "tokens": COUNT},
        **{"data_seconds": SECONDS, "seconds_before": SECONDS},
    },
}
# Of the files a run writes, after its name.
SAVED, BAD_ROWS = ("_resume.pth", ".pth", ".json"), ".bad_rows.txt"
REPORTED = (".metrics.jsonl", ".report.html", "_samples", "_samples.md")  # the last of earlier versions
ENDINGS = (*SAVED, *REPORTED, BAD_ROWS)


class RunFiles:
    """The files a run writes: {save_dir}/{name}, with these endings."""

    def __init__(self, save_dir: Path, name: str):
        self.save_dir, self.name = save_dir, name
        endings = (".pth", "_resume.pth", ".metrics.jsonl", "_samples", BAD_ROWS)
        paths = (save_dir / f"{name}{ending}" for ending in endings)
        self.weights, self.state, self.metrics, self.samples, self.bad_rows = paths

    @cached_property
    def aside(self) -> Path:
        """The new name of an earlier run's files: not in use, and never taken for weights."""
        now = f"{self.name}.{time.strftime('%Y-%m-%d-%H%M%S')}"
        names = chain([now], (f"{now}-{number}" for number in count(2)))  # a second may see several runs
        return self.save_dir / next(name for name in names if not any(self.save_dir.glob(f"{glob.escape(name)}*")))

    def keep_aside(self, *endings: str) -> bool:
        """Renames an earlier run's files; returns whether there were any. Raises UsageError if that fails."""
        earlier = [ending for ending in endings if os.path.lexists(self.save_dir / f"{self.name}{ending}")]
        try:
            for ending in earlier:
                (self.save_dir / f"{self.name}{ending}").rename(f"{self.aside}{ending}")
        except OSError as error:
            raise UsageError(f"{display_path(error.filename)} cannot be renamed: {error.strerror}") from error
        return bool(earlier)

    def keep_reports_aside(self, starts_over: bool, log: Callable[[str], None]):
        """Renames an earlier run's reports; if --from_resume 0 leaves an unfinished run, its weights and state too."""
        # Without that flag a run is finished, and its weights are renamed at the first save of this one.
        was_stopped = starts_over and is_unfinished(self.state)
        has_weights = self.weights.exists() or self.state.exists()
        if self.keep_aside(*REPORTED, *(SAVED if was_stopped else ())) or has_weights:
            log(f"kept the {'unfinished' if was_stopped else 'earlier'} run as {display_path(self.aside)}")

    def lock(self, is_main: bool, flags: tuple[str, ...] = ("--save_weight", "--save_dir")):
        """Makes the folder, removes what killed runs left half written, and locks the run's name on the main rank.

        `flags` name other files or another folder. Raises UsageError if the folder cannot be written to, or another
        process writes the same files now.
        """
        try:
            with files.scratch_folder(self.save_dir):  # it can be written to
                # A killed run's workers may hold the lock for 5 seconds more.
                self.held = is_main and files.lock_of(self.save_dir / self.name).acquire(timeout=6)
        except Timeout as error:
            raise RankError(
                f"another process is training {self.name} in {display_path(self.save_dir)}: wait for it, or give this "
                f"run another {' or '.join(flags)}"
            ) from error
        except OSError as error:
            raise UsageError(f"{flags[-1]}: {self.save_dir} cannot be written to: {error.strerror}") from error


def read_state(path: Path, schema: dict, from_resume: int | None, log: Callable[[str], None]) -> dict | None:
    """Reads the checkpoint to resume from, None to start over; UsageError if unreadable, or --from_resume is needed."""
    if from_resume is None and is_unfinished(path):
        raise UsageError(
            f"{display_path(path)} belongs to a run that did not finish: --from_resume 1 resumes it, --from_resume 0 "
            "starts over"
        )
    if not from_resume:
        return None
    if not path.is_file():
        log(f"--from_resume 1: no {display_path(path)} yet, so this run starts from the beginning")
        return None
    state = files.load_file(path)
    try:
        check(state, schema)
    except SchemaError as error:
        raise UsageError(
            f"{display_path(path)} is no checkpoint of this version ({error}); --from_resume 0 starts over"
        ) from error
    return state


def is_unfinished(path: Path) -> bool:
    """Tells whether a checkpoint has epochs left; one that is missing or unreadable counts as finished."""
    try:
        state = files.load_file(path)
        return state["epoch"] < int(state["arguments"]["epochs"])
    except (UsageError, KeyError, TypeError, ValueError, RuntimeError):
        return False


class Checkpoints:
    """Saves a run; restores its model where it resumes (UsageError if the checkpoint belongs to another run).

    Construct before `round_frozen_weights`: weight files keep frozen weights unrounded. `run` is a `trainer.setup.Run`,
    `companions` are the stage's, `settings` the flags in effect, for sidecar and state.
    """

    def __init__(self, run, model: MiniMindVLM, companions: dict, data: VLMDataset, settings: dict):
        self.run, self.model, self.data, self.settings = run, model, data, settings
        config, tower = run.config, model.vision_encoder
        self.about = {"rows": len(data), "pictures": len(np.unique(data.shown_pictures))}  # in the sidecar
        self.about |= {"prompt_form": usual_form(data, run.tokenizer), "tower_sha256": tower_weights_sha256(tower)}
        self.picture_keys = data.picture_keys if run.processes.is_main else None  # reads all pictures
        if run.state is not None:
            weight_io.load_learned(model, run.state, run.files.state)
        named = model.state_dict(keep_vars=True).items()
        self.frozen = weight_io.in_half_precision({name: weight for name, weight in named if not weight.requires_grad})
        self.tower_key = tower_key(tower)
        content = hashlib.sha256(data.content_sha256.encode() + data.left_out.tobytes()).hexdigest()
        self.fingerprint = {  # what must not change on resume: samples and model depend on it
            "model": f"hidden_size {config.hidden_size}, {config.num_hidden_layers} layers, "
            f"{config.num_attention_heads} and {config.num_key_value_heads} heads, "
            f"{config.vocab_size} tokens{', experts' if config.use_moe else ''}",
            "max_seq_len": str(run.args.max_seq_len),
            "seed": str(run.args.seed),
            "tokenizer": run.tokenizer_sha256[:12],
            "data": f"{len(data):,} rows, {content[:12]}",
            "vision tower": self.tower_key[:12],
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
        sidecar = weight_io.describe(run.config, *made_by) | {"step": step} | self.about
        return weight_io.weight_files(run.files.weights, self.model, self.frozen, sidecar)

    def save(self, parts: list, is_last: bool):
        """Writes what the parts' `state_dict` return, weights and sidecar, all or none; all ranks call it.

        Raises UsageError if nothing was learned yet, the weights are not finite, or the run's last save cannot be
        written (the disk is full), but for the weights alone where these can; other failed saves are logged and keep
        the previous files.
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
                with contextlib.suppress(UsageError):
                    if is_last:  # the weights alone are smaller
                        files.write_together(self._weight_files(state["step"]), rename)
                        failure = UsageError(f"{error}; the weights of step {state['step']} alone were written")
        run.processes.barrier()
        if failure is not None:
            if is_last:
                raise failure
            run.log(f"warning: step {state['step']} could not be saved, training continues: {failure}")

    def report_resume(self, step: int, total_steps: int):
        """Logs where the run continues, which settings changed since it was saved, and how many pictures changed."""
        run, data = self.run, self.data
        before = run.state["arguments"] | {"processes": str(run.state["processes"])}
        now = {name: str(value) for name, value in self.settings.items() if name in before and name not in UNREPORTED}
        now |= {"processes": str(run.processes.world_size)}
        changed = [f"{name} {before[name]} -> {value}" for name, value in now.items() if before[name] != value]
        changed = f"; changed: {', '.join(changed)}" if changed else ""
        run.log(f"  resumes      after step {step:,}, {total_steps - step:,} to go{changed}")
        pictures = run.state.get("pictures", torch.empty(0)).numpy()  # old checkpoints lack it
        # Only the main rank has read the pictures. A parquet with other pictures is other data.
        is_comparable = self.picture_keys is not None and pictures.shape == self.picture_keys.shape
        if is_comparable and len(changed := np.flatnonzero(pictures != self.picture_keys)):
            run.log(
                f"warning: {len(changed):,} of the {len(pictures):,} pictures changed since this run was saved, the "
                f"first is {data.picture_source(changed[0])[1]}: the run continues with their new content; restore "
                "the old files to avoid that, or --from_resume 0 starts over with the new ones"
            )


def check_same_run(state: dict, fingerprint: dict[str, str], rows: int, path: Path):
    """Raises UsageError unless a checkpoint is of this run, and at a position that a run over so many rows can have."""
    for name, value in fingerprint.items():
        if (saved := state["fingerprint"].get(name)) != value:
            raise UsageError(
                f"{display_path(path)} differs from this run in its {name} ({saved}; now {value}): repeat that run's "
                "flags, or start over with --from_resume 0"
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
            raise UsageError(f"the saved random state is damaged ({error}): --from_resume 0 starts over") from error


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
