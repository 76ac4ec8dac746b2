"""Other language models as the decoder: trained, resumed, asked and exported like MiniMind's."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import EVAL, PRETRAIN, ROOT, SFT, turn
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    GraniteConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from dataset.chat import RowError, TemplateEncoder, image_placeholder, load_tokenizer
from dataset.prompts import prompt_batch
from model.answers import generate
from scripts.export import parse_arguments
from trainer.answering.assistant import Assistant, find_model

pytest_plugins = ["tiny"]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
CHATML = """{%- for m in messages %}
{%- if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{%- endif %}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
HEADERS = """{{- '<|begin|>' }}{%- for m in messages %}
{{- '<|header|>' + m['role'] + '<|end_header|>\\n\\n' + (m['content'] | trim) + '<|turn_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|end_header|>\\n\\n' }}{%- endif %}"""
THINKING = """{%- for m in messages %}{%- set text = m['content'] %}
{%- if m['role'] == 'assistant' and '</think>' in text %}{%- set text = text.split('</think>')[-1] %}{%- endif %}
{{- '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- text + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
# Like SmolLM2, Llama 3 and Qwen3: special tokens, the template, and the tokenizer's own names for some of them.
KINDS = {
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML)
    + ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},),
    "llama": (["<|begin|>", "<|end|>", "<|reserved_0|>", "<|header|>", "<|end_header|>", "<|turn_end|>"], HEADERS)
    + ({"bos_token": "<|begin|>", "eos_token": "<|turn_end|>"},),
    "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<think>", "</think>"], THINKING)
    + ({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},),
}
PLACEHOLDERS = {"smollm2": "<image>", "llama": "<|reserved_0|>", "qwen3": "<|image_pad|>"}


def save_language_model(folder: Path, kind: str) -> Path:
    """Writes a tiny language model with random weights and its tokenizer."""
    special, template, names = KINDS[kind]
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    whole.chat_template = template
    whole.save_pretrained(folder)
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(whole), "tie_word_embeddings": kind != "llama"}
    shape |= {"bos_token_id": 1, "eos_token_id": whole.eos_token_id}
    config = Qwen3Config(**shape, head_dim=16) if kind == "qwen3" else LlamaConfig(**shape)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(tmp_path, kind):
    return save_language_model(tmp_path / "llm", kind)


CONVERSATIONS = [
    [turn("user", "<image>\nWhat?"), turn("assistant", "A dog.")],
    [turn("system", "Be"), turn("user", "Hi <|im_end|>"), turn("assistant", "a"), turn("user", "b<image><image>c")]
    + [turn("assistant", "d")],
]


def test_rows_are_encoded_as_the_template_renders_them(folder, kind):
    tokenizer = load_tokenizer(folder)
    assert image_placeholder(tokenizer) == PLACEHOLDERS[kind]
    encoder = TemplateEncoder(tokenizer, 3)
    for turns, chat in zip(CONVERSATIONS, encoder.encode(CONVERSATIONS), strict=True):
        shown = [{**one, "content": one["content"].replace("<image>", PLACEHOLDERS[kind] * 3)} for one in turns]
        assert tokenizer.decode(chat.input_ids) == tokenizer.apply_chat_template(shown, tokenize=False)
        end = tokenizer.decode(encoder.end_id)
        answers = [one["content"] + end for one in turns if one["role"] == "assistant"]
        assert [tokenizer.decode(chat.input_ids[start:stop]) for start, stop in chat.learned] == answers
        assert all(chat.input_ids[at : at + 3] == [encoder.image_token_id] * 3 for at in chat.image_starts)
        assert chat.input_ids.count(encoder.image_token_id) == 3 * len(chat.image_starts)
        [prompt] = encoder.encode([turns[:-1]], add_generation_prompt=True)
        assert prompt.input_ids == chat.input_ids[: chat.learned[-1][0]]
    # What a user types is text, whatever it looks like.
    plain = encoder.encode([[turn("user", end), turn("assistant", "x")]])[0]
    assert plain.input_ids.count(encoder.end_id) == encoder.encode([[turn("user", "y"), turn("assistant", "x")]])[
        0
    ].input_ids.count(encoder.end_id)


def test_a_row_that_the_template_changes_is_refused(tmp_path):
    encoder = TemplateEncoder(load_tokenizer(save_language_model(tmp_path / "llm", "qwen3")), 3)
    with pytest.raises(RowError, match="changes the text of a turn"):
        encoder.encode([[turn("user", "q"), turn("assistant", "<think>x</think>y")]])


def test_it_is_trained_resumed_asked_and_exported(world, folder, kind, tmp_path):
    out, hf = tmp_path / "out", tmp_path / "hf"
    files = [*world.files("pretrain", out), "--save_interval", 1, "--batch_size", 9]
    del files[files.index("--tokenizer_path") : files.index("--tokenizer_path") + 2]
    first = world.run(PRETRAIN, *files, "--llm_path", folder, "--epochs", 1).passed()
    assert "llm" in first.out
    again = [PRETRAIN, *files, "--llm_path", folder, "--epochs", 2, "--from_resume", 1]
    assert "3 to go" in world.run(*again).passed().out
    rows = ["--data_path", world.root / "sft.jsonl", "--images_path", world.images, "--save_dir", out]
    rows += ["--num_workers", 0, "--device", "cpu", "--learning_rate", 1e-3, "--batch_size", 9, "--epochs", 1]
    world.run(SFT, *rows, "--eval_data", world.root / "sft.jsonl").passed()
    ask = ["--save_dir", out, "--device", "cpu", "--max_new_tokens", 4]
    world.run(EVAL, *ask, "--image", world.images / "0.jpg").passed()
    assert "learned tokens" in world.run(EVAL, *ask, "--eval_data", world.root / "sft.jsonl").passed().out
    world.run(EVAL, *ask, "--chat", typed=f"{world.images / '0.jpg'} What?\nAnd?\n".encode()).passed()
    assert (
        "Loading weights" not in world.run(ROOT / "scripts/export.py", "--save_dir", out, "--folder", hf).passed().err
    )
    from_folder = world.run(EVAL, "--load_from", hf, *ask[2:], "--temperature", 0, "--image", world.images / "0.jpg")
    from_file = world.run(EVAL, *ask, "--temperature", 0, "--image", world.images / "0.jpg").passed()
    assert from_folder.passed().out.splitlines()[1:-2] == from_file.out.splitlines()[1:-2]
    its_own_llava(out, hf, world.images)


@torch.inference_mode()
def its_own_llava(out: Path, hf: Path, images: Path):
    """transformers' LLaVA has the logits, tokens and greedy answers of the weights it was exported from."""
    assistant = Assistant(find_model(parse_arguments(["--save_dir", str(out)])), "cpu")
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(hf, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor, form = AutoProcessor.from_pretrained(hf), assistant.loaded.prompt_form
    chats = [turn("user", form.replace("{prompt}", "What?"))], [turn("user", "Hi")]
    pixels = assistant.load_picture(images / "1.jpg")
    ours = prompt_batch(assistant.encoder, list(chats), [[pixels], []])
    newline, first = "\n" in form, form.startswith("<image>")
    parts = [{"type": "text", "text": "What?"}, {"type": "image"}][:: -1 if first else 1]
    assert newline == ("\n" in form)
    shown = [{"role": "user", "content": parts}], chats[1]
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in shown]
    inputs = processor(text=texts, images=[Image.open(images / "1.jpg")], padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], ours["input_ids"])
    inputs.pop("token_type_ids", None)
    difference = theirs(**inputs).logits - assistant.model(**ours).logits
    assert float(difference[ours["attention_mask"].bool()].abs().max()) < 1e-4
    new = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)[:, ours["input_ids"].shape[1] :]
    assert torch.equal(new, generate(assistant.model, ours, 6))


