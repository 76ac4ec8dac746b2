"""Loading the tokenizer that belongs to a language model."""

import hashlib
from pathlib import Path

import datasets
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.errors import UsageError
from common.paths import TOKENIZER_3V_DIR, display_path
from dataset.chat import encoder_for, image_placeholder, image_token_id, uses_template
from model.weights import Weights


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer's folder; another language model's gets a placeholder for images if it has none.

    Raises UsageError if it is missing, unreadable, or neither of MiniMind's form nor with a chat template.
    """
    if not (path / "tokenizer.json").is_file():
        part = "tokenizer_3v" if path == TOKENIZER_3V_DIR else "tokenizer"
        raise UsageError(
            f"no tokenizer in {display_path(path)}: tokenizer.json is missing; --tokenizer_path names another folder "
            f"(python scripts/download.py {part})"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError("it is none of the tokenizers library")
        if max(tokenizer.get_vocab().values(), default=0) >= len(tokenizer):
            raise ValueError(f"it has {len(tokenizer)} tokens, and ids above them")
        if uses_template(tokenizer) and image_token_id(tokenizer) is None:
            tokenizer.add_tokens([image_placeholder(tokenizer)], special_tokens=True)
        encoder_for(tokenizer, image_tokens=2)
    except Exception as error:  # the tokenizers library raises plain Exception on a garbled file
        has_code = "trust_remote_code" in str(error)  # transformers would advise to run it
        reason = "it brings code of its own, which is never run" if has_code else error
        raise UsageError(f"the tokenizer in {display_path(path)} cannot be used: {reason}") from error
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 (hex) of everything that decides which ids a text gets."""
    template = str(tokenizer.chat_template) if uses_template(tokenizer) else ""
    return hashlib.sha256((tokenizer.backend_tokenizer.to_str() + template).encode("utf-8")).hexdigest()


def check_tokenizer(weights: Weights, tokenizer_sha256: str, tokenizer_path: Path, tokenizer: PreTrainedTokenizerBase):
    """Raises UsageError if the weights were trained with another tokenizer, or have fewer rows than it has tokens.

    Weights without a sidecar do not name their tokenizer, but their generation fixes the id of an image's placeholder.
    """
    expected, problem = weights.sidecar.get("tokenizer_sha256"), None
    placeholder, its_placeholder = image_token_id(tokenizer), weights.config.image_token_id
    if expected is not None and expected != tokenizer_sha256:
        problem = f"SHA-256 {expected[:12]}..., this one {tokenizer_sha256[:12]}..."
    elif expected is None and placeholder != its_placeholder:
        problem = f"of different generations: an image is token {its_placeholder} to it, but {placeholder} in this"
    elif len(tokenizer) > weights.config.vocab_size:
        problem = f"{weights.config.vocab_size} tokens, this one has {len(tokenizer)}"
    if problem:
        raise UsageError(
            f"{display_path(weights.path)} was trained with another tokenizer than {display_path(tokenizer_path)} "
            f"({problem}): name the right one with --tokenizer_path"
        )


def quiet_libraries(is_main: bool):
    """Turns off the libraries' progress bars, except those of long waits on the main process."""
    transformers.utils.logging.disable_progress_bar()
    if not is_main:
        datasets.disable_progress_bars()
