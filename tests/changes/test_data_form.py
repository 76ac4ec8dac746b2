"""Another form of data, added from outside: {"photo": "a.jpg", "question": ..., "answer": ...}.

Without its test, this file is all it takes. Rows are then trained on, resumed and measured on like the others, and
tokenised again when this file changes:

    python trainer/train_sft_vlm.py --import my_form.py --data_path photos.jsonl --images_path photos
"""

import re
from pathlib import Path

from tiny import EVAL, SFT, read_jsonl, write_jsonl

from dataset.row_forms import register

pytest_plugins = ["tiny"]


@register(
    "a photo with question and answer",
    fits=lambda row: "photo" in row,
    example={"photo": "a.jpg", "question": "What is this?", "answer": "A cat."},
)
def read_photo(row: dict) -> tuple[list[dict], str]:
    asked, answer = f"<image>\n{row['question']}", row["answer"]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}], row["photo"]


def test_a_form_is_trained_on_resumed_measured_on_and_refused_without_its_import(world, tmp_path):
    out, own = world.copy_of_out(tmp_path / "out"), ["--import", __file__]
    rows = [{"photo": f"{n}.jpg", "question": "什么？", "answer": "蓝色的方形。" * (n + 1)} for n in range(9)]
    data = write_jsonl(tmp_path / "photos.jsonl", rows)
    flags = [*world.files("sft", out), "--data_path", data, "--from_weight", "llm", "--batch_size", 3]
    refused = world.run(SFT, *flags).refused("line 1: ", "no known form has these fields: photo, question, answer")
    assert 'A good line looks like this:\n  {"image": "a.jpg", "conversations": [{"role": "user", ' in refused

    started = world.run(SFT, *own, *flags, "--epochs", 1).passed()
    assert "a photo with question and answer: in 9 rows: read as conversations" in started.out
    assert "3 to go" in world.run(SFT, *own, *flags, "--epochs", 2, "--from_resume", 1).passed().out
    assert [row["step"] for row in read_jsonl(out / "sft_vlm_32.metrics.jsonl") if "step" in row][-1] == 6
    flags = [*world.eval_files(out), "--eval_data", data, "--images_path", world.images, "--weight", "sft_vlm"]
    tokens = learned_tokens(world.run(EVAL, *own, *flags))

    # Tokens are cached, but not those of a form that has changed since.
    changed = tmp_path / "test_data_form.py"
    changed.write_text(Path(__file__).read_text().replace('row["answer"]', 'row["answer"][:6]', 1))
    assert learned_tokens(world.run(EVAL, "--import", changed, *flags)) < tokens


def learned_tokens(done) -> int:
    return int(re.search(r"\b9 rows with (\d+) learned tokens", done.passed().out)[1])
