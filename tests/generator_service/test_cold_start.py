import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from generator_service.adapt.cold_start import cold_start, denoising_loss
from generator_service.backends.dit_checkpoint import CLASS_EMBEDDING
from generator_service.backends.interface import Row, Sampling
from generator_service.real_images import RealImages
from protocol.errors import ConfigError, TrainingDiverged
from protocol.messages import AdaptJob
from tests.generator_service.tiny_dit import class_embedding, full, open_backend, save_checkpoint

CLASSES = ("zero", "one")
JOB = AdaptJob(name="adapted", steps=12, batch_size=16, learning_rate=1e-2, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("pixel"))


@pytest.fixture
def backend(folder):
    return open_backend(folder)


def dataset(size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(8) % 2
    dark = np.random.default_rng(0).integers(0, 60, (8, size, size, 1), dtype=np.uint8)
    return np.repeat(dark + (labels * 190).astype(np.uint8)[:, None, None, None], 3, axis=3), labels


def run(backend, folder, job=JOB, between=lambda: None):
    """The adaptation to its end: (progress, kind, metadata, tables)."""
    images, labels = dataset(backend.native_size()[0])
    real = RealImages(images, labels, [str(index) for index in range(len(images))], [None] * len(images))
    adapting, progress = cold_start(backend, full(backend), real, CLASSES, job, folder, folder / "unfinished"), []
    while True:
        try:
            progress.append(next(adapting))
            between()
        except StopIteration as finished:
            return progress, *finished.value, load_file(folder / CLASS_EMBEDDING)


def test_the_result_is_a_weight_set_that_the_backend_serves(backend, tmp_path):
    progress, kind, metadata, tables = run(backend, tmp_path)
    assert kind == "class_embedding" and metadata["steps"] == 12 and metadata["images"] == 8
    assert [(p.step, p.steps) for p in progress] == [(step, 12) for step in range(1, 13)]
    assert metadata["loss"] == pytest.approx(progress[-1].loss)
    assert {tuple(table.shape) for table in tables.values()} == {(3, 16)} and len(tables) == 2
    base = full(backend)
    rows, sampling = [Row(seed=1, label=0)], Sampling(5, "ddim")
    adapted = backend.sample(class_embedding(base, tmp_path, CLASSES), rows, sampling)
    assert not torch.equal(adapted, backend.sample(base, rows, sampling))


@pytest.mark.parametrize("kind", ["pixel", "latent"])
def test_equal_jobs_give_equal_bits_and_requests_between_steps_change_nothing(tmp_path, kind):
    checkpoint = save_checkpoint(tmp_path / "base", vae=kind == "latent", learned_sigma=kind == "latent")
    backend = open_backend(checkpoint)
    (tmp_path / "alone").mkdir()
    (tmp_path / "served").mkdir()
    rows, sampling = [Row(seed=1, label=2, guidance_scale=2.0)], Sampling(3, "ddim", guided=True)
    before = backend.sample(full(backend), rows, sampling)
    during = []
    *_, alone = run(open_backend(checkpoint), tmp_path / "alone")
    *_, served = run(
        backend, tmp_path / "served", between=lambda: during.append(backend.sample(full(backend), rows, sampling))
    )
    assert len(during) == JOB.steps and all(torch.equal(images, before) for images in during)
    assert alone.keys() == served.keys() and all(torch.equal(alone[name], served[name]) for name in alone)


def test_another_seed_gives_another_result(backend, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    *_, one = run(backend, tmp_path / "a")
    *_, other = run(backend, tmp_path / "b", JOB.model_copy(update={"seed": 4}))
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_the_backbone_is_frozen_and_shared(backend, tmp_path):
    transformer = backend.checkpoint(full(backend)).transformer
    before = copy.deepcopy(transformer.state_dict())
    run(backend, tmp_path)
    after = transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_loss_is_the_denoising_error_from_tables_of_zeros(backend, folder, tmp_path):
    """The first step, computed again with diffusers' own model whose tables were zeroed in place."""
    model = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    for name, parameter in model.named_parameters():
        if "embedding_table" in name:
            parameter.data = torch.zeros(3, 16)
    images, labels = dataset()
    pixels = torch.from_numpy(images[..., :1]).permute(0, 3, 1, 2) / 127.5 - 1
    rng = torch.Generator().manual_seed(JOB.seed)
    chosen = torch.randint(8, (16,), generator=rng)
    dropped = torch.rand(16, generator=rng) < 0.1
    noise = torch.randn(16, 1, 8, 8, generator=rng)
    times = torch.randint(1000, (16,), generator=rng)
    noisy = DDPMScheduler().add_noise(pixels[chosen], noise, times)
    classes = torch.from_numpy(labels)[chosen].masked_fill(dropped, 2)
    with torch.no_grad():
        expected = F.mse_loss(model(noisy, times, classes).sample, noise)
    progress, *_ = run(backend, tmp_path)
    assert progress[0].loss == pytest.approx(expected.item(), rel=1e-5)


def test_each_row_trains_one_class_in_every_block(backend):
    """A batch of class 1 and null rows alone: every block's rows for these two get a gradient, class 0 none."""
    checkpoint = backend.checkpoint(full(backend))
    tables = {name: torch.zeros(3, 16, requires_grad=True) for name in checkpoint.tables}
    latents = checkpoint.encode(dataset()[0][:2])
    loss = denoising_loss(checkpoint, tables, latents, torch.tensor([1, 2]), torch.Generator().manual_seed(0))
    loss.backward()
    for table in tables.values():
        assert (table.grad[0] == 0).all() and (table.grad[1:] != 0).any(1).all()


def test_training_lowers_the_denoising_error(backend, tmp_path):
    checkpoint = backend.checkpoint(full(backend))
    *_, tables = run(backend, tmp_path, JOB.model_copy(update={"steps": 150}))
    images, labels = dataset()
    latents, targets = checkpoint.encode(np.repeat(images, 16, 0)), torch.from_numpy(np.repeat(labels, 16))

    def error(candidate):
        with torch.no_grad():
            return denoising_loss(checkpoint, candidate, latents, targets, torch.Generator().manual_seed(9)).item()

    assert error(tables) < 0.97 * error({name: torch.zeros_like(table) for name, table in tables.items()})


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    folder = save_checkpoint(tmp_path / "base")
    path = next((folder / "transformer").glob("*.safetensors"))
    save_file(load_file(path) | {"proj_out_2.bias": torch.full((4,), float("nan"))}, path)
    with pytest.raises(TrainingDiverged, match="at step 1; lower learning_rate"):
        run(open_backend(folder), tmp_path)
    assert not (tmp_path / CLASS_EMBEDDING).exists()


def test_float16_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="bfloat16"):
        run(open_backend(folder, dtype="float16"), tmp_path)
