"""Stage 0: a tower of one's own pictures, and the path from it through both stages to the evaluation."""

import re
import shlex
import shutil
import signal

import pytest
import torch
from PIL import Image
from tiny import EVAL, PRETRAIN, ROOT, SFT, read_jsonl, write_jsonl

from common.files import lock_of, read_record
from dataset.pictures import random_views
from model.vision_tower import load_vision_tower
from trainer.bundles import epochs_for
from trainer.train_tower import Words

pytest_plugins = ["tiny"]

TOWER = ROOT / "trainer/train_tower.py"
COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (30, 60, 220)}
FEW = ["--steps", 10, "--batch_size", 4, "--size", 32, "--num_workers", 0, "--device", "cpu"]
KILLED = """
import os, signal, torch
clip, calls = torch.nn.utils.clip_grads_with_norm_, []
def counted(*how):
    calls.append(1)
    if len(calls) == {step}:
        os.kill(os.getpid(), signal.{signal})
    return clip(*how)
torch.nn.utils.clip_grads_with_norm_ = counted
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with 24 pictures, train.jsonl and heldout.jsonl: a picture is of a colour, which its answer names."""
    folder = tmp_path_factory.mktemp("photos")
    rows = []
    for number in range(24):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (40, 40), tuple(min(255, value + number) for value in COLOURS[name])).save(
            folder / f"{number}.png"
        )
        asked = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": name}]
        rows.append({"image": f"{number}.png", "conversations": asked})
    write_jsonl(folder / "train.jsonl", rows[:18])
    write_jsonl(folder / "heldout.jsonl", rows[18:])
    return folder


def train(world, photos, folder, *flags, **how):
    files = ["--data_path", photos / "train.jsonl", "--eval_data", photos / "heldout.jsonl"]
    return world.run(TOWER, *files, "--save_tower", folder, "--from_tower", world.tower, *FEW, *flags, **how)


def tensors(folder):
    return load_vision_tower(folder).state_dict()


@pytest.fixture(scope="module")
def trained(world, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "mine_tower"
    return train(world, photos, folder).passed(), folder


def test_it_writes_a_tower_that_sees_pictures_of_the_size(world, trained, photos):
    result, folder = trained
    tower = load_vision_tower(folder)
    assert (tower.settings.size, tower.settings.patches) == (32, 4)
    before = load_vision_tower(world.tower).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items() if "fc1" in name)
    assert read_record(folder)["data"] == str(photos / "train.jsonl")
    assert re.search(r"18 pictures, \d+ words\n", result.out) and "held out      6 pictures" in result.out
    assert re.search(r"100%  tower  step 10  loss .* likeliest word right \d", result.out)
    assert not list(folder.parent.glob("*_resume.pth"))


@pytest.mark.parametrize(("step", "how"), [(7, "SIGKILL"), (5, "SIGTERM")])
def test_a_run_that_was_ended_resumes_bit_identically(world, photos, trained, tmp_path, step, how):
    folder = tmp_path / "tower"
    ended = train(world, photos, folder, hook=KILLED.format(step=step, signal=how))
    assert ended.code == (-signal.SIGKILL if how == "SIGKILL" else 128 + signal.SIGTERM)
    train(world, photos, folder).refused("belongs to a run that did not finish", "--from_resume 1")
    train(world, photos, folder, "--from_resume", 1, "--seed", 7).refused("differs from this run in its seed")
    resumed = train(world, photos, folder, "--from_resume", 1).passed()
    assert "resumes       after step " in resumed.out
    expected = tensors(trained[1])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(folder).items())


def test_a_picture_that_cannot_be_read_is_named_and_an_earlier_tower_kept(world, photos, trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "tower")
    for path in photos.glob("*"):
        (tmp_path / path.name).write_bytes(b"no picture" if path.name == "3.png" else path.read_bytes())
    said = train(world, tmp_path, tmp_path / "tower").passed().out
    assert said.count("skipped, it cannot be read: 3.png") == 1
    [kept] = tmp_path.glob("tower.20*")
    assert f"kept the earlier tower as {kept}\n" in said and tensors(kept).keys() == tensors(trained[1]).keys()
    assert all(torch.equal(tensor, tensors(trained[1])[name]) for name, tensor in tensors(kept).items())


def test_a_tower_that_another_process_writes_is_refused(world, photos, tmp_path):
    with lock_of(tmp_path / "tower").acquire(timeout=0):
        train(world, photos, tmp_path / "tower").refused("another process is training tower", "another --save_tower")


def test_a_damaged_checkpoint_is_refused(world, photos, trained, tmp_path):
    train(world, photos, tmp_path / "tower", hook=KILLED.format(step=5, signal="SIGTERM"))
    path = tmp_path / "tower_resume.pth"
    state = torch.load(path, weights_only=True)
    for damage, words in (
        ({"learned": {}}, "belongs to another run"),
        ({"guide": {}}, "tower_resume.pth is damaged"),
        ({"step": "x"}, "tower_resume.pth is no checkpoint"),
        ({"sample": 100}, "sample 100 is not a valid position"),
        ({"random": [{"cpu": torch.zeros(3), "cuda": None}]}, "random state is damaged"),
    ):
        torch.save(state | damage, path)
        train(world, photos, tmp_path / "tower", "--from_resume", 1).refused(words)


