"""eval_vlm.py: a folder of images, your own images, and every kind of weights."""

import contextlib
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import EVAL, PICTURES, PRETRAIN, ROOT, SFT, write_jsonl

from common.errors import UsageError
from common.paths import BUILTIN_MODEL_DIR
from dataset.pictures import PICTURE_FORMATS
from eval_vlm import parse_arguments
from model import weights as weight_io
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer import bundles
from trainer.answering.assistant import find_model, find_pictures, in_precision

pytest_plugins = ["tiny"]

SPEED = re.compile(r"^    \d+ tokens, \d+ tokens/s$", re.MULTILINE)
AT_ONCE = re.compile(r"^    \d+ answer\(s\) at once: \d+ tokens, \d+ tokens/s$", re.MULTILINE)
UNTRAINED = "the projection is untrained"


@pytest.fixture(scope="module")
def out(world, tmp_path_factory):
    """Returns a --save_dir after both stages."""
    out = world.copy_of_out(tmp_path_factory.mktemp("eval") / "out")
    flags = ["--epochs", 1, "--learning_rate", 1e-3, "--batch_size", 13]
    world.run(PRETRAIN, *world.files("pretrain", out), *flags).passed()
    world.run(SFT, *world.files("sft", out), *flags).passed()
    return out


def answers(result) -> list[tuple[str, str]]:
    """Returns (name, question) of each answer that was printed with its speed."""
    parts = SPEED.split(result.passed().out)
    assert len(parts) > 1, result.out
    return [re.findall(r"^(.*\.jpg): (.*)$", part, re.MULTILINE)[-1] for part in parts[:-1]]


