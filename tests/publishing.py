"""A trained run with its exports, and scripts/publish.py run against a stand-in of the hub.

PYTEST_DONT_REWRITE (the tests import this file before pytest takes its fixtures from it)
"""

import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hub_uploads import UploadHub
from huggingface_hub import close_session, constants
from tiny import SFT, Result

from common.errors import run_script
from common.paths import BUILTIN_TOKENIZER_DIR
from scripts import export
from scripts import publish as script

TOKEN, REPO, NAME = "hf_" + "sEcReT" * 5, "someone/shapes", "sft_vlm_32"
HF_FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "training.json"),
    *("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"),
}
GGUF_FILES = {f"{NAME}-f16.gguf", f"mmproj-{NAME}-f32.gguf", "Modelfile", "training.json"}
FILES = {"-hf": HF_FILES, "-gguf": GGUF_FILES, ".pth": {f"{NAME}.pth", f"{NAME}.json"}}
CARD_FILES = {"README.md", *(f"samples/{number}.jpg" for number in range(8))}


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory) -> Path:
    """A folder with a run's files, and its two exports."""
    out = world.copy_of_out(tmp_path_factory.mktemp("run") / "out")
    flags = ["--from_weight", "llm", "--epochs", 1, "--batch_size", 8, "--log_interval", 1, "--eval_interval", 2]
    flags += ["--eval_data", world.root / "pretrain.jsonl"]
    world.run(SFT, *world.files("sft", out), *flags, "--eval_images_path", world.images).passed()
    files = ["--save_dir", out, "--vision_model_path", world.tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    for kind in ("transformers", "gguf"):
        export.main([*map(str, files), "--to", kind])
    return out


@pytest.fixture
def out(trained, tmp_path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(trained, tmp_path / "out")


@pytest.fixture
def hub():
    with UploadHub({}, tokens={TOKEN: "write", "hf_reads": "read"}) as hub:
        yield hub


@pytest.fixture
def publish(hub, tmp_path, monkeypatch, capfd):
    """Runs the script with the stand-in as the hub, a token and a licence; it must leave no temporary file."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def run(source, *flags, repo=REPO, token=TOKEN, licence="apache-2.0", **changed) -> Result:
        settings = {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True} | changed
        for name, value in (settings | {"HF_TOKEN_PATH": str(tmp_path / "no_token")}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        close_session()
        license_flag = [] if licence is None else ["--license", licence]
        capfd.readouterr()
        try:
            run_script(lambda: script.main([*map(str, (source, repo, *flags)), *license_flag]))
            code = 0
        except SystemExit as ending:
            code = ending.code
        result = Result(code, *capfd.readouterr())
        assert not token or token not in result.text
        assert "--dry_run" in flags or not list((tmp_path / "temporary").iterdir())
        return result

    return run


def published(hub: UploadHub) -> dict[str, bytes]:
    return hub.repos.get(f"models/{REPO}", {})


def card_of(hub: UploadHub) -> tuple[dict, str]:
    """The metadata and the text of the card."""
    _, metadata, text = published(hub)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text
