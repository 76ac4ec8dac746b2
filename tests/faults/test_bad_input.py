"""A user's mistake ends in one helpful message and exit status 1, and loses nothing."""

import argparse
import json
import os
import shlex
import shutil
import socket
from dataclasses import replace

import pytest
import torch
from tiny import EVAL, PRETRAIN, ROOT, SFT, language_model, pretrain_row, turn, write_jsonl

from common import paths
from common.cli import command
from common.errors import UsageError
from common.paths import BUILTIN_DATASET_DIR, BUILTIN_TOKENIZER_DIR, BUILTIN_TOWER_DIR
from dataset.chat import load_tokenizer
from dataset.row_forms import EXAMPLE_ROW
from model.weights import read_weights
from trainer import bundles
from trainer.bundles import BUNDLES, MINIMIND2, MINIMIND_3V, TOWER_WEIGHTS, find_weights
from trainer.flags import build_parser, parse_arguments
from trainer.setup import find_starting_weights
from trainer.support.processes import pick_device, pick_dtype
from trainer.train_pretrain_vlm import STAGE as PRETRAIN_STAGE
from trainer.train_sft_vlm import STAGE as SFT_STAGE

pytest_plugins = ["tiny"]


@pytest.fixture
def out(world, tmp_path):
    return world.copy_of_out(tmp_path / "out")


def refused(world, out, *flags, script=PRETRAIN, **how):
    """Runs with these flags after the required ones (the last of a kind counts) and returns the error message."""

    def kept() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".txt"}

    before = kept()
    message = world.run(script, *world.files("pretrain", out), *flags, **how).refused()
    assert kept() == before
    return message


@pytest.mark.parametrize(
    ("flag", "value", "parts"),
    [
        ("--data_path", "nowhere.jsonl", ["no such data file", "nowhere.jsonl"]),
        ("--data_path", "rows.csv", ["rows.csv is a table", "scripts/make_dataset.py"]),
        ("--data_path", "empty.jsonl", ["empty.jsonl is empty"]),
        ("--data_path", "garbled.parquet", ["garbled.parquet cannot be read"]),
        ("--images_path", "nowhere", ["their folder is missing", "nowhere"]),
        ("--vision_model_path", "nowhere", ["the vision tower in", "config.json", "download.py tower"]),
        ("--vision_model_path", "folder", ["the vision tower in", "model.safetensors", "--vision_model_path"]),
        ("--tokenizer_path", "nowhere", ["no tokenizer in", "tokenizer.json is missing", "download.py tokenizer"]),
        ("--tokenizer_path", "folder", ["the tokenizer in", "cannot be used"]),
        ("--device", "cuda", ["--device cuda: no CUDA GPU is visible"]),
        ("--device", "tpu", ["--device tpu", "use cpu, cuda, cuda:N or mps"]),
        ("--dtype", "float16", ["--dtype float16 needs a CUDA GPU"]),
        ("--max_seq_len", 40_000, ["--max_seq_len 40000: the model has 32768 positions"]),
        (
            "--max_seq_len",
            100,
            ["26 of 26 rows cannot be learned from", "an image is cut off", "26 of them are cut by --max_seq_len 100;"],
        ),
    ],
)
def test_a_flag_with_an_unusable_value(world, out, tmp_path, flag, value, parts):
    (tmp_path / "rows.csv").write_text("image,caption\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "garbled.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "tokenizer.json").write_text("{}")
    message = refused(world, out, flag, value, cwd=tmp_path)
    for part in parts:
        assert part in message, message


WRONG = "--epochs 0 --batch_size -1 --accumulation_steps 0 --learning_rate nan --grad_clip -1 --num_workers -1"
WRONG += " --save_interval 0 --log_interval 0 --save_weight a/b --max_seq_len 1 --timeout_minutes inf"
WRONG += " --seed 9223372036854775808"


WRONG = list(zip(WRONG.split()[::2], WRONG.split()[1::2], strict=True))
NAMES = ("n" * 300, "字" * 60, "\x1b[31mred", "a\nb", " ", "")


