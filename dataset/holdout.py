"""Which rows are held out of training, and what training and held-out rows have in common."""

import numpy as np

from dataset.lm_dataset import VLMDataset


def hold_out(data: VLMDataset, share: float = 0.01, most: int = 512) -> tuple[VLMDataset, VLMDataset | None]:
    """Splits off the rows whose first image has the smallest hash, so that rows of one image stay together.

    The order of rows does not matter. If any have images, only those are held out, at least one from three images on.
    Training rows that show a held-out image beside others are left out, unless they are more than a fifth of all.
    Returns training rows, and held-out rows (`share` of all, at most about `most`) or None.
    """
    candidates = data.row_indices[data.image_counts > 0] if data.image_count else data.row_indices
    hashes = data.column("picture_hash")[candidates]
    images = len(np.unique(hashes)) if data.image_count else 0
    share_of_all = int(share * len(data))
    wanted = min(most, max(share_of_all, int(images >= 3)))
    if wanted == 0 or wanted >= len(candidates):
        return data, None
    order = np.argsort(hashes, kind="stable")
    count = int(np.searchsorted(hashes[order], hashes[order[wanted - 1]], side="right"))
    if count > (2 * wanted if share_of_all else len(candidates) // 2):  # so many rows show this image
        count = wanted
    taken = np.sort(candidates[order[:count]])
    training = data.changed(row_indices=np.setdiff1d(data.row_indices, taken))
    held_out = data.changed(row_indices=taken)
    leaking = showing_the_same(training, held_out)
    if len(leaking) <= len(data) // 5:
        training = data.changed(row_indices=np.setdiff1d(training.row_indices, leaking))
    return training, held_out


def showing_the_same(data: VLMDataset, held_out: VLMDataset) -> np.ndarray:
    """Returns the indices of rows in `data` that show an image of `held_out`, from the same file."""
    row_of_image = np.repeat(data.row_indices, data.image_counts)
    return np.unique(row_of_image[np.isin(data.shown_pictures, held_out.shown_pictures)])


def rows_in_both(data: VLMDataset, heldout: VLMDataset) -> int:
    """Counts held-out rows that are also training rows: with the same image (by bytes or name) and tokens."""
    own, others = (rows.column("picture_hash")[rows.row_indices] for rows in (data, heldout))
    measured = heldout.read_rows(heldout.row_indices[np.isin(others, own)].tolist())
    learned = {tuple(row["input_ids"]) for row in data.read_rows(data.row_indices[np.isin(own, others)].tolist())}
    return sum(tuple(row["input_ids"]) in learned for row in measured)
