import itertools

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment

from trainer.tasks.classification import Classification, ClassificationConfig
from trainer.tasks.randaugment import randaugment

FILL = [10.0, 20.0, 30.0]


def pictures(n: int, size: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_each_row_is_torchvisions_randaugment_from_its_own_seed():
    images, seeds = pictures(6), [5, 6, 7, 8, 5, 9]
    found = randaugment(images, seeds, ops=2, magnitude=9, fill=FILL)
    theirs = RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR, fill=FILL)
    for row, seed in enumerate(seeds):
        torch.manual_seed(seed)
        assert torch.equal(found[row], theirs(images[row]))
    assert not torch.equal(found, images)


def test_torchs_random_state_stays():
    rng = torch.get_rng_state()
    randaugment(pictures(2), [1, 2], ops=3, magnitude=30, fill=FILL)
    assert torch.equal(rng, torch.get_rng_state())


def task(**config: object) -> Classification:
    return Classification(ClassificationConfig(image_size=12, **config), ["a", "b"])


def test_the_task_augments_what_it_normalised():
    """The same as augmenting the pictures and normalising then; rows are independent of how a batch is split."""
    augmenting = task(randaugment=2, randaugment_magnitude=15, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    images = pictures(7)
    x = augmenting.preprocess(images.permute(0, 2, 3, 1))
    whole = augmenting.augment(x, torch.Generator().manual_seed(3))
    seeds = torch.randint(2**62, (7,), generator=torch.Generator().manual_seed(3)).tolist()
    fill = [255 * value for value in (0.3, 0.4, 0.5)]
    made = randaugment(images, seeds, ops=2, magnitude=15, fill=torch.tensor(fill).tolist())
    torch.testing.assert_close(whole, augmenting.preprocess(made.permute(0, 2, 3, 1)))
    both = task(randaugment=2, shift=2, flip=True)
    whole = both.augment(x, torch.Generator().manual_seed(3))
    parts = [
        both.augment(x[first:last], torch.Generator().manual_seed(3), first, 7)
        for first, last in itertools.pairwise([0, 3, 3, 7])
    ]
    assert torch.equal(torch.cat(parts), whole) and whole.unique(dim=0).shape[0] == 7


def test_off_it_draws_nothing():
    generator = torch.Generator().manual_seed(1)
    state, x = generator.get_state(), torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(task(randaugment=0).augment(x, generator), x)
    assert torch.equal(generator.get_state(), state)
