"""Weight files that cannot be misread, and files that are written whole or not at all."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from tiny import PICTURES, PRETRAIN, PRETRAIN_ROWS, SFT, TOKENIZER, language_model, read_jsonl

from common import files
from common.errors import UsageError
from model import weights as checkpoint
from model.model_vlm import MiniMindVLM, VLMConfig, config_fields
from model.projectors import PROJECTORS, VisionProj, register

pytest_plugins = ["tiny"]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def save_llm(out, name="llm_32.pth", **changes):
    """The language model with some tensors replaced, added, or (None) left out."""
    tensors = language_model(steps=0) | changes
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, out / name)


NORM, GATE = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"
KEYS = "model.layers.0.self_attn.k_proj.weight"
BAD_TENSORS = {
    "missing": ({NORM: None}, f"{NORM} is missing"),
    "missing, and its size is asked for": ({GATE: None}, GATE),
    "no embedding": ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight"),
    "unknown": ({"model.norm.bias": torch.zeros(32)}, "model.norm.bias is unknown"),
    "another shape": ({NORM: torch.ones(33)}, f"{NORM} is (33,), expected (32,)"),
    "a layer of another shape": ({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 3)}, "up_proj.weight is (3, 3)"),
    "no shape a model has": ({KEYS: torch.ones(12, 32)}, "num_key_value_heads 3"),
    "no key heads": ({KEYS: torch.ones(1, 32)}, "is no MiniMind weight file"),
    "a number": ({KEYS: torch.tensor(1.0)}, "is no MiniMind weight file"),
    "NaN": ({NORM: torch.full((32,), float("nan"))}, f"{NORM} holds NaN or infinity"),
    "half a projection": ({"vision_proj.vision_proj.0.bias": torch.zeros(32)}, "vision_proj.0.weight is missing"),
    "the projection of another tower": (
        {"vision_proj.vision_proj.0.bias": torch.zeros(32), "vision_proj.vision_proj.0.weight": torch.zeros(32, 48)},
        "name the tower it was trained with by --vision_model_path",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_weights_that_do_not_fit_are_refused(world, tmp_path, case):
    changes, message = BAD_TENSORS[case]
    save_llm(tmp_path, **changes)
    result = world.run(PRETRAIN, *world.files("pretrain", tmp_path))
    result.refused("llm_32.pth", message)
    assert {path.name for path in tmp_path.iterdir()} == {"llm_32.pth"}


class Code:
    def __reduce__(self):
        return print, ("code from a weight file was run",)


def test_files_that_are_no_weights_are_refused(world, tmp_path):
    save_llm(tmp_path)
    path = tmp_path / "llm_32.pth"
    whole = path.read_bytes()
    torch.save({"model.norm.weight": torch.ones(3), "more": Code()}, path)
    with_code = path.read_bytes()
    torch.save({1: torch.ones(3)}, path)
    numbered = path.read_bytes()
    torch.save({"learned": {}, "step": 3}, path)
    contents = {
        "cannot be read": [b"", b"text", whole[: len(whole) // 2], whole[:-100]],
        "could run code": [with_code],
        "is no weight file: a plain dict": [numbered],
        "is the state of a run": [path.read_bytes()],
    }
    for message, all_bytes in contents.items():
        for content in all_bytes:
            path.write_bytes(content)
            result = world.run(PRETRAIN, *world.files("pretrain", tmp_path))
            result.refused("llm_32.pth", message)
            assert "was run" not in result.text
            assert path.read_bytes() == content


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_whatever_the_damage_it_is_a_usage_error(tmp_path):
    """Bytes overwritten or cut out anywhere: the file is refused with a message, or still holds tensors."""
    path = tmp_path / "llm_16.pth"
    torch.save(language_model(steps=0, hidden_size=16, num_hidden_layers=1, vocab_size=50), path)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(200):
        damaged, start = bytearray(whole), rng.randrange(len(whole))
        kind = rng.randrange(4)
        if kind == 0:
            damaged[start : start + rng.choice((1, 4, 64))] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 1:
            del damaged[start : start + rng.randrange(1, 2000)]
        elif kind == 2:
            del damaged[start:]
        else:  # another file altogether
            damaged = rng.choice((b"t", b"", b"\x80\x02", b"(")) + rng.randbytes(rng.randrange(30))
        path.write_bytes(damaged)
        try:
            checkpoint.read_weights(path)
        except UsageError as error:
            assert path.name in str(error)


SIDECARS = {
    "not json": (lambda sidecar: "{", "cannot be read"),
    "no config": (lambda sidecar: json.dumps({"stage": "sft"}), "cannot be read"),
    "a list": (lambda sidecar: "[]", "cannot be read"),
    "no such shape": (lambda sidecar: with_config(sidecar, hidden_size=33), "cannot be read"),
    "no number": (lambda sidecar: with_config(sidecar, num_attention_heads="eight"), "cannot be read"),
    "zero heads": (lambda sidecar: with_config(sidecar, num_key_value_heads=0), "cannot be read"),
    "other layers": (
        lambda sidecar: with_config(sidecar, num_hidden_layers=3),
        "says num_hidden_layers 3, but pretrain_vlm_32.pth has 2",
    ),
    "other size": (lambda sidecar: with_config(sidecar, hidden_size=64), "says hidden_size 64, but"),
    "other tokenizer": (
        lambda sidecar: json.dumps(sidecar | {"tokenizer_sha256": "0" * 64}),
        "was trained with another tokenizer than model/tokenizer",
    ),
}


def with_config(sidecar: dict, **changes) -> str:
    return json.dumps(sidecar | {"config": sidecar["config"] | changes})


@pytest.fixture(scope="module")
def with_sidecar(world, tmp_path_factory):
    out = world.copy_of_out(tmp_path_factory.mktemp("sidecar") / "out")
    world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1).passed()
    return out


@pytest.mark.parametrize("case", SIDECARS)
def test_a_sidecar_that_is_garbled_or_contradicts_the_tensors_is_refused(world, with_sidecar, tmp_path, case):
    change, message = SIDECARS[case]
    for path in (with_sidecar / "pretrain_vlm_32.pth", with_sidecar / "pretrain_vlm_32.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sidecar = tmp_path / "pretrain_vlm_32.json"
    sidecar.write_text(change(json.loads(sidecar.read_text(encoding="utf-8"))), encoding="utf-8")
    world.run(SFT, *world.files("sft", tmp_path)).refused(message)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pth", ".json"}


def test_the_shape_of_the_originals_file_is_read_from_its_tensors(world, tmp_path):
    torch.save(language_model(steps=1, hidden_size=48, num_hidden_layers=3), tmp_path / "llm_48.pth")
    save_llm(tmp_path)
    flags = ["--epochs", 1, "--batch_size", 26, "--ignore_high_loss"]
    result = world.run(PRETRAIN, *world.files("pretrain", tmp_path), *flags, "--hidden_size", 48).passed()
    assert "hidden_size 48, 3 layers" in result.out
    assert "model.layers.2.mlp.up_proj.weight" in load(tmp_path / "pretrain_vlm_48.pth")
    config = checkpoint.read_weights(tmp_path / "llm_48.pth").config
    expected = VLMConfig(hidden_size=48, num_hidden_layers=3)
    for key in checkpoint.SHAPE_KEYS:
        assert getattr(config, key) == getattr(expected, key), key


def test_the_shape_of_experts_is_read_from_their_tensors(tmp_path):
    shape = {
        "use_moe": True,
        "n_routed_experts": 3,
        "n_shared_experts": 2,
        "num_key_value_heads": 4,
        "vocab_size": 6500,
    }
    torch.save(language_model(steps=0, **shape), tmp_path / "llm_32_moe.pth")
    config = checkpoint.read_weights(tmp_path / "llm_32_moe.pth").config
    assert {key: getattr(config, key) for key in shape} == shape


def test_of_several_files_the_newest_is_taken_and_named(world, tmp_path):
    torch.save(language_model(hidden_size=16, num_hidden_layers=1), tmp_path / "llm_16.pth")
    save_llm(tmp_path)
    os.utime(tmp_path / "llm_16.pth", (1e9, 1e9))
    flags = ["--epochs", 1, "--batch_size", 26, "--ignore_high_loss"]
    result = world.run(PRETRAIN, *world.files("pretrain", tmp_path), *flags).passed()
    assert "taking the newest weights, llm_32.pth (also there: llm_16.pth; --hidden_size chooses)" in result.out
    assert "hidden_size 32, 2 layers" in result.out
    result = world.run(PRETRAIN, *world.files("pretrain", tmp_path), *flags, "--hidden_size", 16).passed()
    assert "hidden_size 16, 1 layers" in result.out
    assert "newest" not in result.out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--num_hidden_layers", 3], ["--num_hidden_layers 3 contradicts", "llm_32.pth, which has 2"]),
        (["--hidden_size", 64], ["no weight file llm_64.pth", "there: llm_32.pth"]),
        (["--use_moe", 1], ["no weight file", "there: llm_32.pth"]),
        (["--from_weight", "llm_32.pth", "--use_moe", 1], ["--use_moe 1 contradicts"]),
        (["--from_weight", "llm_32.pth", "--hidden_size", 64], ["--hidden_size 64 contradicts"]),
        (["--from_weight", "nothing.pth"], ["no weight file nothing.pth"]),
        (["--from_weight", "pretrain_vlm"], ["no weight file pretrain_vlm_*.pth", "train_pretrain_vlm.py"]),
    ],
)
def test_a_flag_that_contradicts_the_weights_is_refused(world, tmp_path, flags, parts):
    out = world.copy_of_out(tmp_path / "out")
    world.run(PRETRAIN, *world.files("pretrain", out), *flags, cwd=out).refused(*parts)


def test_weights_of_another_tokenizer_are_refused_by_their_first_loss(world, tmp_path):
    """The original's files say nothing about their tokenizer; ids that mean other things cost more than guessing."""
    out = world.copy_of_out(tmp_path / "out")
    tensors = language_model()
    order = torch.randperm(6400, generator=torch.Generator().manual_seed(0))
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
    torch.save(tensors, out / "llm_32.pth")
    written_before = {"pretrain_vlm_32.pth": b"weights", "pretrain_vlm_32.metrics.jsonl": b'{"step": 1}\n'}
    for name, content in written_before.items():
        (out / name).write_bytes(content)
    flags = ["--epochs", 1, "--batch_size", 13, "--log_interval", 1]
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags)
    result.refused("the first loss is", "ln 6400 = 8.76", "llm_32.pth", "--tokenizer_path", "--ignore_high_loss")
    assert {path.name for path in out.iterdir()} == {"llm_32.pth", "vision_features", *written_before}
    assert all((out / name).read_bytes() == content for name, content in written_before.items())
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags, "--ignore_high_loss").passed()
    assert result.out.count("warning: the first loss is") == 1
    assert [record["step"] for record in read_jsonl(out / "pretrain_vlm_32.metrics.jsonl")] == [1, 2]


