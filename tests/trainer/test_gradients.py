"""A step's gradient is that of the mean loss over all its learned tokens, however the batch is divided.

The scripts run with a learning rate too small to move the weights, so both steps see the same ones; AdamW's first
moment in the saved state is then 0.1 * (0.9 * first gradient + second gradient): linear in the gradients.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import PRETRAIN, SFT, language_model, pretrain_row, sft_row, turn, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.chat import load_tokenizer
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import epoch_order
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.setup import freeze
from trainer.stage import answer_loss
from trainer.step import TrainContext, count, train_step
from trainer.support.processes import Processes

pytest_plugins = ["tiny"]

SEED, ROWS = 7, 11  # steps of 8 and 3: the last is divided unevenly
STILL = ["--learning_rate", 1e-12, "--grad_clip", 0, "--epochs", 1, "--log_interval", 1, "--seed", SEED]
STILL += ["--ignore_high_loss", "--cache_vision", "off"]  # a cache rounds the tower's features: see test_features.py
WAYS = {"accumulated": (["--batch_size", 4, "--accumulation_steps", 2], 1), "two ranks": (["--batch_size", 4], 2)}


@pytest.fixture(scope="module")
def rows(world):
    """Writes rows of 0 to 2 images and about 30 to 500 tokens, 4 to over 100 of them learned."""
    rows = [sft_row(number) for number in range(ROWS - 2)]
    rows.append({"conversations": [turn("user", "几个？\n<image>"), turn("assistant", "两个。")], "image": "3.jpg"})
    rows.append({"conversations": [turn("user", "说。"), turn("assistant", "左边有一个红色的圆形，" * 20)]})
    return write_jsonl(world.root / "gradient_rows.jsonl", rows)


@pytest.fixture(scope="module")
def runs(world, rows, tmp_path_factory):
    """Returns a cached function: (losses, gradients by name) of a step of 8 rows and one of 3."""
    cache = {}

    def run(use_moe: bool, way: str):
        if (use_moe, way) not in cache:
            out = tmp_path_factory.mktemp("gradients")
            weights = out / f"start{'_moe' if use_moe else ''}.pth"
            torch.save(start_weights(use_moe), weights)
            flags, ranks = {"one batch": (["--batch_size", 8], 1), **WAYS}[way]
            files = [*world.files("sft", out), "--data_path", rows, "--from_weight", weights]
            result = world.run(SFT, *files, *flags, *STILL, ranks=ranks).passed()
            name = f"sft_vlm_32{'_moe' if use_moe else ''}"
            losses = [float(line.split("loss ")[1].split()[0]) for line in result.out.splitlines() if "  loss " in line]
            cache[use_moe, way] = losses, first_moments(torch.load(out / f"{name}_resume.pth", weights_only=True))
        return cache[use_moe, way]

    return run


def start_weights(use_moe: bool) -> dict[str, torch.Tensor]:
    """Returns random weights, as training leaves some experts unused; a large router makes the choices stable."""
    weights = language_model(steps=0, use_moe=use_moe)
    for name, tensor in weights.items():
        if name.endswith("mlp.gate.weight"):
            tensor.mul_(20)
    return weights


def first_moments(state: dict) -> dict[str, torch.Tensor]:
    return {name: state["optimizer"]["state"][index]["exp_avg"] for index, name in enumerate(state["learned"])}


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_same_however_the_batch_is_divided(runs, use_moe, way):
    losses, gradients = runs(use_moe, "one batch")
    other_losses, other_gradients = runs(use_moe, way)
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert len(losses) == 2
    assert other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_difference(other_gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "experts"])
def test_the_gradient_is_that_of_the_mean_loss(world, rows, runs, use_moe):
    """Compares with the two steps written out: each one forward pass with the model's own mean loss."""
    tokenizer = load_tokenizer(world.tokenizer)
    data = VLMDataset(rows, world.images, tokenizer, 1536, 196, cache_dir=world.root / "cache")
    assert data.lengths.max() > 10 * data.lengths.min()
    config = VLMConfig(hidden_size=32, num_hidden_layers=2, use_moe=use_moe)
    torch.manual_seed(SEED)
    model = MiniMindVLM(config, vision_model_path=world.tower)
    weights = {name: tensor.float() for name, tensor in start_weights(use_moe).items()}
    model.load_state_dict(model.state_dict() | weights)
    model.train()
    order = epoch_order(data.lengths, SEED, 0)
    losses, expected = [], {}
    for weight, indices in ((0.09, order[:8]), (0.1, order[8:])):
        batch = VLMCollator()([data[int(index)] for index in indices])
        output = model(input_ids=batch["input_ids"], labels=batch["labels"], pixel_values=batch["pixel_values"])
        model.zero_grad()
        output.loss.backward()
        balancing = 0.0 if output.aux_loss is None else output.aux_loss.item()
        losses.append(output.loss.item() - balancing)
        for name, parameter in model.named_parameters():
            expected[name] = expected.get(name, 0) + weight * parameter.grad
    found_losses, found = runs(use_moe, "one batch")
    assert found_losses == pytest.approx(losses, abs=1e-4)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_difference(found[name], gradient) < 1e-5, name