def test_adapters_learn_beside_frozen_matrices_and_are_merged_into_the_weights(world, tmp_path):
    pytest.importorskip("peft")
    folder, out = save_language_model(tmp_path / "llm", "llama"), tmp_path / "out"
    files = ["--data_path", world.root / "sft.jsonl", "--images_path", world.images, "--vision_model_path", world.tower]
    files += ["--llm_path", folder, "--num_workers", 0, "--device", "cpu", "--eval_data", "none", "--batch_size", 9]
    files += ["--lora", 4, "--learning_rate", 1e-2, "--save_interval", 1, "--save_dir"]
    world.run(SFT, *files, out, "--epochs", 2).passed()
    stopped = "import os, signal, trainer.resume as r; save = r.Checkpoints.save\n"
    stopped += "r.Checkpoints.save = lambda self, parts, last: (save(self, parts, last), os.kill(os.getpid(), 9))"
    world.run(SFT, *files, tmp_path / "again", "--epochs", 2, hook=stopped)
    world.run(SFT, *files, tmp_path / "again", "--epochs", 2, "--from_resume", 1).passed()
    once, again = (torch.load(path / "sft_vlm_32.pth", weights_only=True) for path in (out, tmp_path / "again"))
    assert all(torch.equal(once[name], again[name]) for name in once | again)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(once[name].float(), tensor)}
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    assert {name.split(".")[-2] for name in changed} == {f"{part}_proj" for part in parts}
    assert not any("lora" in name for name in once)
    world.run(EVAL, "--save_dir", out, "--device", "cpu", "--image", world.images / "0.jpg").passed()
    refused = world.run(SFT, *files, out, "--freeze_llm", "all")
    refused.refused("--lora 4 trains the decoder", "use --freeze_llm none")


