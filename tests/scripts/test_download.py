"""scripts/download.py, run as a process against a stand-in of the hub: what lands where, and what goes wrong well."""

import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from downloads import (
    DATA,
    LLM,
    TOKENIZER,
    TOWER,
    TOWER_FOLDER,
    WEIGHTS,
    command,
    make_zip,
    refused,
    repos,
    run,
    tree,
)
from hub_stand_in import COMMIT, HubStandIn, send
from huggingface_hub.errors import HTTPError
from hypothesis import given, settings
from hypothesis import strategies as st
from modelscope_stand_in import ModelScopeStandIn

from common.errors import UsageError
from common.paths import ROOT
from scripts import download
from scripts.data import transfer


@pytest.fixture
def hub():
    """The hub with everything on it."""
    with HubStandIn(repos()) as server:
        yield server


@pytest.fixture(params=["hub", "modelscope"])
def source(request):
    """Both sources in turn with everything on them, and the flags that choose them."""
    stand_in, files = HubStandIn, repos()
    if request.param == "modelscope":
        stand_in = ModelScopeStandIn
        files = {rename(repo): content for repo, content in files.items()}
    with stand_in(files) as server:
        yield server, ("--source", request.param)


def rename(repo: str) -> str:
    """What a repository of the hub is called on ModelScope."""
    return repo.replace("/openai/", "/openai-mirror/").replace("/jingyaogong/", "/gongjy/")


@pytest.fixture
def online(monkeypatch):
    """Lets the script's functions, called here, reach a stand-in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def near_hub(hub, online, monkeypatch):
    """The same for the script's functions called here: the real hub's address is read when they are imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    return hub


def test_everything_lands_in_its_place_and_a_second_run_fetches_nothing(source, tmp_path):
    server, flags = source
    dest = tmp_path / "project"
    done = run(server.endpoint, dest, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    data = repos()[DATA]
    assert tree(dest) == {
        f"{TOWER_FOLDER}/config.json": b"{}",
        f"{TOWER_FOLDER}/preprocessor_config.json": b'{"size": 224}',
        f"{TOWER_FOLDER}/model.safetensors": WEIGHTS,
        "out/llm_512.pth": WEIGHTS[::-1],
        "model/tokenizer_minimind2/tokenizer.json": b'{"v": 6400}',
        "model/tokenizer_minimind2/tokenizer_config.json": b"{ }",
        "dataset/pretrain_data.jsonl": data["pretrain_data.jsonl"],
        "dataset/pretrain_images/a.jpg": b"A" * 5000,
        "dataset/sft_data.jsonl": data["sft_data.jsonl"],
        "dataset/sft_images/a.jpg": b"S",
        "dataset/sft_images/more/b.jpg": b"B",
    }
    assert "dataset/pretrain_data.jsonl + dataset/pretrain_images/" in done.stdout
    assert str(Path("trainer/train_pretrain_vlm.py")) in done.stdout

    server.gets.clear()
    again = run(server.endpoint, dest, *flags)
    assert (again.returncode, again.stderr, server.gets) == (0, "", [])
    assert again.stdout.count("already here") == 5


def test_parts_can_be_chosen_and_other_forms_are_understood(hub, tmp_path):
    del hub.repos[TOWER]["model.safetensors"]
    data = hub.repos[DATA]
    data |= {"pretrain_images.zip": make_zip({"a.jpg": b"A"}), "pretrain_data.parquet": b"an older form"}
    data["sft_i2t.parquet"] = b"PAR1"  # today's form, beside the older ones
    done = run(hub.endpoint, tmp_path / "d", "tower", "llm", "pretrain", "sft", "--hidden_size", "768", "--keep_zip")
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "d") == {
        f"{TOWER_FOLDER}/config.json": b"{}",
        f"{TOWER_FOLDER}/preprocessor_config.json": b'{"size": 224}',
        f"{TOWER_FOLDER}/pytorch_model.bin": b"bin",
        "model/tokenizer_minimind2/tokenizer.json": b'{"v": 6400}',
        "model/tokenizer_minimind2/tokenizer_config.json": b"{ }",
        "out/llm_768.pth": b"768",
        "dataset/pretrain_data.jsonl": data["pretrain_data.jsonl"],
        "dataset/pretrain_images/a.jpg": b"A",
        "dataset/pretrain_images.zip": data["pretrain_images.zip"],
        "dataset/sft_data.parquet": b"PAR1",
    }
    assert "sft_i2t.parquet" in done.stdout and "--hidden_size 768" in done.stdout


