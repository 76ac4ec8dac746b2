"""What the benchmark trains on: made-up rows and pictures in the published data's shape, and models of full size."""

import io
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from common.paths import BUILTIN_TOKENIZER_DIR
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.setup import load_tokenizer

PICTURES = 64
LAYERS = {512: 8, 768: 16}
CAPTION_TOKENS = (20, 80)
DIALOGUE_TOKENS = (200, 1500)


class World:
    """Files in a temporary folder, made once and used by every measurement.

    Attributes:
        folder: Of all of it; `data_path`, `images_path`, `tower_path` and `weights_path` lie inside.
    """

    def __init__(self, stage: str, hidden_size: int, rows: int):
        self.folder = Path(tempfile.gettempdir()) / "minimind-v-benchmark"
        self.images_path = self.folder / "images"
        self.tower_path = self.folder / "tower"
        self.weights_path = self.folder / f"weights_{hidden_size}.pth"
        self.data_path = self.folder / f"{stage}-{rows}.jsonl"
        self.tokenizer = load_tokenizer(BUILTIN_TOKENIZER_DIR)
        self.images_path.mkdir(parents=True, exist_ok=True)
        if not (self.images_path / f"{PICTURES - 1}.jpg").is_file():
            self._draw_pictures()
        if not self.data_path.is_file():
            self._write_rows(stage, rows)
        if not (self.tower_path / "model.safetensors").is_file():
            torch.manual_seed(0)
            CLIPVisionModel(CLIPVisionConfig(patch_size=16, image_size=224)).save_pretrained(self.tower_path)
        if not self.weights_path.is_file():
            torch.manual_seed(0)
            config = VLMConfig(hidden_size=hidden_size, num_hidden_layers=LAYERS[hidden_size])
            torch.save(
                {name: tensor.half() for name, tensor in MiniMindVLM(config).state_dict().items()}, self.weights_path
            )

    def _draw_pictures(self):
        rng = np.random.default_rng(0)
        for number in range(PICTURES):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            file = io.BytesIO()
            coarse.resize((128, 128), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            (self.images_path / f"{number}.jpg").write_bytes(file.getvalue())

    def _write_rows(self, stage: str, rows: int):
        rng = random.Random(0)
        words = [self.tokenizer.decode([index]) for index in range(300, 6400)]
        words = [word for word in words if word.isalpha() and "\u4e00" <= word[0]]

        def text(tokens: int) -> str:
            return "".join(rng.choice(words) for _ in range(tokens))

        lines = []
        for number in range(rows):
            if stage == "pretrain":
                turns = [("描述这张图片\n<image>", text(rng.randint(*CAPTION_TOKENS)))]
            else:
                count = rng.randint(1, 4)
                # A picture and the prompt's frame take about 220 of a dialogue's tokens.
                each = max(10, (rng.randint(*DIALOGUE_TOKENS) - 220) // (2 * count))
                turns = [(text(each), text(each)) for _ in range(count)]
                turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
            conversation = [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
            row = {"conversations": conversation, "image": f"{number % PICTURES}.jpg"}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        self.data_path.write_text("".join(lines), encoding="utf-8")
