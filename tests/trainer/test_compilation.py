"""The compiled step: one graph for batches of every size, and the same numbers as without torch.compile."""

import shutil

import pytest
import torch
from tiny import PRETRAIN, SFT, read_jsonl
from tiny_models import tiny_vlm

from trainer.stage import answer_loss
from trainer.support.fast_steps import compile_or_not

pytest_plugins = ["tiny"]

FLOAT32, BATCH = torch.float32, 4
WARM_UP = [(208, 4, 5), (1016, 12, 600)]
# Length, images, learned tokens: none of these sizes is in WARM_UP.
SIZES = [(216, 5, 9), (400, 7, 40), (1000, 4, 4), (208, 2, 2), (408, 5, 5), (424, 8, 599)]
BELOW = [(208, 0, 5), (208, 1, 5), (208, 2, 1)]


def synthetic_batch(samples, length, images, learned) -> dict:
    generator = torch.Generator().manual_seed(samples * length)
    input_ids = torch.randint(3, 30, (samples, length), generator=generator)
    starts = [(image % samples, 196 * (image // samples)) for image in range(images)]
    return {
        "input_ids": input_ids,
        "labels": input_ids.clone(),
        "image_starts": torch.tensor(starts, dtype=torch.int64).view(-1, 2),
        "learned_positions": torch.arange(1, 1 + learned) * 2,
        "pixel_values": torch.randint(0, 256, (images, 3, 224, 224), dtype=torch.uint8, generator=generator),
    }


def step(forward, model, samples, size) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, _ = answer_loss(forward, synthetic_batch(samples, *size))
    if loss.requires_grad:
        loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


@pytest.fixture
def model(request):
    torch._dynamo.reset()
    model = tiny_vlm().train()
    model.requires_grad_(request.param == "all learns")
    model.vision_proj.requires_grad_(True)
    yield model
    torch._dynamo.reset()


HAS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


# With inductor all learns in test_a_compiled_run_is_the_run.
@pytest.mark.parametrize(
    ("model", "backend"),
    [
        ("all learns", "aot_eager"),
        ("the projection learns", "aot_eager"),
        pytest.param("the projection learns", "inductor", marks=HAS_COMPILER),
    ],
    indirect=["model"],
)
def test_no_recompilation_after_warm_up_and_the_same_numbers(model, backend):
    random_state, batches = torch.get_rng_state(), [synthetic_batch(BATCH, *size) for size in WARM_UP]
    compiled = compile_or_not(model, answer_loss, batches, FLOAT32, print, backend=backend, fullgraph=True)
    assert compiled is not model
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(weight.grad is None for weight in model.parameters())
    with torch.compiler.set_stance("fail_on_recompile"):
        for samples, size in [*((BATCH, size) for size in SIZES + BELOW), (1, SIZES[2]), (BATCH + 1, SIZES[2])]:
            loss, gradients = step(compiled, model, samples, size)
            expected_loss, expected = step(model, model, samples, size)
            # Inductor sums in another order.
            torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                largest = float(expected[name].abs().max())
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name)


@HAS_COMPILER
def test_a_compiled_run_is_the_run(world, tmp_path):
    """With --compile 1 the losses are those of --compile 0, though padded otherwise; the steps compile nothing more."""
    losses, hook = [], "import torch, trainer.loop as loop\nheader = loop.print_header\n"
    hook += "loop.print_header = lambda *a, **k: (torch.compiler.set_stance('fail_on_recompile'), header(*a, **k))"
    for flag in (0, 1):
        out = world.copy_of_out(tmp_path / str(flag) / "out")
        flags = ["--compile", flag, "--batch_size", 4, "--epochs", 1, "--learning_rate", 1e-3, "--log_interval", 1]
        flags += ["--from_weight", "llm", "--cache_vision", "off"]
        done = world.run(SFT, *world.files("sft", out), *flags, hook=hook).passed()
        assert (", compiled" in done.out) == bool(flag)
        losses.append([row["loss"] for row in read_jsonl(out / "sft_vlm_32.metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_without_a_compiler_the_run_goes_on(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    broken = "import torch\ndef fail(*a, **k): raise RuntimeError('no compiler here')\n"
    broken += "torch.compile = lambda *a, **k: fail\n"
    done = world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1, "--compile", 1, hook=broken).passed()
    assert "continues without it (no compiler here)" in done.out
    assert ", compiled" not in done.out


def test_experts_are_not_compiled(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    flags = ["--from_weight", "none", "--hidden_size", 32, "--num_hidden_layers", 1, "--use_moe", 1, "--compile", 1]
    done = world.run(PRETRAIN, *world.files("pretrain", out), *flags, "--epochs", 1).passed()
    assert "models with experts cannot be compiled" in done.out
