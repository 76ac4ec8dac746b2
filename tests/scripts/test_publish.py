"""scripts/publish.py against a stand-in of the hub: what is uploaded, what never is, and what is refused."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from publishing import (
    CARD_FILES,
    FILES,
    GGUF_FILES,
    HF_FILES,
    NAME,
    PUBLISH,
    REPO,
    TOKEN,
    card_of,
    is_left_clean,
    published,
)

from common.errors import UsageError
from scripts.publish import read_model

pytest_plugins = ["tiny", "publishing"]


@pytest.mark.parametrize("ending", FILES)
def test_each_kind_is_published_whole_with_its_card(publish, hub, trained, tmp_path, ending):
    source = trained / f"{NAME}{ending}"
    done = publish(source).passed()
    files = published(hub)
    assert files.keys() == FILES[ending] | CARD_FILES
    folder = source if source.is_dir() else source.parent
    for name in FILES[ending] - {"training.json", f"{NAME}.json"}:
        assert files[name] == (folder / name).read_bytes()
    assert f"{hub.endpoint}/{REPO} (public)" in done.out and is_left_clean(tmp_path)

    metadata, text = card_of(hub)
    library = {"-hf": {"library_name": "transformers"}, "-gguf": {"library_name": "gguf"}, ".pth": {}}[ending]
    fields = {"license": "apache-2.0", "language": ["zh"], "pipeline_tag": "image-text-to-text", **library}
    assert "minimind-v" in metadata.pop("tags")
    assert metadata == fields  # no base_model: the tower is not the published one
    use = {"-hf": f'model="{REPO}"', "-gguf": f"llama-server -hf {REPO}", ".pth": f"--weight out/{NAME}.pth"}
    assert [kind for kind, words in use.items() if words in text] == [ending]
    assert ("hf download" in text) and ("--load_from" in text) == (ending == "-hf")


def test_a_dry_run_contacts_nobody_and_writes_only_the_card(world, hub, trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in [trained, *trained.rglob("*")]}
    (tmp_path / "temporary").mkdir()
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "TMPDIR": str(tmp_path / "temporary")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
    command = [PUBLISH, trained / f"{NAME}-hf", REPO, "--license", "mit", "--dry_run"]
    done = world.start(*command, cwd=tmp_path, env=environment).passed()
    assert hub.requests == [] and {path.name for path in tmp_path.iterdir()} == {"temporary"}
    assert {path: path.stat().st_mtime_ns for path in [trained, *trained.rglob("*")]} == before
    [place] = (tmp_path / "temporary").iterdir()
    assert f"the card is {place / 'README.md'}" in done.out and "nothing was uploaded" in done.out
    listed = dict(re.findall(r"^  (\S+) +(\S+B)$", done.out, re.MULTILINE))
    assert listed.keys() == HF_FILES | CARD_FILES
    assert re.search(rf"^  {len(listed)} files +\S+[kM]B$", done.out, re.MULTILINE)
    assert "8 images of the run's data" in done.out
    # The folder that would go, big files as links.
    assert (place / "model.safetensors").is_symlink() and (place / "samples" / "7.jpg").is_file()


def test_sample_images_can_stay_here(publish, hub, trained):
    done = publish(trained / f"{NAME}-hf", "--no_samples").passed()
    _, text = card_of(hub)
    assert published(hub).keys() == HF_FILES | {"README.md", "loss.png"}
    assert "samples/" not in text and "photo.jpg" in text and "images of the run's data" not in done.out


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", "there is no access token"),
        ("hf_unknown", "the hub refuses the access token"),
        ("hf_reads", "the access token may not write to someone/shapes"),
        ("hf_\x01with_control", "characters that no token has"),
        ("hf_\u00fcml\u00e4ut", "characters that no token has"),
    ],
    ids=["none", "unknown", "reads", "control", "umlaut"],
)
def test_a_token_that_does_not_do_is_refused_and_never_shown(publish, hub, trained, token, words):
    # `publish` checks that the token is in no output; the stand-in repeats it in its answer.
    publish(trained / f"{NAME}.pth", token=token).refused(words, "hf auth login" if "may not" not in words else "")
    assert hub.repos == {}


def test_the_token_of_a_login_is_used(publish, hub, trained, tmp_path):
    (tmp_path / "no_token").write_text(TOKEN)
    assert TOKEN not in publish(trained / f"{NAME}.pth", token="").passed().text
    assert f"{NAME}.pth" in published(hub)


NOT_PUBLISHED = {
    "sft_vlm_32_resume.pth": "a training state",
    "checkpoint-100.pt": "a training state",
    "rows.jsonl": "data",
    "rows.parquet": "data",
    "0123.features": "cached features",
    "tokens.cache": "a cache",
    "train.log": "a log",
    "pytorch_model.bin": "pickled",
    "README.md": "written anew",
    ".env": "not a file of the model",
    "checkpoints/": "a training state",
    "config/": "not a file of the model",
}


@pytest.mark.parametrize("ending", ["-hf", "-gguf"])
def test_what_is_no_part_of_the_model_stays_here_and_is_named(publish, hub, out, ending):
    folder = out / f"{NAME}{ending}"
    for name in NOT_PUBLISHED:
        (folder / name.rstrip("/")).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"private")
    (folder / "config" / "config.json").write_bytes(b"private")
    done = publish(folder).passed()
    assert published(hub).keys() == FILES[ending] | CARD_FILES
    assert not any(b"private" == content for content in published(hub).values())
    said = dict(re.findall(r"^left out: (\S+) \((.+)\)$", done.out, re.MULTILINE))
    assert said.keys() == NOT_PUBLISHED.keys()
    assert all(why in said[name] for name, why in NOT_PUBLISHED.items())


def test_of_a_runs_files_only_the_weights_go(publish, hub, trained):
    done = publish(trained / f"{NAME}.pth").passed()
    assert f"left out: {NAME}_resume.pth (a training state, to resume from)" in done.out
    assert f"left out: {NAME}.metrics.jsonl" in done.out and "llm_32" not in done.out
    assert not any("resume" in name or "metrics" in name for name in published(hub))


KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n"


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.parametrize("what", ["a link", "a link to the same", "a folder", "a key"])
def test_a_file_that_is_not_what_an_export_writes_is_refused_by_name(out, tmp_path, ending, what):
    source = out / f"{NAME}{ending}"
    for name in FILES[ending] - {f"{NAME}.pth"}:
        file = (source if source.is_dir() else out) / name
        shutil.move(file, tmp_path / "moved")
        (tmp_path / "id_rsa").write_text(KEY)
        {
            "a link": lambda file: file.symlink_to(tmp_path / "id_rsa"),
            "a link to the same": lambda file: file.symlink_to(tmp_path / "moved"),
            "a folder": lambda file: file.mkdir(),
            "a key": lambda file: file.write_text(KEY),
        }[what](file)
        if what == "a folder" and ending == ".pth":
            assert file not in read_model(source)[0].files.values()
        else:
            with pytest.raises(UsageError, match=re.escape(name) if "link" in what else None):
                read_model(source)
        file.rmdir() if what == "a folder" else file.unlink()
        shutil.move(tmp_path / "moved", file)
    read_model(source)


def test_sample_images_that_are_links_or_no_pictures_stay_here(publish, hub, out, tmp_path):
    samples = out / f"{NAME}_samples"
    (tmp_path / "id_rsa").write_text(KEY)
    shutil.copy(samples / "1.jpg", tmp_path / "private.jpg")
    for number, target in ((0, "id_rsa"), (1, "private.jpg")):
        (samples / f"{number}.jpg").unlink()
        (samples / f"{number}.jpg").symlink_to(tmp_path / target)
    (samples / "2.jpg").write_text(KEY)
    publish(out / f"{NAME}-gguf").passed()
    assert published(hub).keys() == GGUF_FILES | CARD_FILES - {f"samples/{number}.jpg" for number in range(3)}
    samples.rename(tmp_path / "elsewhere")
    samples.symlink_to(tmp_path / "elsewhere")
    hub.repos.clear()
    publish(out / f"{NAME}-gguf").passed()
    assert not any(name.startswith("samples/") for name in published(hub))


@pytest.mark.parametrize(("ending", "sidecar"), [("-hf", "-hf/training.json"), (".pth", ".json")])
def test_of_a_sidecar_only_known_fields_are_published(publish, hub, out, ending, sidecar):
    path = out / f"{NAME}{sidecar}"
    content = json.loads(path.read_text())
    content |= {"api_key": "private", "notes": {"a": "private"}}
    content["arguments"] |= {"wandb_key": "private", "data_path": "/home/private/rows.jsonl"}
    content["versions"] |= {"private": "1"}
    path.write_text(json.dumps(content))
    publish(out / f"{NAME}{ending}").passed()
    texts = {name: file for name, file in published(hub).items() if not name.endswith((".jpg", ".png"))}
    assert [name for name, file in texts.items() if b"private" in file] == []
    assert json.loads(texts[Path(sidecar).name if "/" in sidecar else f"{NAME}.json"])["config"] == content["config"]


def sha256s(folder: Path, names) -> set[str]:
    return {hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_after_a_failure_the_same_command_sends_what_is_missing(publish, hub, trained):
    folder, texts = trained / f"{NAME}-gguf", [name for name in GGUF_FILES if name.endswith(".gguf")]
    [refused] = sha256s(folder, [f"{NAME}-f16.gguf"])
    hub.refused.add(refused)
    publish(folder).refused("The same command uploads what is missing")
    assert published(hub) == {}
    publish(folder).passed()
    assert published(hub).keys() == GGUF_FILES | CARD_FILES
    assert hub.puts.count(refused) == 2  # the others arrived the first time
    assert len(hub.puts) == len(set(hub.puts)) + 1 and sha256s(folder, texts) <= set(hub.puts)
    hub.puts.clear()
    publish(folder).passed()
    assert hub.puts == []


INTERRUPT = """
import os, signal, huggingface_hub._commit_api as api
sent, upload = [], api.lfs_upload
def interrupted(*args, **more):
    sent.append(1)
    if len(sent) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    upload(*args, **more)
