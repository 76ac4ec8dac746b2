"""Images in text: where they land, what is refused, and training without GPU syncs."""

import plain_model
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import AT, IMAGE, IMAGES, PROMPTS, batch, pictures, prompt, save_tower, tiny_vlm

from model.model_vlm import MiniMindVLM, VLMConfig, find_image_starts
from model.projectors import PROJECTORS


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def spliced(model, **inputs) -> torch.Tensor:
    """Returns the embeddings (B, L, D) that the decoder gets."""
    seen = []
    hook = model.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def plain_splice(model, prompts, pixel_values) -> list[torch.Tensor]:
    """Returns each sample's float64 embeddings (L, D), by a plain loop over its images."""
    weight, bias = (tensor.double() for tensor in model.vision_proj.vision_proj[0].parameters())
    with torch.no_grad():
        projected = [model.encode_images(picture[None])[0].double() @ weight.T + bias for picture in pixel_values]
    rows = []
    for ids, starts in prompts:
        own, projected = projected[: len(starts)], projected[len(starts) :]
        rows.append(plain_model.splice(plain_model.embed(model, ids), starts, own))
    assert not projected
    return rows


def assert_spliced(model, prompts, embeddings, pixel_values):
    for row, expected in zip(embeddings, plain_splice(model, prompts, pixel_values), strict=True):
        torch.testing.assert_close(row[: len(expected)].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given_starts", [False, True])
@pytest.mark.parametrize("case", ["one_image", "two_images"])
def test_recorded_logits_and_loss(tmp_path, case, given_starts):
    recorded = plain_model.recorded(case)
    shape = recorded["shape"]
    folder = save_tower(tmp_path, 768, intermediate_size=1024, num_attention_heads=12)
    config = VLMConfig(
        hidden_size=shape["h"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
    )
    model = MiniMindVLM(config, vision_model_path=folder).eval()
    plain_model.fill_decoder(model)
    ids = recorded["input_ids"]
    starts = recorded["image_starts"] if given_starts else None
    labels = ids.masked_fill(ids == AT, -100)
    with torch.no_grad():
        output = model(ids, pixel_values=recorded["pixel_values"], labels=labels, image_starts=starts)
    torch.testing.assert_close(output.logits[..., recorded["columns"]], recorded["logits"], atol=1e-4, rtol=0)
    assert float(output.loss) == pytest.approx(recorded["loss"], abs=1e-4)


# ---- where images land


@pytest.mark.parametrize("given_starts", [False, True])
def test_splice_is_the_plain_loops(vlm, given_starts):
    inputs = batch(PROMPTS)
    assert inputs["image_starts"].tolist() == find_image_starts(inputs["input_ids"], AT, 196).tolist()
    if not given_starts:
        inputs["image_starts"] = None
    pixel_values = pictures(sum(IMAGES))
    assert_spliced(vlm, PROMPTS, spliced(vlm, **inputs, pixel_values=pixel_values), pixel_values)


PARTS = st.lists(st.just(IMAGE) | st.lists(st.sampled_from([AT, 5, 6, 7]), max_size=4), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(samples=st.lists(PARTS.filter(any), min_size=1, max_size=3))
def test_any_mix_of_samples_is_spliced_exactly(vlm, samples):
    prompts = [prompt([1], *parts) for parts in samples]
    pixel_values = pictures(sum(len(starts) for _, starts in prompts))
    assert_spliced(vlm, prompts, spliced(vlm, **batch(prompts), pixel_values=pixel_values), pixel_values)


RUNS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 195, 196, 197, 391, 392, 393]), st.integers(0, 3)), max_size=4)


@settings(max_examples=50, deadline=None)
@given(samples=st.lists(RUNS, min_size=1, max_size=3))
def test_image_starts_are_those_of_a_plain_walk(samples):
    rows = [sum(([AT] * run + [5] * text for run, text in runs), []) for runs in samples]
    expected = [[sample, start] for sample, ids in enumerate(rows) for start in plain_model.image_starts(ids)]
    padded = batch([(ids or [5], []) for ids in rows])["input_ids"]
    assert find_image_starts(padded, AT, 196).tolist() == expected


def test_logits_with_images_are_the_plain_ones():
    model = tiny_vlm(use_moe=True, inference_rope_scaling=True, original_max_position_embeddings=16, rope_theta=100.0)
    pixel_values = pictures(sum(IMAGES[:3]))
    with torch.no_grad():
        logits = model(**batch(PROMPTS[:3]), pixel_values=pixel_values).logits
    for row, embeddings in zip(logits, plain_splice(model, PROMPTS[:3], pixel_values), strict=True):
        expected, _ = plain_model.decode(model, embeddings)
        torch.testing.assert_close(row[: len(expected)].double(), expected, atol=1e-4, rtol=1e-4)


def test_pictures_per_sample_or_flat_as_bytes_or_normalised(vlm):
    prompts = [prompt([1], IMAGE, [5], IMAGE), prompt([1, 7], IMAGE, IMAGE, [6])]
    inputs, flat = batch(prompts), pictures(4)
    expected = vlm(**inputs, pixel_values=flat).logits
    mean, std = vlm.vision_encoder.pixel_mean, vlm.vision_encoder.pixel_std
    normalised = (flat / 255 - mean) / std
    for starts in (inputs["image_starts"], None):
        for pixel_values in (flat.unflatten(0, (2, 2)), normalised, normalised.unflatten(0, (2, 2))):
            logits = vlm(**inputs | {"image_starts": starts}, pixel_values=pixel_values).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (vlm(**inputs, pixel_values=flat.flip(0)).logits - expected).abs().max() > 0.1  # the images matter


