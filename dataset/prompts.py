"""Prompts to generate from: conversations and pictures to one left-padded batch."""

import torch

from dataset.chat import IMAGE_TAG, ChatEncoder


def with_images(prompt: str, images: int) -> str:
    """The prompt with an `<image>` for each picture: as typed where it has that many, else they follow the text.

    Raises:
        ValueError: If it has some, but not that many.
    """
    tags = prompt.count(IMAGE_TAG)
    if tags not in (0, images):
        raise ValueError(f"the prompt has {tags} {IMAGE_TAG} for {images} picture(s)")
    return prompt if tags else "\n".join([prompt, *[IMAGE_TAG] * images])


def prompt_batch(encoder: ChatEncoder, conversations: list[list[dict]], pictures: list[list[torch.Tensor]]) -> dict:
    """What `generate` takes for a batch of conversations that the assistant is to answer.

    Args:
        conversations: Turns, the last of them the user's.
        pictures: Each conversation's pictures in order, uint8 (3, 224, 224).

    Returns:
        input_ids and attention_mask (B, L), padded at the left; pixel_values (all images, 3, 224, 224) and image_starts
        (all images, 2), or None where no conversation has a picture.
    """
    chats = encoder.encode(conversations, add_generation_prompt=True)
    longest = max(len(chat.input_ids) for chat in chats)
    input_ids = torch.full((len(chats), longest), encoder.pad_id)
    attention_mask = torch.zeros_like(input_ids)
    starts = []
    for row, chat in enumerate(chats):
        left = longest - len(chat.input_ids)
        input_ids[row, left:] = torch.tensor(chat.input_ids)
        attention_mask[row, left:] = 1
        starts += [[row, left + start] for start in chat.image_starts]
        if len(chat.image_starts) != len(pictures[row]):
            tags, given = len(chat.image_starts), len(pictures[row])
            raise ValueError(f"conversation {row + 1} has {tags} {IMAGE_TAG}, but {given} picture(s) were given")
    flat = [picture for of_one in pictures for picture in of_one]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.stack(flat) if flat else None,
        "image_starts": torch.tensor(starts) if flat else None,
    }
