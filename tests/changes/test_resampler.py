"""Another projection, added from outside: a resampler, whose 64 learned queries attend to the patches.

Without its test, this file is all it takes. It is trained, resumed and talked to like the others, but not exported:

    python trainer/train_pretrain_vlm.py --import my_resampler.py --projector resampler
    python trainer/train_sft_vlm.py --import my_resampler.py
    python eval_vlm.py --import my_resampler.py
"""

import torch
from tiny import EVAL, PRETRAIN, ROOT, SFT
from torch import nn

from model.projectors import Projector, register

pytest_plugins = ["tiny"]
QUERIES = 64


@register("resampler")
class Resampler(Projector):
    is_grid = False  # queries have no position in the image, so there are no word maps
    identified_by = ("vision_proj.features.weight", "vision_proj.queries")

    def __init__(self, width: int, hidden_size: int, pixel_shuffle: int = 1):
        super().__init__(width, hidden_size, pixel_shuffle)
        self.queries = nn.Parameter(torch.randn(QUERIES, hidden_size) * 0.02)
        self.features = nn.Linear(width, hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, 4, batch_first=True)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        keys = self.features(image_features)
        return self.attention(self.queries.expand(len(keys), -1, -1), keys, keys, need_weights=False)[0]

    @classmethod
    def tokens(cls, patches: int, pixel_shuffle: int) -> int:
        super().tokens(patches, pixel_shuffle)  # raises for a pixel shuffle
        return QUERIES


def test_a_resampler_is_trained_resumed_evaluated_and_refused_by_the_export(world, tmp_path):
    out = world.copy_of_out(tmp_path / "out")
    own = ["--import", __file__]
    flags = ["--batch_size", 9, "--save_interval", 1, "--learning_rate", 1e-3, "--epochs"]
    first = [PRETRAIN, *world.files("pretrain", out), "--projector", "resampler", *own, *flags]
    done = world.run(*first, 1).passed()
    assert "resampler projection, 64 tokens an image" in done.out and f"--import {__file__}" in done.out
    assert "3 to go" in world.run(*first, 2, "--from_resume", 1).passed().out
    world.run(SFT, *world.files("sft", out), *own, *flags, 1).passed()
    asked = ["--weight", "sft_vlm", "--image", world.images / "0.jpg"]
    world.run(EVAL, *world.eval_files(out), *own, *asked).passed()
    exported = [ROOT / "scripts/export.py", "--weight", "sft_vlm", "--save_dir", out, "--folder", tmp_path / "exported"]
    world.run(*exported, *own).refused("a resampler projection is not exported")
    world.run(EVAL, *world.eval_files(out), *asked).refused("no projector 'resampler'", "--import names the file")
