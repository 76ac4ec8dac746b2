"""A trained run with its exports, and scripts/publish.py run against a stand-in of the hub.

PYTEST_DONT_REWRITE (the tests import this file before pytest takes its fixtures from it)
"""

import shutil
from pathlib import Path

import pytest
import yaml
from hub_uploads import UploadHub
from tiny import SFT

from common.paths import BUILTIN_TOKENIZER_DIR, ROOT

PUBLISH, EXPORT = ROOT / "scripts" / "publish.py", ROOT / "scripts" / "export.py"
TOKEN, REPO, NAME = "hf_" + "sEcReT" * 5, "someone/shapes", "sft_vlm_32"
HF_FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "training.json"),
    *("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"),
}
GGUF_FILES = {f"{NAME}-f16.gguf", f"mmproj-{NAME}-f32.gguf", "Modelfile", "training.json"}
FILES = {"-hf": HF_FILES, "-gguf": GGUF_FILES, ".pth": {f"{NAME}.pth", f"{NAME}.json"}}
CARD_FILES = {"README.md", "loss.png", *(f"samples/{number}.jpg" for number in range(8))}


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory) -> Path:
    """A folder with a run's files, and its two exports."""
    out = world.copy_of_out(tmp_path_factory.mktemp("run") / "out")
    flags = ["--from_weight", "llm", "--epochs", 1, "--batch_size", 8, "--log_interval", 1, "--eval_interval", 2]
    flags += ["--eval_data", world.root / "pretrain.jsonl"]
    world.run(SFT, *world.files("sft", out), *flags, "--eval_images_path", world.images).passed()
    files = ["--save_dir", out, "--vision_model_path", world.tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    for kind in ("transformers", "gguf"):
        world.run(EXPORT, *files, "--to", kind).passed()
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
def publish(world, hub, tmp_path):
    """Runs the script in a process that takes the stand-in for the hub, with a token and a licence."""

    def run(source, *flags, repo=REPO, token=TOKEN, endpoint=hub.endpoint, xet=False, licence="apache-2.0", hook=""):
        settings = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": not xet}
        settings["HF_TOKEN_PATH"] = str(tmp_path / "no_token")
        lines = [f"huggingface_hub.constants.{name} = {value!r}" for name, value in settings.items()]
        lines = ["import huggingface_hub, huggingface_hub.constants, tempfile", *lines]
        (tmp_path / "temporary").mkdir(exist_ok=True)
        lines += [f"tempfile.tempdir = {str(tmp_path / 'temporary')!r}", hook]
        environment = {"HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        license_flag = ["--license", licence] if licence is not None else []
        result = world.run(PUBLISH, source, repo, *license_flag, *flags, hook="\n".join(lines), env=environment)
        assert not token or token not in result.text
        return result

    return run


def published(hub: UploadHub) -> dict[str, bytes]:
    return hub.repos.get(f"models/{REPO}", {})


def card_of(hub: UploadHub) -> tuple[dict, str]:
    """The metadata and the text of the card."""
    _, metadata, text = published(hub)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def is_left_clean(tmp_path: Path) -> bool:
    return not list((tmp_path / "temporary").iterdir())
