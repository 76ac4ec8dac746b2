"""Where a model looks: the maps against a plain loop, on a model with a known dependence, and as a mask."""

import numpy as np
import pytest
import torch
from checks.check_looking import attribute_maps, covered_patches, measure
from tiny_models import AT, IMAGE, batch, pictures, prompt, tiny_vlm

from common.errors import UsageError
from dataset.scenes.draw import heldout_scenes, patch_coverage
from dataset.scenes.language import CHINESE, LANGUAGES, caption
from model import answers as looking
from model.answers import patch_maps, split_words, word_maps
from trainer.answering.assistant import mask_of

pytest_plugins = ["tiny"]

ANSWER = torch.tensor([9, 60, 60, 31])
ONE, TWO = prompt([1, 5, AT, 7], IMAGE, [9, 8]), prompt([1, 77], IMAGE, [3, AT, 4], IMAGE, [50])


@pytest.fixture(scope="module")
def model():
    return tiny_vlm()


def inputs_of(form: tuple, images: int) -> dict:
    return batch([form]) | {"pixel_values": pictures(images)}


@torch.no_grad()
def plain_rise(model, inputs: dict, ids: list[int], image: int, patch: int) -> list[float]:
    """Shows one patch of one image and runs the model anew for each token: the plain version."""
    features = model.vision_proj(model.encode_images(inputs["pixel_values"]))
    blank = features.mean(dim=1, keepdim=True).expand_as(features)
    showing = blank.clone()
    showing[image, patch] = features[image, patch]
    prompt_ids, rises = inputs["input_ids"][0].tolist(), []
    for token in range(len(ids)):
        scores = []
        for images in (blank, showing):
            embeds = model.get_input_embeddings()(torch.tensor([prompt_ids + ids[:token]]))
            for (_, start), of_image in zip(inputs["image_starts"].tolist(), images, strict=True):
                embeds[0, start : start + len(of_image)] = of_image
            scores.append(model(inputs_embeds=embeds).logits[0, -1].log_softmax(dim=-1)[ids[token]].item())
        rises.append(scores[1] - scores[0])
    return rises


@pytest.mark.parametrize(("form", "images"), [(ONE, 1), (TWO, 2)])
def test_the_maps_equal_those_of_a_plain_loop(model, form, images, monkeypatch):
    inputs = inputs_of(form, images)
    maps = patch_maps(model, inputs, ANSWER)
    assert maps.shape == (4, images, 14, 14) and maps.dtype == torch.float32
    for image, patch in [(0, 0), (0, 17), (0, 27), (images - 1, 28), (images - 1, 100), (images - 1, 195)]:
        expected = plain_rise(model, inputs, ANSWER.tolist(), image, patch)
        assert maps[:, image, patch // 14, patch % 14].tolist() == pytest.approx(expected, abs=1e-4)
    assert maps.abs().amax(dim=(2, 3)).min() > 1e-3  # far above that tolerance
    monkeypatch.setattr(looking, "MOST_LOGITS", 5 * 4 * 128)  # 5 patches at a time: some of one image, some of the next
    torch.testing.assert_close(patch_maps(model, inputs, ANSWER), maps, atol=1e-4, rtol=0)
    asked = iter([False, False, True])
    assert patch_maps(model, inputs, ANSWER, lambda: next(asked)) is None


def test_a_shuffled_image_has_a_smaller_map():
    inputs = batch([([1, *[AT] * 49, 9], [1])]) | {"pixel_values": pictures(1)}
    assert patch_maps(tiny_vlm(pixel_shuffle=2), inputs, ANSWER).shape == (4, 1, 7, 7)


@pytest.mark.parametrize("patch", [0, 52, 195])
def test_an_answer_that_depends_on_one_patch_has_its_peak_there(model, patch, monkeypatch):
    """All patches have the same features but one, so only that one can tell the answer anything."""
    features = torch.ones(1, 196, 32)
    features[0, patch] = -3 * torch.arange(32) / 32
    monkeypatch.setattr(model, "encode_images", lambda pixel_values: features)
    of_patch = patch_maps(model, inputs_of(ONE, 1), ANSWER).abs().sum(dim=0).flatten().tolist()
    peak = of_patch.pop(patch)
    assert peak > 5 * max(of_patch)


def test_looking_leaves_the_random_state_and_the_model_as_they_were(model):
    model.train()
    before, weights = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch_maps(model, inputs_of(ONE, 1), ANSWER)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    model.eval()


# ---- words


@pytest.mark.parametrize("text", ["图中有一个物体：中间有一个小的绿色五角星。", "A red house, 12 trees.\n龘😀图", "😀"])
def test_words_are_whole_and_join_to_the_answer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = split_words(tokenizer, ids)
    assert "".join(word for word, _, _ in words) == text
    assert not any("\ufffd" in word for word, _, _ in words)
    assert [start for _, start, _ in words] == [0, *(end for _, _, end in words[:-1])] and words[-1][2] == len(ids)
    assert {word.strip() for word, _, _ in words} >= {part for part in ("绿色", "red", "house", "12") if part in text}


def test_an_answer_ends_at_its_end_token(model, tokenizer):
    ids = torch.tensor([35, 36, tokenizer.eos_token_id, 0, 0])
    ended, alone = (word_maps(model, tokenizer, inputs_of(ONE, 1), some) for some in (ids, ids[:2]))
    assert [word for word, _ in ended] == [word for word, _ in alone]
    assert all(torch.equal(of_word, other) for (_, of_word), (_, other) in zip(ended, alone, strict=True))
    assert word_maps(model, tokenizer, inputs_of(ONE, 1), ids[2:]) == []


def test_a_words_map_is_the_sum_of_its_tokens(model, tokenizer):
    ids = torch.tensor([id for id in tokenizer("😀a", add_special_tokens=False)["input_ids"] if id < 128] + [35, 36])
    maps, words = patch_maps(model, inputs_of(ONE, 1), ids), word_maps(model, tokenizer, inputs_of(ONE, 1), ids)
    torch.testing.assert_close(sum(of_word for _, of_word in words), maps.sum(dim=0))


def test_a_mask_is_dark_where_a_word_does_not_look():
    peak = np.zeros((14, 14), dtype=np.float32)
    nothing = np.asarray(mask_of(peak))[..., 1]
    peak[3, 5] = 7.5
    dark = np.asarray(mask_of(peak))[..., 1]
    assert dark[3, 5] == 0 and (dark == 0).sum() == 1 and nothing.min() == dark.max() > 150
    assert mask_of(np.full((14, 28), np.nan)).size == (28, 14)


# ---- the check


def one_and_two() -> list:
    scenes = heldout_scenes()
    return [next(scene for scene in scenes if len(scene.objects) == number) for number in (1, 2, 2)]


def words_looking_at(scene, tokenizer, target, language=CHINESE) -> list[tuple]:
    """Returns the words of a scene's caption, each with the map that `target` gives the object it names."""
    text, at, words = caption(scene.facts, language), 0, []
    for word, _, _ in split_words(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]):
        number = min(text[: at + 1].count(language.separator[0]), len(scene.objects) - 1)
        words.append((word, torch.from_numpy(target(patch_coverage(scene), number))[None]))
        at += len(word)
    return words