api.lfs_upload = interrupted
"""


def test_after_ctrl_c_the_same_command_sends_what_is_missing(publish, hub, trained, tmp_path):
    done = publish(trained / f"{NAME}-gguf", hook=INTERRUPT)
    assert done.code == 130 and "The same command uploads what is missing" in done.err
    assert "Traceback" not in done.text and is_left_clean(tmp_path)
    assert published(hub) == {} and len(hub.puts) > 0
    publish(trained / f"{NAME}-gguf").passed()
    assert published(hub).keys() == GGUF_FILES | CARD_FILES
    assert len(hub.puts) == len(set(hub.puts))  # none twice


def test_by_xet_too_what_has_arrived_is_not_sent_again(publish, hub, trained):
    pytest.importorskip("hf_xet")
    hub.commits_fail = True
    publish(trained / f"{NAME}-gguf", xet=True).refused("not now")
    sent = sum(hub.xorbs)
    assert sent > 10_000 and published(hub) == {}
    hub.commits_fail = False
    publish(trained / f"{NAME}-gguf", xet=True).passed()
    assert published(hub).keys() == GGUF_FILES | CARD_FILES
    assert sum(hub.xorbs) == sent


FLAGS = {
    "no licence": ({"licence": None}, (), ("--license is missing", "apache-2.0")),
    "a licence with a space": ({"licence": "Apache 2"}, (), ("no id of a licence",)),
    "a language": ({}, ("--language", "chinese"), ("--language chinese", "zh or en")),
    "no owner": ({"repo": "shapes"}, (), ("has no owner", "NAME/REPO")),
    "two slashes": ({"repo": "a/b/c"}, (), ("a/b/c is no name",)),
    "characters": ({"repo": "some one/sh\x1bapes"}, (), ("is no name of a repository",)),
    "a git address": ({"repo": "someone/shapes.git"}, (), ("is no name of a repository",)),
}


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flags(publish, hub, trained, case):
    changed, flags, words = FLAGS[case]
    message = publish(trained / f"{NAME}-hf", *flags, **changed).refused(*words)
    assert hub.requests == [] and "\x1b" not in message


def test_no_source(world):
    world.run(PUBLISH).refused("say what to publish and where", "SOURCE NAME/REPO")
    world.run(PUBLISH, "out/sft_vlm_512-hf", "--license", "mit").refused("SOURCE NAME/REPO")


def test_several_languages_and_a_licence_as_it_is_usually_written(publish, hub, trained):
    publish(trained / f"{NAME}.pth", "--language", "no,en", licence="CC-BY-NC-4.0").passed()
    metadata, _ = card_of(hub)
    assert (metadata["language"], metadata["license"]) == (["no", "en"], "cc-by-nc-4.0")


def test_what_the_hub_refuses_is_said_and_leaves_nothing(publish, hub, trained, tmp_path):
    publish(trained / f"{NAME}.pth", licence="no-such-licence").refused(
        "the hub refuses the card", "must be one of", "--license no"
    )
    publish(trained / f"{NAME}.pth", repo="stranger/shapes").refused("may not write to stranger/shapes", "your name")
    assert hub.repos == {}
    hub.commits_fail = True
    publish(trained / f"{NAME}.pth").refused("not now")
    assert published(hub) == {} and is_left_clean(tmp_path)


def test_no_network(publish, trained):
    publish(trained / f"{NAME}.pth", endpoint="http://127.0.0.1:9").refused("the connection to http://127.0.0.1:9")
    offline = "huggingface_hub.constants.HF_HUB_OFFLINE = True"
    publish(trained / f"{NAME}.pth", hook=offline).refused("HF_HUB_OFFLINE")


def test_private(publish, hub, trained):
    source = trained / f"{NAME}.pth"
    done = publish(source, "--private").passed()
    assert f"{REPO} (private)" in done.out and hub.private == {REPO}
    assert "(private)" in publish(source).passed().out  # it stays so
    hub.private.clear()
    files, message = dict(published(hub)), publish(trained / f"{NAME}-hf", "--private").refused("is there already")
    assert "public" in message and "/settings" in message and published(hub) == files


def test_no_room_for_the_card(publish, hub, trained, tmp_path):
    hook = f"tempfile.tempdir = {str(tmp_path / 'gone')!r}"
    publish(trained / f"{NAME}.pth", hook=hook).refused("cannot be put together", "No such file")
    assert hub.requests == []


def damaged(out: Path, kind: str) -> Path:
    if kind == "a state under another name":
        return Path(shutil.copy(out / f"{NAME}_resume.pth", out / "other.pth"))
    if kind == "a weight file that is cut off":
        (out / f"{NAME}.pth").write_bytes((out / f"{NAME}.pth").read_bytes()[:-100])
        return out / f"{NAME}.pth"
    if kind == "a GGUF that is none":
        (out / f"{NAME}-gguf" / f"{NAME}-f16.gguf").write_bytes(b"<html>")
        return out / f"{NAME}-gguf"
    if kind == "an mmproj alone":
        (out / f"{NAME}-gguf" / f"{NAME}-f16.gguf").unlink()
        return out / f"{NAME}-gguf"
    if kind == "pickled weights alone":
        (out / f"{NAME}-hf" / "model.safetensors").rename(out / f"{NAME}-hf" / "pytorch_model.bin")
        return out / f"{NAME}-hf"
    return out / {"a state": f"{NAME}_resume.pth", "a run's folder": "", "nothing": "gone.pth"}[kind]


SOURCES = {
    "a state": ("a training state, which is never published", f"{NAME}.pth"),
    "a state under another name": ("no weight file",),
    "a weight file that is cut off": ("cannot be read",),
    "a GGUF that is none": ("is not what scripts/export.py writes",),
    "an mmproj alone": ("no text model",),
    "pickled weights alone": ("has no model.safetensors",),
    "a run's folder": ("is nothing to publish",),
    "nothing": ("is nothing to publish",),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_no_model_is_refused(publish, hub, out, kind):
    publish(damaged(out, kind)).refused(*SOURCES[kind])
    assert hub.requests == []
