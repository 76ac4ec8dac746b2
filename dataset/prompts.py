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
    for row, chat in enumerate(chats):
        tags, given = len(chat.image_starts), len(pictures[row])
        if tags != given:
            raise ValueError(f"conversation {row + 1} has {tags} {IMAGE_TAG}, but {given} picture(s) were given")
    batch = left_padded([chat.input_ids for chat in chats], [chat.image_starts for chat in chats], encoder.pad_id)
    flat = [picture for of_one in pictures for picture in of_one]
    return batch | {"pixel_values": torch.stack(flat) if flat else None}


def left_padded(prompts: list, image_starts: list[list[int]], pad_token_id: int) -> dict:
    """Prompts of any lengths to one batch.

    Args:
        prompts: Each one's token ids.
        image_starts: Each one's images' first positions.

    Returns:
        input_ids and attention_mask (B, L), and image_starts (all images, 2) or None where there is no image.
    """
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_token_id)
    attention_mask, starts = torch.zeros_like(input_ids), []
    for row, prompt in enumerate(prompts):
        left = longest - len(prompt)
        input_ids[row, left:], attention_mask[row, left:] = torch.as_tensor(prompt), 1
        starts += [[row, left + start] for start in image_starts[row]]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_starts": torch.tensor(starts) if starts else None,
    }