def test_it_describes_every_picture_of_a_folder(world, out, tmp_path):
    """Typed in the user's own folder, with paths relative to it."""
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = os.path.relpath(world.images, tmp_path)
    script, save_dir = os.path.relpath(EVAL, tmp_path), os.path.relpath(out, tmp_path)
    # Tokenizer and tower default to those of the weights.
    result = world.run(script, "--save_dir", save_dir, "--image_dir", pictures, "--max_new_tokens", 4, cwd=tmp_path)
    asked = re.findall(r"^(.*\.jpg): 描述这张图片$", result.passed().out, re.MULTILINE)
    assert sorted(asked) == sorted(f"{number}.jpg" for number in range(PICTURES))
    assert "sft_vlm_32.pth" in result.out
    assert str(world.tower) in result.out
    assert UNTRAINED not in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_is_described_at_once_as_picture_by_picture(world, out):
    flags = [*world.eval_files(loud(world, out)), "--image_dir", world.images, "--temperature", 0]
    flags += ["--max_new_tokens", 12]
    texts = {}
    for batch_size in (1, 3, PICTURES):
        said = world.run(EVAL, *flags, "--batch_size", batch_size).passed().out
        texts[batch_size], speeds = AT_ONCE.sub("", said).split(), AT_ONCE.findall(said)
        assert len(speeds) == -(-PICTURES // batch_size)
    assert texts[1] == texts[3] == texts[PICTURES]


def test_the_precisions_answer_and_int8_is_for_the_cpu(world, out):
    flags = [*world.eval_files(out), "--image", world.images / "0.jpg", "--max_new_tokens", 4]
    for dtype in ("float32", "bfloat16", "int8"):
        said = world.run(EVAL, *flags, "--dtype", dtype).passed().out
        assert "tokens/s" in said and "0.236 M parameters" in said
    assert "-1: must be at least 0.001, or 0" in world.run(EVAL, *flags, "--temperature", -1).err
    with pytest.raises(UsageError, match="--dtype int8 is for the CPU"):
        in_precision(SimpleNamespace(device=torch.device("cuda")), "int8")


def test_it_gives_the_same_from_every_folder(world, out, tmp_path):
    flags = [*world.eval_files(out), "--image", world.images / "0.jpg"]
    texts = [world.run(EVAL, *flags, cwd=cwd).passed().out for cwd in (ROOT, ROOT / "trainer", tmp_path)]
    texts = [SPEED.sub("", text) for text in texts]
    assert texts[0] == texts[1] == texts[2]


def test_a_question_about_one_picture_and_about_several(world, out):
    flags = [*world.eval_files(out), "--prompt", "有几个？"]
    assert answers(world.run(EVAL, *flags, "--image", "0.jpg", cwd=world.images)) == [("0.jpg", "有几个？")]
    result = world.run(EVAL, *flags, "--image", "0.jpg", "1.jpg", "2.jpg", cwd=world.images)
    assert answers(result) == [("0.jpg, 1.jpg, 2.jpg", "有几个？")]


def test_the_pictures_matter(world, out):
    """With random weights that outweigh the words, the answer depends on the images and their order."""

    def said(*pictures: str) -> str:
        flags = ["--temperature", 0, "--max_new_tokens", 12, "--image", *pictures]
        result = world.run(EVAL, *world.eval_files(loud(world, out)), *flags, cwd=world.images).passed()
        return result.out.split(".jpg: ", 1)[1].split("tokens,")[0]

    assert said("0.jpg") == said("0.jpg")
    assert said("0.jpg") != said("1.jpg")
    assert said("0.jpg", "1.jpg") != said("1.jpg", "0.jpg")


def loud(world, out):
    """Returns a --save_dir with large random weights, so that images outweigh the words."""
    folder = out.parent / "loud"
    if not folder.exists():
        folder.mkdir()
        torch.manual_seed(0)
        weights = torch.load(out / "sft_vlm_32.pth", weights_only=True)
        loud = {name: torch.randn(tensor.shape).half() * 0.5 for name, tensor in weights.items() if tensor.dim() == 2}
        torch.save(weights | loud | {"lm_head.weight": loud["model.embed_tokens.weight"]}, folder / "sft_vlm_32.pth")
    return folder


def test_the_seed_decides_the_samples(world, out):
    def said(*flags) -> str:
        files = [*world.eval_files(loud(world, out)), "--image", world.images / "0.jpg", "--temperature", 5]
        return SPEED.sub("", world.run(EVAL, *files, "--max_new_tokens", 8, *flags).passed().out)

    assert said() == said() == said("--seed", 42) != said("--seed", 43)


def test_a_language_model_alone_answers_with_a_warning(world, out):
    result = world.run(EVAL, *world.eval_files(out), "--weight", "llm", "--image", world.images / "0.jpg").passed()
    assert result.out.count(UNTRAINED) == 1
    assert "llm_32.pth" in result.out
    assert SPEED.search(result.out)
    for weight in ("pretrain_vlm", "sft_vlm"):
        flags = ["--weight", weight, "--image", world.images / "0.jpg"]
        assert UNTRAINED not in world.run(EVAL, *world.eval_files(out), *flags).passed().out


def test_weights_by_path_and_by_size(world, out, tmp_path):
    picture = ["--image", world.images / "0.jpg"]
    result = world.run(EVAL, *world.eval_files(tmp_path), *picture, "--weight", "pretrain_vlm_32.pth", cwd=out).passed()
    assert "pretrain_vlm_32.pth" in result.out
    here = [*world.eval_files(out), *picture]
    result = world.run(EVAL, *here, "--hidden_size", 32, "--load_from", "model").passed()
    assert "hidden_size" not in result.err
    world.run(EVAL, *here, "--hidden_size", 768).refused("sft_vlm_768.pth", "there: sft_vlm_32.pth")
    world.run(EVAL, *here, "--num_hidden_layers", 8).refused("--num_hidden_layers 8 contradicts")
    world.run(EVAL, *world.eval_files(tmp_path), *picture).refused("no weight file sft_vlm_*.pth", "Train it first")


@pytest.mark.parametrize(
    ("name", "folder", "part"),
    [
        ("sft_vlm", "out", "sft_vlm"),
        ("pretrain_vlm", "out", "pretrain_vlm"),
        ("llm", "out", "llm"),
        ("sft_vlm", "out/minimind-3v", "minimind-3v"),
        ("llm", "out/minimind-3v", "llm_3v"),
    ],
)
def test_missing_published_weights_are_named_with_their_download(tmp_path, monkeypatch, name, folder, part):
    monkeypatch.setitem(vars(bundles.MINIMIND_3V), "weights_dir", tmp_path / "out/minimind-3v")
    with pytest.raises(UsageError, match=f"ownload the published one: python scripts/download.py {part}$"):
        bundles.find_weights(tmp_path / folder, name)
    with pytest.raises(UsageError, match=r"\(there: no weights\)\.$"):
        bundles.find_weights(tmp_path, "my_photos")
    for there in ("photos_512.pth", "photos_512_resume.pth", "scenes_768_moe.pth"):
        (tmp_path / there).touch()
    with pytest.raises(UsageError, match=r"\(there: photos_512.pth, scenes_768_moe.pth\)\. Did you mean photos\?$"):
        bundles.find_weights(tmp_path, "my_photos")


@pytest.mark.parametrize("there", ["minimind2-v", "minimind-3v"])
def test_the_built_in_language_model_stands_in_only_where_nothing_was_downloaded(tmp_path, monkeypatch, there):
    for name in ("minimind2-v", "minimind-3v"):
        monkeypatch.setitem(vars(bundles.BUNDLES[name]), "tower", tmp_path / name)
    args = parse_arguments(["--weight", "llm", "--save_dir", str(tmp_path)])
    assert find_model(args).weights.path.parent == BUILTIN_MODEL_DIR
    (tmp_path / there).mkdir()
    with pytest.raises(UsageError, match="no weight file llm_"):
        find_model(args)


@pytest.mark.parametrize("form", ["saved", "with the tower, and the head only once", "pytorch_model.bin"])
def test_load_from_a_transformers_folder(world, out, tmp_path, form):
    """A folder name that begins with `model` is still taken as a folder."""
    weights = weight_io.read_weights(out / "sft_vlm_32.pth")
    folder = tmp_path / "model_of_mine"
    if form == "saved":
        model = MiniMindVLM(VLMConfig(**weights.sidecar["config"]))
        weight_io.load_into(model, weights)
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(weights.sidecar["config"]))
        tensors = {name: tensor for name, tensor in weights.tensors.items() if name != "lm_head.weight"}
        tensors["vision_encoder.vision_model.embeddings.class_embedding"] = torch.zeros(32)
        if form == "pytorch_model.bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            from safetensors.torch import save_file

            save_file(tensors, folder / "model.safetensors")
    flags = ["--temperature", 0, "--image", world.images / "0.jpg"]
    files = world.eval_files(out)
    from_folder = world.run(EVAL, *files, "--load_from", "model_of_mine", *flags, cwd=tmp_path).passed().out
    from_file = world.run(EVAL, *files, *flags, cwd=tmp_path).passed().out
    assert "model_of_mine" in from_folder
    assert UNTRAINED not in from_folder
    assert SPEED.sub("", from_folder).splitlines()[1:] == SPEED.sub("", from_file).splitlines()[1:]