@pytest.mark.parametrize(("flag", "value"), [*WRONG, *(("--save_weight", name) for name in NAMES)])
def test_a_value_that_a_flag_cannot_have(flag, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        build_parser(SFT_STAGE, "").parse_args([flag, value])
    message = capsys.readouterr().err
    assert f"argument {flag}: " in message and "\x1b" not in message


def test_rows_without_a_picture_do_not_pretrain(world, out, tmp_path):
    text = {"conversations": [turn("user", "说。"), turn("assistant", "好。")]}
    data = write_jsonl(tmp_path / "rows.jsonl", [text] * 8)
    assert "has a picture: --freeze_llm all trains only the projection" in refused(world, out, "--data_path", data)
    world.run(SFT, *world.files("sft", out), "--data_path", data, "--from_weight", "llm", "--epochs", 1).passed()


def not_a_file_of_each_kind(folder) -> dict:
    """Makes what is no file: by its kind, its path."""
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "folder.jsonl").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket.jsonl"))
    (folder / "device.jsonl").symlink_to("/dev/zero")
    return {kind: folder / f"{kind}.jsonl" for kind in ("pipe", "folder", "socket", "device")}


def test_a_pipe_socket_device_or_folder_is_no_input_file(world, out, tmp_path, monkeypatch):
    """Opening a pipe that nobody writes to waits for ever."""
    for kind, path in not_a_file_of_each_kind(tmp_path).items():
        assert f"a {kind}, not a" in refused(world, out, "--data_path", path)
        world.run(EVAL, *world.eval_files(out), "--weight", "llm", "--image", path).refused(f"it is a {kind}, not a")
        with pytest.raises(UsageError):
            read_weights(path)


def test_a_shape_without_weights_that_no_model_can_have(world, out):
    assert "--hidden_size 100" in refused(world, out, "--from_weight", "none", "--hidden_size", 100)


