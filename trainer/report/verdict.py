"""Says in words whether a model looks at its images, and what helps where it does not."""

import math

from common.paths import BUILTIN_DATASET_DIR, BUILTIN_TOWER_DIR, display_path

UNWRITTEN = (
    "That is to be expected of stage 1: the language model stays as it is, and words that it has never written keep a "
    "high loss until stage 2 teaches them."
)
FEW = 30  # short answers, which tell nothing
SMALL = 0.02  # of the held-out loss: a gap that is sure, but changes little of what is said


def looks(figures: dict) -> str:
    """Returns "unknown", "not", "hardly", "depends" or "looks".

    A gap counts from twice its standard error on. Where short answers were asked for, more of them must be right than
    with the images of other rows, by twice that difference's standard error; where none were, as for captions, the gap
    must be more than SMALL of the loss.

    Args:
        figures: Of `HeldOut.as_dict` and `exact_match`.
    """
    gap, error, asked = figures.get("gap_shuffled"), figures.get("gap_error", 0), figures.get("short_answers")
    if gap is None or error is None:
        return "unknown"
    if gap <= 2 * error:
        return "not"
    if not asked or asked < FEW:
        return "depends" if gap > SMALL * figures["loss"] else "hardly"
    right, shuffled = figures["exact_match"], figures["exact_shuffled"]
    deviation = math.sqrt((right * (1 - right) + shuffled * (1 - shuffled)) / asked)
    return "looks" if right - shuffled > 2 * deviation else "hardly"


def verdict(figures: dict, sidecar: dict) -> list[str]:
    """Returns sentences on whether the model looks at its images, with the figures, and what would help.

    Args:
        sidecar: Of its weights.
    """
    gap, error, asked = figures.get("gap_shuffled"), figures.get("gap_error"), figures.get("short_answers")
    if gap is None:
        return []
    found = looks(figures)
    how = {
        "unknown": "Too few pictures are held out to tell whether it looks at them",
        "looks": "It looks at the images",
        "depends": "Its answers depend on the images",
        "hardly": "It hardly looks at the images",
        "not": "It does not look at the images",
    }[found]
    sentence = f"{how}: those of other rows raise the loss by {gap:.3f} nats per token"
    sentence += "" if error is None else f" (standard error {error:.3f})"
    if asked:
        sentence += (
            f", and {figures['exact_match']:.1%} of {asked:,} short answers are right to the letter, with the images "
            f"of other rows {figures['exact_shuffled']:.1%}; giving each question's most frequent answer would make "
            f"{figures['exact_frequent']:.1%}"
        )
    if found in ("unknown", "looks", "depends"):
        return [f"{sentence}."]
    if found == "hardly" and sidecar.get("stage") == "pretrain":
        return [f"{sentence}.", UNWRITTEN]
    return [f"{sentence}.", f"What may help: {'; '.join(cures(sidecar))}."]


def cures(sidecar: dict) -> list[str]:
    """Returns what may make a model look at its images, the likeliest cure first."""
    arguments, stage = sidecar.get("arguments", {}), sidecar.get("stage")
    own_data = display_path(BUILTIN_DATASET_DIR) not in str(arguments.get("data_path"))
    tower, start = str(arguments.get("vision_model_path")), str(arguments.get("from_weight"))
    found = []
    if own_data and tower == display_path(BUILTIN_TOWER_DIR):
        found.append("a tower of your own pictures, as this one has seen drawn shapes only (trainer/train_tower.py)")
    if stage == "sft" and start.startswith("llm"):
        found.append("stage 1 first (trainer/train_pretrain_vlm.py), which opens the way for the images")
    return [*found, "shorter answers that name what is seen", "more pictures, and a check that they match their texts"]