def test_config_json_decides_what_the_tensors_do_not_tell(tmp_path):
    told = {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 0.1}
    MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=1, **told)).save_pretrained(tmp_path)
    found = weight_io.read_folder(tmp_path).config
    assert {name: getattr(found, name) for name in told} == told


def test_load_from_something_else_is_refused(world, out, tmp_path):
    flags = [*world.eval_files(out), "--image", world.images / "0.jpg", "--load_from"]
    world.run(EVAL, *flags, "nowhere").refused("--load_from nowhere", "config.json and model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 30}')
    (tmp_path / "model.safetensors").write_bytes(b"garbled")
    world.run(EVAL, *flags, tmp_path).refused("cannot be read")
    torch.save(torch.load(out / "sft_vlm_32.pth", weights_only=True), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    world.run(EVAL, *flags, tmp_path).refused("is no MiniMind weight file", "hidden_size 30")
    (tmp_path / "config.json").write_text("[")
    world.run(EVAL, *flags, tmp_path).refused("cannot be read")


def test_a_picture_that_cannot_be_read_is_skipped_and_reported(world, out, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"no picture")
    (folder / "b.jpg").write_bytes((world.images / "0.jpg").read_bytes())
    (folder / "c.png").write_bytes((world.images / "1.jpg").read_bytes()[:200])
    result = world.run(EVAL, *world.eval_files(out), "--image_dir", folder)
    result.refused("2 picture(s) could not be read")
    assert len(AT_ONCE.findall(result.out)) == 1
    assert re.search(r"skipped: .*a\.jpg: not a picture", result.out)
    assert re.search(r"skipped: .*c\.png: ", result.out)


def test_every_picture_that_can_be_read_is_described_and_the_rest_is_named(world, out, tmp_path):
    with Image.open(world.images / "0.jpg") as image:
        image.load()
    names = ["a.jfif", "b.JPE", "c.mpo", "d.webp", "e.ppm", *(["f.avif"] if "AVIF" in PICTURE_FORMATS else [])]
    for name in names:
        kind = {"jfif": "JPEG", "JPE": "JPEG", "mpo": "MPO"}.get(name[2:], name[2:].upper())
        image.save(tmp_path / name, kind)
    for name in ("g.heic", "h.heic", "notes.txt", "README", ".hidden"):
        (tmp_path / name).write_text("no picture")
    os.mkfifo(tmp_path / "pipe.jpg")
    said = world.run(EVAL, *world.eval_files(out), "--image_dir", tmp_path).passed().out
    assert re.findall(r"^(\w\.\w+): 描述", said, re.MULTILINE) == names
    [counts] = re.findall(r"not read: (.*)\. HEIC is not read: convert it to JPEG", said)
    assert set(counts.split(", ")) == {"2 .heic", "1 .txt", "1 README", "1 .jpg"}
    world.run(EVAL, *world.eval_files(out), "--image", tmp_path / "g.heic").refused("HEIC is not read: convert")


def test_missing_pictures_are_refused(world, out, tmp_path):
    files = world.eval_files(out)
    world.run(EVAL, *files, "--image_dir", tmp_path / "nowhere").refused("nowhere does not exist", "--image")
    world.run(EVAL, *files, "--image_dir", tmp_path).refused("no pictures (", ".jpg")
    world.run(EVAL, *files, "--image", "nowhere.jpg").refused("nowhere.jpg: no such file")


def test_a_prompt_with_the_wrong_number_of_image_tags_is_refused(world, out):
    files = [*world.eval_files(out), "--image", "0.jpg", "1.jpg", "--prompt"]
    world.run(EVAL, *files, "<image>在哪里？", cwd=world.images).refused("1 <image>", "2 picture(s)")
    world.run(EVAL, *files, "左<image>右<image>", cwd=world.images).passed()
    folder = [*world.eval_files(out), "--image_dir", world.images, "--prompt", "<image><image>"]
    world.run(EVAL, *folder).refused("2 <image>", "1 picture(s)")


def test_weights_and_tokenizer_must_belong_together(world, out, tmp_path):
    folder = shutil.copytree(world.tokenizer, tmp_path / "tokenizer")
    other = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    other["model"]["merges"] = other["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    flags = [*world.eval_files(out), "--image", world.images / "0.jpg", "--tokenizer_path", folder]
    world.run(EVAL, *flags).refused("was trained with another tokenizer", "--tokenizer_path")


TYPED = {
    "Please describe s0.jpg.": ("Please describe.", "s0.jpg"),
    "s0.jpg描述这张图片": ("描述这张图片", "s0.jpg"),
    "描述猫.jpg。": ("描述。", "猫.jpg"),
    "比较s0.jpg和s1.jpg": ("比较和", "s0.jpg", "s1.jpg"),
    "s0.jpg, s1.jpg": ("", "s0.jpg", "s1.jpg"),
    "s0.jpg,s1.jpg：有什么不同？": ("有什么不同？", "s0.jpg", "s1.jpg"),
    "(“s0.jpg”) what?": ("what?", "s0.jpg"),
    r"my\ photo.jpg what?": ("what?", "my photo.jpg"),
    "describe my photo.jpg, please": ("describe please", "my photo.jpg"),
    "'my photo.jpg' what?": ("what?", "my photo.jpg"),
    "“my photo.jpg”是什么": ("是什么", "my photo.jpg"),
    r"it\'s.jpg": ("", "it's.jpg"),
    r"'it'\''s.jpg' what?": ("what?", "it's.jpg"),
    "a, b.jpg what?": ("what?", "a, b.jpg"),
    "file://{here}/my%20photo.jpg what?": ("what?", "{here}/my photo.jpg"),
    "~/s0.jpg!": ("", "{here}/s0.jpg"),
    "see {here}/my dir/b.jpg?": ("see?", "{here}/my dir/b.jpg"),
    r"my\ dir/b.jpg?": ("", "my dir/b.jpg"),
    "what is in noending": ("what is in noending",),
    "is 1/2 and/or 5 km/h a .jpg?": ("is 1/2 and/or 5 km/h a .jpg?",),
    "?!": ("?!",),
}
MISSING = {
    "none.jpg": "no such file",
    "描述没有.PNG！": "no such file",
    "s0.jpg.bak": "no such file",
    "my-s0.jpg": "no such file",
    "'no photo.jpg' what?": "no photo.jpg: no such file",
    r"no\ photo.jpg what?": "no such file",
    "~/none what?": "no such file",
    "{here}/my dir": "no such file",
    "{here}/noending what?": "no picture's ending",
    "./my\\ dir/": "a folder, not a file",
    "pipe.jpg": "a pipe",
    "https://a.com/b.jpg": "an address: download",
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    for name in (
        "s0.jpg",
        "s1.jpg",
        "photo.jpg",
        "my photo.jpg",
        "猫.jpg",
        "it's.jpg",
        "a, b.jpg",
        "b.jpg",
        "noending",
    ):
        (tmp_path / name).touch()
    (tmp_path / "my dir").mkdir()
    (tmp_path / "my dir" / "b.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("line", TYPED)
def test_a_picture_is_found_however_its_path_is_typed(files, line):
    question, *paths = [text.format(here=files) for text in TYPED[line]]
    asked, found = find_pictures(line.format(here=files))
    assert (asked, list(map(str, found))) == (question, paths)


@pytest.mark.parametrize("line", MISSING)
def test_what_looks_like_a_picture_and_is_none_is_named(files, line):
    with pytest.raises(ValueError, match=f"^[^;]*{MISSING[line]}[^;]*$"):
        find_pictures(line.format(here=files))


@pytest.mark.parametrize(
    "name", ["'s0.jpg' ", '"my photo.jpg",', "'none.jpg' ", "'{here}/none.jpg' ", "'", "'/", "./'", "“"]
)
def test_a_longer_line_takes_proportionally_longer(files, monkeypatch, name):
    calls, looks = [], {look: getattr(os.path, look) for look in ("isfile", "isdir")}
    for look, of_system in looks.items():
        monkeypatch.setattr(os.path, look, lambda path, of_system=of_system: calls.append(path) or of_system(path))
    counts = []
    for number in (100, 400):
        calls.clear()
        with contextlib.suppress(ValueError):
            find_pictures(name.format(here=files) * number)
        counts.append(len(calls))
    assert counts[1] <= 5 * counts[0] and counts[1] <= 50 * 400


def test_a_chat_line_that_is_refused_changes_nothing(world, out):
    """170 pictures, in a line of their own or with a question, are refused; the pictures before them stay."""
    many = ", ".join(["0.jpg"] * 170)
    lines = [
        "1.jpg",
        many,
        f"{many} 有什么？",
        "none.jpg 这是什么？",
        "2.jpg",
        "<image>",
        "有什么？",
        "好",
    ]
    typed = "\n".join(lines).encode()
    said = world.run(EVAL, *world.eval_files(out), "--chat", typed=typed, cwd=world.images).passed().out
    refused = re.findall("not added, and nothing asked: (.*)", said)
    words = [*["are more than the model's 32,768 positions"] * 2, "none.jpg: no such", "1 <image> for 2"]
    assert [word in text for word, text in zip(words, refused, strict=True)] == [True] * 4
    assert re.findall("with .*jpg", said) == ["with 1.jpg", "with 2.jpg"]
    assert "2 picture(s) added: ask about them" in said
    assert said.count("tokens/s") == 2


def test_the_question_is_the_same_however_it_is_typed(world, out):
    """And a full stop, Chinese beside it, or quotes do not lose the picture."""
    picture = world.images / "0.jpg"
    files = [*world.eval_files(loud(world, out)), "--temperature", 0, "--max_new_tokens", 8, "--chat"]

    def said(line: str) -> str:
        result = world.run(EVAL, *files, typed=line.encode(), cwd=world.images).passed()
        return SPEED.split(result.out.split("jpg\n", 1)[1])[0]

    assert (
        said(f"{picture} 描述这张图片")
        == said("0.jpg描述这张图片")
        == said("描述这张图片'0.jpg'")
        != said("1.jpg描述这张图片")
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--chat --image a.jpg", "argument --image: not allowed with argument --chat"),
        ("--image_dir . --eval_data b.jsonl", "argument --eval_data: not allowed with argument --image_dir"),
        ("--json x.json", "--json: needs --eval_data"),
        ("--seed -1", "--seed: -1: must be from 0 to 9223372036854775807"),
        (f"--seed {2**63}", "must be from 0"),
        ("--seed 1.5", "--seed: invalid int value"),
        ("--prompt \udcff", "--prompt: invalid utf8_text value"),
        ("--temperature 1e-320", "--temperature: 1e-320: must be at least 0.001"),
        ("--temperature -1", "must be at least 0.001"),
        ("--temperature nan", "must be at least 0.001"),
        ("--temperature inf", "must be at least 0.001"),
        ("--top_p 0", "--top_p: 0: must be from 0.001 to 1"),
        ("--top_p 1.1", "must be from 0.001 to 1"),
        ("--top_k -1", "must be at least 0"),
        ("--max_new_tokens 0", "--max_new_tokens: 0: must be at least 1"),
        ("--batch_size 0", "must be at least 1"),
        ("--max_seq_len 7", "must be at least 8"),
        ("--short_answer -1", "must be at least 0"),
    ],
)
def test_wrong_flags_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(flags.split())
    assert words in capsys.readouterr().err


def test_help_names_each_default_once_and_its_text_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    args = parse_arguments(
        ["--prompt", r"a\nb", "--seed", "1099511627776", "--temperature", "0", "--json", "a", "--eval_data", "b"]
    )
    assert (args.prompt, args.seed, args.temperature) == ("a\nb", 1099511627776, 0)
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "(default: 0) (default" not in " ".join(shown.split())


def test_a_users_own_placeholders_are_text(world, out, tmp_path):
    """Alone or beside a picture, in a chat and in rows to evaluate on."""
    files, owns = world.eval_files(out), ["@" * count for count in (196, 200, 392)]
    typed = "\n/new\n".join(f"{own}\n好\n0.jpg {own}\n好" for own in owns).encode()
    assert world.run(EVAL, *files, "--chat", typed=typed, cwd=world.images).passed().out.count("tokens/s") == 12
    turns = [[{"role": "user", "content": f"{own}?"}, {"role": "assistant", "content": f"好{own}"}] for own in owns]
    rows = [{"conversations": conversation} for conversation in turns]
    for some in (rows + [row | {"image": "0.jpg"} for row in rows], rows):
        data = write_jsonl(tmp_path / "rows.jsonl", some)
        flags = ["--eval_data", data, "--images_path", world.images, "--short_answer", 500]
        assert f"{len(some)} rows with " in world.run(EVAL, *files, *flags).passed().out
