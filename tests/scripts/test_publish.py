"""scripts/publish.py against a stand-in of the hub: what is uploaded, what never is, and what is refused."""

import hashlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import huggingface_hub._commit_api
import pytest
from publishing import CARD_FILES, FILES, GGUF_FILES, HF_FILES, NAME, REPO, TOKEN, card_of, published
from tiny import read_jsonl, write_jsonl

from common.errors import UsageError
from common.files import RECORD
from scripts.publish import read_model, without_folders

pytest_plugins = ["tiny", "publishing"]
KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n"


@pytest.mark.parametrize("ending", FILES)
def test_each_kind_is_published_whole_with_its_card(publish, hub, trained, ending):
    source = trained / f"{NAME}{ending}"
    done = publish(source).passed()
    files = published(hub)
    assert files.keys() == FILES[ending] | CARD_FILES
    folder = source if source.is_dir() else source.parent
    for name in FILES[ending] - {"training.json", f"{NAME}.json"}:
        assert files[name] == (folder / name).read_bytes()
    assert f"{hub.endpoint}/{REPO} (public)" in done.out and "8 images of the run's data" in done.out

    metadata, text = card_of(hub)
    library = {"-hf": {"library_name": "transformers"}, "-gguf": {"library_name": "gguf"}, ".pth": {}}[ending]
    fields = {"license": "apache-2.0", "language": ["zh"], "pipeline_tag": "image-text-to-text", **library}
    assert "minimind-v" in metadata.pop("tags") and metadata.pop("model-index")[0]["name"] == NAME
    assert metadata == fields  # no base_model: the tower is not the published one
    use = {"-hf": f'model="{REPO}"', "-gguf": f"llama-server -hf {REPO}", ".pth": f"--weight out/{NAME}.pth"}
    assert [kind for kind, words in use.items() if words in text] == [ending]
    assert "left out" not in done.out


def test_a_dry_run_contacts_nobody_and_writes_only_the_card(publish, hub, trained):
    before = {path: path.stat().st_mtime_ns for path in [trained, *trained.rglob("*")]}
    done = publish(trained / f"{NAME}-hf", "--dry_run", token="").passed()
    assert hub.requests == [] and "nothing was uploaded" in done.out
    assert {path: path.stat().st_mtime_ns for path in [trained, *trained.rglob("*")]} == before
    card = Path(re.search(r"the card is (.+)", done.out)[1])
    assert {path.relative_to(card.parent).as_posix() for path in card.parent.rglob("*.*")} == CARD_FILES
    listed = dict(re.findall(r"^  (\S+) +(\S+B)$", done.out, re.MULTILINE))
    assert listed.keys() == HF_FILES | CARD_FILES
    assert re.search(rf"^  {len(listed)} files +\S+[kM]B$", done.out, re.MULTILINE)


def test_sample_images_can_stay_here(publish, hub, trained):
    done = publish(trained / f"{NAME}-hf", "--no_samples").passed()
    assert published(hub).keys() == HF_FILES | {"README.md"}
    text = card_of(hub)[1]
    assert "samples/" not in text and "photo.jpg" in text and "images of the run's data" not in done.out


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", "there is no access token"),
        ("hf_unknown", "the access token may not write to someone/shapes"),
        ("hf_reads", "the access token may not write to someone/shapes"),
        ("hf_\x01with_control", "characters that no token has"),
        ("hf_\u00fcml\u00e4ut", "characters that no token has"),
    ],
    ids=["none", "unknown", "reads", "control", "umlaut"],
)
def test_a_token_that_does_not_do_is_refused_and_never_shown(publish, hub, trained, token, words):
    # `publish` checks that the token is in no output; the stand-in repeats it in its answer.
    publish(trained / f"{NAME}.pth", token=token).refused(words, "hf auth login")
    assert hub.repos == {}


def test_the_token_of_a_login_is_used(publish, hub, trained, tmp_path):
    (tmp_path / "no_token").write_text(TOKEN)
    assert TOKEN not in publish(trained / f"{NAME}.pth", token="").passed().text
    assert f"{NAME}.pth" in published(hub)


NOT_PUBLISHED = ("sft_vlm_32_resume.pth", "checkpoint-100.pt", "rows.jsonl", "rows.parquet", "0123.features")
NOT_PUBLISHED += ("pytorch_model.bin", "README.md", ".env", "secrets.json", "added.json", "other.gguf", "config/")


@pytest.mark.parametrize("ending", ["-hf", "-gguf"])
def test_what_is_no_part_of_the_export_stays_here_and_is_named(publish, hub, out, ending):
    folder = out / f"{NAME}{ending}"
    for name in NOT_PUBLISHED:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"private")
    (folder / "config" / "config.json").write_bytes(b"private")
    done = publish(folder).passed()
    assert published(hub).keys() == FILES[ending] | CARD_FILES
    assert b"private" not in published(hub).values()
    named = set(re.findall(r"^left out: (\S+)$", done.out, re.MULTILINE))
    assert named == {name.rstrip("/") for name in NOT_PUBLISHED}


