"""Use an exported folder as a user of transformers does: nothing of this repository is imported.

    python transformers_user.py FOLDER CHATS.json RESULT.pt

CHATS.json holds conversations, and the files of their images in order. RESULT.pt gets the prompts' token ids, the
logits at their positions, and the greedy answers' ids.
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

folder, chats_file, result_file = sys.argv[1:]
chats = json.load(open(chats_file, encoding="utf-8"))
sees_images = json.load(open(f"{folder}/config.json", encoding="utf-8"))["model_type"] == "llava"
model_class = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
model, loading = model_class.from_pretrained(folder, output_loading_info=True)
assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
processor = (AutoProcessor if sees_images else AutoTokenizer).from_pretrained(folder)
texts = [
    processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in chats["conversations"]
]
images = [Image.open(name) for name in chats["images"]]
inputs = processor(text=texts, padding=True, return_tensors="pt", **({"images": images} if sees_images else {}))
inputs.pop("token_type_ids", None)
with torch.inference_mode():
    logits = model(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
assert not {"model.model_vlm", "trainer", "dataset", "common"} & set(sys.modules)
new = ids[:, inputs["input_ids"].shape[1] :]
torch.save({"input_ids": inputs["input_ids"], "logits": logits, "new": new}, result_file)
