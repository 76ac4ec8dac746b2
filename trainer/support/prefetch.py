"""A loader's batches on the device, each copied while the one before it is computed."""

from collections.abc import Iterable, Iterator

import torch


def on_device(loader: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Yields the batches with their tensors on the device.

    On CUDA a batch is copied (from pinned memory, on a stream of its own) while the batch before it is computed.
    """
    if device.type != "cuda":
        for batch in loader:
            yield batch | {name: part.to(device) for name, part in tensors_of(batch).items()}
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in loader:
        with torch.cuda.stream(stream):
            moved = {name: part.to(device, non_blocking=True) for name, part in tensors_of(batch).items()}
            copied = stream.record_event()
        if ahead is not None:
            yield received(device, *ahead)
        ahead = batch | moved, copied, moved
    if ahead is not None:
        yield received(device, *ahead)


def tensors_of(batch: dict) -> dict[str, torch.Tensor]:
    return {name: part for name, part in batch.items() if isinstance(part, torch.Tensor)}


def received(device: torch.device, batch: dict, copied: torch.cuda.Event, moved: dict[str, torch.Tensor]) -> dict:
    """Makes the current stream wait for the copy (the host does not) and returns the batch."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in moved.values():
        tensor.record_stream(current)  # its memory is free again only when this stream has used it
    return batch
