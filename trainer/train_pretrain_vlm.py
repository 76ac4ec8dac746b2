"""Stage 1, pretraining: teach the projection to say what is in a picture in the language model's own terms.

    python trainer/train_pretrain_vlm.py
    torchrun --nproc_per_node 2 trainer/train_pretrain_vlm.py --batch_size 256

Starts from a language model (llm) that has never seen a picture. The vision tower and the language model stay as they
are; the one linear layer between them, vision_proj, learns from captions. Writes out/pretrain_vlm_{hidden_size}.pth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import run_script  # noqa: E402
from trainer.flags import Stage, parse_arguments  # noqa: E402
from trainer.loop import train  # noqa: E402
from trainer.setup import Run  # noqa: E402

STAGE = Stage(
    name="pretrain",
    story="stage 1, pretraining: captions teach the projection, the language model stays as it is",
    defaults={
        "from_weight": "llm",
        "save_weight": "pretrain_vlm",
        "freeze_llm": 1,
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 4e-4,
        "max_seq_len": 640,
    },
)


def main():
    args = parse_arguments(STAGE, __doc__)
    with Run(STAGE, args) as run:
        data = run.load_data()  # conversations about pictures, as token ids
        heldout = run.load_heldout(data)  # rows that are measured on, not trained on
        model = run.load_model()  # tower + projection + decoder; freeze_llm 1 leaves the projection to learn
        train(run, model, data, heldout)


if __name__ == "__main__":
    run_script(main)