def test_it_starts_from_nothing_too(world, photos, tmp_path):
    train(world, photos, tmp_path / "tower", "--from_tower", "none", "--steps", 1).passed()
    assert load_vision_tower(tmp_path / "tower").settings.hidden_size == 128


@pytest.mark.parametrize(
    ("rows", "flags", "words"),
    [
        (3, (), "needs at least 4 pictures"),
        (18, ("--size", 40), "--size 40 is no multiple of the tower's patches of 16"),
    ],
)
def test_what_cannot_be_learned_is_refused(world, photos, tmp_path, rows, flags, words):
    data = write_jsonl(tmp_path / "few.jsonl", read_jsonl(photos / "train.jsonl")[:rows])
    flags = ["--data_path", data, "--images_path", photos, *flags]
    train(world, photos, tmp_path / "tower", *flags).refused(words)


def test_answers_without_a_common_word_are_refused():
    with pytest.raises(Exception, match="no words in common"):
        Words([{1, (1,)}, {2, (2,)}])


def test_words_weigh_by_how_rare_they_are_and_answers_by_half():
    said = [{1, 2, (1, 2)}, {1, 2, (1, 2)}, {1, 3, (1, 3)}, {1, 4}, {1}, {1, 3}]
    words = Words(said)  # 1 is in all, 4 and the answer (1, 3) in one
    assert set(words.numbers) == {2, 3, (1, 2)}
    targets = words.targets(said)
    assert targets[0, words.numbers[1, 2]] == targets[0, words.numbers[2]] == 0.5
    assert targets[2, words.numbers[3]] == 1
    assert targets[4].sum() == 0


def test_only_pictures_that_may_be_mirrored_are():
    torch.manual_seed(0)
    pixels = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    pixels[..., 8:] = 255  # light is on the right
    views = random_views(pixels, 32, torch.arange(64) < 32)
    assert views.shape == (64, 3, 32, 32)
    light = views.mean((1, 2))
    is_mirrored = light[:, :8].mean(1) > light[:, -8:].mean(1)
    assert 5 < is_mirrored[:32].sum() < 27 and not is_mirrored[32:].any()


def test_every_command_names_the_next_until_the_answers_are_counted(world, photos, trained, tmp_path):
    """With the built-in language model; a tower of other weights is refused."""
    out, script, flags = tmp_path / "out", PRETRAIN, ["--num_workers", 0, "--device", "cpu"]
    said = trained[0].out
    for script, more in ((PRETRAIN, ["--epochs", 1]), (SFT, ["--epochs", 1]), (EVAL, [])):
        command = shlex.split(said[said.index("next: ") :].replace("\\\n", " "))[1:]
        assert command[:2] == ["python", str(script)]
        flags = ["--num_workers", 0, "--device", "cpu"] if script != EVAL else ["--device", "cpu"]
        said = world.run(script, *command[2:], *more, *flags, "--save_dir", out).passed().out
        if script != EVAL:
            assert f"trained on {photos / 'train.jsonl'}" in said and "(the built-in recipe)" in said
    assert "learning_rate" not in said and "of 6 short answers are right to the letter" in said
    files = ["--data_path", photos / "train.jsonl", "--eval_data", "none", "--save_dir", out, "--save_weight", "b"]
    other = ["--vision_model_path", ROOT / "model/builtin/tower"]
    world.run(SFT, "--from_weight", "mine_pretrain", *files, *other, *flags, "--num_workers", 0).refused(
        "mine_pretrain_128.pth", "--vision_model_path"
    )


def test_few_rows_are_shown_more_often():
    assert [epochs_for("pretrain", rows) for rows in (10, 167, 3000, 100_000)] == [60, 60, 4, 1]
    assert epochs_for("sft", 5000) == 5


def test_the_built_in_language_model_takes_a_tower_of_ones_own_only_beside_own_data(world, trained, photos, tmp_path):
    tower = ["--vision_model_path", trained[1], "--save_dir", tmp_path / "out", "--device", "cpu", "--num_workers", 0]
    world.run(PRETRAIN, *tower).refused("some files are missing", "built-in language model")
    files = ["--data_path", photos / "train.jsonl", "--eval_data", "none", "--epochs", 1]
    named = ["--tokenizer_path", ROOT / "model/tokenizer", "--from_weight", ROOT / "model/builtin/llm_128.pth"]
    said = (
        world.run(PRETRAIN, *tower, *files, *named, hook="import trainer.report.watcher as h; h.MUCH = 9").passed().out
    )
    assert "learning_rate 0.004 (the built-in recipe)" in said  # also where every part is named
    assert "of its cores' time: do other programs run?" in said
    assert "which has read about drawn shapes only" in said and "its tower has seen only these" not in said
