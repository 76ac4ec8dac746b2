"""The notebook runs from its first cell to its last, with tiny settings and in a copy of the project."""

import json
import re
import shutil

import pytest

from common.paths import ROOT

nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install -r tests/requirements.txt")
nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install -r tests/requirements.txt")
NOTEBOOK = ROOT / "scripts" / "minimind_v.ipynb"
ROOMS = ("common", "model", "dataset", "trainer", "scripts")
ROWS = 2


def test_it_holds_no_outputs_and_says_a_sentence_before_each_cell():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for before, cell in zip([None, *cells], cells, strict=False):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert before["cell_type"] == "markdown" and len(cell["source"]) <= 40


def test_every_cell_runs(tmp_path):
    for room in ROOMS:
        unwanted = shutil.ignore_patterns("__pycache__", "*images", "*.jsonl.*", "complete.json", "clip-*")
        shutil.copytree(ROOT / room, tmp_path / room, ignore=unwanted)
    shutil.copy(ROOT / "eval_vlm.py", tmp_path)
    shutil.copytree(ROOT / "dataset" / "example", tmp_path / "dataset" / "example", dirs_exist_ok=True)
    # At its end a run describes its pictures, which takes longer than these few steps.
    watcher = tmp_path / "trainer" / "report" / "watcher.py"
    changed = re.sub("(?m)^LONGEST = .*", "LONGEST = 8", watcher.read_text(encoding="utf-8"))
    watcher.write_text(changed, encoding="utf-8")
    rows = (ROOT / "dataset" / "example" / "photos.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    for name, photos in (("dataset/example/photos.jsonl", "photos/"), ("tiny.jsonl", "dataset/example/photos/")):
        text = "".join(f"{row.replace('photos/', photos)}\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    more = ["--data_path", "tiny.jsonl", "--eval_data", "none", "--epochs", "1", "--batch_size", "1", "--device", "cpu"]
    for cell in notebook.cells:
        cell.source = cell.source.replace("MORE = []", f"MORE = {more}").replace("--epochs 60", "--epochs 1")
        cell.source = cell.source.replace("torch.cuda.is_available()", "False")
        cell.source = cell.source.replace('"--nproc_per_node", "2"', '"--nproc_per_node", "1"')
        if "install" in cell.metadata.get("tags", ()):
            cell.source = ""
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == 3  # the patches, their features, the scene that is asked about
    assert sum("iframe" in output.get("data", {}).get("text/html", "") for output in shown) == 2  # both stages' pages
    text = "".join(output.get("text", "") for output in shown)
    assert "196 of them" in text and "my_photos" in text
