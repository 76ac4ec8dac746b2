"""Splitting off rows to measure on."""

import copy

import numpy as np

from dataset.lm_dataset import VLMDataset


def hold_out(data: VLMDataset, share: float = 0.01, most: int = 512) -> tuple[VLMDataset, VLMDataset | None]:
    """Holds out the rows whose image's hash is smallest, whatever the file's order; rows about an image go together.

    Where there are images, rows without one are not taken.

    Returns:
        The rows to learn from, and the rows held out: at most `share` of all and about `most`, None for none.
    """
    wanted = min(most, int(share * len(data)))
    candidates = data.positions[data.image_counts > 0] if data.picture_count else data.positions
    if wanted == 0 or wanted >= len(candidates):
        return data, None
    hashes = data.column("picture_hash")[candidates]
    order = np.argsort(hashes, kind="stable")
    count = int(np.searchsorted(hashes[order], hashes[order[wanted - 1]], side="right"))
    if count > 2 * wanted:  # an image in so many rows that they cannot all be spared
        count = wanted
    taken = np.sort(candidates[order[:count]])
    kept, held_out = copy.copy(data), copy.copy(data)
    kept.positions, held_out.positions = np.setdiff1d(data.positions, taken), taken
    return kept, held_out
