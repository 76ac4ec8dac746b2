"""Which samples make up which batch, on any number of ranks and after resuming."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dataset.sampler import BatchSampler, epoch_order


def lengths_of(count):
    return np.random.default_rng(count).integers(200, 640, count)


def all_batches(lengths, batch_size, accumulation_steps, world_size, start=(0, 0), **options):
    """Returns indices by [step][micro-batch][rank], from each rank's own sampler."""
    ranks = []
    for rank in range(world_size):
        options |= {"rank": rank, "world_size": world_size, "start": start}
        sampler = BatchSampler(lengths, batch_size, accumulation_steps, **options)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        assert len(batches) == accumulation_steps * len(list(sampler.steps()))
        ranks.append(batches)
    assert len({len(batches) for batches in ranks}) == 1  # otherwise one would wait forever
    micro_steps = [list(of_ranks) for of_ranks in zip(*ranks, strict=True)]
    return [micro_steps[i : i + accumulation_steps] for i in range(0, len(micro_steps), accumulation_steps)]


def flat(steps):
    return [index for step in steps for micro_step in step for batch in micro_step for index in batch]


@settings(max_examples=60, deadline=None, database=None)  # no database: writes nothing into the project
@given(count=st.integers(0, 5000), seed=st.integers(0, 2**32), epoch=st.integers(0, 100))
def test_an_order_has_every_index_once(count, seed, epoch):
    lengths = lengths_of(count)
    order = epoch_order(lengths, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, epoch_order(lengths, seed, epoch))


@pytest.mark.parametrize("lengths", [lengths_of(1000), np.full(1000, 300), np.arange(1000)], ids=["any", "one", "own"])
def test_every_seed_and_epoch_has_its_own_order(lengths):
    orders = [epoch_order(lengths, seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(order == other) < 0.1


@pytest.mark.parametrize("accumulation_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_step_is_the_next_slice_of_the_order(world_size, accumulation_steps):
    lengths, batch_size = lengths_of(203), 4
    steps = all_batches(lengths, batch_size, accumulation_steps, world_size, epochs=2, seed=7)
    group = batch_size * accumulation_steps * world_size
    expected = []
    for epoch in range(2):
        order = epoch_order(lengths, 7, epoch)
        expected += [order[start : start + group].tolist() for start in range(0, 203, group)]
    assert [flat([step]) for step in steps] == expected
    for step in steps:
        assert len(step) == accumulation_steps
        sizes = [len(batch) for micro_step in step for batch in micro_step]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1  # the last step is divided evenly


@settings(max_examples=100, deadline=None, database=None)
@given(
    count=st.integers(1, 120),
    batch_size=st.integers(1, 9),
    accumulation_steps=st.integers(1, 4),
    world_size=st.integers(1, 4),
    epochs=st.integers(1, 3),
    data=st.data(),
)
def test_every_sample_once_an_epoch_and_an_exact_resume(
    count, batch_size, accumulation_steps, world_size, epochs, data
):
    options = {"epochs": epochs, "seed": 3}
    sizes = (batch_size, accumulation_steps, world_size)
    lengths = lengths_of(count)
    steps = all_batches(lengths, *sizes, **options)
    seen = flat(steps)
    assert seen == [index for epoch in range(epochs) for index in epoch_order(lengths, 3, epoch)]
    sampler = BatchSampler(lengths, batch_size, accumulation_steps, world_size=world_size, **options)
    positions, following, shares = zip(*sampler.steps(), strict=True)
    assert len(positions) == len(steps) and following == (*positions[1:], (epochs, 0))
    assert shares[0] == 0 and list(shares) == sorted(shares) and shares[-1] == (len(steps) > 1)
    step = data.draw(st.integers(0, len(steps) - 1))
    assert all_batches(lengths, *sizes, start=positions[step], **options) == steps[step:]
    # With other sizes too, exactly the samples not yet seen follow.
    epoch, sample = positions[step]
    assert flat(all_batches(lengths, 5, 1, 2, start=(epoch, sample), **options)) == seen[epoch * count + sample :]


def test_a_finished_run_has_nothing_left():
    for start in ((2, 0), (3, 0), (1, 50)):
        assert all_batches(lengths_of(50), 4, 2, 2, start=start, epochs=2) == []


def test_fewer_samples_than_ranks():
    [step] = all_batches(lengths_of(2), 1, 2, 4)
    assert sorted(flat([step])) == [0, 1]
    assert sum(len(batch) == 0 for micro_step in step for batch in micro_step) == 6


def useful_share(lengths, batch_size, multiple=8):
    batches = [lengths[batch] for batch in BatchSampler(lengths, batch_size)]
    return lengths.sum() / sum(-(-batch.max() // multiple) * multiple * len(batch) for batch in batches)


def captions(rng, count):
    return np.minimum(215 + rng.lognormal(np.log(25), 0.5, count), 640).astype(int)  # 196 of them the picture


def dialogues_of_any_length(rng, count):
    return rng.integers(200, 1501, count)


def dialogues_mostly_short(rng, count):
    return np.clip(200 + rng.lognormal(np.log(250), 0.8, count), 200, 1500).astype(int)


@pytest.mark.parametrize("draw", [captions, dialogues_of_any_length, dialogues_mostly_short])
@pytest.mark.parametrize("seed", range(2))
def test_at_most_5_percent_of_a_batch_is_padding(draw, seed):
    """With lengths rounded up to a multiple of 8; a plain shuffle has over 20 % at a batch of 256."""
    lengths = draw(np.random.default_rng(seed), 20_000)
    shuffled = [lengths[i : i + 256] for i in range(0, len(lengths), 256)]
    assert lengths.sum() / sum(batch.max() * len(batch) for batch in shuffled) < 0.8
    for batch_size in (1, 4, 16, 24, 64, 256):
        assert useful_share(lengths, batch_size) >= 0.95


def test_a_file_smaller_than_a_batch_is_shuffled_too():
    orders = {tuple(epoch_order(np.arange(12) * 50 + 200, 0, epoch)) for epoch in range(5)}
    assert len(orders) == 5


def test_neighbours_change_even_if_all_lengths_differ():
    lengths = np.sort(dialogues_of_any_length(np.random.default_rng(0), 5000)) + np.linspace(0, 0.9, 5000)
    first, second = (list(BatchSampler(lengths, 16, seed=seed)) for seed in (1, 2))
    mates = {index: set(batch) for batch in first for index in batch}
    again = [len(mates[index] & set(batch)) - 1 for batch in second for index in batch]
    assert np.mean(again) < 4  # of 15


class Rows(torch.utils.data.Dataset):
    """Reads rows a batch at a time, as VLMDataset does."""

    def __len__(self):
        return 21

    def __getitems__(self, indices):
        return [10 * index for index in indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_feeds_a_loader(workers):
    sampler = BatchSampler(lengths_of(21), 4, 2, epochs=2, rank=1, world_size=2)
    loader = DataLoader(Rows(), batch_sampler=sampler, num_workers=workers, collate_fn=list)
    assert len(loader) == 8
    assert list(loader) == [[10 * index for index in batch] for batch in sampler]
