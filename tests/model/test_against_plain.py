"""Twenty training steps with every technique on give the losses of a naive training loop."""

import math
import shutil

import pytest
import torch
import transformers
from PIL import Image
from tiny import PRETRAIN, SFT, read_jsonl
from transformers import AutoTokenizer

from dataset.chat import ChatEncoder
from dataset.sampler import epoch_order
from model.model_vlm import MiniMindVLM, VLMConfig

pytest_plugins = ["tiny"]

BATCH, EPOCHS, RATE, SEED, MAX_LENGTH = 4, 3, 1e-3, 5, 512
FLAGS = ["--batch_size", BATCH, "--epochs", EPOCHS, "--learning_rate", RATE, "--seed", SEED, "--log_interval", 1]
FLAGS += ["--max_seq_len", MAX_LENGTH, "--from_weight", "llm"]


class PlainLoop:
    """Pads to max_seq_len, calls the tower per image after transformers' processor, computes all logits."""

    def __init__(self, world, stage: str):
        self.images = world.images
        self.rows = read_jsonl(world.root / f"{stage}.jsonl")
        encoder = ChatEncoder(AutoTokenizer.from_pretrained(world.tokenizer), 196)
        self.chats = encoder.encode([row["conversations"] for row in self.rows])
        name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
        self.processor = getattr(transformers, name)()
        torch.manual_seed(SEED)
        self.model = MiniMindVLM(VLMConfig(hidden_size=32, num_hidden_layers=2), vision_model_path=world.tower).train()
        weights = torch.load(world.out / "llm_32.pth", weights_only=True)
        self.model.load_state_dict(self.model.state_dict() | {name: weights[name].float() for name in weights})
        if stage == "pretrain":
            self.model.requires_grad_(False)
            self.model.vision_proj.requires_grad_(True)
        self.learned = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=RATE, foreach=False)

    def embedded(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a row's (max_seq_len, D) embeddings, images included, and its labels."""
        row, chat = self.rows[index], self.chats[index]
        assert len(chat.input_ids) <= MAX_LENGTH
        input_ids, labels = torch.zeros(MAX_LENGTH, dtype=torch.int64), torch.full((MAX_LENGTH,), -100)
        input_ids[: len(chat.input_ids)] = torch.tensor(chat.input_ids)
        for start, end in chat.learned:
            labels[start:end] = input_ids[start:end]
        embeds = self.model.get_input_embeddings()(input_ids)
        for name, start in zip(row.get("image", "").split(", "), chat.image_starts, strict=False):
            with Image.open(self.images / name) as image:
                pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
            features = self.model.vision_encoder(pixel_values=pixels).last_hidden_state[0, 1:]
            embeds = torch.cat((embeds[:start], self.model.vision_proj(features), embeds[start + 196 :]))
        return embeds, labels

    def losses(self) -> list[float]:
        losses, steps_an_epoch = [], math.ceil(len(self.rows) / BATCH)
        lengths = torch.tensor([len(chat.input_ids) for chat in self.chats]).numpy()
        for epoch in range(EPOCHS):
            order = epoch_order(lengths, SEED, epoch)
            for first in range(0, len(order), BATCH):
                rows = [self.embedded(int(index)) for index in order[first : first + BATCH]]
                embeds, labels = (torch.stack(column) for column in zip(*rows, strict=True))
                logits = self.model(inputs_embeds=embeds).logits
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
                losses.append(loss.item())
                # Zero, not None: a step without an image still applies moments and weight decay to the projection.
                self.optimizer.zero_grad(set_to_none=False)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
                last = (EPOCHS - 1) * len(order) + (steps_an_epoch - 1) * BATCH
                done = (epoch * len(order) + first) / last
                for group in self.optimizer.param_groups:
                    group["lr"] = RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
                self.optimizer.step()
        return losses


@pytest.mark.parametrize(("stage", "script"), [("pretrain", PRETRAIN), ("sft", SFT)])
def test_twenty_steps(world, tmp_path, stage, script):
    """Within 1e-4: features cached in float16 (2 ** -11) and another order of sums, over twenty steps."""
    out = world.copy_of_out(tmp_path / "out")
    techniques = ["--cache_vision", tmp_path / "features", "--num_workers", 1]
    techniques += ["--compile", int(stage == "sft" and shutil.which("g++") is not None)]
    world.run(script, *world.files(stage, out), *FLAGS, *techniques).passed()
    found = [row["loss"] for row in read_jsonl(out / f"{stage}_vlm_32.metrics.jsonl")]
    expected = PlainLoop(world, stage).losses()
    assert len(found) == len(expected) >= 20
    assert found == pytest.approx(expected, rel=1e-4)
    assert len({round(loss, 3) for loss in expected}) > 10  # the weights do move
