"""The held-out scenes of the built-in set as tasks of lmms-eval; the yaml files beside this one name its functions.

    python scripts/export.py --weight sft_vlm
    python -m lmms_eval --model llava_hf --tasks scenes,scenes_image_first --include_path tests/checks/lmms_eval \\
        --model_args pretrained=out/sft_vlm_128-hf,device=cpu,device_map=cpu

`scenes` asks as eval_vlm.py does, the text and then the image; `scenes_image_first` as lmms-eval's own tasks do.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset, Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from dataset.prompts import with_images
from dataset.scenes.draw import draw_builtin_dataset, heldout_scenes
from dataset.scenes.grading import Grade, grade
from dataset.scenes.language import DESCRIBE, Facts, caption


def process_docs(_: Dataset) -> Dataset:
    """Returns the scenes (image, caption, and objects as dictionaries of `Facts`); draws them if need be."""
    paths = sorted((draw_builtin_dataset() / "heldout_images").iterdir())
    rows = [
        {"image": str(path), "caption": caption(scene.facts), "objects": [asdict(facts) for facts in scene.facts]}
        for path, scene in zip(paths, heldout_scenes(), strict=True)
    ]
    return Dataset.from_list(rows).cast_column("image", Image())


def doc_to_visual(doc: dict) -> list:
    """Returns the scene's image, as RGB."""
    return [doc["image"].convert("RGB")]


def doc_to_text(_: dict) -> str:
    """Returns the request with `<image>` where the image goes, for models of lmms-eval that take text."""
    return with_images(DESCRIBE, 1)


def doc_to_messages(doc: dict) -> list[dict]:
    """Returns the same request as a chat turn, for models that apply the chat template; it joins the parts."""
    [image] = doc_to_visual(doc)
    return [{"role": "user", "content": [{"type": "text", "text": DESCRIBE}, {"type": "image", "url": image}]}]


def process_results(doc: dict, results: Sequence[str]) -> dict:
    """Returns a scene's grade for `attributes`, and whether it was described without a mistake."""
    graded = grade(results[0], [Facts(**facts) for facts in doc["objects"]])
    return {"attributes": graded, "captions": float(graded.whole)}


def attributes(grades: Sequence[Grade]) -> float:
    """Returns the share of attributes that are right, over all scenes."""
    return sum(grade.right for grade in grades) / sum(grade.total for grade in grades)
