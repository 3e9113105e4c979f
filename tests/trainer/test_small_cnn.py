import pytest
import torch
from sklearn.datasets import load_digits

from trainer.tasks.classification import Classification, ClassificationConfig
from trainer.tasks.small_cnn import SmallCNN


@pytest.mark.parametrize("pixels", [8, 16, 32, 64])
def test_size_and_reach(pixels):
    """Small enough for a laptop, and every logit sees all of a small image."""
    model = SmallCNN(10, pixels).eval()
    assert 50_000 < sum(parameter.numel() for parameter in model.parameters()) < 150_000
    x = torch.randn(1, 3, pixels, pixels, requires_grad=True)
    model(x)[0, 3].backward()
    assert (x.grad != 0).float().mean() > 0.9


def test_it_learns_digits_from_ten_a_class():
    """Held-out accuracy above 0.9 on scikit-learn's digits (1,697 images), at 8 pixels, in 200 updates."""
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3)
    labels = torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(labels), generator=generator)  # the file's first rows are a few writers' only
    training = torch.cat([shuffled[labels[shuffled] == label][:10] for label in range(10)])
    held_out = torch.ones(len(labels), dtype=torch.bool)
    held_out[training] = False

    torch.manual_seed(0)
    task = Classification(ClassificationConfig(image_size=8, shift=1, drop_rate=0.1), list(map(str, range(10))))
    model = task.build_model().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    x, y = task.preprocess(images[training]), labels[training]
    for _ in range(200):
        rows = torch.randint(len(y), (64,), generator=generator)
        optimizer.zero_grad()
        task.losses(model(task.augment(x[rows], generator)), y[rows]).mean().backward()
        optimizer.step()
        schedule.step()
    correct = task.predict(model, task.preprocess(images[held_out])).argmax(1) == labels[held_out]
    assert correct.float().mean() > 0.9
