"""What keeps a GPU busy, as far as a CPU can tell: captured steps, images enlarged on the device, determinism.

A captured step learns what `train_step` learns, and a graph of it would hold for every batch.
"""

from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_compilation import synthetic_batch
from tiny_models import tiny_vlm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig

from common.errors import UsageError
from common.paths import BUILTIN_TOKENIZER_DIR, BUILTIN_TOWER_DIR
from model.vision_tower import bicubic_weights, normalise
from scripts.bench import speed
from trainer import flags
from trainer.setup import freeze
from trainer.stage import answer_loss, pad_answers, round_up
from trainer.step import Counts, TrainContext, train_step
from trainer.support.fast_steps import CapturedStep
from trainer.support.processes import Processes
from trainer.train_pretrain_vlm import STAGE

BATCH = 4
PAD = partial(pad_answers, batch_size=BATCH)
SIZES = [(272, 40), (267, 33), (265, 37), (270, 34), (250, 9)]  # length, learned tokens; all but the last of one shape
OWN = ["--from_weight", "none", "--data_path", __file__, "--vision_model_path", str(BUILTIN_TOWER_DIR)]
OWN += ["--tokenizer_path", str(BUILTIN_TOKENIZER_DIR)]
HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class Trace(TorchDispatchMode):
    """Lists the operators that run, with the shapes and the plain values they are given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "profiler":
            self.seen.append((function._schema.name, describe(args), describe(sorted((kwargs or {}).items()))))
        return function(*args, **(kwargs or {}))


def describe(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    return tuple(map(describe, value)) if isinstance(value, list | tuple) else repr(value)


def batch_of(length: int, learned: int) -> dict:
    batch = synthetic_batch(BATCH, length, BATCH, learned)
    labels = torch.full_like(batch["labels"], -100).flatten()
    places = (torch.arange(learned) % BATCH) * length + 200 + torch.arange(learned) // BATCH
    labels[places] = batch["input_ids"].flatten()[places]
    learned_positions = (labels != -100).nonzero()[:, 0]
    labels = labels.view(BATCH, length)
    return batch | {"labels": labels, "learned_positions": learned_positions, "units": learned, "samples": BATCH}


def context_of(frozen: str):
    model = tiny_vlm().train()
    freeze(model, frozen)
    return model, TrainContext(model, answer_loss, Processes(0, 1, torch.device("cpu")), torch.float32, 1.0)


def take(step, batches) -> tuple[list, list]:
    """Takes a step for each batch; returns losses and traces."""
    losses, traces = [], []
    for number, batch in enumerate(batches):
        counts = Counts(batch["units"], BATCH, batch["input_ids"].numel(), 0)
        with Trace() as trace:
            losses.append(step([batch], counts, 1e-3 / (1 + number))[0])
        traces.append(trace.seen)
    return losses, traces


@pytest.mark.parametrize("frozen", ["all", "none"])
def test_it_learns_the_same_by_the_same_operators_for_every_batch(frozen):
    batches = [batch_of(*size) for size in SIZES]
    (plain_model, plain), (model, context) = context_of(frozen), context_of(frozen)
    untouched = context_of(frozen)[0]
    captured, computed = CapturedStep(train_step, context, PAD), []
    compute = captured.compute

    def traced(*args):
        with Trace() as trace:
            compute(*args)
        computed.append(trace.seen)

    captured.compute = traced
    expected, plain_traces = take(partial(train_step, plain), batches)
    losses, _ = take(captured, batches)
    assert len(captured.graphs) == 2
    # The same sums over more zeros, and a learning rate in float32.
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-6, atol=0)
    states = (part.state_dict().values() for part in (model, plain_model, untouched))
    for weight, plain_weight, before in zip(*states, strict=True):
        moved = float((plain_weight - before).abs().max())
        torch.testing.assert_close(weight, plain_weight, rtol=0, atol=1e-3 * moved)
    # AdamW makes its moments in the first step.
    assert computed[1] == computed[2] == computed[3]
    assert plain_traces[1] != plain_traces[2]  # so the comparison can tell
    assert not HOST_READS & {name for name, *_ in computed[1]}


def test_other_batches_take_the_ordinary_step():
    _, context = context_of("none")
    calls = []
    captured = CapturedStep(
        lambda context, batches, *_: calls.append(batches) or (torch.zeros(2), torch.zeros(())), context, PAD
    )
    full, counts = batch_of(272, 40), Counts(40, BATCH, 1088, 0)
    smaller = full | {name: full[name][:2] for name in ("input_ids", "labels", "image_starts", "pixel_values")}
    two_images = full | {name: torch.cat([full[name]] * 2) for name in ("image_starts", "pixel_values")}
    nothing = full | {"learned_positions": full["learned_positions"][:0], "units": 0}
    for batches, of in (
        ([smaller], counts),
        ([two_images], counts),
        ([full, full], counts),
        ([nothing], Counts(0, 4, 1, 0)),
    ):
        captured(batches, of, 1e-3)
        assert calls.pop() is batches
    captured([full], counts, 1e-3)
    assert calls.pop() is not full


def test_a_loss_sees_no_count_of_units():
    """In a captured step the batch does not know it: its padding is no unit."""
    context, seen = context_of("none")[1], []
    loss = context.loss
    loss.stage_loss = lambda model, batch: seen.append(batch) or answer_loss(model, batch)
    full = batch_of(272, 40)
    CapturedStep(train_step, context, PAD)([full], Counts(40, BATCH, 1088, 0), 1e-3)
    train_step(context, [full], Counts(40, BATCH, 1088, 0), 1e-3)
    assert [all(isinstance(part, torch.Tensor) for part in batch.values()) for batch in seen] == [True, True]


def test_sizes_are_rounded_up_by_little():
    sizes = range(8, 5000)
    assert all(n <= round_up(n, 16) < 1.07 * n + 8 for n in sizes)
    assert len({round_up(n, 16) for n in range(1024, 2048)}) == 17


@pytest.mark.parametrize("source", [1, 2, 7, 100, 128, 223])
@pytest.mark.parametrize("size", [224, 256])
def test_images_are_enlarged_to_pillows_bytes(source, size):
    images = np.random.default_rng(source).integers(0, 256, (3, source, source, 3), dtype=np.uint8)
    images[0] = 255 * (images[0] > 127)
    expected = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        enlarged = normalise(pixels, bicubic_weights(source, size, pixels.device), 0, 1) * 255
    np.testing.assert_array_equal(enlarged.round().numpy(), np.stack(expected).transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], {"capture": 1, "compile": 0, "deterministic": 0, "num_workers": 14}),  # the built-in set is not compiled
        (OWN, {"compile": 1, "deterministic": 0}),
        ([*OWN, "--deterministic", "1"], {"compile": 0, "capture": 1}),
    ],
)
def test_what_a_gpu_is_given(monkeypatch, typed, expected):
    monkeypatch.setattr(flags, "pick_device", lambda *_: torch.device("cuda:0"))
    monkeypatch.setattr(flags, "pick_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(flags, "cores", lambda: 16)
    args = flags.parse_arguments(STAGE, "", typed)
    assert {name: int(getattr(args, name)) for name in expected} == expected


def test_compiled_kernels_are_not_deterministic(monkeypatch):
    monkeypatch.setattr(flags, "pick_device", lambda *_: torch.device("cuda:0"))
    monkeypatch.setattr(flags, "pick_dtype", lambda *_: torch.bfloat16)
    with pytest.raises(UsageError, match="--deterministic 1 needs --compile 0"):
        flags.parse_arguments(STAGE, "", ["--compile", "1", "--deterministic", "1"])


def test_every_model_of_the_benchmark_has_the_same_weights(tmp_path, monkeypatch):
    """On a machine that has no tower of random weights yet, too."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"TOWER": CLIPVisionConfig(**shape, patch_size=16), "FOLDER": tmp_path, "LAYERS": {512: 1}}
    for name, value in values.items():
        monkeypatch.setattr(speed, name, value)
    models = [speed.load_model(Namespace(hidden_size=512, stage="sft")) for _ in range(2)]
    weights = ([*model.state_dict().values(), *model.vision_encoder.state_dict().values()] for model in models)
    assert all(map(torch.equal, *weights))


def test_where_graphs_do_not_fit_the_run_goes_on_without():
    """As on a GPU whose memory the graphs' pool fills: the step is taken once, uncaptured, with fresh gradients."""
    (plain_model, plain), (model, context) = context_of("none"), context_of("none")
    captured, batches = CapturedStep(train_step, context, PAD), [batch_of(272, 40)] * 3

    def capture(inputs, counts):
        for parameter in context.parameters:
            parameter.grad = torch.ones_like(parameter)  # what a step that runs out of memory leaves
        raise torch.OutOfMemoryError

    captured.stream, captured.capture = object(), capture
    take(partial(train_step, plain), batches)
    take(captured, batches)
    assert captured.stream is None and not any(captured.graphs.values())
    for weight, expected in zip(model.state_dict().values(), plain_model.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