def test_a_step_without_pictures_is_the_same_on_one_rank_and_two(world, tmp_path):
    """The projection then has no gradient, which every rank's optimizer must treat as zero."""
    rows = [pretrain_row(0), *({"conversations": sft_row(5 * number)["conversations"]} for number in range(2))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    # In both epochs the rows without an image come first: the second time the optimizer has moments.
    lengths = np.array([300, 30, 40])
    seed = next(seed for seed in range(99) if all(epoch_order(lengths, seed, epoch)[2] == 0 for epoch in (0, 1)))
    learned = []
    for ranks in (1, 2):
        out = world.copy_of_out(tmp_path / f"out_{ranks}")
        files = [*world.files("pretrain", out), "--data_path", data]
        flags = ["--batch_size", 2 // ranks, "--epochs", 2, "--learning_rate", 1e-2, "--from_weight", "llm"]
        flags += ["--seed", seed]
        result = world.run(PRETRAIN, *files, *flags, ranks=ranks).passed()
        assert "3 rows, 1 pictures" in result.out
        learned.append(torch.load(out / "pretrain_vlm_32_resume.pth", weights_only=True)["learned"])
    for name, tensor in learned[0].items():
        assert relative_difference(learned[1][name], tensor) < 1e-5, name


def everything(trainer) -> list[torch.Tensor]:
    """Copies the weights, the optimizer's moments and the tower's weights."""
    moments = [value for kept in trainer.context.optimizer.state.values() for value in kept.values()]
    tower = trainer.model.vision_encoder.state_dict().values()
    return [tensor.detach().clone() for tensor in (*trainer.model.state_dict().values(), *moments, *tower)]


@pytest.fixture
def trainer(world):
    torch.manual_seed(0)
    model = MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=2), vision_model_path=world.tower)
    freeze(model, "none")
    tokenizer = load_tokenizer(world.tokenizer)
    data = VLMDataset(world.root / "sft.jsonl", world.images, tokenizer, 1536, 196, cache_dir=world.root / "cache")
    processes = Processes(0, 1, torch.device("cpu"))
    context = TrainContext(model.train(), answer_loss, processes, torch.float32, grad_clip=1.0)
    return SimpleNamespace(model=model, data=data, context=context, skipped_pictures=0)


def learn(trainer, batches: list[dict]) -> float:
    counts = count(batches, trainer.context.processes)
    trainer.skipped_pictures += counts.skipped
    losses, _ = train_step(trainer.context, batches, counts, 1e-2)
    return float(losses[0])


def test_a_batch_with_nothing_to_learn_changes_nothing(trainer):
    collate = VLMCollator()
    good = [collate([trainer.data[0], trainer.data[1]])]
    assert math.isfinite(learn(trainer, good))  # from here on moments would move the weights
    unlearned = collate([trainer.data[0] | {"labels": torch.full_like(trainer.data[0]["labels"], -100)}])
    broken = collate(broken_samples(trainer))
    before = everything(trainer)
    for batches in ([unlearned], [collate([])], [broken], [collate([]), unlearned, broken]):
        assert learn(trainer, batches) == 0.0
        assert all(torch.equal(a, b) for a, b in zip(everything(trainer), before, strict=True))
    assert trainer.skipped_pictures == 4
    # The same beside samples that do learn.
    assert math.isfinite(learn(trainer, [*good, collate([])]))
    assert any(not torch.equal(a, b) for a, b in zip(everything(trainer), before, strict=True))


def broken_samples(trainer) -> list:
    """Returns two samples whose image cannot be read, as the dataset gives them."""
    data = trainer.data
    assert len(data[3]["pixel_values"]) == len(data[4]["pixel_values"]) == 1
    folder, data.images_path = data.images_path, data.images_path.parent / "nowhere"
    try:
        return data.__getitems__([3, 4])
    finally:
        data.images_path = folder


def test_training_leaves_the_tower_frozen_in_eval_mode_and_out_of_the_optimizer(trainer):
    tower = trainer.model.vision_encoder
    before = [tensor.clone() for tensor in tower.state_dict().values()]
    batch = VLMCollator()([trainer.data[index] for index in range(8)])
    assert len(batch["pixel_values"])
    learn(trainer, [batch])
    assert not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, tower.state_dict().values(), strict=True))
    in_optimizer = {id(parameter) for group in trainer.context.optimizer.param_groups for parameter in group["params"]}
    assert in_optimizer == {id(parameter) for parameter in trainer.model.parameters()}


class Syncs(TorchDispatchMode):
    """Records what syncs with the GPU: reading a value, or a size that depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in self.NAMES:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_step_does_not_sync_with_the_gpu(trainer):
    collate = VLMCollator()
    batches = [collate([trainer.data[0], trainer.data[1]]), collate([trainer.data[2], trainer.data[5]])]
    counts = count(batches, trainer.context.processes)
    with Syncs() as syncs:
        train_step(trainer.context, batches, counts, 1e-2)
    assert syncs.seen == []
    with Syncs() as syncs:
        float(torch.ones(1))
    assert syncs.seen == ["aten::_local_scalar_dense"]