def test_a_save_dir_that_is_a_file(world, out, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    start = ["--from_weight", out / "llm_32.pth"]
    assert "file cannot be written to" in refused(world, out, *start, "--save_dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"


def bad_rows() -> list[dict]:
    """Returns 100 good rows, short ones, then from line 101 on a bad one of each kind."""
    text = {"conversations": [turn("user", "说。"), turn("assistant", "好。")]}
    good, asked = pretrain_row(0), [turn("user", "什么？\n<image>"), turn("assistant", "圆。")]
    bad = [
        good | {"image": "nowhere.jpg"},
        good | {"image": "../tiny.py"},
        {"conversations": asked},
        {"conversations": asked[:1], "image": "0.jpg"},
        {"conversations": [turn("assistant", "圆。")], "image": ""},
        {"image": "0.jpg"},
    ]
    return [pretrain_row(0)] + [text] * 99 + bad


def test_bad_rows_are_listed_then_refused_or_left_out(world, out, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", bad_rows())
    with data.open("a", encoding="utf-8") as file:
        file.write("{this is not json\n")
    flags = ["--data_path", data, "--epochs", 1, "--batch_size", 20]
    expected = {
        101: "no such picture: nowhere.jpg",
        102: "the picture's path leaves images_path",
        103: "1 <image> in the text, but 0 picture(s)",
        104: "nothing to learn: no assistant turn",
        105: "turn 1 is of role 'assistant', expected 'user'",
        106: "conversations is missing",
        107: "not JSON",
    }
    for limit in ([], ["--max_bad_rows", 6]):
        message = refused(world, out, *flags, *limit)
        assert "7 of 107 rows cannot be learned from" in message
        assert "--max_bad_rows" in message and EXAMPLE_ROW in message
        for line, reason in expected.items():
            assert f"line {line}: {reason}" in message
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags, "--max_bad_rows", 7).passed()
    assert "They are left out." in result.out
    assert ": 100 rows, 1 pictures" in result.out
    report = (out / "pretrain_vlm_32.bad_rows.txt").read_text(encoding="utf-8")
    assert all(f"line {line}: {reason}" in report for line, reason in expected.items())


def test_one_percent_of_bad_rows_is_left_out_by_default(world, out, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", bad_rows()[:101])
    flags = ["--data_path", data, "--epochs", 1, "--batch_size", 20]
    result = world.run(PRETRAIN, *world.files("pretrain", out), *flags).passed()
    assert "line 101: no such picture: nowhere.jpg" in result.out


def test_a_long_report_is_cut_in_the_terminal_only(world, out, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"conversations": []} for _ in range(30)])
    message = refused(world, out, "--data_path", data)
    assert message.count("  line ") == 20
    assert "and 10 more, all in" in message
    assert (out / "pretrain_vlm_32.bad_rows.txt").read_text(encoding="utf-8").count("  line ") == 30


def test_with_two_ranks_a_mistake_is_reported_once_and_neither_hangs(world, out):
    world.run(PRETRAIN, *world.files("pretrain", out), "--data_path", "nowhere.jsonl", ranks=2).refused("nowhere.jsonl")
    world.run(SFT, *world.files("sft", out), "--max_seq_len", 400, "--from_weight", "llm", ranks=2).refused(
        "5 of 25 rows"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_devices_that_are_not_there(monkeypatch):
    with pytest.raises(UsageError, match="no Apple GPU"):
        pick_device("mps", 0, 1)
    assert pick_device(None, 0, 1).type in ("cpu", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1", 0, 1) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match=r"3 GPU\(s\) are asked for, but there are 2"):
        pick_device("cuda:2", 0, 1)
    # Four ranks on one machine with two GPUs: all four must raise, not just the third and fourth.
    for local_rank in range(4):
        with pytest.raises(UsageError, match=r"4 GPU\(s\) are asked for, but there are 2"):
            pick_device("cuda", local_rank, 4)
    assert pick_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert pick_dtype(None, torch.device("cpu")) == torch.float32
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # it prepares itself for each of a run's many lengths


@pytest.mark.parametrize("stage", [PRETRAIN_STAGE, SFT_STAGE])
@pytest.mark.parametrize(("kind", "compiles"), [("built-in", 0), ("minimind2-v", 1)])
def test_only_long_runs_compile(stage, kind, compiles, monkeypatch):
    """On a GPU, compiling takes as long as all of the built-in set."""
    monkeypatch.setattr("trainer.flags.pick_device", lambda *args: torch.device("cuda", 0))
    monkeypatch.setattr("trainer.flags.choose_bundle", lambda args, data: (BUNDLES[kind], {}))
    assert parse_arguments(stage, "", ["--dtype", "float32"]).compile == compiles


class Place:
    """A project folder with some of the published files."""

    def __init__(self, root, monkeypatch):
        self.root = root
        for name in ("TOWER_DIR", "DATASET_DIR"):
            monkeypatch.setattr(paths, name, root / getattr(paths, name).relative_to(ROOT))
        for bundle in (bundles.MINIMIND2, bundles.MINIMIND_3V):
            for part in ("tower", "tokenizer"):
                monkeypatch.setitem(vars(bundle), part, root / getattr(bundle, part).relative_to(ROOT))

    def has(self, *names: str) -> "Place":
        for name in names:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".pth":
                torch.save(language_model(steps=0), path)
            elif path.suffix:
                path.touch()
            else:
                path.mkdir()
        return self

    def choose(self, stage="pretrain", from_weight="llm", **flags) -> argparse.Namespace:
        names = ("data_path", "images_path", "eval_data", "eval_images_path", "tokenizer_path", "vision_model_path")
        args = dict.fromkeys((*names, "hidden_size", "num_hidden_layers", "use_moe", "llm_path"))
        args["save_weight"] = f"{stage}_vlm"
        args = argparse.Namespace(**args | {"from_weight": from_weight, "save_dir": self.root / "out"} | flags)
        bundle, chosen = bundles.choose_bundle(args, stage)
        missing = {name: value for name, value in chosen.items() if getattr(args, name) is None}
        return argparse.Namespace(**vars(args) | missing, assets=bundle.name)


@pytest.fixture
def place(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


TOWER = "model/vision_model/clip-vit-base-patch16/model.safetensors"
PUBLISHED_TOKENIZER = "model/tokenizer_minimind2/tokenizer.json"
DATA = ("dataset/pretrain_data.jsonl", "dataset/pretrain_images")


def test_without_published_files_the_built_in_set_is_used(place):
    args = place.choose()
    assert args.assets == "built-in"
    assert args.vision_model_path == BUILTIN_TOWER_DIR
    assert args.tokenizer_path == BUILTIN_TOKENIZER_DIR
    assert args.data_path == BUILTIN_DATASET_DIR / "pretrain.jsonl"
    assert place.choose("sft", "pretrain_vlm").data_path.name == "sft.jsonl"
    # Weights of an earlier run on the built-in set do not count as published files.
    assert place.has("out/pretrain_vlm_128.pth").choose("sft", "pretrain_vlm").assets == "built-in"


def test_published_files_are_used_if_complete(place):
    args = place.has(TOWER, PUBLISHED_TOKENIZER, *DATA, "out/llm_768.pth").choose()
    assert args.assets == "minimind2-v"
    assert args.vision_model_path == (place.root / TOWER).parent
    assert args.tokenizer_path == (place.root / PUBLISHED_TOKENIZER).parent
    assert (args.data_path, args.images_path) == tuple(place.root / name for name in DATA)


def test_parquet_needs_no_folder_of_pictures(place):
    place.has(TOWER, PUBLISHED_TOKENIZER, "dataset/pretrain_data.parquet", "out/llm_512.pth")
    place.has(DATA[0])  # of an older form, without its pictures
    assert place.choose().data_path == place.root / "dataset/pretrain_data.parquet"
    assert place.choose(data_path=place.root / "mine.parquet").images_path is None


def test_missing_folders_of_each_generation_are_named_with_their_download(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "MINIMIND_3V", replace(MINIMIND_3V, tower=tmp_path / "3v"))
    monkeypatch.setattr("dataset.chat.TOKENIZER_3V_DIR", tmp_path / "3v")
    for folder, end in (("3v", "_3v"), ("other", "")):
        with pytest.raises(UsageError, match=rf"download\.py tower{end}`"):
            bundles.read_tower(tmp_path / folder)
        with pytest.raises(UsageError, match=rf"download\.py tokenizer{end}\)"):
            load_tokenizer(tmp_path / folder)


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ([TOWER], ["tokenizer", "data", "pictures", "language model"]),
        ([PUBLISHED_TOKENIZER, *DATA], ["vision tower", "language model"]),
        ([TOWER, PUBLISHED_TOKENIZER, *DATA], ["language model"]),
        (["out/llm_512.pth"], ["vision tower", "tokenizer", "data", "pictures"]),
        (["out/llm_768.pth"], ["vision tower", "tokenizer", "data", "pictures"]),
        ([DATA[0], TOWER, PUBLISHED_TOKENIZER, "out/llm_512.pth"], ["pictures"]),
        # Folders of an interrupted download.
        (
            ["model/vision_model/clip-vit-base-patch16/config.json", PUBLISHED_TOKENIZER, *DATA],
            ["vision tower", "language model"],
        ),
        (["model/tokenizer_minimind2", TOWER, *DATA, "out/llm_512.pth"], ["tokenizer"]),
    ],
)
def test_missing_published_files_are_listed_with_their_download(place, there, missing):
    commands = {
        "vision tower": ("clip-vit-base-patch16", "python scripts/download.py tower"),
        "tokenizer": ("tokenizer_minimind2", "python scripts/download.py tokenizer"),
        "data": ("pretrain_data.jsonl", "python scripts/download.py pretrain"),
        "pictures": ("pretrain_images", "python scripts/download.py pretrain"),
        "language model": ("llm_512.pth", "python scripts/download.py llm --hidden_size 512"),
    }
    with pytest.raises(UsageError) as error:
        place.has(*there).choose()
    listed = [line.strip() for line in str(error.value).splitlines() if line.startswith("  ")]
    assert [line.split(": ")[0] for line in listed] == missing
    for line in listed:
        name, command = commands[line.split(": ")[0]]
        assert name in line
        assert f"({command})" in line


ORIGINALS = [
    (
        "model/siglip2-base-p32-256-ve/config.json",
        "model/tokenizer.json",
        "dataset/pretrain_i2t.parquet",
        "out/llm_768.pth",
    ),
    (
        "model/clip-vit-base-patch16/config.json",
        "model/minimind_tokenizer/tokenizer.json",
        DATA[0],
        DATA[1],
        "out/lm_512.pth",
    ),
    (TOWER, "model/tokenizer.json", "dataset/pretrain_vlm_data.jsonl", DATA[1], "out/full_sft_512.pth"),
]


@pytest.mark.parametrize("names", ORIGINALS, ids=["3v", "lm", "full_sft"])
def test_the_originals_own_names_and_places_are_taken(place, names):
    tower, tokenizer, data, *_, weights = names
    is_3v = "siglip2" in tower
    place.has(*names)
    torch.save(language_model(steps=0, qk_norm=is_3v), place.root / weights)
    for mark in TOWER_WEIGHTS:
        ((place.root / tower).parent / mark).touch()
    args = place.choose()
    bundle = MINIMIND_3V if is_3v else MINIMIND2
    assert (args.assets, args.vision_model_path) == (bundle.name, (place.root / tower).parent)
    assert args.tokenizer_path == (place.root / tokenizer).parent
    assert args.data_path == place.root / data
    assert find_starting_weights(args, print).path == place.root / weights
    # The usual name comes first, however old it is; another size only where it is asked for.
    place.has("out/llm_256.pth")
    os.utime(place.root / "out/llm_256.pth", (1, 1))
    assert find_weights(place.root / "out", "llm").name == ("llm_768.pth" if is_3v else "llm_256.pth")
    size = int(weights.split("_")[-1].removesuffix(".pth"))
    assert find_weights(place.root / "out", "llm", size) == place.root / weights


@pytest.mark.parametrize(
    "name",
    [
        *("out/512_llm.pth", "out/pretrain_512.pth", "out/model.safetensors", "out/pytorch_model.bin", "out/llm.pth"),
        *("dataset/sft_i2t.parquet", "dataset/mine.jsonl", "dataset/pretrain_images.zip", "dataset/captions.csv"),
        *("dataset/SFT.PARQUET", "dataset/sft_data.parquet.0123456789ab.part", "out/minimind-3v/llm_768.pth"),
        *("model/siglip-base/config.json", "model/vision_model/clip-vit-large/pytorch_model.bin", "model/config.json"),
        "model/my_tokenizer/tokenizer.json",
    ],
)
def test_what_lies_there_and_is_not_understood_is_named_and_the_built_in_set_not_taken(place, name):
    folder_or_file = name if name.startswith(("out", "dataset")) else name.rpartition("/")[0]
    with pytest.raises(UsageError, match=rf"files are missing:(.|\n)*{folder_or_file} \(unexpected name\)"):
        place.has(name).choose()


def test_what_runs_here_left_does_not_keep_the_built_in_set_from_being_taken(place):
    place.has("out/my_run_128.pth", "out/my_run_128.json", "out/x_128_resume.pth", "out/pretrain_vlm_128.pth")
    place.has("dataset/eval_images/scene_0.jpg", "model/tokenizer/tokenizer.json", "model/builtin/tower/config.json")
    assert place.choose().assets == "built-in"
    # Data of one's own is in question only where none is named.
    assert place.has("dataset/mine.jsonl").choose(data_path=place.root / "dataset/mine.jsonl").assets == "built-in"


def test_the_built_in_set_is_not_mixed_with_own_paths(place):
    for flags in ({"images_path": place.root}, {"tokenizer_path": place.root}, {"hidden_size": 768}):
        with pytest.raises(UsageError, match=r"download\.py tower") as error:
            place.choose(**flags)
    assert "--hidden_size 768" in str(error.value)


def test_own_data_trains_whichever_model_is_there(place):
    mine = place.root / "mine" / "rows.jsonl"
    args = place.choose(data_path=mine)  # nothing downloaded
    assert (args.assets, args.vision_model_path) == ("built-in", BUILTIN_TOWER_DIR)
    assert (args.data_path, args.images_path, args.eval_data) == (mine, mine.parent, None)
    # The newest weights of that name decide on tower and tokenizer, whatever was downloaded.
    place.has(TOWER, PUBLISHED_TOKENIZER, *DATA, "out/llm_512.pth", "out/sft_vlm_128.pth")
    shape = {"config": {"hidden_size": 32, "num_hidden_layers": 2}}
    (place.root / "out/sft_vlm_128.json").write_text(json.dumps(shape | {"assets": "built-in"}))
    assert place.choose(data_path=mine).assets == "minimind2-v"
    args = place.choose("sft", "sft_vlm", data_path=mine)
    assert (args.assets, args.tokenizer_path) == ("built-in", BUILTIN_TOKENIZER_DIR)
    path = str(place.root / "out/sft_vlm_128.pth")
    assert place.choose("sft", path, data_path=mine).assets == "built-in"
    tower = place.root / "my_tower"
    tower.mkdir()
    sidecar = shape | {"assets": "published", "arguments": {"vision_model_path": str(tower), "tokenizer_path": "gone"}}
    (place.root / "out/sft_vlm_128.json").write_text(json.dumps(sidecar))
    args = place.choose("sft", "sft_vlm", data_path=mine)
    assert (args.assets, args.vision_model_path) == ("minimind2-v", tower)
    assert args.tokenizer_path == (place.root / PUBLISHED_TOKENIZER).parent


def test_the_generation_is_that_of_the_weights_that_the_run_takes(place):
    """Newer weights of the built-in set are not taken for published data, so they do not decide on the tower."""
    place.has("out/pretrain_vlm_128.pth", "dataset/sft_data.parquet")
    tensors = language_model(steps=0, qk_norm=True)
    torch.save(tensors, place.root / "out/pretrain_vlm_768.pth")
    os.utime(place.root / "out/pretrain_vlm_768.pth", (1, 1))
    sidecar = {"config": {"hidden_size": 32, "num_hidden_layers": 2}, "assets": "built-in"}
    (place.root / "out/pretrain_vlm_128.json").write_text(json.dumps(sidecar))
    place.has("model/vision_model/siglip2-base-p32-256-ve/model.safetensors")
    place.has("model/tokenizer_minimind3v/tokenizer.json")
    args = place.choose("sft", "pretrain_vlm")
    assert (args.assets, args.vision_model_path) == ("minimind-3v", MINIMIND_3V.tower)
    assert BUNDLES[args.assets].recipes["sft"]["learning_rate"] == 5e-6
    assert find_starting_weights(args, print).path.name == "pretrain_vlm_768.pth"
    args = place.choose("sft", "pretrain_vlm", data_path=place.root / "mine.parquet")
    assert args.assets == "built-in"
    assert find_starting_weights(args, print).path.name == "pretrain_vlm_128.pth"


def test_another_generation_is_one_more_record(place, monkeypatch):
    folders = {"tower": place.root / "model/my_tower", "tokenizer": place.root / "model/my_tokenizer"}
    mine = bundles.Bundle("mine", layers={64: 2}, recipes={"sft": {"epochs": 9}}, **folders)
    monkeypatch.setitem(BUNDLES, "mine", mine)
    place.has("model/my_tower/model.safetensors", "model/my_tokenizer/tokenizer.json", "out/pretrain_vlm_64.pth")
    sidecar = {"config": {"hidden_size": 32, "num_hidden_layers": 2}, "assets": "mine"}
    (place.root / "out/pretrain_vlm_64.json").write_text(json.dumps(sidecar))
    args = place.choose("sft", "pretrain_vlm", data_path=place.root / "mine.parquet")
    assert (args.assets, args.vision_model_path, args.tokenizer_path) == ("mine", *folders.values())
    assert mine.recipes["sft"]["epochs"] == 9
    mine_gone = place.root / "model/my_tower/model.safetensors"
    mine_gone.unlink()
    with pytest.raises(UsageError, match="vision tower: .*my_tower"):
        place.choose("sft", "pretrain_vlm", data_path=place.root / "mine.parquet")


@pytest.mark.parametrize("shape", [(768, 3072), (3072,)])
def test_weights_of_an_earlier_minimind_3v_are_named_not_what_the_older_generation_lacks(place, shape):
    place.has("model/vision_model/siglip2-base-p32-256-ve/model.safetensors", "out/llm_768.pth")
    path = place.root / "out/llm_768.pth"
    torch.save(language_model(steps=0, qk_norm=True) | {"vision_proj.mlp.0.weight": torch.zeros(shape)}, path)
    with pytest.raises(UsageError, match=r"llm_768.pth belongs to an earlier minimind-3v") as error:
        parse_arguments(PRETRAIN_STAGE, "", ["--from_weight", str(path)])
    assert "Missing" not in str(error.value)
    path.write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"llm_768.pth"):
        parse_arguments(PRETRAIN_STAGE, "", ["--from_weight", str(path)])


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(PRETRAIN_STAGE, (2, 16, 4e-4, 450)), (SFT_STAGE, (2, 4, 5e-6, 768))],
    ids=["pretrain", "sft"],
)
def test_the_recipe_of_minimind_3v(place, stage, expected):
    place.has(TOWER, PUBLISHED_TOKENIZER, "model/tokenizer_minimind3v/tokenizer.json", "dataset/mine.parquet")
    place.has("model/vision_model/siglip2-base-p32-256-ve/model.safetensors", "out/old_512.pth")
    torch.save(language_model(steps=0, qk_norm=True), place.root / "out/new_768.pth")

    def settings(from_weight: str) -> tuple:
        files = ["--data_path", str(place.root / "dataset/mine.parquet"), "--save_dir", str(place.root / "out")]
        args = parse_arguments(stage, "", [*files, "--from_weight", from_weight])
        return args.epochs, args.batch_size, args.learning_rate, args.max_seq_len

    assert settings("new") == settings(str(place.root / "out/new_768.pth")) == expected
    names = ("epochs", "batch_size", "learning_rate", "max_seq_len")
    assert settings("old") == tuple(stage.defaults[name] for name in names) != expected


