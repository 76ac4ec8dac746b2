"""The training loop, the same for both stages."""

import math
import os
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import BatchSampler
from model.model_vlm import MiniMindVLM
from trainer import checkpoint
from trainer.assets import UsageError, shown
from trainer.compilation import LENGTH_MULTIPLE, CompiledVLM, extreme_shapes
from trainer.features import PictureFeatures
from trainer.prefetch import on_device
from trainer.progress import Progress, clock, start_wandb
from trainer.setup import Run

MODEL_INPUTS = ("input_ids", "labels", "image_starts", "learned_positions")


def cosine_learning_rate(peak: float, done: float) -> float:
    """From `peak` at 0 of the run done to a tenth of it at 1, along half a cosine."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def train(run: Run, model: MiniMindVLM, data: VLMDataset):
    """Trains what is not frozen, and writes weights, state and metrics as it goes.

    An optimizer step takes batch_size x accumulation_steps x processes samples, and its gradient is that of the mean loss
    over all their learned tokens, however they are divided.

    Raises:
        UsageError: If the first loss says that weights and tokenizer do not belong together.
    """
    run.cache_features(model, data)
    Trainer(run, model, data).train()


class Trainer:
    def __init__(self, run: Run, model: MiniMindVLM, data: VLMDataset):
        args, processes = run.args, run.processes
        self.run, self.model, self.data, self.args, self.processes = run, model, data, args, processes
        self.parameters = checkpoint.learned_parameters(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=args.learning_rate, fused=run.device.type in ("cpu", "cuda")
        )
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self.forward = self._compiled() if args.compile else model
        self.image_features = PictureFeatures(self.forward.encode_images, data.feature_cache, run.device)
        self.sampler = BatchSampler(
            data.lengths,
            args.batch_size,
            args.accumulation_steps,
            args.epochs,
            args.seed,
            processes.rank,
            processes.world_size,
        )
        # The first sample of the run's last step, counted through all epochs.
        self.last_first = (args.epochs - 1) * len(data) + (self.sampler.steps_per_epoch - 1) * self.sampler.group
        self.step = self.skipped_pictures = 0
        self.first_loss_seen = run.state is not None
        self.wandb_id = None
        if run.state is not None:
            self._restore(run.state)
        remaining = len(self.sampler) // args.accumulation_steps
        self.total_steps = self.step + remaining
        run.header(model, data, self.total_steps)
        if run.state is not None:
            run.say(f"  goes on      after step {self.step:,}, {remaining:,} to go")

    def train(self):
        """Runs all steps that are left."""
        progress = self._start_progress()
        batches = self._batches()
        try:
            for epoch, first_sample in self.sampler.steps():
                self._one_step(progress, batches, epoch, first_sample)
            self._finish(progress)
        finally:
            progress.close()

    def _one_step(self, progress: Progress, batches, epoch: int, first_sample: int):
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.args.accumulation_steps)]
        data_seconds = time.perf_counter() - started
        learned, samples, tokens = self._count(micro_batches)
        done = (epoch * len(self.data) + first_sample) / max(1, self.last_first)
        learning_rate = cosine_learning_rate(self.args.learning_rate, done)
        loss_sum = self._learn(micro_batches, learned, samples, learning_rate)
        self.step += 1
        next_sample = min(first_sample + self.sampler.group, len(self.data))
        epoch_ends = next_sample == len(self.data)
        self.position = (epoch + 1, 0) if epoch_ends else (epoch, next_sample)
        progress.add(loss_sum, learned, samples, tokens, data_seconds)
        if progress.due(self.step, epoch_ends):
            progress.report(self.step, epoch + 1, learning_rate, self.skipped_pictures)
        if self.step % self.args.save_interval == 0 or epoch_ends:
            self._save(progress)

    def _count(self, micro_batches: list[dict]) -> tuple[int, int, int]:
        """Learned tokens, samples and tokens of this step over all ranks; broken pictures are named here."""
        for batch in micro_batches:
            for error in batch["skipped"]:
                tqdm.write(f"skipped a sample, its picture cannot be read: {error}")
        counts = self.processes.sum(
            sum(len(batch["learned_positions"]) for batch in micro_batches),
            sum(len(batch["input_ids"]) for batch in micro_batches),
            sum(batch["tokens"] for batch in micro_batches),
            sum(len(batch["skipped"]) for batch in micro_batches),
        )
        self.skipped_pictures += int(counts[3])
        return int(counts[0]), int(counts[1]), int(counts[2])

    def _learn(self, micro_batches: list[dict], learned: int, samples: int, learning_rate: float) -> torch.Tensor:
        """One optimizer step. Returns the sum of the losses of its learned tokens over all ranks."""
        device = self.run.device
        loss_sum = torch.zeros(1, device=device)
        if learned == 0:
            return loss_sum  # nothing to learn: no step, since even a zero gradient would move AdamW's weights
        for batch in micro_batches:
            if len(batch["learned_positions"]) == 0:
                continue
            inputs = {name: batch[name] for name in MODEL_INPUTS}
            inputs["image_features"] = self.image_features(batch)  # in the precision that the tower is held in
            with torch.autocast(device.type, self.run.dtype, enabled=self.run.dtype != torch.float32):
                output = self.forward(**inputs, num_items_in_batch=1)
            loss_sum += output.loss.detach()
            loss = output.loss / learned
            if output.aux_loss is not None:
                loss = loss + output.aux_loss * (len(batch["input_ids"]) / samples)
            if loss.requires_grad:  # not so where only the projection learns and the batch has no picture
                self.scaler.scale(loss).backward()
        self.processes.sum_gradients(list(self.parameters.values()), loss_sum)
        if not self.first_loss_seen:
            self._check_first_loss(float(loss_sum) / learned)
            self.first_loss_seen = True
        self.scaler.unscale_(self.optimizer)
        if self.args.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.args.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum

    def _check_first_loss(self, loss: float):
        uniform = math.log(self.model.config.vocab_size)
        if self.run.weights is None or loss < uniform:
            return
        message = (
            f"the first loss is {loss:.2f}, no better than guessing (ln {self.model.config.vocab_size} = {uniform:.2f}), though "
            f"training starts from {shown(self.run.weights.path)}. Most likely these weights and the tokenizer "
            f"{shown(self.args.tokenizer_path)} do not belong together: name the right one with --tokenizer_path"
        )
        if not self.args.ignore_high_loss:
            raise UsageError(f"{message}, or go on all the same with --ignore_high_loss")
        self.run.say(f"warning: {message}")

    def _compiled(self) -> CompiledVLM | MiniMindVLM:
        """The compiled model, or the model where that does not work here."""
        run, compiled = self.run, CompiledVLM(self.model, self.args.batch_size)
        run.say("compiling tower and decoder ... (--compile 0 does without)")
        try:
            compiled.warm_up(extreme_shapes(self.data, self.args.batch_size), run.device, run.dtype)
        except torch.OutOfMemoryError as error:
            longest = int(max(self.data.lengths))
            raise UsageError(
                f"{run.device} has too little memory for a batch of {self.args.batch_size} samples of the longest row's "
                f"{longest} tokens: a smaller --batch_size with more --accumulation_steps computes the same"
            ) from error
        except RuntimeError as error:
            self.args.compile = False
            reason = str(error).strip().splitlines()[0]
            run.say(f"warning: torch.compile does not work here, so this run goes on without it ({reason})")
            return self.model
        return compiled

    def _batches(self) -> Iterator[dict]:
        """This process's batches, on the device."""
        is_cuda, workers = self.run.device.type == "cuda", self.args.num_workers
        loader = DataLoader(
            self.data,
            batch_sampler=self.sampler,
            collate_fn=VLMCollator(self.model.config.pad_token_id, LENGTH_MULTIPLE if self.args.compile else 1),
            num_workers=workers,
            pin_memory=is_cuda,
            prefetch_factor=4 if workers else None,
        )
        # With a cache the pixels are not wanted on the device, but for those that it lacks.
        names = MODEL_INPUTS if self.data.feature_cache is not None else (*MODEL_INPUTS, "pixel_values")
        return on_device(loader, self.run.device, names)

    def _start_progress(self) -> Progress:
        run, wandb_run = self.run, None
        if self.args.use_wandb and self.processes.is_main:
            settings = {
                key: str(value) if isinstance(value, os.PathLike) else value for key, value in vars(self.args).items()
            }
            wandb_run = start_wandb(self.args.wandb_project, run.name, settings, self.args.save_dir, self.wandb_id)
            self.wandb_id = wandb_run.id
        metrics_path = run.metrics_path if self.processes.is_main else None
        return Progress(self.total_steps, self.step, self.args.log_interval, metrics_path, wandb_run)

    def _finish(self, progress: Progress):
        seconds = time.perf_counter() - self.run.started
        if self.skipped_pictures:
            progress.say(f"{self.skipped_pictures} sample(s) were skipped because a picture could not be read")
        progress.say(f"done in {clock(seconds)}: {shown(self.run.weights_path)}")
        following = {
            "pretrain": "python trainer/train_sft_vlm.py",
            "sft": f"python eval_vlm.py --weight {self.args.save_weight}",
        }
        progress.say(f"next: {following[self.run.stage.name]}")

    def _save(self, progress: Progress):
        """Writes the weights and, after them, the state to go on from.

        Raises:
            UsageError: If half precision cannot hold the weights any more; what was saved before is kept.
        """
        largest = torch.finfo(torch.float16).max
        if not all(bool((parameter.detach().abs() <= largest).all()) for parameter in self.parameters.values()):
            raise UsageError(
                f"the weights became NaN or larger than {largest:g} by step {self.step}, so they are not saved: a lower "
                f"--learning_rate than {self.args.learning_rate:g} or a lower --grad_clip than {self.args.grad_clip:g} may help"
            )
        if self.processes.is_main:
            run = self.run
            progress.begin_file()
            sidecar = checkpoint.describe(
                self.model.config, run.stage.name, self.args.assets, run.tokenizer_sha256, vars(self.args)
            )
            checkpoint.save_weights(run.weights_path, self.model, run.frozen_weights, sidecar | {"step": self.step})
            checkpoint.write_atomically(run.state_path, lambda file: torch.save(self._state(), file))
        self.processes.barrier()

    def _state(self) -> dict:
        epoch, sample = self.position
        device = self.run.device
        return {
            "learned": {name: parameter.detach().cpu() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "sample": sample,
            "step": self.step,
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
            "arguments": {key: str(value) for key, value in vars(self.args).items()},
            "fingerprint": {
                "data": self.data.fingerprint,
                "tokenizer": self.run.tokenizer_sha256,
                "rows": len(self.data),
                "seed": self.args.seed,
            },
            "wandb_id": self.wandb_id,
            "skipped_pictures": self.skipped_pictures,
        }

    def _restore(self, state: dict):
        here = {"data": self.data.fingerprint, "tokenizer": self.run.tokenizer_sha256, "rows": len(self.data)}
        here["seed"] = self.args.seed  # another order would skip samples and repeat others
        for name, value in state["fingerprint"].items():
            if here[name] != value:
                raise UsageError(
                    f"{shown(self.run.state_path)} is of a run with other {name} ({value}; now {here[name]}): repeat that "
                    "run's flags, or leave --from_resume out to begin anew"
                )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.wandb_id = state["step"], state["wandb_id"]
        self.skipped_pictures = state.get("skipped_pictures", 0)
        self.sampler.start_at(state["epoch"], state["sample"])
        torch.set_rng_state(state["random"]["cpu"])
        if state["random"]["cuda"] is not None and self.run.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.run.device)
