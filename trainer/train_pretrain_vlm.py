"""Stage 1, pretraining: teach the projection to turn image patches into what the language model understands.

    python trainer/train_pretrain_vlm.py
    torchrun --nproc_per_node 2 trainer/train_pretrain_vlm.py --batch_size 256

Starts from a language model (llm) that has never seen an image. The vision tower and the language model stay frozen;
the projection between them, vision_proj, learns from captions. Writes out/pretrain_vlm_{hidden_size}.pth.
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
    name="pretrain",
    title="Pretraining",
    story="stage 1, pretraining: captions teach the projection, the language model stays as it is",
    defaults={
        "from_weight": "llm",
        "save_weight": "pretrain_vlm",
        "freeze_llm": "all",
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 4e-4,
        "max_seq_len": 640,
    },
    data="pretrain",
    following="trainer/train_sft_vlm.py",
    loss=answer_loss,
    pad=pad_answers,
)


def main(stage: Stage = STAGE, description: str = __doc__):
    args = parse_arguments(stage, description)
    with Processes.start(args.device, args.timeout_minutes) as processes:
        run = Run(stage, args, processes)  # tokenizer, starting weights, the files that will be written
        data, heldout = load_data(run)  # captions as token ids: training rows, evaluation rows
        model = load_model(run)  # tower + projection + decoder
        freeze(model, args.freeze_llm, args.lora)  # all: only the projection learns
        train(run, model, data, heldout)  # minimises the stage's loss


if __name__ == "__main__":
    run_script(main, outlives_output=True)
