"""The scripts that made the built-in models run, and write what training loads."""

from common.paths import BUILTIN_MODEL_DIR
from dataset.scenes.draw import heldout_scenes
from model.model_vlm import load_vision_tower
from model.weights import read_weights
from scripts.builtin import build_llm, build_tower


def build(script, out_dir, monkeypatch) -> None:
    few = heldout_scenes()[:4]
    monkeypatch.setattr(script, "heldout_scenes", lambda: few)
    monkeypatch.setattr("sys.argv", ["build"])
    monkeypatch.setattr(build_tower, "BATCH_SIZE", 2)
    for name, value in {"STEPS": 2, "OUT": out_dir}.items():
        monkeypatch.setattr(script, name, value)
    script.main()


def test_build_tower(tmp_path, monkeypatch, capsys):
    build(build_tower, tmp_path, monkeypatch)
    assert "held-out scenes: {" in capsys.readouterr().out
    built, shipped = (load_vision_tower(path) for path in (tmp_path, BUILTIN_MODEL_DIR / "tower"))
    assert built.config.hidden_size == shipped.config.hidden_size


def test_build_llm(tmp_path, monkeypatch, capsys):
    build(build_llm, tmp_path, monkeypatch)
    assert "held-out scenes: {" in capsys.readouterr().out
    built, shipped = (read_weights(folder / "llm_128.pth") for folder in (tmp_path, BUILTIN_MODEL_DIR))
    assert built.tensors.keys() == shipped.tensors.keys()
    for weights in (built, shipped):
        assert weights.sidecar["assets"] == "built-in"
        assert weights.sidecar["tokenizer_sha256"] == shipped.sidecar["tokenizer_sha256"]


def test_the_built_in_weights_are_small():
    assert sum(path.stat().st_size for path in BUILTIN_MODEL_DIR.rglob("*") if path.is_file()) < 10_000_000
