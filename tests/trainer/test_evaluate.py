import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.evaluate import evaluate, gradient_magnitude, train_val_gap
from trainer.tasks.classification import Classification, ClassificationConfig


def test_by_hand():
    logits = torch.zeros(6, 4)
    logits[:, 3] = -100.0
    predicted = torch.tensor([1, 1, 0, 0, 0, 0])
    logits[torch.arange(6), predicted] = math.log(3.0)  # probabilities: 3/5 for it, 1/5 for two others
    labels = torch.tensor([1, 0, 0, 0, 0, 1])  # right, wrong, right, right, right, wrong
    result = evaluate(logits, labels, 4)
    assert result.top1 == pytest.approx(4 / 6)
    assert result.per_class == [0.75, 0.5, None, None]
    assert result.worst_case_disparity == pytest.approx(0.5 / 0.75)
    assert result.loss == pytest.approx((4 * math.log(5 / 3) + 2 * math.log(5)) / 6, rel=1e-6)


def test_a_class_that_is_never_right_makes_the_disparity_zero():
    result = evaluate(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 2]), 3)
    assert result.per_class == [1.0, None, 0.0] and result.worst_case_disparity == 0.0


def test_all_wrong_is_zero_not_undefined():
    result = evaluate(torch.eye(2), torch.tensor([1, 0]), 2)
    assert result.top1 == 0.0 and result.worst_case_disparity == 0.0


def test_gap():
    assert train_val_gap(0.978, 0.947) == pytest.approx(0.031)


def test_gradient_magnitude_by_hand():
    """One row of x = (1, 2, ...): the gradient of softmax cross entropy is (p - onehot(y)) times x."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2, bias=False))
    nn.init.zeros_(model[1].weight)  # p is 1/2 each
    x = torch.zeros(2, 3, 2, 2)
    x[0, 0, 0], x[1, 2, 1] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])  # norms 5 and 1
    task = Classification(ClassificationConfig(), ["a", "b"])
    magnitude = gradient_magnitude(task, model, x, torch.tensor([0, 1]))
    assert magnitude == pytest.approx((5 + 1) / 2 * math.sqrt(0.5), rel=1e-6)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "vit_tiny_patch16_224"])
def test_gradient_magnitude_equals_one_backward_a_row(name):
    task = Classification(ClassificationConfig(model=name, image_size=32, drop_rate=0.5), ["a", "b", "c"])
    torch.manual_seed(0)
    model = task.build_model().train()
    next(model.parameters()).requires_grad_(False)
    x, y = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1])
    magnitude = gradient_magnitude(task, model, x, y, chunk_size=2)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())

    model.eval()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norms = []
    for row in range(5):
        loss = F.cross_entropy(model(x[row : row + 1]), y[row : row + 1])
        gradients = torch.autograd.grad(loss, trainable)
        norms.append(math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients)))
    assert magnitude == pytest.approx(sum(norms) / 5, rel=1e-5)