@pytest.mark.parametrize("ranges", [True, False])
def test_a_lost_connection_is_resumed_where_it_broke(source, tmp_path, ranges):
    server, flags = source
    server.cut["llm_512.pth"], server.ranges = 150_000, ranges
    done = run(server.endpoint, tmp_path / "d", "llm", *flags)
    assert done.returncode == 0 and "trying again" in done.stderr
    assert tree(tmp_path / "d")["out/llm_512.pth"] == WEIGHTS[::-1]
    assert server.gets[-2:] == [("llm_512.pth", None), ("llm_512.pth", "bytes=150000-")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_is_continued_by_the_next(source, tmp_path, how):
    server, flags = source
    server.hold["llm_512.pth"] = 150_000
    first = subprocess.Popen(**command(server.endpoint, tmp_path / "d", "llm", *flags))
    try:
        assert server.holding.wait(60)
        out = tmp_path / "d" / "out"
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in out.glob("*.part")) < 100_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(how)
        _, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    assert how == signal.SIGKILL or (first.returncode == 130 and "The same command resumes" in errors)
    assert "Traceback" not in errors
    assert not (out / "llm_512.pth").exists()
    kept = sum(path.stat().st_size for path in out.glob("*.part"))

    done = run(server.endpoint, tmp_path / "d", "llm", *flags)
    assert done.returncode == 0, done.stderr
    assert server.gets[-1] == ("llm_512.pth", f"bytes={kept}-") and kept >= 100_000
    assert tree(tmp_path / "d")["out/llm_512.pth"] == WEIGHTS[::-1]


@pytest.mark.parametrize("name", ["tokenizer.json", "llm_512.pth"])
def test_damage_on_the_way_is_noticed(hub, tmp_path, name):
    hub.damage.add(name)
    part = "llm" if name == "llm_512.pth" else "tokenizer"
    refused(run(hub.endpoint, tmp_path / "d", part), name, "damaged")
    assert name not in str(tree(tmp_path / "d").keys())
    assert run(hub.endpoint, tmp_path / "d", part).returncode == 0


TRAIN_3V = [
    "trainer/train_pretrain_vlm.py --from_weight out/minimind-3v/llm_768.pth --save_weight pretrain_3v",
    "trainer/train_sft_vlm.py --from_weight out/pretrain_3v_768.pth --save_weight sft_3v",
]


@pytest.mark.parametrize(
    ("parts", "weights", "train", "talk"),
    [
        ("minimind-3v", ["sft_vlm_768"], [], ["sft_vlm_768"]),
        ("llm_3v", ["llm_768"], [], ["llm_768"]),
        ("llm_3v sft --hidden_size 64", ["llm_64"], [TRAIN_3V[1].replace("768", "64")], []),
        ("minimind-3v pretrain sft", ["sft_vlm_768", "llm_768"], TRAIN_3V, ["sft_vlm_768"]),
        ("minimind-3v llm sft", ["sft_vlm_768"], ["trainer/train_sft_vlm.py"], ["sft_vlm_768"]),
    ],
)
def test_of_the_newest_generation_comes_what_is_needed_and_its_commands(hub, tmp_path, parts, weights, train, talk):
    """Its repository has no more than that."""
    hub.repos |= {
        "models/jingyaogong/minimind-3v-pytorch": {f"{name}.pth": WEIGHTS for name in weights},
        "models/jingyaogong/siglip2-base-p32-256-ve": repos()[TOWER],
        "models/jingyaogong/minimind-3v": repos()[TOKENIZER],
    }
    done = run(hub.endpoint, tmp_path / "d", *parts.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.stem for path in (tmp_path / "d" / "out" / "minimind-3v").iterdir()} == set(weights)
    said = [line.split(":  ") for line in done.stdout.replace(f"{ROOT}/", "").splitlines() if ":  " in line]
    assert [command for what, command in said if what == "Train"] == [f"python {line}" for line in train]
    assert [re.search(r"--weight \S+/(\w+)\.pth", command)[1] for what, command in said if what == "Talk to it"] == talk


