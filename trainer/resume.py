"""When and how a run is saved: weights, sidecar and training state together, and no failure to save ends a run."""

import time

import torch

from common import files
from common.errors import UsageError
from common.paths import display_path
from model.model_vlm import MiniMindVLM
from trainer import weights as checkpoint
from trainer.setup import Run
from trainer.watch.progress import Progress

MAY_CHANGE = ("epochs", "learning_rate", "batch_size", "accumulation_steps", "grad_clip", "dtype", "device")


class Saver:
    """Writes a run's files; only the main process has one.

    Args:
        run: Which run.
        model: Whose weights.
    """

    def __init__(self, run: Run, model: MiniMindVLM):
        self.run, self.model = run, model
        self.saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether --save_minutes have passed since the last save."""
        return time.monotonic() - self.saved_at >= 60 * self.run.args.save_minutes

    def save(self, state: dict) -> UsageError | None:
        """Writes the state, the weights and their sidecar, all or none.

        Returns:
            What went wrong, as a full disk; the files are then those of the save before.
        """
        self.saved_at = time.monotonic()  # also of a save that fails: not tried again at every step
        try:
            # The state first: if the power fails between the renames, the weights can be made of it (`mend`).
            files.write_together(
                {self.run.state_path: lambda file: torch.save(state, file)} | self._weight_files(state["step"])
            )
        except UsageError as error:
            return error
        return None

    def mend(self, state: dict):
        """Makes the weight file that of a state that was read: it is an older one if the run was ended in between."""
        sidecar = checkpoint.glance_at_sidecar(self.run.weights_path)
        if sidecar.get("step") != state["step"] or not self.run.weights_path.is_file():
            files.write_together(self._weight_files(state["step"]))

    def _weight_files(self, step: int) -> dict:
        run = self.run
        sidecar = checkpoint.describe(
            self.model.config, run.stage.name, run.args.assets, run.tokenizer_sha256, vars(run.args)
        )
        return checkpoint.weight_files(run.weights_path, self.model, run.frozen_weights, sidecar | {"step": step})


def state_of(trainer, progress: Progress) -> dict:
    """All that a run needs to go on, beside the files it started from and the random states."""
    epoch, sample = trainer.position
    return {
        "learned": {name: parameter.detach().cpu() for name, parameter in trainer.parameters.items()},
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": epoch,
        "sample": sample,
        "step": trainer.step,
        "arguments": {key: str(value) for key, value in vars(trainer.args).items()},
        "processes": trainer.processes.world_size,
        "fingerprint": trainer.fingerprint,
        "wandb_id": trainer.wandb_id,
        "skipped_pictures": trainer.skipped_pictures,
        "bad_steps": trainer.bad_steps.tolist(),
        "progress": progress.pending(),
    }


def restore(trainer, state: dict):
    """Puts a state into a trainer that was just made.

    Raises:
        UsageError: If it is of a run with other data, another model, or another order of samples.
    """
    for name, value in trainer.fingerprint.items():
        before = state["fingerprint"].get(name)
        if before != value:
            raise UsageError(
                f"{display_path(trainer.run.state_path)} is of a run with other {name} ({before}; now {value}): repeat that "
                "run's flags, or leave --from_resume out to begin anew"
            )
    fused = trainer.optimizer.defaults["fused"]
    trainer.optimizer.load_state_dict(state["optimizer"])
    for group in trainer.optimizer.param_groups:
        group["fused"] = fused  # the state may come from another kind of device
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.step, trainer.wandb_id, trainer.pending = state["step"], state["wandb_id"], state["progress"]
    trainer.skipped_pictures = state["skipped_pictures"]
    trainer.bad_steps = torch.tensor(state["bad_steps"], device=trainer.run.device)
    trainer.bad_steps_told = state["bad_steps"][0]
    trainer.position = state["epoch"], state["sample"]
    trainer.sampler.start_at(*trainer.position)
    if trainer.processes.rank < len(state["random"]):
        random = state["random"][trainer.processes.rank]
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None and trainer.run.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], trainer.run.device)
    if trainer.saver is not None:
        trainer.saver.mend(state)


def changes(state: dict, args, processes) -> str:
    """What of the settings that may change is another than in a saved run, in words."""
    before = state["arguments"] | {"processes": str(state["processes"])}
    now = {name: str(getattr(args, name)) for name in MAY_CHANGE} | {"processes": str(processes.world_size)}
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    return f"; changed: {', '.join(changed)}" if changed else ""