def test_what_is_no_language_model_is_refused(world, tmp_path):
    folder = save_language_model(tmp_path / "llm", "smollm2")
    files = ["--data_path", world.root / "sft.jsonl", "--images_path", world.images, "--vision_model_path", world.tower]
    files += ["--num_workers", 0, "--device", "cpu", "--save_dir", tmp_path / "out", "--llm_path", folder]
    config = json.loads((folder / "config.json").read_text())
    for broken, words in {
        json.dumps(config | {"hidden_size": -1}): ("hidden_size is -1",),
        json.dumps(config | {"model_type": "clip"}): ("--llm_path", "clip is no causal language model"),
        json.dumps(config | {"num_hidden_layers": 3}): ("weights are missing",),
        "[]": ("an object is needed",),
    }.items():
        (folder / "config.json").write_text(broken)
        world.run(PRETRAIN, *files).refused(*words)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    world.run(PRETRAIN, *files).refused("the tokenizer", "chat template")
    (folder / "tokenizer.json").unlink()
    world.run(PRETRAIN, *files).refused("no tokenizer in")
    (folder / "config.json").unlink()
    world.run(PRETRAIN, *files).refused("--llm_path", "no folder of a language model: config.json is missing")


@pytest.mark.parametrize(
    "llm", [{"model_type": "nothing"}, {"hidden_size": "x"}, {"num_attention_heads": 0}, {"vocab_size": 1 << 40}]
)
def test_a_damaged_sidecar_is_refused(world, tmp_path, llm):
    folder, out = save_language_model(tmp_path / "llm", "smollm2"), tmp_path / "out"
    # Without a mark before the user's text, as GPT-2's.
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    files = ["--data_path", world.root / "pretrain.jsonl", "--images_path", world.images, "--save_dir", out]
    files += ["--vision_model_path", world.tower, "--num_workers", 0, "--device", "cpu", "--eval_data", "none"]
    world.run(PRETRAIN, *files, "--llm_path", folder, "--epochs", 1).passed()
    sidecar = json.loads((out / "pretrain_vlm_32.json").read_text())
    sidecar["config"]["llm"] |= llm
    (out / "pretrain_vlm_32.json").write_text(json.dumps(sidecar))
    ask = ["--weight", "pretrain_vlm", "--save_dir", out, "--device", "cpu", "--image", world.images / "0.jpg"]
    world.run(EVAL, *ask).refused("pretrain_vlm_32")


