"""Stage 2, supervised fine-tuning: teach the whole model to answer questions about images.

    python trainer/train_sft_vlm.py
    torchrun --nproc_per_node 2 trainer/train_sft_vlm.py --batch_size 16 --learning_rate 2e-5

Starts from stage 1 (pretrain_vlm). The vision tower stays frozen; projection and language model learn from dialogues.
Writes out/sft_vlm_{hidden_size}.pth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.errors import run_script
from trainer.flags import parse_arguments
from trainer.loop import train
from trainer.setup import Run, freeze, load_data, load_model
from trainer.stage import Stage, answer_loss, pad_answers
from trainer.support.processes import Processes

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


def main(stage: Stage = STAGE, description: str = __doc__):
    args = parse_arguments(stage, description)
    with Processes.start(args.device, args.timeout_minutes) as processes:
        run = Run(stage, args, processes)  # tokenizer, starting weights, the files that will be written
        data, heldout = load_data(run)  # dialogues as token ids: training rows, evaluation rows
        model = load_model(run)  # tower + projection + decoder
        freeze(model, args.freeze_llm, args.lora)  # none: all but the tower learns
        train(run, model, data, heldout)  # minimises the stage's loss


if __name__ == "__main__":
    run_script(main, outlives_output=True)
