"""transformers' own generate() with images: every way to call it gives what each prompt alone gives."""

import pytest
import torch
from tiny_models import AT, IMAGE, IMAGES, PROMPTS, batch, pictures, prompt, save_tower, tiny_vlm
from transformers import CompileConfig

from model.model_minimind import CACHE_NAME
from model.model_vlm import MiniMindVLM

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "experts"])
def any_vlm(request):
    return tiny_vlm(use_moe=request.param)


def alone(model, index, **how) -> torch.Tensor:
    """Returns the new tokens of one prompt alone."""
    (ids, starts), before = PROMPTS[index], sum(IMAGES[:index])
    own = pictures(sum(IMAGES))[before : before + len(starts)] if starts else None
    return model.generate(torch.tensor([ids]), pixel_values=own, **GREEDY | how)[:, len(ids) :]


@pytest.fixture(scope="module")
def one_by_one(any_vlm):
    return torch.cat([alone(any_vlm, index) for index in range(len(PROMPTS))]).tolist()


def test_the_answers_depend_on_the_pictures(any_vlm, one_by_one):
    ids = torch.tensor([PROMPTS[3][0]])
    other = any_vlm.generate(ids, pixel_values=pictures(2, seed=7), **GREEDY)[0, ids.shape[1] :]
    assert other.tolist() != one_by_one[3]


WAYS = [{}, {"use_cache": False}, {"cache_implementation": "static"}]


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("given_starts", [False, True])
def test_a_left_padded_batch_is_one_by_one(any_vlm, one_by_one, how, given_starts):
    inputs = batch(PROMPTS, pad="left")
    if not given_starts:
        del inputs["image_starts"]
    together = any_vlm.generate(**inputs, pixel_values=pictures(sum(IMAGES)), **how, **GREEDY)
    assert together[:, inputs["input_ids"].shape[1] :].tolist() == one_by_one


@pytest.mark.parametrize("several", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_several_answers_are_refused(any_vlm, several):
    with pytest.raises(ValueError, match="num_beams and num_return_sequences must be 1"):
        any_vlm.generate(**batch(PROMPTS[1:2]), pixel_values=pictures(1), **GREEDY | several)


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("own", [196, 200, 392])
def test_where_starts_are_given_a_run_of_placeholders_is_text(any_vlm, how, own):
    text = prompt([1], [AT] * own, [5])
    for prompts in ([text], [text, prompt([1, *[AT] * own, 7], IMAGE)]):
        inputs = batch(prompts, pad="left") | {"image_starts": torch.zeros(0, 2, dtype=torch.int64)}
        if len(prompts) > 1:
            inputs["image_starts"] = torch.tensor([[1, 2 + own]])
        pixel_values = pictures(1) if len(prompts) > 1 else None
        given = any_vlm.generate(**inputs, pixel_values=pixel_values, **GREEDY | how)
        assert given.shape == (len(prompts), inputs["input_ids"].shape[1] + 8)


def test_a_users_own_placeholder_beside_an_image_in_generate(any_vlm):
    """image_starts place images exactly at every step, with the cache and without."""
    inputs = batch([prompt([1, AT], IMAGE, [5]), prompt([1, 7, 8, 9, 10], IMAGE)], pad="left")
    with_cache = any_vlm.generate(**inputs, pixel_values=pictures(2), **GREEDY)
    without = any_vlm.generate(**inputs, pixel_values=pictures(2), use_cache=False, **GREEDY)
    assert with_cache.tolist() == without.tolist()
    first = any_vlm(**inputs, pixel_values=pictures(2)).logits[:, -1].argmax(-1)
    assert with_cache[:, -8].tolist() == first.tolist()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_several_tokens_into_a_filled_cache(any_vlm, name):
    inputs = batch(PROMPTS[1:4], pad="left")
    pixel_values, mask = pictures(sum(IMAGES[1:4])), inputs["attention_mask"]
    more = torch.randint(3, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    ids, longer_mask = torch.cat((inputs["input_ids"], more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    whole = any_vlm(ids, attention_mask=longer_mask, pixel_values=pixel_values).logits
    filled = any_vlm(**inputs, pixel_values=pixel_values, use_cache=True)[CACHE_NAME]
    pieces = [
        any_vlm(piece, attention_mask=longer_mask[:, :end], **{name: filled}).logits
        for piece, end in zip(more.split([4, 1, 1], 1), (-2, -1, None), strict=True)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole[:, -6:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("asked", [[5, 6, 7], [5, *[AT] * 196, 7]], ids=["text", "a new picture"])
def test_a_conversation_continues_from_its_cache(any_vlm, asked):
    ids = torch.tensor([PROMPTS[1][0]])
    first = any_vlm.generate(ids, pixel_values=pictures(1), return_dict_in_generate=True, **GREEDY)
    longer = torch.cat((first.sequences, torch.tensor([asked])), dim=1)
    new = pictures(2)[1:] if AT in asked else None
    continued = any_vlm.generate(longer, pixel_values=new, **{CACHE_NAME: first[CACHE_NAME]}, **GREEDY)
    both = pictures(2 if AT in asked else 1)
    both[0] = pictures(1)[0]
    assert continued.tolist() == any_vlm.generate(longer, pixel_values=both, **GREEDY).tolist()


def test_only_last_logits_are_computed_and_pictures_encoded_once(monkeypatch):
    vlm = tiny_vlm()
    lengths, encoded, encode = [], [], vlm.encode_images
    monkeypatch.setattr(vlm, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    hook = vlm.lm_head.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    inputs = batch(PROMPTS, pad="left")
    vlm.generate(**inputs, pixel_values=pictures(sum(IMAGES)), **GREEDY)
    hook.remove()
    assert lengths == [1] * 8
    assert encoded == [sum(IMAGES)]


def test_the_compiled_step_is_one_graph_and_gives_the_same():
    """As transformers does on CUDA with a static cache, here with a compiler that runs on the CPU."""
    torch._dynamo.reset()
    vlm, inputs = tiny_vlm(), batch(PROMPTS, pad="left") | {"pixel_values": pictures(sum(IMAGES))}
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True  # transformers' switch for its own tests
    static = GREEDY | {"cache_implementation": "static", "compile_config": compiling}
    expected = vlm.generate(**inputs, **GREEDY)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(vlm.generate(**inputs, **static), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(vlm.generate(**inputs, **static), expected)
    torch._dynamo.reset()


def test_a_saved_folder_loads_with_its_tower(any_vlm, tmp_path):
    any_vlm.save_pretrained(tmp_path / "saved")
    tower = save_tower(tmp_path / "tower")
    inputs = batch(PROMPTS) | {"pixel_values": pictures(sum(IMAGES))}
    loaded = MiniMindVLM.from_pretrained(tmp_path / "saved", vision_model_path=tower).eval()
    torch.testing.assert_close(loaded(**inputs).logits, any_vlm(**inputs).logits)
    half = MiniMindVLM.from_pretrained(tmp_path / "saved", vision_model_path=tower, dtype=torch.bfloat16)
    assert half(**inputs).logits.dtype == torch.bfloat16
    assert torch.equal(half.model.rotary_frequencies, any_vlm.model.rotary_frequencies)
