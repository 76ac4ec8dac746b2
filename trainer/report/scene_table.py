"""Measures how many of the built-in set's held-out scenes a model describes correctly."""

from transformers import PreTrainedTokenizerBase

from dataset.chat import encoder_for
from dataset.pictures import PictureFormat, load_picture
from dataset.prompts import prompt_batch, with_images
from dataset.scenes.draw import draw_builtin_dataset, heldout_scenes
from dataset.scenes.grading import chance, score
from dataset.scenes.language import CHINESE, ENGLISH
from model.answers import generate_answers
from model.model_vlm import MiniMindVLM

BATCH, TOKENS = 50, 64


def scene_table(model: MiniMindVLM, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Returns the shares of correct attributes and whole captions, with shuffled images and chance to compare.

    Returns:
        Rows {"name", "attributes", "captions"}; the first is for the right pictures, asked in Chinese.
    """
    root, facts = draw_builtin_dataset(), [scene.facts for scene in heldout_scenes()]
    encoder = encoder_for(tokenizer, model.config.image_tokens)
    picture_format = PictureFormat(**model.vision_encoder.settings.picture_settings)
    paths = sorted((root / "heldout_images").iterdir())
    pictures = [[load_picture(path, picture_format=picture_format)] for path in paths]
    # Each scene gets the description of another's picture: half the set away, so that none keeps its own.
    half = len(pictures) // 2
    random_caption, constant_caption = chance(facts)
    rows = {}
    for name, language in (("Chinese", CHINESE), ("English", ENGLISH)):
        question, texts = [{"role": "user", "content": with_images(language.requests[0], 1)}], []
        for start in range(0, len(pictures), BATCH):
            part = pictures[start : start + BATCH]
            texts += generate_answers(model, tokenizer, prompt_batch(encoder, [question] * len(part), part), TOKENS)
        rows[f"{name}: right pictures"] = score(texts, facts)
        rows[f"{name}: shuffled images"] = score(texts[half:] + texts[:half], facts)
    rows |= {"chance: another scene's caption": random_caption, "chance: best single caption": constant_caption}
    return [{"name": name, "attributes": of.attributes, "captions": of.captions} for name, of in rows.items()]