@pytest.mark.parametrize("none", [None, torch.zeros(0, 3, 224, 224, dtype=torch.uint8), torch.zeros(2, 0, 3, 224, 224)])
def test_a_batch_without_images(vlm, none):
    inputs = batch([prompt([1, AT, 5]), prompt([1, 6] * 100 + [AT])])
    expected = torch.nn.functional.embedding(inputs["input_ids"], vlm.model.embed_tokens.weight)
    for starts in (None, inputs["image_starts"]):
        assert torch.equal(spliced(vlm, **inputs | {"image_starts": starts}, pixel_values=none), expected)


# ---- what is refused, naming the sample

TEXT, ONE, TWO = prompt([1, 5, 6]), prompt([1], IMAGE, [5]), prompt([1], IMAGE, IMAGE, [5])
CUT, OWN = ([1, *[AT] * 150], []), prompt([1, AT, 5], IMAGE)
MISMATCHES = {
    "one too few": ([ONE, TWO], 2, "2 image(s) were given", "sample 1: 2"),
    "one too many": ([TEXT, ONE], 2, "2 image(s) were given", "sample 1: 1"),
    "none given": ([TEXT, ONE], None, "0 image(s) were given", "sample 1: 1"),
    "nothing to put them": ([TEXT, TEXT], 1, "1 image(s) were given", "sample 1: 0"),
    "cut off": ([ONE, CUT], 2, "sample 1: 0", "cut off"),
    "cut off beside a user's own": ([OWN, CUT, TEXT], 2, "sample 1: 0", "cut off"),
    "cut off after a whole one": ([TWO, (TWO[0][:300], [])], 4, "sample 1: 1", "cut off"),
    "per sample, too many": ([ONE, TEXT], (2, 1), "1 in each of 2 samples", "sample 1: 0"),
    "per sample, too few": ([ONE, TWO], (2, 1), "1 in each of 2 samples", "sample 1: 2"),
    "per sample, swapped": ([ONE, prompt([1], *[IMAGE] * 3), TWO], (3, 2), "2 in each of 3 samples", "sample 0: 1"),
    "per sample, cut off": ([ONE, CUT], (2, 1), "sample 1: 0", "cut off"),
    "another number of samples": ([ONE, ONE], (1, 2), "1 samples", "2"),
}


# image_starts are on the GPU, so with them only the totals are compared, which are right in these two.
TOTAL_IS_RIGHT = ("per sample, swapped", "another number of samples")
REFUSED = [(case, how) for case in MISMATCHES for how in ("forward", "generate")]
REFUSED += [(case, "forward with starts") for case in MISMATCHES if case not in TOTAL_IS_RIGHT]


@pytest.mark.parametrize("case, how", REFUSED)
def test_a_mismatch_is_a_value_error_that_names_the_sample(vlm, case, how):
    prompts, given_pictures, *words = MISMATCHES[case]
    shape = given_pictures if isinstance(given_pictures, tuple) else (given_pictures,)
    pixel_values = None if given_pictures is None else torch.zeros(*shape, 3, 224, 224, dtype=torch.uint8)
    inputs = batch(prompts)
    starts = inputs.pop("image_starts")
    if "cut off" in case:
        starts = find_image_starts(inputs["input_ids"], AT, 196)
    with pytest.raises(ValueError) as caught:
        if how.startswith("forward"):
            vlm(**inputs, pixel_values=pixel_values, image_starts=starts if "starts" in how else None)
        else:
            vlm.generate(**inputs, pixel_values=pixel_values, max_new_tokens=1)
    for word in words:
        assert word in str(caught.value)


# ---- training without GPU syncs


def training_inputs():
    inputs = batch(PROMPTS)
    del inputs["attention_mask"]  # right-padded: causal attention is enough
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == AT) | (inputs["input_ids"] == 0), -100)
    labels[:, 0] = -100
    learned = (labels.flatten() != -100).nonzero().flatten()
    return inputs | {"labels": labels, "learned_positions": learned, "pixel_values": pictures(sum(IMAGES))}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_training_step_never_syncs(reduction):
    """The meta device has shapes but no values, so anything that would sync raises."""
    model = tiny_vlm().train().to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in training_inputs().items()}
    model(**inputs, reduction=reduction).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(NotImplementedError, match="nonzero"):  # looking for the images syncs
        model(**inputs | {"image_starts": None})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_on_cuda_never_syncs(autocast):
    model = tiny_vlm().train().cuda()
    inputs = {name: tensor.cuda() for name, tensor in training_inputs().items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_learned_positions_give_the_loss_and_gradient_of_labels():
    model, inputs = tiny_vlm(), training_inputs()
    found = []
    for positions in (inputs.pop("learned_positions"), None):
        model.zero_grad()
        loss = model(**inputs, learned_positions=positions).loss
        loss.backward()
        found.append((loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())))
    for by_position, by_label in zip(*found, strict=True):
        torch.testing.assert_close(by_position, by_label, atol=1e-4, rtol=1e-4)


def test_the_projection_alone_can_train():
    model, inputs = tiny_vlm(), training_inputs()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vision_proj."))
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("vision_proj.")
    assert all(parameter.grad.abs().max() > 0 for parameter in model.vision_proj.parameters())


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize(("name", "factor"), [("linear", 1), ("linear", 2), ("mlp", 7), ("norm_mlp", 1)])
def test_any_number_of_images_is_projected(name, factor, images):
    projector = PROJECTORS[name](8, 16, factor)
    features = torch.randn(images, 196, 8)
    projected = projector(features)
    assert projected.shape == (images, 196 // factor**2, 16)
    if images and factor > 1:
        grid = F.pixel_unshuffle(features.view(images, 14, 14, 8).permute(0, 3, 1, 2), factor)
        assert torch.equal(projected, projector.vision_proj(grid.flatten(2).transpose(1, 2)))
