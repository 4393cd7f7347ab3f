"""The sample stream: workers, restarts and world size change nothing; evaluation counts once."""

import hashlib
import re
from collections import Counter

import pytest
import torch
from helpers.images import write_image_folder
from helpers.pipeline import (
    batch_transform,
    eval_loader,
    eval_transform,
    image_dataset,
    train_loader,
    train_transform,
)
from timm.data.distributed_sampler import RepeatAugSampler

from data import ShardSampler, TrainBatchSampler, steps_per_epoch
from utils.errors import DataError
from utils.rng import key, permutation, reseed

STREAM = {"batch_size": 4, "micro_batches": 4, "total_steps": 5, "seed": 7}  # two steps per epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_image_folder(tmp_path_factory.mktemp("set"), classes=4, train=10, val=7)
    (root / "train/class_2/003.jpg").write_bytes(b"damaged")
    return root


def train_set(root):
    later = [(1, train_transform(16)), (2, train_transform(32))]
    return image_dataset(
        root, transform=train_transform(24), later_transforms=later, train=True, seed=7
    )


def digest(*tensors):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def micro_batches(root, num_workers, start_step=0, rank=0, world_size=1, data=None):
    """{(step, micro-batch): hash of the model's input and targets, substituted files}, as in training."""
    data = data or train_set(root)
    sampler = TrainBatchSampler(
        len(data), **STREAM, start_step=start_step, rank=rank, world_size=world_size
    )
    mix = batch_transform(4, reprob=0.5, mixup=0.8, cutmix=1.0)
    batches = iter(train_loader(data, sampler, num_workers=num_workers))
    result = {}
    for step in sampler.steps:
        for micro_batch in sampler.own_micro_batches:
            batch = next(batches)
            reseed(key(7, "slot", step, micro_batch))
            result[step, micro_batch] = (digest(*mix(batch.images, batch.labels)), batch.bad)
    assert next(batches, None) is None
    return result


def test_workers_restarts_and_world_size_change_nothing(root):
    expected = micro_batches(root, num_workers=0)
    assert len({digest for digest, _ in expected.values()}) == 20
    assert sum(len(bad) for _, bad in expected.values()) == 2, "met once in each full epoch"
    for num_workers in (1, 2):
        assert micro_batches(root, num_workers) == expected
    for start in (1, 2, 3, 4):
        rest = {
            (step, micro_batch): v for (step, micro_batch), v in expected.items() if step >= start
        }
        assert micro_batches(root, num_workers=start % 2, start_step=start) == rest
    for world_size in (2, 4):
        parts = [
            micro_batches(root, 0, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        assert sum(map(len, parts)) == len(expected)
        assert {place: v for part in parts for place, v in part.items()} == expected


def test_the_size_follows_the_epoch_of_the_sample(root):
    data = train_set(root)
    sizes = [data[epoch, 0].image.shape[1:] for epoch in range(4)]
    assert sizes == [(24, 24), (16, 16), (32, 32), (32, 32)]


def test_a_second_pass_over_persistent_workers_is_the_same(root):
    data = train_set(root)
    loader = train_loader(data, TrainBatchSampler(len(data), **STREAM), num_workers=2)
    first, second = ([digest(b.images, b.labels) for b in loader] for _ in range(2))
    assert first == second


def test_every_epoch_is_a_new_order_without_repeats():
    sampler = TrainBatchSampler(103, batch_size=5, micro_batches=4, total_steps=15, seed=1)
    epochs = [[], [], []]
    for batch in sampler:
        for epoch, index, repeat in batch:
            assert repeat == 0
            epochs[epoch].append(index)
    assert [len(set(epoch)) for epoch in epochs] == [len(epoch) for epoch in epochs] == [100] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(sampler) == 60


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_repeats_are_those_of_timms_sampler(world_size):
    """As on `world_size` GPUs with one micro-batch each: the same images in the same places."""
    settings = {"batch_size": 8, "micro_batches": world_size, "total_steps": 4 // world_size * 2}
    samplers = [
        TrainBatchSampler(40, **settings, seed=5, repeats=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    order = permutation(40, key(5, "order", 0))
    theirs = RepeatAugSampler(
        range(40), world_size, 0, shuffle=False, num_repeats=3, selected_round=32, selected_ratio=0
    )
    for rank, sampler in enumerate(samplers):
        theirs.rank = rank
        ours = [sample for batch in list(sampler)[: 4 // world_size] for sample in batch]
        assert [index for _, index, _ in ours] == order[list(theirs)][: len(ours)].tolist()
        assert len({sample[1:] for sample in ours}) == len(ours)
        if world_size == 4:
            assert len({index for _, index, _ in next(iter(sampler))}) == 8, "an image twice"


def test_repeats_are_augmented_differently_and_the_first_as_ever(root):
    data = train_set(root)
    first, second = data[0, 3, 0], data[0, 3, 1]
    assert torch.equal(first.image, data[0, 3].image)
    assert not torch.equal(first.image, second.image)
    assert torch.equal(second.image, data[0, 3, 1].image)
    assert first.label == second.label


def test_resuming_costs_no_more_at_the_end_of_an_epoch():
    sampler = TrainBatchSampler(
        1000, batch_size=1, micro_batches=1, total_steps=10**12, seed=0, start_step=10**9 - 1
    )
    assert next(iter(sampler)) == sampler.micro_batch(10**9 - 1, 0)
    assert sampler.micro_batch(10**9 - 1, 0)[0][0] == 10**6 - 1


def test_a_dataset_smaller_than_a_step_is_refused():
    assert steps_per_epoch(100, 100) == 1
    with pytest.raises(DataError, match=r"99 images, a step takes 100; .* to 99 or less"):
        TrainBatchSampler(99, batch_size=50, micro_batches=2, total_steps=1, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("num_samples", [1, 7, 64, 257])
def test_evaluation_counts_every_image_once(num_samples, batch_size, world_size):
    alone = list(ShardSampler(num_samples, batch_size=batch_size))
    seen = Counter()
    for rank in range(world_size):
        sampler = ShardSampler(num_samples, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert all(batch in alone for batch in batches)
        seen.update(index for batch in batches for index in batch)
    assert seen == Counter(range(num_samples))


def test_an_evaluation_leaves_the_generators_alone(root):
    data = image_dataset(root, "val", transform=eval_transform(24))
    loader = eval_loader(data, ShardSampler(len(data), batch_size=8), num_workers=1)
    reseed(3)
    expected = torch.rand(1)
    for _ in range(2):
        reseed(3)
        batches = list(loader)
        assert torch.equal(torch.rand(1), expected)
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(28))
        assert torch.cat([batch.labels for batch in batches]).tolist() == data.labels.tolist()
    image = batches[1].images[0]
    assert torch.equal(image, data[8].image)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_error_in_a_worker_comes_out_as_one_line(root, num_workers):
    data = image_dataset(root, "train", transform=eval_transform(24))
    loader = eval_loader(data, ShardSampler(len(data), batch_size=8), num_workers=num_workers)
    path = re.escape(str(root / "train/class_2/003.jpg"))
    # `as error` would keep the workers in a cycle, to be waited for when it is collected.
    with pytest.raises(DataError, match=rf"^{path}[^\n]+ TEST.SKIP_BAD=True\Z"):
        list(loader)