@pytest.mark.parametrize(
    ("typed", "meant"), [("none", "none"), ("ends", "ends"), ("all", "all"), ("0", "none"), ("1", "all")]
)
def test_freeze_llm_takes_words_and_the_numbers_that_mean_one_thing(typed, meant):
    assert build_parser(SFT_STAGE, "").parse_args(["--freeze_llm", typed]).freeze_llm == meant


@pytest.mark.parametrize(("typed", "word"), [("2", "write ends"), ("some", "none, ends, all"), ("", "none, ends, all")])
def test_freeze_llm_asks_for_a_word_else(typed, word, capsys):
    with pytest.raises(SystemExit):
        build_parser(SFT_STAGE, "").parse_args(["--freeze_llm", typed])
    assert word in capsys.readouterr().err.replace("'", "")


def test_a_path_as_from_weight_needs_no_language_model_in_save_dir(place):
    place.has(TOWER, PUBLISHED_TOKENIZER, *DATA)
    assert place.choose(from_weight="/some/where/llm_512.pth").assets == "minimind2-v"
    assert place.choose(from_weight="none").assets == "minimind2-v"
    with pytest.raises(UsageError, match="language model"):
        place.choose()


def test_a_garbled_tokenizer_is_refused(world, out, tmp_path):
    folder = shutil.copytree(world.tokenizer, tmp_path / "tokenizer")
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for content in ('{"model"', json.dumps(whole | {"model": whole["model"] | {"vocab": {"a": 1}, "merges": []}})):
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        assert "cannot be used" in refused(world, out, "--tokenizer_path", folder)


def test_a_link_to_data_that_is_away_keeps_the_built_in_set_from_being_taken(place):
    (place.root / "dataset").mkdir(exist_ok=True)
    (place.root / "dataset/pretrain_data.jsonl").symlink_to(place.root / "disk_that_is_not_mounted")
    with pytest.raises(UsageError, match="files are missing"):
        place.choose()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py", "is not a file that Python can import"),
        ("my.v2.py", "is not a file that Python can import"),
        ("random.py", "another module is called random"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused(world, tmp_path, name, words):
    (tmp_path / name).touch() if name != "nowhere.py" else None
    for flags in (["--import", tmp_path / name], [f"--imp={tmp_path / name}"]):
        refused = world.run(PRETRAIN, *flags)
        assert refused.code == 2 and words in refused.err and "usage:" not in refused.err
    assert "error: argument --import" in world.run(PRETRAIN, "--import").err


def test_commands_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"image_dir": tmp_path / "my photos", "prompt": "-5 or 5?", "chat": True, "seed": None}
    typed = command("eval_vlm.py", flags).replace("\\\n", " ")
    assert shlex.split(typed) == ["python", str(EVAL), "--image_dir", "my photos", "--prompt=-5 or 5?", "--chat"]