def test_the_newest_generation_is_trained_as_the_readme_says():
    lines = [line.split("  #")[0].strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    assert all(f"python {line}" in lines for line in ("scripts/download.py llm_3v pretrain sft", *TRAIN_3V))


def test_an_unreachable_hub_is_named_at_once(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        started = time.monotonic()
        refused(run(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "d"), "connection to", "HF_ENDPOINT")
    assert time.monotonic() - started < 30
    refused(run("mirror.example", tmp_path / "d"), "mirror.example", "missing an 'http://' or 'https://'")


def test_what_the_hub_lacks_is_named(hub, tmp_path):
    del hub.repos[LLM]["llm_768.pth"]
    refused(run(hub.endpoint, tmp_path / "d", "llm", "--hidden_size", "768"), "llm_768.pth", "sft_vlm_512.pth")
    del hub.repos[TOKENIZER]
    refused(run(hub.endpoint, tmp_path / "d"), "MiniMind2-V answers 404", "not there, or private")
    assert hub.gets == [] and not (tmp_path / "d").exists()


def test_a_file_of_the_users_own_is_not_overwritten(hub, tmp_path):
    own = tmp_path / "d" / "dataset" / "pretrain_data.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text("my own rows")
    refused(run(hub.endpoint, tmp_path / "d"), "pretrain_data.jsonl", "move or delete")
    assert hub.gets == [] and own.read_text() == "my own rows"


def test_an_unsafe_zip_is_refused_and_the_rest_stays(hub, tmp_path):
    hub.repos[DATA]["sft_images.zip"] = make_zip({"a.jpg": b"A", "../evil": b"E"})
    dest = tmp_path / "deep" / "project"
    dest.mkdir(parents=True)
    refused(run(hub.endpoint, dest, "pretrain", "sft"), "sft_images.zip", "../evil")
    assert (dest / "dataset/pretrain_images/a.jpg").exists() and not (dest / "dataset/sft_images").exists()
    assert not any("evil" in path.name for path in tmp_path.rglob("*"))


def planned(dest: Path, part: str) -> dict:
    """What makes up a part."""
    return download.plan(download.parse_args([part, "--dest", str(dest)]), download.find_source("hub"))[part]


def test_too_little_disk_is_refused_before_anything_is_fetched(near_hub, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    data = near_hub.repos[DATA]
    needed = len(data["pretrain_data.jsonl"]) + round(len(data["pretrain_images.zip"]) * 2.6)
    for free, status in [(needed - 5, 1), (needed + 5, 0)]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(free, 0, free))
        monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("must not be called"))
        if status:
            with pytest.raises(UsageError, match="not enough disk .* needed .* free"):
                download.main(["pretrain", "--dest", str(tmp_path)])
        else:
            download.check_disk(planned(tmp_path, "pretrain"))
    assert near_hub.gets == [] and list(tmp_path.iterdir()) == []


def write_zip(folder: Path, content: bytes) -> Path:
    """A zip on disk, where download.py would have put it."""
    path = folder / "pretrain_images.zip"
    path.write_bytes(content)
    return path


def test_an_interrupted_unpacking_starts_over(tmp_path):
    path = write_zip(tmp_path, make_zip({"pretrain_images/a.jpg": b"AAAA", "pretrain_images/b.jpg": b"BBBB"}))
    mine = tmp_path / "pretrain_images.part" / "a.jpg"  # no temporary folder of ours
    mine.parent.mkdir()
    mine.write_bytes(b"here")
    dies = "zipfile.ZipFile.extract = lambda *_: os.kill(os.getpid(), 9)"
    program = f"import os, sys, zipfile, pathlib; from scripts.data import transfer; {dies}"
    program += "; transfer.unpack(*map(pathlib.Path, sys.argv[1:]))"
    command = [sys.executable, "-c", program, path, tmp_path / "pretrain_images"]
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == -9
    assert len(list(tmp_path.iterdir())) == 3
    transfer.unpack(path, tmp_path / "pretrain_images")
    assert tree(tmp_path / "pretrain_images") == {"a.jpg": b"AAAA", "b.jpg": b"BBBB"}
    assert tree(mine.parent) == {"a.jpg": b"here"}
    assert {item.name for item in tmp_path.iterdir()} == {"pretrain_images", "pretrain_images.zip", mine.parent.name}


def link(name: str, target: bytes) -> bytes:
    """A zip with a symbolic link."""
    memory, info = io.BytesIO(), zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr(info, target)
    return memory.getvalue()


def lying(declared: int) -> bytes:
    """A zip whose member of 100,000 zeros is declared as another size, in both of its headers."""
    content, size = make_zip({"a.jpg": bytes(100_000)}), (100_000).to_bytes(4, "little")
    assert content.count(size) == 2
    return content.replace(size, declared.to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (make_zip({"/evil": b"E"}), "outside"),
        (make_zip({"a/../../evil": b"E"}), "outside"),
        (make_zip({"..\\evil": b"E"}), "outside"),
        (make_zip({"C:evil": b"E"}), "outside"),
        (link("evil", b"/etc/passwd"), "link"),
        (lying(50), "damaged"),
        (lying(4_000_000_000), "not enough disk"),
        (make_zip({"a.jpg": b"E"})[:-9], "damaged"),
        (b"<html>", "damaged"),
        (make_zip({"x": b"E", "x/y": b"E"}), "'x' is in it twice, or is a file and a folder"),
        (make_zip({"./a/x": b"E", "a/x/y/z": b"E"}), "a file and a folder"),
        (make_zip({"a": b"E", "./a": b"F"}), "twice"),
        (make_zip({"a.jpg": b"E"}).replace(b"\x08\0", b"\x63\0"), "damaged"),
        (make_zip({"a.jpg": b"E"}).replace(b"\x08\0", b"\x0e\0"), "damaged"),
        (make_zip({"a.jpg": b"E"}).replace(b"\x08\0", b"\x0c\0"), "damaged"),
    ],
    ids=[
        "absolute",
        "dots",
        "backslash",
        "drive",
        "link",
        "short",
        "bomb",
        "cut",
        "html",
        "file and folder",
        "file and folder below",
        "twice",
        "an unknown method",
        "garbage as LZMA",
        "garbage as BZIP2",
    ],
)
def test_bad_zips_are_refused(tmp_path, monkeypatch, content, word):
    free = namedtuple("usage", "total used free")(0, 0, 1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    inner = tmp_path / "in" / "side"
    inner.mkdir(parents=True)
    with pytest.raises(UsageError, match=word):
        transfer.unpack(write_zip(inner, content), inner / "pretrain_images")
    assert tree(tmp_path).keys() == {"in/side/pretrain_images.zip"}


@settings(max_examples=80, deadline=None, database=None)
@given(st.lists(st.text("./\\:ab~", min_size=1, max_size=7), min_size=1, max_size=3, unique=True))
def test_no_name_leads_out_of_the_folder(tmp_path_factory, names):
    outer = tmp_path_factory.mktemp("zip")
    inner = outer / "1" / "2"
    inner.mkdir(parents=True)
    try:
        transfer.unpack(write_zip(inner, make_zip(dict.fromkeys(names, b"x"))), inner / "pretrain_images")
    except (UsageError, OSError):
        assert not (inner / "pretrain_images").exists()
    allowed = ("1/2/pretrain_images/", "1/2/pretrain_images.zip")
    assert all(name.startswith(allowed) for name in tree(outer))


def test_an_answer_that_is_no_hubs(near_hub, tmp_path, monkeypatch):
    monkeypatch.setattr("hub_stand_in.describe", lambda *_: ["a login page"])
    with pytest.raises(UsageError, match="does not answer like a model hub"):
        download.main(["llm", "--dest", str(tmp_path)])


@pytest.fixture
def modelscope(online, monkeypatch):
    """ModelScope with everything on it, for the script's functions called here."""
    with ModelScopeStandIn({rename(repo): content for repo, content in repos().items()}) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        yield server


def from_modelscope(dest: Path, part: str, *words: str):
    """Tries to fetch a part; all words must be in the error's one line, and nothing on the disk."""
    with pytest.raises(UsageError) as error:
        download.main([part, "--source", "modelscope", "--dest", str(dest)])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value
    assert not any(dest.iterdir())


@pytest.mark.parametrize(
    "listing", [{"Data": {"Files": None}}, {"Data": {}}, ["a login page"], {"Data": {"Files": [{"Type": "blob"}]}}]
)
def test_an_answer_that_is_not_modelscopes(modelscope, tmp_path, monkeypatch, listing):
    answer = json.dumps(listing).encode()
    monkeypatch.setattr(ModelScopeStandIn, "serve", lambda _, request: send(request, 200, answer))
    from_modelscope(tmp_path, "llm", modelscope.endpoint, "does not answer like ModelScope", "MODELSCOPE_ENDPOINT")


def test_what_modelscope_lacks_is_named_with_the_cure(modelscope, tmp_path, monkeypatch):
    cure = "leave --source out"
    with monkeypatch.context() as patch:
        unhashed = {"Path": "new.pth", "Type": "blob", "Size": 1, "Sha256": ""}
        patch.setattr("modelscope_stand_in.describe", lambda name, content: unhashed)
        from_modelscope(tmp_path, "llm", "no checksum for new.pth", cure)
    modelscope.repos[rename(DATA)] |= {f"{number}.txt": b"." for number in range(200)}
    from_modelscope(tmp_path, "sft", "gongjy/minimind-v_dataset has 200 files or more", cure)
    modelscope.repos.clear()
    from_modelscope(tmp_path, "llm", "answers 404: not there, or private: leave --source out")


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://a:b", ["MODELSCOPE_ENDPOINT http://a:b is no address"]),
        ("http://127.0.0.1:9", ["connection to http://127.0.0.1:9 failed", "leave --source out"]),
    ],
)
def test_an_address_where_no_modelscope_is(online, tmp_path, monkeypatch, endpoint, words):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
    from_modelscope(tmp_path, "llm", *words)


