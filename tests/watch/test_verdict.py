"""What is said of a model's figures: whether it looks at its images, and what would help."""

import pytest

from trainer.report.page import verdict

GAP = {"loss": 1.0, "gap_shuffled": 0.3, "gap_error": 0.05}
ASKED = {"short_answers": 200, "exact_match": 0.5, "exact_shuffled": 0.1, "exact_frequent": 0.12}


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, "looks at"),
        ({"gap_shuffled": 0.09}, "does not look"),  # less than twice its standard error
        ({"gap_shuffled": -0.3}, "does not look"),
        ({"gap_error": None}, "Too few pictures"),  # of too few pictures
        ({"short_answers": 3, "exact_match": 0.3, "exact_shuffled": 0.3}, "depend on"),  # too few to tell
        ({"exact_shuffled": 0.45}, "hardly"),  # 0.05 is less than twice sqrt((0.25 + 0.2475) / 200)
        ({"exact_match": 0.0, "exact_shuffled": 0.0}, "hardly"),
        ({"short_answers": 0}, "depend on"),
        ({"short_answers": 0, "gap_shuffled": 0.013, "gap_error": 0.005}, "hardly"),  # sure, but 1.3 % of the loss
    ],
)
def test_both_the_gap_and_the_answers_must_be_better_than_chance(changed, word):
    assert word in verdict(GAP | ASKED | changed, {})[0].split(":")[0]


def test_the_figures_stand_beside_chance():
    [sentence] = verdict(GAP | ASKED, {})
    assert sentence.startswith("It looks at the images")
    for words in ("0.300 nats", "standard error 0.050", "50.0% of 200", "10.0%", "12.0%"):
        assert words in sentence


def test_a_model_that_does_not_look_gets_the_cure_that_fits():
    own = {"arguments": {"data_path": "mine/train.jsonl", "vision_model_path": "model/builtin/tower"}, "stage": "sft"}
    own["arguments"]["from_weight"] = "llm"
    sentence, cure = verdict(GAP | {"gap_shuffled": 0.0}, own)
    assert sentence.startswith("It does not look at the images")
    assert "trainer/train_tower.py" in cure and "stage 1 first" in cure
    own["arguments"] |= {"vision_model_path": "out/mine_tower", "from_weight": "mine_pretrain"}
    cure = verdict(GAP | {"gap_shuffled": 0.0}, own)[1]
    assert "train_tower" not in cure and "stage 1" not in cure
    drawn = own["arguments"] | {"data_path": "dataset/builtin/sft.jsonl", "vision_model_path": "model/builtin/tower"}
    assert "train_tower" not in verdict(GAP | {"gap_shuffled": 0.0}, {"arguments": drawn})[1]


def test_stage_1_may_keep_a_high_loss():
    says_nothing = {"exact_match": 0.0, "exact_shuffled": 0.0}
    assert "to be expected of stage 1" in verdict(GAP | ASKED | says_nothing, {"stage": "pretrain"})[1]
    assert "What may help" in verdict(GAP | ASKED | says_nothing, {"stage": "sft"})[1]


def test_without_images_of_other_rows_nothing_is_said():
    assert verdict({"gap_shuffled": None, "loss": 1.0}, {}) == []