@pytest.mark.parametrize("ending", ["-hf", "-gguf"])
@pytest.mark.parametrize("what", ["a link to the same", "a folder", "a key", "nothing"])
def test_a_file_that_is_not_what_the_export_wrote_is_refused_by_name(out, tmp_path, ending, what):
    replace = {
        "a link to the same": lambda file: file.symlink_to(tmp_path / "moved"),
        "a folder": lambda file: file.mkdir(),
        "a key": lambda file: file.write_text(KEY),
        "nothing": lambda file: None,
    }
    for name in FILES[ending]:
        file = out / f"{NAME}{ending}" / name
        shutil.move(file, tmp_path / "moved")
        replace[what](file)
        with pytest.raises(UsageError, match=re.escape(name)):
            read_model(file.parent)
        if what != "nothing":
            file.rmdir() if what == "a folder" else file.unlink()
        shutil.move(tmp_path / "moved", file)
    read_model(file.parent)


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


def test_of_a_sidecar_only_known_fields_are_published(publish, hub, out):
    path = out / f"{NAME}.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"api_key": "private", "notes": {"a": "private"}}))
    publish(path.with_suffix(".pth")).passed()
    sidecar = json.loads(published(hub)[f"{NAME}.json"])
    assert sidecar.keys() == content.keys() and sidecar["config"] == content["config"]
    assert not any(b"private" in file for file in published(hub).values())


def test_no_folder_of_this_machine_is_published(publish, hub, out, trained):
    for ending in (".pth", ".json"):
        (out / f"{NAME}{ending}").rename(out / f"renamed{ending}")
    for source in (*(trained / f"{NAME}{ending}" for ending in FILES), out / "renamed.pth"):
        hub.repos.clear()
        publish(source).passed()
        named = [name for name, content in published(hub).items() if str(trained.parent.parent).encode() in content]
        assert named == []
    sidecar = json.loads(published(hub)["renamed.json"])
    assert sidecar["arguments"]["data_path"] == "sft.jsonl" and sidecar["config"]["hidden_size"] == 32
    content = {"arguments": {"data_path": "dataset/sft_data.jsonl", "epochs": 2, "images_path": "C:\\me\\data"}}
    assert without_folders(content | {"step": 3}) == {
        "arguments": content["arguments"] | {"images_path": "data"},
        "step": 3,
    }


