"""One contract for every entry of the trainer's registry."""

import pytest
import torch

from protocol.errors import ConfigError
from trainer.registry import ENTRIES, resolve
from trainer.selection.feedback import Scored
from trainer.selection.vog import vog
from trainer.tasks.interface import Task

CLASSES = ("left", "right", "neither")
SMALL = {"video": {"model": "small_cnn", "image_size": 12, "frames": 3, "hidden": 8}}  # others are by default


@pytest.mark.parametrize("name", ENTRIES["feedback"])
def test_every_feedback_criterion(name):
    """A finite score a row, from the arguments alone; the global random state is not touched."""
    criterion = resolve("feedback", name)
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 3
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))

    def samples() -> Scored:
        return Scored(logits, labels, lambda: features, torch.Generator().manual_seed(1))

    rng, given = torch.get_rng_state(), logits.clone()
    scores = criterion(samples())
    assert scores.shape == (50,) and scores.isfinite().all() and scores.unique().numel() == 50
    assert torch.equal(scores, criterion(samples()))
    assert torch.equal(rng, torch.get_rng_state()) and torch.equal(given, logits)


@pytest.mark.parametrize("name", ["marginal", "entropy"])
def test_the_lowest_score_is_the_least_certain_row(name):
    logits = torch.tensor([[9.0, 0.0], [0.1, 0.0], [4.0, 0.0]])
    samples = Scored(logits, torch.tensor([0, 0, 0]), lambda: 1 / 0, torch.Generator())
    assert resolve("feedback", name)(samples).argmin() == 1


@pytest.mark.parametrize("name", ENTRIES["task"])
def test_every_task(name):
    """Images or clips in, a loss and a logit a row out; one update on the batch lowers its loss; VoG can score it."""
    cls = resolve("task", name)
    task = cls(cls.Config(**SMALL.get(name, {})), CLASSES)
    assert isinstance(task, Task) and tuple(task.classes) == CLASSES
    torch.manual_seed(0)
    model = task.build_model().train()
    shape = (6, *([] if task.frame.frames is None else [task.frame.frames]), 12, 12, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 3
    x = task.augment(task.preprocess(images), torch.Generator().manual_seed(1))
    assert x.dtype == torch.float32 and len(x) == 6 and x.shape[-3] == 3

    snapshots = [{name: tensor.clone() for name, tensor in model.state_dict().items()}]
    loss = task.losses(model(x), y)
    assert loss.shape == (6,)
    loss.mean().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert task.losses(model(x), y).mean() < loss.mean()
    snapshots.append(model.state_dict())

    logits = task.predict(model, x)
    assert logits.shape == (6, 3) and not logits.requires_grad and model.training
    features = task.features(model, x)
    assert len(features) == 6 and features.ndim == 2 and not features.requires_grad and model.training
    scores = vog(model, snapshots, x, y, logit=task.true_logit)
    assert scores.isfinite().all() and (scores > 0).all()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown feedback 'margin'; known: entropy, marginal, random, similarity"):
        resolve("feedback", "margin")
