"""A model's step through torch.compile: one graph for batches of every length, made before the first step."""

import itertools

import torch
from torch._dynamo import mark_dynamic

from dataset.chat import TOKENS_PER_IMAGE
from dataset.lm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM

# Lengths are padded to a multiple of this where they are compiled: kernels for odd sizes are slower.
LENGTH_MULTIPLE = 8


class CompiledVLM:
    """`MiniMindVLM.forward` and `encode_images`, compiled for full batches of any length.

    What is rare (an epoch's last, smaller batch; one with fewer than two pictures or learned tokens, for which
    torch.compile makes graphs of their own) is computed as the model is written.

    Args:
        model: A model without experts, on its device.
        batch_size: Samples of a full batch.
        options: For torch.compile.
    """

    def __init__(self, model: MiniMindVLM, batch_size: int, **options):
        self.model, self.batch_size = model, batch_size
        self._forward, self._encode_images = torch.compile(model.forward, **options), torch.compile(encode, **options)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `MiniMindVLM.encode_images`."""
        if len(pixel_values) < 2:
            return self.model.encode_images(pixel_values)
        mark_dynamic(pixel_values, 0)
        return self._encode_images(self.model, pixel_values)

    def __call__(self, input_ids, labels, image_starts, learned_positions, image_features, num_items_in_batch: int):
        """As `MiniMindVLM.forward`, with features in place of pictures. One value of num_items_in_batch is one graph."""
        inputs = {
            "input_ids": input_ids,
            "labels": labels,
            "image_starts": image_starts,
            "learned_positions": learned_positions,
            "image_features": image_features,
        }
        is_full = len(input_ids) == self.batch_size and input_ids.shape[1] > 1
        if not is_full or len(image_starts) < 2 or len(learned_positions) < 2:
            return self.model(**inputs, num_items_in_batch=num_items_in_batch)
        for name, tensor in inputs.items():
            mark_dynamic(tensor, 1 if name in ("input_ids", "labels") else 0)
        return self._forward(**inputs, num_items_in_batch=num_items_in_batch)

    def warm_up(self, shapes: list[tuple[int, int, int]], device: torch.device, dtype: torch.dtype):
        """Compiles forward and backward with made-up batches; gradients and random state stay as they are.

        Args:
            shapes: (length, images, learned tokens) of each.

        Raises:
            RuntimeError: If torch.compile does not work here (it needs a C++ compiler, and Triton on CUDA), or the
                device's memory does not hold such a batch.
        """
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for length, images, learned in shapes:
                input_ids = torch.ones(self.batch_size, length, dtype=torch.int64, device=device)
                pixel_values = torch.zeros(images, 3, 224, 224, dtype=torch.uint8, device=device)
                features = self.encode_images(pixel_values)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    output = self(
                        input_ids=input_ids,
                        labels=input_ids.clone(),
                        image_starts=torch.zeros(images, 2, dtype=torch.int64, device=device),
                        learned_positions=torch.ones(learned, dtype=torch.int64, device=device),
                        image_features=features,
                        num_items_in_batch=1,
                    )
                output.loss.backward()
        self.model.zero_grad(set_to_none=True)


def encode(model: MiniMindVLM, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.encode_images(pixel_values)


def extreme_shapes(data: VLMDataset, batch_size: int) -> list[tuple[int, int, int]]:
    """The least and the most (length, images, learned tokens) of a full batch, in all combinations.

    A compiled graph may hold for sizes on one side of a threshold only; these find it out before the first step.
    """
    # Long enough for an image: what holds one is what is compiled.
    lengths = (max(int(length), TOKENS_PER_IMAGE) for length in (min(data.lengths), max(data.lengths)))
    lengths = [-(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE for length in lengths]
    images, learned = (
        [max(2, batch_size * int(count)) for count in (min(counts), max(counts))]
        for counts in (data.image_counts, data.learned_tokens)
    )
    return sorted(set(itertools.product(lengths, images, learned)))