def test_a_repository_that_needs_a_login(near_hub, tmp_path, monkeypatch):
    gated = {"X-Error-Code": "GatedRepo"}
    monkeypatch.setattr("hub_stand_in.answer", lambda _, request: send(request, 401, b"", gated))
    with pytest.raises(UsageError, match="MiniMind2-V answers 401: .*accept the terms"):
        download.main(["tokenizer", "--dest", str(tmp_path)])


def test_an_answer_that_ends_early_is_not_asked_for_ever(near_hub, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(transfer.time, "sleep", waits.append)
    near_hub.repos[LLM]["short"] = b"only this"
    (path, file), *_ = planned(tmp_path, "llm").items()
    file = replace(file, url=f"{near_hub.endpoint}/{LLM[7:]}/resolve/{COMMIT}/short")
    with pytest.raises(HTTPError, match="ends after 9 of 307,200 bytes"):
        transfer.fetch(file, path)
    assert waits == [1, 2, 4, 8]


def test_a_disk_that_fills_up_meanwhile(near_hub, tmp_path, monkeypatch):
    def fill_up(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "fetch", fill_up)
    with pytest.raises(UsageError, match="No space left on device. What has arrived is kept"):
        download.main(["llm", "--dest", str(tmp_path)])


def test_inside_the_project_the_next_command_can_be_typed_as_shown(capsys, monkeypatch):
    arguments = download.parse_args(["pretrain", "sft"])
    monkeypatch.chdir(ROOT / "scripts")
    download.report(arguments, {})
    lines = capsys.readouterr().out.splitlines()
    expected = [Path("../trainer/train_pretrain_vlm.py"), Path("../trainer/train_sft_vlm.py")]
    assert [line.split()[-1] for line in lines[-2:]] == [str(path) for path in expected]
