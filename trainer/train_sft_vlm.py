"""Stage 2, supervised fine-tuning: teach the whole model to answer questions about pictures.

    python trainer/train_sft_vlm.py
    torchrun --nproc_per_node 2 trainer/train_sft_vlm.py --batch_size 16 --learning_rate 2e-5

Starts from stage 1 (pretrain_vlm). The vision tower stays as it is; projection and language model learn from dialogues.
Writes out/sft_vlm_{hidden_size}.pth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import run_script  # noqa: E402
from trainer.flags import Stage, parse_arguments  # noqa: E402
from trainer.loop import train  # noqa: E402
from trainer.setup import Run  # noqa: E402

STAGE = Stage(
    name="sft",
    story="stage 2, fine-tuning: dialogues teach projection and language model, the tower stays as it is",
    defaults={
        "from_weight": "pretrain_vlm",
        "save_weight": "sft_vlm",
        "freeze_llm": 0,
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-6,
        "max_seq_len": 1536,
    },
)


def main():
    args = parse_arguments(STAGE, __doc__)
    with Run(STAGE, args) as run:
        data = run.load_data()  # dialogues about pictures, as token ids
        heldout = run.load_heldout(data)  # rows that are measured on, not trained on
        model = run.load_model()  # tower + projection + decoder; freeze_llm 0 leaves all but the tower to learn
        train(run, model, data, heldout)


if __name__ == "__main__":
    run_script(main)
