"""The decoder: recorded logits, plain mathematics, the cache, attention, experts, and the loss."""

import copy
import math

import plain_model
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.model_minimind import CACHE_NAME, MiniMindConfig, MiniMindForCausalLM, rotary_frequencies

# Of a head's 8 pairs two keep their frequency, three are blended and three are stretched.
YARN = {"hidden_size": 64, "rope_theta": 100.0, "inference_rope_scaling": True, "yarn_factor": 4.0}
YARN |= {"original_max_position_embeddings": 64, "yarn_beta_fast": 2.0, "yarn_beta_slow": 1.0}
GREEDY = {"max_new_tokens": 10, "do_sample": False}
PROMPTS = [[1, 50, 60, 70, 80, 2, 9], [1, 5], [1, 77, 30, 4], [1]]


def tiny_model(**shape) -> MiniMindForCausalLM:
    """Makes two layers of width 32, without near-ties between tokens; generation never stops early."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128} | shape
    model = MiniMindForCausalLM(MiniMindConfig(eos_token_id=127, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def dense():
    return tiny_model()


@pytest.fixture(scope="module", params=["dense", "experts", "yarn", "experts and yarn"])
def any_model(request):
    return tiny_model(use_moe="experts" in request.param, **(YARN if "yarn" in request.param else {}))


def random_ids(*shape) -> torch.Tensor:
    return torch.randint(3, 128, shape, generator=torch.Generator().manual_seed(1))


def left_padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def test_recorded_logits_and_loss():
    case = plain_model.recorded("dense_text")
    shape = case["shape"]
    config = MiniMindConfig(
        hidden_size=shape["h"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
    )
    model = MiniMindForCausalLM(config).eval()
    plain_model.fill_decoder(model)
    with torch.no_grad():
        output = model(case["input_ids"], labels=case["input_ids"])
    torch.testing.assert_close(output.logits[..., case["columns"]], case["logits"], atol=1e-4, rtol=0)
    assert float(output.loss) == pytest.approx(case["loss"], abs=1e-4)


def test_equals_plain_mathematics(any_model):
    ids = random_ids(2, 40)
    with torch.no_grad():
        logits = any_model(ids).logits
    for sample, row in enumerate(ids.tolist()):
        expected, _ = plain_model.decode(any_model, plain_model.embed(any_model, row))
        torch.testing.assert_close(logits[sample].double(), expected, atol=1e-4, rtol=1e-4)


def test_yarn_changes_the_logits_and_plain_yarn_equals_transformers():
    """Guards the test above: YaRN is not a no-op here, and the plain form is right."""
    ids, stretched = random_ids(1, 40), tiny_model(**YARN)
    plain = tiny_model(hidden_size=64, rope_theta=100.0)
    assert (stretched(ids).logits - plain(ids).logits).abs().max() > 0.1
    published = {"inference_rope_scaling": True, "hidden_size": 512}
    for config in (stretched.config, MiniMindConfig(**published)):
        theirs = copy.deepcopy(config)
        theirs.rope_parameters = {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": config.yarn_factor,
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
            "original_max_position_embeddings": config.original_max_position_embeddings,
        }
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
        plain_frequencies, plain_factor = plain_model.angular_frequencies(config)
        torch.testing.assert_close(torch.tensor(plain_frequencies), frequencies)
        torch.testing.assert_close(rotary_frequencies(config)[0], frequencies)
        assert rotary_frequencies(config)[1] == pytest.approx(factor) == pytest.approx(plain_factor)


@pytest.mark.parametrize("hidden_size, heads", [(32, 4), (320, 5), (512, 8), (768, 8)])
def test_rotary_table_is_for_the_head_size(hidden_size, heads):
    config = MiniMindConfig(hidden_size=hidden_size, num_attention_heads=heads, num_key_value_heads=1)
    frequencies, _ = rotary_frequencies(config)
    head_size = hidden_size // heads
    assert frequencies.tolist() == pytest.approx([1e6 ** (-2 * i / head_size) for i in range(head_size // 2)])


def test_half_precision_keeps_exact_angles(dense, tmp_path):
    exact = dense.model.rotary_frequencies
    assert torch.equal(copy.deepcopy(dense).bfloat16().half().model.rotary_frequencies, exact)
    dense.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.model.rotary_frequencies, exact)


def test_a_saved_model_loads_as_the_same(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(random_ids(1, 9)).logits, any_model(random_ids(1, 9)).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    "shape, words", [({"hidden_size": 30}, "30"), ({"num_key_value_heads": 3}, "3"), ({"hidden_size": 36}, "even")]
)
def test_shape_that_does_not_divide_is_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        MiniMindConfig(**{"hidden_size": 32, "num_attention_heads": 4} | shape)


@pytest.mark.parametrize("hidden_size, layers, millions", [(512, 8, 25.83), (768, 16, 104.03)])
def test_parameter_counts(hidden_size, layers, millions):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=hidden_size, num_hidden_layers=layers))
    # Not every release ties the head to the embedding on the meta device, so it is skipped by name.
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name != "lm_head.weight"}
    assert sum(sizes.values()) / 1e6 == pytest.approx(millions, abs=0.005)


# ---- the cache, and generate()


def test_greedy_with_the_cache_is_greedy_without(any_model):
    lengths = []
    hook = any_model.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for prompt in PROMPTS:
        lengths.clear()
        ids = torch.tensor([prompt])
        without = any_model.generate(ids, use_cache=False, **GREEDY)
        with_cache = any_model.generate(ids, **GREEDY)
        assert with_cache.tolist() == without.tolist()
        assert lengths == [*range(len(prompt), len(prompt) + 10), len(prompt), *[1] * 9]
    hook.remove()


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_a_left_padded_batch_is_one_by_one(any_model, how):
    alone = [any_model.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist() for p in PROMPTS]
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)
    ids, mask = left_padded(PROMPTS)
    together = any_model.generate(ids, attention_mask=mask, **how, **GREEDY)
    assert together[:, ids.shape[1] :].tolist() == alone


def test_prompt_lookup_gives_the_same(any_model):
    """Several candidate tokens enter the filled cache at once; wrong ones are removed again."""
    for prompt in PROMPTS:
        ids = torch.tensor([prompt * 3])
        expected = any_model.generate(ids, eos_token_id=0, **GREEDY)
        guessed = any_model.generate(ids, eos_token_id=0, prompt_lookup_num_tokens=3, **GREEDY)
        assert guessed.tolist() == expected.tolist()


def test_left_pads_do_not_change_the_logits(any_model):
    ids, mask = left_padded(PROMPTS)
    logits = any_model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, prompt in zip(logits, PROMPTS, strict=True):
        torch.testing.assert_close(row[-len(prompt) :], any_model(torch.tensor([prompt])).logits[0])


def test_pads_in_the_middle_do_not_count(any_model):
    """As when a right-padded batch fills the cache and its conversations continue."""
    with_pads, mask = torch.tensor([[1, 50, 60, 0, 0, 70, 80]]), torch.tensor([[1, 1, 1, 0, 0, 1, 1]])
    expected = any_model(with_pads[mask.bool()][None]).logits[0]
    torch.testing.assert_close(any_model(with_pads, attention_mask=mask).logits[mask.bool()], expected)
    cache = any_model(with_pads[:, :5], attention_mask=mask[:, :5], use_cache=True)[CACHE_NAME]
    after = any_model(with_pads[:, 5:], attention_mask=mask, cache=cache).logits[0]
    torch.testing.assert_close(after, expected[3:])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static", "exactly full static"])
def test_several_tokens_into_a_filled_cache(any_model, kind, padded):
    ids = random_ids(2, 20)
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :5], mask[0, :5] = 0, 0
    whole = any_model(ids, attention_mask=mask if padded else None).logits
    if kind == "dynamic":
        cache = DynamicCache()
    else:
        cache = StaticCache(config=any_model.config, max_cache_len=20 if "full" in kind else 33)
    pieces = []
    for start, end in ((0, 7), (7, 8), (8, 15), (15, 20)):
        seen = mask[:, :end] if padded else None
        pieces.append(any_model(ids[:, start:end], attention_mask=seen, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


def test_use_cache_makes_a_cache_and_training_makes_none(dense):
    ids = random_ids(1, 6)
    first = dense(ids, use_cache=True)
    assert first[CACHE_NAME].get_seq_length() == 6
    assert CACHE_NAME not in dense(ids)


def test_a_fresh_output_per_forward(dense):
    ids = random_ids(1, 8)
    first = dense(ids, labels=ids)
    kept_logits, kept_loss = first.logits.clone(), float(first.loss.detach())
    second = dense(ids.flip(1), labels=ids)
    assert second is not first
    assert second.logits.data_ptr() != first.logits.data_ptr()
    assert torch.equal(first.logits, kept_logits)
    assert float(first.loss.detach()) == kept_loss != float(second.loss.detach())


def test_logits_to_keep(dense):
    ids = random_ids(2, 8)
    torch.testing.assert_close(dense(ids, logits_to_keep=3).logits, dense(ids).logits[:, -3:])


# ---- attention: grouped heads, and a mask only where one is needed


@pytest.fixture
def attention_calls(monkeypatch):
    calls, real = [], F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        calls.append({"query": query, "key": key, "value": value} | options)
        return real(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def test_keys_are_not_repeated_and_causal_needs_no_mask(dense, attention_calls):
    ids = random_ids(2, 12)
    ids[1, 8:] = 0  # right-padded, as in training
    for attention_mask in (None, torch.ones_like(ids)):
        attention_calls.clear()
        dense(ids, attention_mask=attention_mask, labels=ids)
        assert len(attention_calls) == dense.config.num_hidden_layers
        for call in attention_calls:
            assert call["query"].shape == (2, 4, 12, 8)
            assert call["key"].shape == call["value"].shape == (2, 2, 12, 8)
            assert call["attn_mask"] is None
            assert call["is_causal"] is True
            assert call["enable_gqa"] is True


def test_one_token_after_a_cache_needs_no_mask_but_several_do(dense, attention_calls):
    cache = DynamicCache()
    dense(random_ids(1, 5), past_key_values=cache)
    for length, needs_mask in ((1, False), (3, True)):
        attention_calls.clear()
        dense(random_ids(1, length), past_key_values=cache)
        assert [call["attn_mask"] is not None for call in attention_calls] == [needs_mask] * 2
        assert not any(call["is_causal"] for call in attention_calls)
        assert all(call["key"].shape[1] == 2 for call in attention_calls)
        # The two heads of a group as two queries of one head, where there is a single token.
        assert {call["query"].shape for call in attention_calls} == {(1, 2, 2, 8) if length == 1 else (1, 4, 3, 8)}


# ---- experts


@torch.no_grad()
def test_balancing_loss_is_per_sequence_and_without_pads():
    model = tiny_model(use_moe=True, aux_loss_alpha=0.5)
    ids = random_ids(3, 14)
    ids[1, 9:], ids[2, 3:] = 0, 0
    output = model(ids, labels=torch.full_like(ids, -100))
    each = []
    for row in ids.tolist():
        _, balance = plain_model.decode(model, plain_model.embed(model, row), [int(token != 0) for token in row])
        each.append(balance)
    assert len({round(balance, 3) for balance in each}) == 3
    assert float(output.aux_loss) == pytest.approx(sum(each) / 3, rel=1e-4)
    # With no learned tokens the loss is the balancing loss alone.
    assert float(output.loss) == pytest.approx(float(output.aux_loss))
    # A sum over tokens does not mix with a mean over samples.
    assert float(model(ids, labels=torch.full_like(ids, -100), reduction="sum").loss) == 0
    # A sample's balancing loss does not depend on its padding.
    for row, length, balance in zip(ids, (14, 9, 3), each, strict=True):
        assert float(model(row[None, :length]).aux_loss) == pytest.approx(balance, rel=1e-4)


def test_balancing_loss_teaches_the_router():
    model = tiny_model(use_moe=True)
    model(random_ids(2, 14)).aux_loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.model.layers)


def test_a_dense_model_has_no_balancing_loss(dense):
    assert dense(random_ids(1, 5)).aux_loss is None


def test_experts_under_bfloat16_autocast_stay_near_float32():
    model, ids = tiny_model(use_moe=True), random_ids(2, 14)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(ids).logits.float()
    exact = model(ids).logits
    assert (rough - exact).pow(2).mean().sqrt() < 0.1 * exact.std()


# ---- the loss


def labelled(ids):
    """Returns labels with learned spans, pads, and a sample with nothing learned."""
    labels = ids.clone()
    labels[:, :4] = -100
    labels[0, 9:] = -100
    labels[1] = -100
    return labels


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_learned_positions_give_the_loss_and_gradient_of_labels(dense, reduction):
    ids = random_ids(3, 12)
    labels = labelled(ids)
    logits = dense(ids).logits
    learned = int((labels[:, 1:] != -100).sum())
    mean = plain_model.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().tolist())
    expected = mean if reduction == "mean" else mean * learned
    positions = (labels.flatten() != -100).nonzero().flatten()
    padded = torch.cat((positions, torch.tensor([0, 1, 2])))  # -100 there: ignored
    common = {"input_ids": ids, "labels": labels, "reduction": reduction}
    loss, grads = gradients(dense, **common)
    assert loss == pytest.approx(expected, rel=1e-5)
    for learned_positions in (positions, padded):
        other_loss, other_grads = gradients(dense, learned_positions=learned_positions, **common)
        assert other_loss == pytest.approx(expected, rel=1e-5)
        for name, gradient in grads.items():
            torch.testing.assert_close(other_grads[name], gradient, atol=1e-5, rtol=1e-4)
    logits_there = dense(ids, labels=labels, learned_positions=positions).logits
    assert logits_there.shape == (learned, 128)


def test_a_first_token_is_never_learned(dense):
    """Nothing precedes it, and the last token of the previous sample must not be used instead."""
    ids = random_ids(3, 6)
    everywhere = torch.arange(ids.numel())
    by_labels, grads = gradients(dense, input_ids=ids, labels=ids)
    by_position, other_grads = gradients(dense, input_ids=ids, labels=ids, learned_positions=everywhere)
    assert by_position == pytest.approx(by_labels, rel=1e-6)
    for name, gradient in grads.items():
        torch.testing.assert_close(other_grads[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("by_position", [False, True])
def test_nothing_learned_is_zero_and_not_nan(dense, by_position, reduction):
    ids = random_ids(2, 6)
    positions = torch.zeros(0, dtype=torch.long) if by_position else None
    inputs = {"input_ids": ids, "labels": torch.full_like(ids, -100), "learned_positions": positions}
    loss, grads = gradients(dense, reduction=reduction, **inputs)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in grads.values())


def test_the_loss_of_uniform_guessing_is_log_vocabulary():
    model, ids = tiny_model(), random_ids(2, 9)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert float(model(ids, labels=ids).loss.detach()) == pytest.approx(math.log(128), rel=1e-6)
