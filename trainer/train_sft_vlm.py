"""Stage 2, supervised fine-tuning: teach the whole model to answer questions about images.

    python trainer/train_sft_vlm.py
    torchrun --nproc_per_node 2 trainer/train_sft_vlm.py --batch_size 16 --learning_rate 2e-5

Starts from stage 1 (pretrain_vlm). The vision tower stays frozen; projection and language model learn from dialogues.
Writes out/sft_vlm_{hidden_size}.pth.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import run_script
from trainer.stage import Stage, answer_loss, pad_answers
from trainer.train_pretrain_vlm import main  # takes the same steps for every stage

STAGE = Stage(
    name="sft",
    title="Fine-tuning",
    story="stage 2, fine-tuning: dialogues teach projection and language model, the tower stays as it is",
    defaults={
        "from_weight": "pretrain_vlm",
        "save_weight": "sft_vlm",
        "freeze_llm": "none",
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 1e-6,
        "max_seq_len": 1536,
    },
    data="sft",
    following="eval_vlm.py",
    loss=answer_loss,
    pad=pad_answers,
)

if __name__ == "__main__":
    run_script(partial(main, STAGE, __doc__), outlives_output=True)