def sha256s(folder: Path, names) -> set[str]:
    return {hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_after_a_failure_the_same_command_sends_what_is_missing(publish, hub, trained):
    folder, weights = trained / f"{NAME}-gguf", [name for name in GGUF_FILES if name.endswith(".gguf")]
    [refused] = sha256s(folder, [f"{NAME}-f16.gguf"])
    hub.refused.add(refused)
    publish(folder).refused("The same command uploads what is missing")
    assert published(hub) == {}
    publish(folder).passed()
    assert published(hub).keys() == GGUF_FILES | CARD_FILES
    assert hub.puts.count(refused) == 2  # the others arrived the first time
    assert len(hub.puts) == len(set(hub.puts)) + 1 and sha256s(folder, weights) <= set(hub.puts)
    hub.puts.clear()
    publish(folder).passed()
    assert hub.puts == []


def test_after_ctrl_c_the_same_command_sends_what_is_missing(publish, hub, trained, monkeypatch):
    sent, lfs_upload = [], huggingface_hub._commit_api.lfs_upload

    def interrupted(*args, **more):
        sent.append(1)
        if len(sent) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        lfs_upload(*args, **more)

    monkeypatch.setattr(huggingface_hub._commit_api, "lfs_upload", interrupted)
    done = publish(trained / f"{NAME}-gguf")
    assert done.code == 130 and "interrupted" in done.err and "Traceback" not in done.text
    assert published(hub) == {} and len(hub.puts) > 0
    publish(trained / f"{NAME}-gguf").passed()
    assert published(hub).keys() == GGUF_FILES | CARD_FILES
    assert len(hub.puts) == len(set(hub.puts))  # none twice


def test_by_xet_too_what_has_arrived_is_not_sent_again(publish, hub, trained):
    pytest.importorskip("hf_xet")
    hub.commits_fail = True
    publish(trained / f"{NAME}-gguf", HF_HUB_DISABLE_XET=False).refused("not now")
    sent = sum(hub.xorbs)
    assert sent > 10_000 and published(hub) == {}
    hub.commits_fail = False
    publish(trained / f"{NAME}-gguf", HF_HUB_DISABLE_XET=False).passed()
    assert published(hub).keys() == GGUF_FILES | CARD_FILES
    assert sum(hub.xorbs) == sent


FLAGS = {
    "no owner": ({"repo": "shapes"}, ("use NAME/REPO",)),
    "two slashes": ({"repo": "a/b/c"}, ("a/b/c is not a repository's name",)),
    "characters": ({"repo": "some one/sh\x1bapes"}, ("is not a repository's name",)),
    "a git address": ({"repo": "someone/shapes.git"}, ("cannot end by '.git'",)),
    "nothing there": ({"source": "gone.pth"}, ("cannot be published",)),
    "a run's folder": ({"source": ""}, ("cannot be published",)),
    "a state": ({"source": f"{NAME}_resume.pth"}, ("is a training state, which is never published",)),
    "no network": ({"ENDPOINT": "http://127.0.0.1:9"}, ("the upload to http://127.0.0.1:9 failed",)),
    "offline": ({"HF_HUB_OFFLINE": True}, ("HF_HUB_OFFLINE",)),
}


@pytest.mark.parametrize("case", FLAGS)
def test_wrong_flags(publish, hub, trained, case):
    changed, words = FLAGS[case]
    source = trained / changed.pop("source", f"{NAME}.pth")
    assert "\x1b" not in publish(source, **changed).refused(*words) and hub.repos == {}


def test_a_licence_is_required(publish, trained):
    done = publish(trained / f"{NAME}.pth", licence=None)
    assert done.code == 2 and "--license" in done.err


def test_a_language_is_named_only_if_the_samples_tell(publish, hub, out):
    assert "the card's language: zh (--language names others)" in publish(out / f"{NAME}.pth").passed().out
    samples = out / f"{NAME}_samples" / "samples.jsonl"
    write_jsonl(samples, [row | {"reference": "A red circle. 日本の"} for row in read_jsonl(samples)])
    assert "the card's language: none (--language names others)" in publish(out / f"{NAME}.pth").passed().out
    assert "language" not in card_of(hub)[0]


def test_several_languages_and_a_licence_as_it_is_usually_written(publish, hub, trained):
    publish(trained / f"{NAME}.pth", "--language", "no,en", licence="CC-BY-NC-4.0").passed()
    metadata, _ = card_of(hub)
    assert (metadata["language"], metadata["license"]) == (["no", "en"], "cc-by-nc-4.0")


def test_what_the_hub_refuses_is_said_and_leaves_nothing(publish, hub, trained):
    publish(trained / f"{NAME}.pth", licence="no-such-licence").refused('"license', "must be one of")
    publish(trained / f"{NAME}.pth", repo="stranger/shapes").refused("may not write to stranger/shapes", "your name")
    assert hub.repos == {}
    hub.commits_fail = True
    publish(trained / f"{NAME}.pth").refused("not now")
    assert published(hub) == {}


def test_private(publish, hub, trained):
    source = trained / f"{NAME}.pth"
    done = publish(source, "--private").passed()
    assert f"{REPO} (private)" in done.out and hub.private == {REPO}
    assert "(private)" in publish(source).passed().out  # it stays so
    hub.private.clear()
    files, message = dict(published(hub)), publish(trained / f"{NAME}-hf", "--private").refused("exists and is public")
    assert "--private" in message and "/settings" in message and published(hub) == files


DAMAGED = {
    "a state under another name": (
        *(".pth", "no weight file"),
        lambda out: shutil.copy(out / f"{NAME}_resume.pth", out / f"{NAME}.pth"),
    ),
    "cut off": (
        *(".pth", "cannot be read"),
        lambda out: (out / f"{NAME}.pth").write_bytes((out / f"{NAME}.pth").read_bytes()[:-100]),
    ),
    "no record": ("-hf", "export an old one again", lambda out: (out / f"{NAME}-hf" / RECORD).unlink()),
    "a list of files": (
        *("-hf", "export an old one again"),
        lambda out: (out / f"{NAME}-hf" / RECORD).write_text('{"exported_by": "", "files": ["config.json"]}'),
    ),
}


def test_a_record_that_leads_out_of_the_folder_is_refused(publish, hub, out):
    folder = out / f"{NAME}-hf"
    (out / "id_rsa").write_text(KEY)
    record = json.loads((folder / RECORD).read_text())
    record["files"]["../id_rsa"] = hashlib.sha256(KEY.encode()).hexdigest()
    (folder / RECORD).write_text(json.dumps(record))
    publish(folder).refused("id_rsa is not what scripts/export.py wrote")
    assert hub.requests == []


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_model_is_refused(publish, hub, out, case):
    ending, words, damage = DAMAGED[case]
    damage(out)
    publish(out / f"{NAME}{ending}").refused(words)
    assert hub.requests == []