def test_what_the_export_cannot_express_is_refused(world, tmp_path):
    folder, out = save_language_model(tmp_path / "llm", "smollm2"), tmp_path / "out"
    config = GraniteConfig(**SHAPE | {"vocab_size": 259}, logits_scaling=8.0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    files = ["--data_path", world.root / "pretrain.jsonl", "--images_path", world.images, "--save_dir", out]
    files += ["--vision_model_path", world.tower, "--num_workers", 0, "--device", "cpu", "--eval_data", "none"]
    world.run(PRETRAIN, *files, "--llm_path", folder, "--epochs", 1).passed()
    exported = world.run(ROOT / "scripts/export.py", "--save_dir", out, "--weight", "pretrain_vlm")
    exported.refused("a granite is not exported", "logits would differ")
    assert not list(out.glob("*-hf*"))
    refused = world.run(SFT, *files, "--llm_path", folder, "--hidden_size", 64)
    refused.refused("--hidden_size 64 contradicts", "llm, which has 32: leave it out")
    refused = world.run(SFT, *files, "--llm_path", folder, "--from_weight", "pretrain_vlm")
    assert "--from_weight: not allowed with argument --llm_path" in refused.err


def test_its_weights_may_have_the_name_that_a_run_starts_from(world, tmp_path):
    folder, out = save_language_model(tmp_path / "llm", "smollm2"), tmp_path / "out"
    # Without a mark before the user's text, as GPT-2's.
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    files = ["--data_path", world.root / "pretrain.jsonl", "--images_path", world.images, "--save_dir", out]
    files += ["--vision_model_path", world.tower, "--num_workers", 0, "--device", "cpu", "--eval_data", "none"]
    world.run(PRETRAIN, *files, "--llm_path", folder, "--save_weight", "llm", "--epochs", 1).passed()
    assert "llm_32.pth" in world.run(PRETRAIN, *files, "--epochs", 1).passed().out


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
def test_a_sentencepiece_tokenizer_gives_its_own_tokens(tmp_path, scheme):
    """As Llama 2's: a text gets a blank before it, whether at the start, always, or by the normalizer."""
    letters = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", "▁", *map(chr, range(32, 127)), "▁d", "▁A"])}
    tokenizer = Tokenizer(BPE(letters, [("▁", "d"), ("▁", "A")], unk_token="<unk>"))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    )
    template += "{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    whole.chat_template = template
    whole.save_pretrained(tmp_path / "llm")
    tokenizer = load_tokenizer(tmp_path / "llm")
    chats = [[turn("user", "What?"), turn("assistant", "A dog.")]]
    chats.append([*chats[0], turn("user", "And?"), turn("assistant", "dA")])
    for chat, encoded in zip(chats, TemplateEncoder(tokenizer, 2).encode(chats), strict=True):
        assert encoded.input_ids == tokenizer.apply_chat_template(chat, return_dict=False)
        [prompt] = TemplateEncoder(tokenizer, 2).encode([chat[:-1]], add_generation_prompt=True)
        asked = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt.input_ids == asked == encoded.input_ids[: encoded.learned[-1][0]]


def test_a_damaged_record_of_an_export_is_refused_and_the_ends_of_any_model_learn(world, folder, tmp_path):
    out, hf = tmp_path / "out", tmp_path / "hf"
    files = ["--data_path", world.root / "pretrain.jsonl", "--images_path", world.images, "--save_dir", out]
    files += ["--vision_model_path", world.tower, "--num_workers", 0, "--device", "cpu", "--eval_data", "none"]
    done = world.run(PRETRAIN, *files, "--llm_path", folder, "--epochs", 1, "--freeze_llm", "ends").passed()
    assert "learn" in done.out
    world.run(ROOT / "scripts/export.py", "--save_dir", out, "--weight", "pretrain_vlm", "--folder", hf).passed()
    record = json.loads((hf / "training.json").read_text())
    record["config"]["llm"]["num_attention_heads"] = 3
    (hf / "training.json").write_text(json.dumps(record))
    world.run(EVAL, "--load_from", hf, "--device", "cpu", "--image", world.images / "0.jpg").refused(str(hf))
