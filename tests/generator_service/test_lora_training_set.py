import numpy as np
import pytest
import torch

from generator_service.adapt.training_set import class_means, held_out


@pytest.mark.parametrize(("part", "expected"), [(0.0, 0), (0.1, 10), (0.5, 50), (1.0, 96)])
def test_so_many_are_held_out_of_every_class_alike(part, expected):
    labels = np.repeat(np.arange(4), [10, 20, 30, 40])
    chosen = held_out(labels, part, 1000, seed=0)
    each = np.bincount(labels[chosen], minlength=4)
    assert chosen.sum() == expected and (each < [10, 20, 30, 40]).all()
    assert np.abs(each - part * np.array([9, 19, 29, 39])).max() <= 1.6


def test_a_class_of_one_image_keeps_it():
    labels = np.array([0, 1, 1, 1, 1, 2])
    assert all(not held_out(labels, 0.9, 1000, seed)[[0, 5]].any() for seed in range(20))
    assert not held_out(np.arange(5), 0.5, 1000, seed=0).any()


def test_what_is_held_out_follows_from_the_seed_and_is_bounded():
    labels = np.arange(1000) % 10
    assert np.array_equal(held_out(labels, 0.5, 64, 1), held_out(labels, 0.5, 64, 1))
    assert not np.array_equal(held_out(labels, 0.5, 64, 1), held_out(labels, 0.5, 64, 2))
    assert held_out(labels, 0.5, 64, 1).sum() == 64


def test_class_means_by_hand():
    features = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0]])
    means = class_means(features, np.array([2, 0, 2]), 3)
    assert torch.equal(means[[0, 2]], torch.tensor([[10.0, 20.0], [2.0, 3.0]])) and means[1].isnan().all()
