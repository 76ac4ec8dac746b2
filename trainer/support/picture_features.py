"""The tower's features of a batch's pictures: computed, or taken from the cache and put there."""

import torch

from dataset.chat import TOKENS_PER_IMAGE
from dataset.features import FeatureCache


class PictureFeatures:
    """Gives a batch's features.

    Args:
        encode_images: (images, 3, 224, 224) uint8 to (images, 196, width), on `device`.
        cache: Where they are kept, or None.
        device: Where the features are wanted.
    """

    def __init__(self, encode_images, cache: FeatureCache | None, device: torch.device):
        self.encode_images, self.cache, self.device = encode_images, cache, device

    def __call__(self, batch: dict) -> torch.Tensor:
        """(images, 196, width) of the batch as the collate function made it."""
        pixels = batch["pixel_values"]
        if self.cache is None:
            return self.encode_images(pixels.to(self.device))
        # Rounded to the cache's precision in the first epoch too, so that a resumed run learns from the same numbers.
        features = torch.empty(len(batch["slots"]), TOKENS_PER_IMAGE, self.cache.width, dtype=torch.float16)
        found = torch.tensor([is_found for _, _, is_found in batch["slots"]], dtype=torch.bool)
        features[found] = batch["image_features"]
        # A worker looked some batches ahead: since then a picture may have been encoded.
        missing = []
        for place, pixel in zip((~found).nonzero()[:, 0].tolist(), pixels, strict=True):
            since = self.cache.get(*batch["slots"][place][:2])
            if since is None:
                missing.append((place, pixel))
            else:
                features[place] = since
        self._encode_and_keep(batch["slots"], missing, features)
        return features.to(self.device)

    def _encode_and_keep(self, slots: list, missing: list[tuple[int, torch.Tensor]], features: torch.Tensor):
        """Fills the features of the missing (place, pixels), and puts them into the cache.

        Off CUDA each picture is encoded by itself, at little cost: pictures encoded together change each other's last
        bits, which rounding to half precision would make a thousand times larger.
        """
        together = max(1, len(missing)) if self.device.type == "cuda" else 1
        for start in range(0, len(missing), together):
            part = missing[start : start + together]
            encoded = self.encode_images(torch.stack([pixel for _, pixel in part]).to(self.device))
            for (place, _), of_one in zip(part, encoded.to("cpu", torch.float16), strict=True):
                features[place] = of_one
                self.cache.put(*slots[place][:2], of_one)