def checked(tokenizer, target, language=CHINESE) -> dict:
    seen = [
        (
            covered_patches(scene, 14),
            attribute_maps(scene, words_looking_at(scene, tokenizer, target, language), language),
        )
        for scene in one_and_two()
    ]
    return measure(seen)


@pytest.mark.parametrize("language", LANGUAGES, ids=("Chinese", "English"))
def test_words_are_found_in_either_language(tokenizer, language):
    right = checked(tokenizer, lambda covered, number: covered[number], language)
    assert set(right["peak on the object"].values()) == {1.0}


def test_the_check_tells_the_right_object_from_the_other_and_from_none(tokenizer):
    right = checked(tokenizer, lambda covered, number: covered[number])
    assert set(right["peak on the object"].values()) == {1.0}
    assert set(right["two objects: peak on the other one"].values()) == {0.0}
    swapped = checked(tokenizer, lambda covered, number: covered[len(covered) - 1 - number])
    assert set(swapped["two objects: peak on the other one"].values()) == {1.0}
    nothing = checked(tokenizer, lambda covered, number: np.float32(covered.sum(axis=0) == 0))
    assert set(nothing["peak on the object"].values()) == {0.0}
    assert 0 < right["chance: patches of the object"]["colour"] < 0.5


def test_the_patches_of_an_object_follow_the_grid():
    scene = one_and_two()[1]
    assert (covered_patches(scene, 14) == (patch_coverage(scene) > 0)).all()
    assert covered_patches(scene, 7).shape == (2, 7, 7) and covered_patches(scene, 7).any(axis=(1, 2)).all()


def test_the_check_refuses_weights_that_describe_nothing(world, monkeypatch, capsys):
    from checks import check_looking

    files = ["--save_dir", world.out, "--vision_model_path", world.tower, "--tokenizer_path", world.tokenizer]
    monkeypatch.setattr("sys.argv", ["check_looking.py", *map(str, files), "--weight", "llm"])
    monkeypatch.setattr(check_looking, "SCENES", 2)
    with pytest.raises(UsageError, match="weights trained on the built-in set"):
        check_looking.main()
    assert "0 of 2 scenes are described word for word" in capsys.readouterr().out
