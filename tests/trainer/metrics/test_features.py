from pathlib import Path

import numpy as np
import torch

from trainer.metrics import feature_file, features


def test_so_many_of_each_class_are_drawn():
    labels = torch.tensor([2] * 30 + [0] * 3 + [5] * 50)
    rows = features.drawn(labels, 20, torch.Generator().manual_seed(0))
    assert torch.bincount(labels[rows]).tolist() == [3, 0, 20, 0, 0, 20]
    assert len(rows.unique()) == 43
    again = features.drawn(labels, 20, torch.Generator().manual_seed(0))
    other = features.drawn(labels, 20, torch.Generator().manual_seed(1))
    assert torch.equal(rows, again) and not torch.equal(rows, other)


def test_classes_are_spread_over_the_labels():
    assert features.spread(5, 50).tolist() == [0, 1, 2, 3, 4]
    assert features.spread(101, 3).tolist() == [0, 50, 100]


def test_some_of_the_labels_are_drawn():
    labels = torch.tensor([3, 3, 7, 1, 9, 1])
    drawn = [features.some(labels, 2, torch.Generator().manual_seed(seed)).tolist() for seed in range(30)]
    assert {label for pair in drawn for label in pair} == {1, 3, 7, 9}
    assert all(len(pair) == 2 and pair == sorted(pair) for pair in drawn)
    assert features.some(labels, 9, torch.Generator()).tolist() == [1, 3, 7, 9]


def test_a_rectangle_of_every_image_is_erased_and_nothing_else():
    images = torch.full((40, 24, 16, 3), 100, dtype=torch.uint8)
    found = features.erased(images, torch.Generator().manual_seed(0))
    assert found.dtype == torch.uint8 and found.shape == images.shape
    for image in found:
        changed = (image != 100).any(2)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        inside = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert inside.double().mean() > 0.9  # noise may be the very colour by chance
        assert 0.01 < inside.numel() / (24 * 16) < 0.45
    assert torch.equal(found, features.erased(images, torch.Generator().manual_seed(0)))


def test_components_are_those_of_a_singular_value_decomposition():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 12)) * np.linspace(5, 1, 12) + 3)
    found = features.principal_components(x, 4).double()
    centred = x - x.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    wanted = left[:, :4] * values[:4]
    signs = (found * wanted).sum(0).sign()
    assert torch.allclose(found, wanted * signs, atol=1e-5)


def test_few_components_keep_all_distances():
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(9, 300))).float()  # nine samples lie in eight dimensions
    found = features.principal_components(x)
    assert found.shape == (9, features.COMPONENTS)
    assert torch.allclose(torch.cdist(found, found), torch.cdist(x, x), atol=1e-3)


def test_what_is_written_is_read(tmp_path: Path):
    assert feature_file.read(tmp_path) is None
    draw = torch.Generator().manual_seed(0)
    given = {"real": torch.randn(4, 6, generator=draw), "dropped": torch.randn(3, 6, generator=draw)}
    labels = {"real": torch.tensor([0, 0, 1, 1]), "dropped": torch.tensor([1, 0, 1])}
    features.write(tmp_path, given, labels)
    found = feature_file.read(tmp_path)
    assert found is not None
    assert found.labels.tolist() == [0, 0, 1, 1, 1, 0, 1]
    assert [feature_file.KINDS[kind] for kind in found.kinds] == ["real"] * 4 + ["dropped"] * 3
    whole = torch.cat(list(given.values()))
    places = torch.from_numpy(found.components)
    assert torch.allclose(torch.cdist(places, places), torch.cdist(whole, whole), atol=1e-4)
