"""Use an exported folder as a user of transformers does: nothing of this repository is imported.

    python transformers_user.py FOLDER...

FOLDER.chats.json holds conversations, and the files of their images in order. FOLDER.pt gets the prompts' token ids,
the logits at their positions, and the greedy answers' ids.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

for folder in sys.argv[1:]:
    chats = json.load(open(f"{folder}.chats.json", encoding="utf-8"))
    sees_images = json.load(open(f"{folder}/config.json", encoding="utf-8"))["model_type"] == "llava"
    model_class = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    processor = (AutoProcessor if sees_images else AutoTokenizer).from_pretrained(folder)
    texts = [
        processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for turns in chats["conversations"]
    ]
    images = {"images": [Image.open(name) for name in chats["images"]]} if sees_images else {}
    inputs = processor(text=texts, padding=True, return_tensors="pt", **images)
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    torch.save({"input_ids": inputs["input_ids"], "logits": logits, "new": new}, f"{folder}.pt")
assert not {"model.model_vlm", "trainer", "dataset", "common"} & set(sys.modules)
