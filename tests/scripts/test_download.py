"""scripts/download.py against stand-ins of both sites: what lands where, and what goes wrong well."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import replace

import pytest
from downloads import LLM, TOKENIZER, TOWER, TOWER_FOLDER, WEIGHTS, command, repos, tree
from hub_stand_in import COMMIT, HubStandIn, send
from modelscope_stand_in import ModelScopeStandIn, describe

from common.errors import UsageError
from common.paths import ROOT
from scripts import download


@pytest.fixture
def hub():
    """The hub with everything on it."""
    with HubStandIn(repos()) as server:
        yield server


@pytest.fixture
def modelscope():
    """ModelScope with everything on it."""
    with ModelScopeStandIn({rename(repo): content for repo, content in repos().items()}) as server:
        yield server


@pytest.fixture(params=["hub", "modelscope"])
def source(request):
    """Both sources in turn, and the flags that choose them."""
    return request.getfixturevalue(request.param), ("--source", request.param)


def rename(repo: str) -> str:
    """What a repository of the hub is called on ModelScope."""
    return repo.replace("/openai/", "/openai-mirror/").replace("/jingyaogong/", "/gongjy/")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns a function that downloads from an address to tmp_path/d; returns the output, and the error or ""."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)

    def run(endpoint: str, *arguments: str) -> tuple[str, str]:
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
        try:
            download.main(["--dest", str(tmp_path / "d"), *arguments])
        except UsageError as error:
            assert "\n" not in str(error)
            return capsys.readouterr().out, str(error)
        return capsys.readouterr().out, ""

    return run


def test_everything_lands_in_its_place_and_a_second_run_fetches_nothing(source, run, tmp_path):
    server, flags = source
    printed, error = run(server.endpoint, *flags)
    assert error == ""
    assert tree(tmp_path / "d") == {
        f"{TOWER_FOLDER}/config.json": b"{}",
        f"{TOWER_FOLDER}/preprocessor_config.json": b'{"size": 224}',
        f"{TOWER_FOLDER}/model.safetensors": WEIGHTS,
        "out/llm_512.pth": WEIGHTS[::-1],
        "model/tokenizer_minimind2/tokenizer.json": b'{"v": 6400}',
        "model/tokenizer_minimind2/tokenizer_config.json": b"{ }",
        "dataset/pretrain_data.parquet": b"PAR1" + WEIGHTS,
        "dataset/sft_data.parquet": b"PAR1",
    }
    assert f"{tmp_path / 'd/dataset/pretrain_data.parquet'} (307kB to fetch)" in printed
    assert printed.endswith("\nTrain:  python trainer/train_sft_vlm.py\n")

    server.gets.clear()
    printed, error = run(server.endpoint, *flags)
    assert (error, server.gets, printed.count("already here")) == ("", [], 5)


def test_parts_can_be_chosen_and_other_forms_are_understood(hub, run, tmp_path):
    del hub.repos[TOWER]["model.safetensors"]
    printed, error = run(hub.endpoint, "tower", "llm", "sft", "--hidden_size", "768")
    assert error == ""
    assert tree(tmp_path / "d") == {
        f"{TOWER_FOLDER}/config.json": b"{}",
        f"{TOWER_FOLDER}/preprocessor_config.json": b'{"size": 224}',
        f"{TOWER_FOLDER}/pytorch_model.bin": b"bin",
        "model/tokenizer_minimind2/tokenizer.json": b'{"v": 6400}',
        "model/tokenizer_minimind2/tokenizer_config.json": b"{ }",
        "out/llm_768.pth": b"768",
        "dataset/sft_data.parquet": b"PAR1",
    }
    assert "python trainer/train_sft_vlm.py --hidden_size 768" in printed


@pytest.mark.parametrize("ranges", [True, False])
def test_a_lost_connection_is_resumed_where_it_broke(source, run, tmp_path, ranges):
    server, flags = source
    server.cut["llm_512.pth"], server.ranges = 150_000, ranges
    assert run(server.endpoint, "llm", *flags)[1] == ""
    assert tree(tmp_path / "d")["out/llm_512.pth"] == WEIGHTS[::-1]
    assert server.gets[-2:] == [("llm_512.pth", None), ("llm_512.pth", "bytes=150000-")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_is_continued_by_the_next(hub, run, tmp_path, how):
    hub.hold["llm_512.pth"] = 150_000
    first = subprocess.Popen(**command(hub.endpoint, tmp_path / "d", "llm"))
    try:
        assert hub.holding.wait(60)
        out = tmp_path / "d" / "out"
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in out.glob("*.part")) < 100_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(how)
        _, errors = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL) and "Traceback" not in errors
    assert not (out / "llm_512.pth").exists()
    kept = sum(path.stat().st_size for path in out.glob("*.part"))

    assert run(hub.endpoint, "llm")[1] == ""
    assert hub.gets[-1] == ("llm_512.pth", f"bytes={kept}-") and kept >= 100_000
    assert tree(tmp_path / "d")["out/llm_512.pth"] == WEIGHTS[::-1]


@pytest.mark.parametrize("name", ["tokenizer.json", "llm_512.pth"])
def test_damage_on_the_way_is_noticed(hub, run, tmp_path, name):
    hub.damage.add(name)
    part = "llm" if name == "llm_512.pth" else "tokenizer"
    assert f"{name} arrived damaged" in run(hub.endpoint, part)[1]
    assert name not in str(tree(tmp_path / "d").keys())
    assert run(hub.endpoint, part)[1] == ""


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
def test_of_the_newest_generation_comes_what_is_needed_and_its_commands(
    hub, run, tmp_path, parts, weights, train, talk
):
    """Its repository has no more than that."""
    hub.repos |= {
        "models/jingyaogong/minimind-3v-pytorch": {f"{name}.pth": WEIGHTS for name in weights},
        "models/jingyaogong/siglip2-base-p32-256-ve": repos()[TOWER],
        "models/jingyaogong/minimind-3v": repos()[TOKENIZER],
    }
    printed, error = run(hub.endpoint, *parts.split())
    assert error == ""
    assert {path.stem for path in (tmp_path / "d" / "out" / "minimind-3v").iterdir()} == set(weights)
    commands = [line.split(":  ") for line in printed.splitlines() if ":  " in line]
    assert [command for what, command in commands if what == "Train"] == [f"python {line}" for line in train]
    talks = [re.search(r"--weight \S+/(\w+)\.pth", command)[1] for what, command in commands if what == "Talk to it"]
    assert talks == talk


def test_the_newest_generation_is_trained_as_the_readme_says():
    lines = [line.split("  #")[0].strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    assert all(f"python {line}" in lines for line in ("scripts/download.py llm_3v pretrain sft", *TRAIN_3V))


def test_an_unreachable_hub_is_one_line_and_status_1(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = subprocess.run(**command(endpoint, tmp_path / "d"), timeout=60, check=False)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: the connection to {endpoint} failed")
    assert "HF_ENDPOINT" in line


@pytest.mark.parametrize(
    ("flags", "endpoint", "words"),
    [
        ([], "mirror.example", "missing an 'http://' or 'https://' protocol"),
        ([], "http://a:b", "http://a:b does not answer like a model hub: set HF_ENDPOINT"),
        (
            ["--source", "modelscope"],
            "http://a:b",
            "http://a:b does not answer like a model hub: check MODELSCOPE_ENDPOINT",
        ),
        (
            ["--source", "modelscope"],
            "http://127.0.0.1:9",
            "connection to http://127.0.0.1:9 failed.*leave --source out",
        ),
    ],
)
def test_an_address_where_nothing_is(run, tmp_path, flags, endpoint, words):
    assert re.search(words, run(endpoint, "llm", *flags)[1])
    assert not (tmp_path / "d").exists()


def test_what_the_hub_lacks_is_named(hub, run, tmp_path):
    del hub.repos[LLM]["llm_768.pth"]
    assert re.search(
        r"has no llm_768.pth\. It has: .*sft_vlm_512.pth", run(hub.endpoint, "llm", "--hidden_size", "768")[1]
    )
    del hub.repos[TOKENIZER]
    assert "MiniMind2-V answers 404: not there, or private" in run(hub.endpoint)[1]
    assert hub.gets == [] and not (tmp_path / "d").exists()


def test_a_file_of_the_users_own_is_not_overwritten(hub, run, tmp_path):
    rows, weights = tmp_path / "d/dataset/pretrain_data.parquet", tmp_path / "d/out/llm_512.pth"
    for path, content in ((rows, b"my own rows"), (weights, bytes(len(WEIGHTS)))):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        error = run(hub.endpoint)[1]
        assert f"{path} is your own, or another version" in error and "move or delete" in error
        assert hub.gets == [] and path.read_bytes() == content
        path.unlink()
    weights.with_suffix(".json").write_text("{}")  # of a training whose weights were deleted
    assert f"{weights} is your own" in run(hub.endpoint)[1]


def test_an_answer_that_is_no_hubs(hub, run, monkeypatch):
    monkeypatch.setattr("hub_stand_in.describe", lambda *_: ["a login page"])
    assert f"{hub.endpoint} does not answer like a model hub: set HF_ENDPOINT" in run(hub.endpoint, "llm")[1]


@pytest.mark.parametrize(
    "listing", [{"Data": {"Files": None}}, {"Data": {}}, ["a login page"], {"Data": {"Files": [{"Type": "blob"}]}}]
)
def test_an_answer_that_is_not_modelscopes(modelscope, run, tmp_path, monkeypatch, listing):
    answer = json.dumps(listing).encode()
    monkeypatch.setattr(ModelScopeStandIn, "serve", lambda _, request: send(request, 200, answer))
    error = run(modelscope.endpoint, "llm", "--source", "modelscope")[1]
    assert f"{modelscope.endpoint} does not answer like a model hub: check MODELSCOPE_ENDPOINT" in error
    assert not (tmp_path / "d").exists()


def test_what_modelscope_lacks_is_named_with_the_cure(modelscope, run, tmp_path, monkeypatch):
    cure, flags = "check MODELSCOPE_ENDPOINT, or leave --source out", ("llm", "--source", "modelscope")
    with monkeypatch.context() as patch:
        patch.setattr(
            "modelscope_stand_in.describe",
            lambda name, content: describe(name, content) | ({"Sha256": ""} if name == "llm_512.pth" else {}),
        )
        assert f"no size or checksum for llm_512.pth: {cure}" in run(modelscope.endpoint, *flags)[1]
    modelscope.repos.clear()
    assert re.search(f"answers 404: not there, or private, or {cure}", run(modelscope.endpoint, *flags)[1])
    assert not (tmp_path / "d").exists()


def test_an_answer_that_ends_early_is_not_asked_for_ever(hub, run, tmp_path, monkeypatch):
    waits, fetch = [], download.fetch
    monkeypatch.setattr(download.time, "sleep", waits.append)
    hub.repos[LLM]["short"] = b"only this"
    url = f"{hub.endpoint}/{LLM[7:]}/resolve/{COMMIT}/short"
    monkeypatch.setattr(
        download, "fetch", lambda file, path: fetch(replace(file, url=url) if path.suffix == ".pth" else file, path)
    )
    assert re.search("short ends after 9 of .* bytes.*the same command resumes", run(hub.endpoint, "llm")[1])
    assert waits == [1, 2, 4, 8]


def test_a_disk_that_fills_up_meanwhile(hub, run, monkeypatch):
    def fill_up(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "fetch", fill_up)
    assert "No space left on device. Partial files stay" in run(hub.endpoint, "llm")[1]
