"""A loader's batches on the device, the next one's copy under way while this one is computed."""

from collections.abc import Iterable, Iterator

import torch


def on_device(loader: Iterable[dict], device: torch.device, names: tuple[str, ...]) -> Iterator[dict]:
    """The batches in order, their tensors of these names on the device; everything else stays as it is.

    On CUDA a batch's copy (from pinned memory, on a stream of its own) is issued before the batch ahead of it is handed
    out, so that it is done while that one is computed.
    """
    if device.type != "cuda":
        for batch in loader:
            yield batch | {name: batch[name].to(device) for name in names if name in batch}
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in loader:
        with torch.cuda.stream(stream):
            moved = {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}
            copied = stream.record_event()
        if ahead is not None:
            yield received(*ahead)
        ahead = batch | moved, copied, moved
    if ahead is not None:
        yield received(*ahead)


def received(batch: dict, copied: torch.cuda.Event, moved: dict[str, torch.Tensor]) -> dict:
    """The batch, once its copy is done in the order of the current stream (the host does not wait)."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in moved.values():
        tensor.record_stream(current)  # its memory is free again only when this stream has used it
    return batch
