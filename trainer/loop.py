"""The training loop, the same for both stages."""

import math
import os
import signal
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.errors import RankError, Stopped, UsageError
from common.paths import display_path
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import BatchSampler
from model.model_vlm import MiniMindVLM
from trainer import weights as checkpoint
from trainer.resume import Saver, changes, restore, state_of
from trainer.setup import Run
from trainer.support.compilation import LENGTH_MULTIPLE, CompiledVLM, extreme_shapes
from trainer.support.picture_features import PictureFeatures
from trainer.support.prefetch import on_device
from trainer.support.signals import StopSignals, ignore_in_worker
from trainer.watch.progress import Progress, clock, start_wandb
from trainer.watch.watcher import Watch

BAD_STEPS_IN_A_ROW = 10
MODEL_INPUTS = ("input_ids", "labels", "image_starts", "learned_positions")


def cosine_learning_rate(peak: float, done: float) -> float:
    """From `peak` at 0 of the run done to a tenth of it at 1, along half a cosine."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def train(run: Run, model: MiniMindVLM, data: VLMDataset, heldout: VLMDataset | None = None):
    """Trains what is not frozen, and writes weights, state and metrics as it goes; measures on `heldout` now and then.

    An optimizer step takes batch_size x accumulation_steps x processes samples, and its gradient is that of the mean loss
    over all their learned tokens, however they are divided.

    Raises:
        UsageError: If the first loss says that weights and tokenizer do not belong together.
    """
    run.cache_features(model, data)
    Trainer(run, model, data, heldout).train()


class Trainer:
    def __init__(self, run: Run, model: MiniMindVLM, data: VLMDataset, heldout: VLMDataset | None = None):
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
        self.step, self.position, self.skipped_pictures, self.wandb_id = 0, (0, 0), 0, None
        # Steps skipped because their loss or gradient was not finite: all, in a row, and the most in a row.
        self.bad_steps = torch.zeros(3, dtype=torch.int64, device=run.device)
        self.bad_steps_told = 0
        self.first_loss_seen = run.state is not None
        self.pending = None
        torch.manual_seed(args.seed + processes.rank)  # from here on (dropout) every rank draws its own
        self.saver = Saver(run, model) if processes.is_main else None
        self.fingerprint = run.fingerprint(data)
        if run.state is not None:
            restore(self, run.state)
        remaining = len(self.sampler) // args.accumulation_steps
        self.total_steps = self.step + remaining
        if args.eval_interval is None:
            args.eval_interval = math.ceil(self.total_steps / 10)
        self.watch = None if heldout is None else Watch(run, model, heldout, self.step)
        run.header(model, data, heldout, self.total_steps)
        if run.state is not None:
            run.say(
                f"  goes on      after step {self.step:,}, {remaining:,} to go{changes(run.state, args, processes)}"
            )

    def train(self):
        """Runs all steps that are left.

        Raises:
            Stopped: If a signal asked for it; the run is saved then.
            UsageError: If it cannot go on, as where the last save fails.
        """
        progress = self._start_progress()
        batches = self._batches()
        try:
            with StopSignals(speaks=self.processes.is_main) as signals:
                for epoch, first_sample in self.sampler.steps():
                    self._one_step(progress, batches, epoch, first_sample)
                    self._save_if_due(progress, signals)
            self._finish(progress)
        except RuntimeError as error:
            # torch raises it wherever this process is when a worker ends.
            if not str(error).startswith("DataLoader worker"):
                raise
            raise RankError(
                f"a worker process that reads pictures was ended from outside ({str(error).splitlines()[0].strip()}), most "
                f"likely because memory ran out: use fewer than --num_workers {self.args.num_workers}. What was saved "
                "is kept: the same command with --from_resume 1 goes on from there"
            ) from error
        finally:
            batches.close()
            progress.close()

    def _one_step(self, progress: Progress, batches, epoch: int, first_sample: int):
        started = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.args.accumulation_steps)]
        data_seconds = time.perf_counter() - started
        learned, samples, tokens = self._count(micro_batches)
        done = (epoch * len(self.data) + first_sample) / max(1, self.last_first)
        learning_rate = cosine_learning_rate(self.args.learning_rate, done)
        learned_from = self._learn(micro_batches, learned, samples, learning_rate)
        self.step += 1
        next_sample = min(first_sample + self.sampler.group, len(self.data))
        epoch_ends = next_sample == len(self.data)
        self.position = (epoch + 1, 0) if epoch_ends else (epoch, next_sample)
        progress.add(learned_from, samples, tokens, data_seconds)
        is_due = progress.due(self.step, epoch_ends)
        if is_due or self.run.device.type != "cuda":  # to read them there is to wait for the device
            self._check_bad_steps(progress)
        if is_due:
            counts = {"skipped_pictures": self.skipped_pictures, "skipped_steps": self.bad_steps_told}
            progress.report(self.step, epoch + 1, learning_rate, counts)
        if self.watch is not None and (self.step % self.args.eval_interval == 0 or self.step == self.total_steps):
            self.watch.look(progress, self.step, epoch + 1)

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
        """One optimizer step. Returns (2,): the summed loss of its learned tokens over all ranks, and their number."""
        device = self.run.device
        loss_sum = torch.zeros(1, device=device)
        if learned == 0:
            return torch.zeros(2, device=device)  # no step: even a zero gradient would move AdamW's weights
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
        is_bad = self._step_unless_bad(loss_sum, learning_rate)
        return torch.where(is_bad, 0.0, torch.cat((loss_sum, torch.full_like(loss_sum, learned))))

    def _step_unless_bad(self, loss_sum: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """Moves the weights, unless the loss or the gradient is not finite. Returns whether it is so, unread."""
        weights = list(self.parameters.values())
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
        if self.args.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(weights, self.args.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        is_bad = ~loss_sum.isfinite().all()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # leaves steps out by itself: overflow is how it finds its scale
            self.scaler.update()
        else:
            is_bad = is_bad | ~norm.isfinite()
            if self.optimizer.defaults["fused"]:
                self.optimizer.found_inf = is_bad.float()  # where it is 1, the kernel changes nothing
                self.optimizer.step()
            elif not is_bad:
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total, in_a_row, most = self.bad_steps
        in_a_row = (in_a_row + 1) * is_bad
        self.bad_steps = torch.stack((total + is_bad, in_a_row, torch.maximum(most, in_a_row)))
        return is_bad

    def _check_bad_steps(self, progress: Progress):
        """Tells of steps that were skipped.

        Raises:
            UsageError: If there were too many in a row.
        """
        total, in_a_row, most = self.bad_steps.tolist()
        if total > self.bad_steps_told:
            progress.say(
                f"by step {self.step} the loss or the gradient was not finite in {total - self.bad_steps_told} step(s) more: "
                f"skipped, the weights are as before ({total} so far)"
            )
            self.bad_steps_told = total
        if most >= BAD_STEPS_IN_A_ROW:
            raise UsageError(
                f"{most} steps in a row, up to step {self.step}, had a loss or a gradient that is not finite, so the run ends; "
                f"the weights saved last are finite. What may help: a lower --learning_rate than {self.args.learning_rate:g}, "
                f"a lower --grad_clip than {self.args.grad_clip:g}, --dtype float32, and a look at the data "
                f"(python -m dataset.check {display_path(self.args.data_path)})"
            )

    def _check_first_loss(self, loss: float):
        if not math.isfinite(loss):
            return  # such a step is skipped; the next one tells
        self.first_loss_seen = True
        uniform = math.log(self.model.config.vocab_size)
        if self.run.weights is None or loss < uniform:
            return
        message = (
            f"the first loss is {loss:.2f}, no better than guessing (ln {self.model.config.vocab_size} = {uniform:.2f}), though "
            f"training starts from {display_path(self.run.weights.path)}. Most likely these weights and the tokenizer "
            f"{display_path(self.args.tokenizer_path)} do not belong together: name the right one with --tokenizer_path"
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
        except (RuntimeError, NameError) as error:  # NameError: torch 2.6's compiler in transformers' tower
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
            worker_init_fn=ignore_in_worker,
            generator=torch.Generator(),  # its own: the loader's draws would be missing from a resumed run's
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
        return Progress(self.total_steps, self.step, self.args.log_interval, metrics_path, wandb_run, self.pending)

    def _finish(self, progress: Progress):
        seconds = time.perf_counter() - self.run.started
        if self.skipped_pictures:
            progress.say(f"{self.skipped_pictures} sample(s) were skipped because a picture could not be read")
        if self.watch is not None:
            self.watch.finish(progress, self.step)
        progress.say(f"done in {clock(seconds)}: {display_path(self.run.weights_path)}")
        following = {
            "pretrain": "python trainer/train_sft_vlm.py",
            "sft": f"python eval_vlm.py --weight {self.args.save_weight}",
        }
        progress.say(f"next: {following[self.run.stage.name]}")

    def _save_if_due(self, progress: Progress, signals: StopSignals):
        """Saves at --save_interval, after --save_minutes, at an epoch's end, and where a signal came.

        Raises:
            Stopped: If one came, to whichever process.
            UsageError: If the run's last save fails.
        """
        # All processes decide the same: by the main process's clock, and by everybody's signals.
        minutes_are_up, asked = self.processes.sum(
            self.saver is not None and self.saver.is_due(), signals.asked is not None
        )
        is_last = self.step == self.total_steps
        if self.step % self.args.save_interval == 0 or self.position[1] == 0 or minutes_are_up or asked:
            error = self._save(progress)
            if error is not None and (asked or is_last):
                raise error
            if error is not None:
                progress.say(f"warning: step {self.step} could not be saved, training goes on: {error}")
        if asked and not is_last:
            progress.say(
                f"stopped after step {self.step:,} of {self.total_steps:,}, which is saved: the same command with "
                "--from_resume 1 goes on from there"
            )
            raise Stopped(signals.asked or signal.SIGTERM)

    def _save(self, progress: Progress) -> UsageError | None:
        """Writes weights and state; what was saved before is kept where that fails. Returns what went wrong."""
        largest = torch.finfo(torch.float16).max
        if not all(bool((parameter.detach().abs() <= largest).all()) for parameter in self.parameters.values()):
            raise UsageError(
                f"the weights became NaN or larger than {largest:g} by step {self.step}, so they are not saved: a lower "
                f"--learning_rate than {self.args.learning_rate:g} or a lower --grad_clip than {self.args.grad_clip:g} may help"
            )
        is_cuda, error = self.run.device.type == "cuda", None
        random = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(self.run.device) if is_cuda else None}
        of_all = self.processes.gather(random)
        if self.saver is not None:
            error = self.saver.save(state_of(self, progress) | {"random": of_all})
        self.processes.barrier()
        return error
