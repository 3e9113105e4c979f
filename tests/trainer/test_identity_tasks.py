"""The tasks on identities: their networks, their losses, and that everything around them can handle two outputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from protocol.errors import ConfigError
from trainer.evaluate import gradient_magnitude
from trainer.losses.triplet import batch_hard_triplet
from trainer.selection.lookahead import lookahead_scores
from trainer.selection.vog import vog
from trainer.tasks.face import Face, FaceConfig
from trainer.tasks.identity import CosineHead, Mirrored
from trainer.tasks.reid import Reid, ReidConfig

CLASSES = ["ann", "bob", "cyd", "dan"]
SMALL: dict[str, Any] = {"model": "small_cnn", "image_size": (32, 16)}


def reid(**config: Any) -> Reid:
    return Reid(ReidConfig(**SMALL | config), CLASSES)


def face(**config: Any) -> Face:
    return Face(FaceConfig(**SMALL | {"embedding": 24} | config), CLASSES)


TASKS = pytest.mark.parametrize("task", [reid(), reid(neck="none", margin="soft"), face(), face(embedding=None)])


def batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, 32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(rows) // 2 % 4


@TASKS
def test_two_outputs_and_what_is_made_of_them(task: Reid | Face):
    torch.manual_seed(0)
    model, (x, y) = task.build_model().eval(), batch()
    features, logits = model(x)
    assert features.shape == (8, 96) and logits.shape == (8, 4)
    embeddings = task.features(model, x)
    torch.testing.assert_close(embeddings, model.neck(features))
    torch.testing.assert_close(model.head(embeddings), logits)
    scale = task.config.scale if isinstance(task, Face) else 1.0
    torch.testing.assert_close(task.predict(model.train(), x), scale * logits.detach())
    assert model.training
    torch.testing.assert_close(task.true_logit((features, logits), y), scale * logits[torch.arange(8), y])


@TASKS
def test_everything_that_takes_a_models_outputs(task: Reid | Face):
    """Gradient norms of single rows, VoG, and lookahead on the loss of the whole batch (eq. 12)."""
    torch.manual_seed(0)
    model, (x, y) = task.build_model().train(), batch()
    norms = []
    model.eval()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for row in range(8):  # alone, a row has neither positive nor negative: the triplet loss is 0
        gradients = torch.autograd.grad(task.losses(model(x[row : row + 1]), y[row : row + 1]).sum(), trainable)
        norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))
    model.train()
    assert gradient_magnitude(task, model, x, y, chunk_size=3) == pytest.approx(sum(norms) / 8, rel=1e-4)

    snapshots = [{name: value + 0.01 * k for name, value in model.state_dict().items()} for k in range(2)]
    assert (vog(model, snapshots, x, y, logit=task.true_logit) > 0).all()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = lookahead_scores(model, task.losses, x, y, virtual_lr=0.01)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    first = task.losses(model(x), y)
    first.mean().backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    with torch.no_grad():
        expected = task.losses(model(x), y) - first
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


def test_the_reid_loss_is_the_sum_of_its_parts():
    outputs, y = (torch.randn(6, 5), torch.randn(6, 4)), torch.arange(6) // 2
    cross_entropy = F.cross_entropy(outputs[1], y, reduction="none", label_smoothing=0.1)
    triplet = batch_hard_triplet(outputs[0], y, margin=0.5)
    assert triplet.sum() > 0
    task = reid(label_smoothing=0.1, margin=0.5, triplet_weight=2.0)
    torch.testing.assert_close(task.losses(outputs, y), cross_entropy + 2 * triplet)
    torch.testing.assert_close(reid(triplet_weight=0.0, label_smoothing=0.1).losses(outputs, y), cross_entropy)


def test_the_bnneck_has_no_bias_to_learn():
    """Luo et al. 2019: the triplet loss sees features before, the classifier after it, and nothing shifts them."""
    model = reid().build_model()
    assert isinstance(model.neck, nn.BatchNorm1d) and not model.neck.bias.requires_grad and model.head.bias is None
    plain = reid(neck="none").build_model()
    assert isinstance(plain.neck, nn.Identity) and plain.head.bias is not None
    x, y = batch()
    optimizer = torch.optim.Adam(model.parameters(), 0.1, weight_decay=5e-4)
    reid().losses(model.train()(x), y).mean().backward()
    optimizer.step()
    assert (model.neck.bias == 0).all() and (model.neck.weight != 1).any()


def test_the_margin_is_off_when_predicting():
    task = face(scale=16.0, margin=0.5)
    model, (x, y) = task.build_model(), batch()
    model.eval()
    with torch.no_grad():
        features, cosines = model(x)
    assert (cosines.abs() <= 1 + 1e-6).all()
    torch.testing.assert_close(task.predict(model, x), 16 * cosines)
    shifted = cosines - 0.5 * F.one_hot(y, 4)
    torch.testing.assert_close(task.losses((features, cosines), y), F.cross_entropy(16 * shifted, y, reduction="none"))


def test_cosines_are_as_exact_under_autocast():
    torch.manual_seed(0)
    head, x = CosineHead(24, 4), torch.randn(8, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines = head(x)
    torch.testing.assert_close(cosines, F.cosine_similarity(x[:, None], head.weight[None], dim=2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("resnet18", (64, 32)), ("vit_tiny_patch16_224", (64, 32))])
def test_timm_opens_the_published_backbone(name: str, size: tuple[int, int]):
    """Its features are the model's own, of the same input; a model of a fixed size is built for that of the task."""
    task = reid(model=name, image_size=size)
    torch.manual_seed(1)
    model = task.build_model().eval()
    rng = torch.get_rng_state()
    published = task.backbone(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert (published.name, published.size) == (name, size)
    other = timm.create_model(published.name, num_classes=0, **published.options)
    other.load_state_dict(published.state)
    images = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (published.mean, published.std))
    x = (images.permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), model(task.preprocess(images))[0], rtol=1e-4, atol=1e-5)


@TASKS
def test_the_built_in_network_is_not_timms(task: Reid | Face):
    with pytest.raises(ConfigError, match="small_cnn is not a model of timm") as caught:
        task.backbone(task.build_model())
    assert caught.value.param == "model"
    with pytest.raises(ConfigError, match="not its task's own"):
        task.backbone(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"method embed\(x\)"):
        task.features(nn.Linear(2, 2), torch.zeros(1, 2))


def test_an_input_that_a_model_cannot_take():
    with pytest.raises(ConfigError, match="cannot take images of 40 x 8 pixels"):
        reid(model="convnext_tiny", image_size=(40, 8)).build_model()


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (ReidConfig, {"query_split": "query"}),
        (ReidConfig, {"margin": 0.0}),
        (ReidConfig, {"neck": "bn"}),
        (ReidConfig, {"image_size": 256}),
        (ReidConfig, {"image_size": (256, 4)}),
        (FaceConfig, {"scale": 0.0}),
        (FaceConfig, {"margin": 1.5}),
        (FaceConfig, {"label_smoothing": 0.1}),
        (FaceConfig, {"pairs": [{"name": "lfw"}]}),
        (FaceConfig, {"random_erasing": 1.5}),
    ],
)
def test_settings_out_of_range_are_refused(config: type, wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        config(**wrong)


def test_mirrored_pictures():
    class Set:
        images, labels = torch.arange(24).view(2, 2, 2, 3), torch.tensor([0, 1])

        def __len__(self) -> int:
            return 2

    mirrored = Mirrored(Set())
    assert torch.equal(mirrored.images[0:2], Set.images[:, :, [1, 0]]) and len(mirrored) == 2