def test_random_weights_may_begin_with_any_loss(world, tmp_path):
    flags = ["--from_weight", "none", "--hidden_size", 16, "--num_hidden_layers", 1, "--epochs", 1, "--batch_size", 26]
    result = world.run(PRETRAIN, *world.files("pretrain", tmp_path), *flags).passed()
    assert "starts from  random weights" in result.out
    assert (tmp_path / "pretrain_vlm_16.pth").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("torch")])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"the old ones")

    def write(file):
        file.write(b"the new o")
        raise error

    with pytest.raises(
        UsageError if isinstance(error, OSError) else type(error), match="weights.pth.*No space|torch|^$"
    ):
        files.write_atomically(path, write)
    assert path.read_bytes() == b"the old ones"
    assert list(tmp_path.iterdir()) == [path]
    files.write_atomically(path, lambda file: file.write(b"the new ones"))
    assert path.read_bytes() == b"the new ones"
    assert list(tmp_path.iterdir()) == [path]


# What a full disk looks like to the process: a write comes short.
SMALL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
"""


def test_a_full_disk_ends_in_a_message_and_leaves_what_was_saved(world, with_sidecar, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    for path in filter(Path.is_file, with_sidecar.glob("pretrain_vlm_32*")):
        (out / path.name).write_bytes(path.read_bytes())
    weights = (out / "pretrain_vlm_32.pth").read_bytes()
    result = world.run(PRETRAIN, *world.files("pretrain", out), "--epochs", 1, "--seed", 9, hook=SMALL_DISK)
    result.refused("pretrain_vlm_32.pth cannot be written: File too large")
    assert (out / "pretrain_vlm_32.pth").read_bytes() == weights
    assert not list(out.glob(".*"))


def test_weights_that_became_nan_do_not_replace_good_ones(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    (out / "sft_vlm_32.pth").write_bytes(b"good weights")
    flags = ["--epochs", 1, "--learning_rate", 1e30, "--save_interval", 1, "--from_weight", "llm"]
    result = world.run(SFT, *world.files("sft", out), *flags)
    result.refused("the weights became NaN or larger than 65504 by step 1,", "--learning_rate")
    assert {path.read_bytes() for path in out.glob("sft_vlm_32.pth*")} == {b"good weights"}


def test_what_is_written_is_what_was_in_memory(world, with_sidecar):
    weights = checkpoint.read_weights(with_sidecar / "pretrain_vlm_32.pth")
    assert weights.sidecar["config"]["vision_hidden_size"] == 32
    assert weights.has_projection
    assert weights.config.image_token_id == 34
    assert (weights.sidecar["rows"], weights.sidecar["pictures"]) == (PRETRAIN_ROWS, PICTURES)
    assert weights.sidecar["arguments"]["tokenizer_path"] == str(TOKENIZER.relative_to(TOKENIZER.parents[1]))


@pytest.mark.parametrize("sidecar", [True, False])
def test_a_typo_in_a_tinkerers_configuration_is_not_called_a_damaged_file(world, tmp_path, monkeypatch, sidecar):
    def tinkered(**fields):
        raise AttributeError("typo")

    out = world.copy_of_out(tmp_path / "out")
    if sidecar:
        text = json.dumps(
            checkpoint.describe(VLMConfig(hidden_size=32, num_hidden_layers=2), "llm", "published", "0" * 64, {})
        )
        (out / "llm_32.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(checkpoint, "VLMConfig", lambda **fields: tinkered() if fields else VLMConfig())
    with pytest.raises(AttributeError, match="typo"):
        checkpoint.read_weights(out / "llm_32.pth")


ODD_TENSORS = {
    "lm_head.weight differs from model.embed_tokens.weight": {"lm_head.weight": torch.ones(6400, 32)},
    "model.norm.weight is torch.bool": {NORM: torch.ones(32, dtype=torch.bool)},
    "model.norm.weight is torch.complex64": {NORM: torch.ones(32, dtype=torch.complex64)},
    "is torch.float8_e4m3fn": {NORM: torch.ones(32).to(torch.float8_e4m3fn)},
    "torch.sparse_coo": {NORM: torch.ones(32).to_sparse()},
    "plain floating point is expected": {NORM: torch.ones(32, device="meta")},
    "model.layers.2.self_attn.q_proj.weight is missing": {"model.layers.999999.mlp.up_proj.weight": torch.ones(1)},
}


@pytest.mark.parametrize("words", ODD_TENSORS)
def test_tensors_that_make_no_model_are_refused(tmp_path, words):
    save_llm(tmp_path, **ODD_TENSORS[words])
    with pytest.raises(UsageError, match="llm_32.pth") as error:
        weights = checkpoint.read_weights(tmp_path / "llm_32.pth")
        checkpoint.load_into(MiniMindVLM(weights.config), weights)
    assert words in str(error.value)


CONFIGS = [{"rope_theta": 0}, {"rope_theta": float("nan")}, {"rms_norm_eps": -1}, {"max_position_embeddings": -1}]
CONFIGS += [
    {"dropout": 2.0},
    {"hidden_size": True},
    {"torch_dtype": 5},
    {"attn_implementation": 3},
    {"return_dict": "x"},
]


@pytest.mark.parametrize("content", [*CONFIGS, "nested too deeply"], ids=str)
def test_a_configuration_that_makes_no_model_is_refused(tmp_path, content):
    save_llm(tmp_path)
    text = '{"config": ' + "[" * 100_000
    if isinstance(content, dict):
        text = json.dumps({"config": config_fields(VLMConfig(hidden_size=32, num_hidden_layers=2)) | content})
    (tmp_path / "llm_32.json").write_text(text)
    with pytest.raises(UsageError, match="llm_32.json.*cannot be read"):
        checkpoint.read_weights(tmp_path / "llm_32.pth")


OTHERS = (5, ["a"], {"a": 1}, None, True, float("nan"))
FIELDS = {
    **{(field, repr(other)): {field: other} for field in ("title", "assets", "tokenizer_sha256") for other in OTHERS},
    **{("step", repr(other)): {"step": other} for other in ("x", -1, 1.5, float("nan"), True, 1 << 60)},
    **{("prompt_form", repr(other)): {"prompt_form": other} for other in ("{prompt}", ["x"], None)},
    **{("versions", repr(other)): {"versions": other} for other in (["x"], {"torch": 2})},
    ("arguments", "a list in it"): {"arguments": {"epochs": [1]}},
    ("arguments.vision_model_path", "a number"): {"arguments": {"vision_model_path": 5}},
    **{
        (f"config.{name}", repr(value)): {"config": {name: value}}
        for name in ("max_position_embeddings", "n_routed_experts", "pixel_shuffle", "vision_patches", "pad_token_id")
        for value in (10**12, -1, 2.5, None, "x")
    },
    **{("config.rope_theta", repr(value)): {"config": {"rope_theta": value}} for value in (True, 0, float("inf"))},
    ("surrogates", "half a character"): {"notes": "\ud800"},
}


@pytest.mark.parametrize(("where", "changed"), [(key[0], FIELDS[key]) for key in FIELDS], ids=map(str, FIELDS))
def test_a_sidecar_with_a_field_of_another_kind_is_refused(tmp_path, where, changed):
    save_llm(tmp_path)
    sidecar = checkpoint.describe(VLMConfig(hidden_size=32, num_hidden_layers=2), "llm", "own", "0" * 64, {})
    for part, value in changed.items():
        is_part = isinstance(value, dict) and part in ("config", "arguments") and isinstance(sidecar[part], dict)
        sidecar[part] = sidecar[part] | value if is_part else value
    (tmp_path / "llm_32.json").write_text(json.dumps(sidecar))
    with pytest.raises(UsageError, match="llm_32.json.* cannot be read: ") as error:
        checkpoint.read_weights(tmp_path / "llm_32.pth")
    assert where in str(error.value)
    assert checkpoint.read_sidecar_or_empty(tmp_path / "llm_32.pth") == {}


EXPORT = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "hidden_act": "silu"}
EXPORTS = [
    *(("config.json", content) for content in ("[]", "null", "5", '"x"', "[" * 10_000, '{"a":' * 10_000)),
    *(("training.json", content) for content in ("[]", "null", "5", '{"step": 5}', "[" * 10_000, "")),
    *(("config.json", EXPORT | {"hidden_size": value}) for value in (10**9, "x", -1, [32], 64)),
    *(("config.json", EXPORT | {name: 5}) for name in ("text_config", "vision_config", "model_type", "hidden_act")),
    ("config.json", EXPORT | {"projector_hidden_act": "unheard_of"}),
    ("config.json", EXPORT | {"hidden_act": "gelu"}),
    ("config.json", EXPORT | {"text_config": {"max_position_embeddings": 10**12}}),
]


@pytest.mark.parametrize(("name", "content"), EXPORTS, ids=lambda value: str(value)[:60])
def test_an_exported_folder_that_is_not_what_it_says_is_refused(tmp_path, name, content):
    files = {"config.json": EXPORT, name: content}
    for file, text in files.items():
        (tmp_path / file).write_text(text if isinstance(text, str) else json.dumps(text))
    save_llm(tmp_path, "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be read|no MiniMind weight file|does not fit"):
        weights = checkpoint.read_folder(tmp_path)
        checkpoint.load_into(MiniMindVLM(weights.config), weights)


def test_a_projection_of_ones_own_does_not_claim_files_of_the_linear_one(tmp_path):
    model = MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    register("own")(type("Own", (VisionProj,), {}))
    try:
        assert checkpoint.config_of(model.state_dict(), tmp_path).projector == "linear"
    finally:
        del PROJECTORS["own"]
