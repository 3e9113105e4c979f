import json

import pytest
import torch
import torch.nn.functional as F

from generator_service.assets import train_letters
from generator_service.assets.train_letters import LETTERS, NULL, Letters, glyph_bank, new_scheduler
from generator_service.backends.dit import LETTERS as EMBEDDED
from generator_service.backends.dit import Config, DiTBackend
from generator_service.backends.interface import Row, Sampling
from tests.generator_service.tiny_dit import full


@pytest.fixture(scope="module")
def letters():
    return Letters(torch.Generator().manual_seed(0))


def test_every_letter_comes_from_several_fonts_and_none_is_a_digit():
    _, labels = glyph_bank()
    assert torch.bincount(labels, minlength=NULL).min() >= 3
    assert len(set(LETTERS)) == len(LETTERS) and all(letter.isalpha() for letter in LETTERS)


def test_letters_fill_the_page_as_the_digits_do(letters):
    """scikit-learn's digits: mean 4.9 of 16, every row used in every image, outer columns nearly empty."""
    images, labels = letters.batch(2000)
    ink = (images[:, 0] + 1) * 8
    assert images.min() >= -1 and images.max() <= 1 and labels.max() < NULL
    assert 3.5 < ink.mean() < 5.5
    assert (ink[:, [0, -1]].amax(2) > 0).float().mean() > 0.95
    assert ink[:, :, [0, -1]].mean() < 1


def test_strokes_and_letters_follow_the_seed():
    one, other, third = (Letters(torch.Generator().manual_seed(seed)).batch(16) for seed in (1, 1, 2))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert not torch.equal(one[0], third[0])


def test_a_short_training_learns_repeats_and_is_served(tmp_path, monkeypatch):
    arguments = ["train_letters", "--out", str(tmp_path / "a"), "--steps", "12", "--batch", "32"]
    monkeypatch.setattr("sys.argv", arguments)
    train_letters.main()
    model, loss = train_letters.train(steps=12, batch=32, peak_lr=1.5e-3, seed=0)
    backend = DiTBackend(Config(checkpoint=str(tmp_path / "a"), device="cpu"))
    saved = backend.checkpoint(full(backend)).transformer.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    assert backend.classes == tuple(LETTERS) and loss < 1.5
    assert backend.generate(full(backend), [Row(seed=0, label=0)], Sampling(2, "ddim")).shape == (1, 8, 8, 3)


def test_the_committed_prior_is_small_and_made_by_this_script():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 4e6
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    assert "".join(index["id2label"].values()) == LETTERS
    stored = json.loads((EMBEDDED / "scheduler" / "scheduler_config.json").read_text())
    made = new_scheduler().config
    assert {name: made[name] for name in stored if not name.startswith("_")} == {
        name: value for name, value in stored.items() if not name.startswith("_")
    }


def test_the_committed_prior_denoises_letters_and_uses_their_labels(letters):
    backend = DiTBackend(Config(device="cpu"))
    checkpoint = backend.checkpoint(full(backend))
    rng = torch.Generator().manual_seed(5)
    images, labels = letters.batch(512)
    noise, times = torch.randn(images.shape, generator=rng), torch.randint(1000, (512,), generator=rng)
    noisy = checkpoint.forward_process.add_noise(images, noise, times)

    def error(conditions):
        with torch.no_grad():
            return F.mse_loss(checkpoint.predict(noisy, times, conditions, checkpoint.tables), noise).item()

    assert error(labels) < 0.18  # 1 for a model that predicts no noise
    assert error(labels) < error(torch.full_like(labels, NULL)) < error((labels + 40) % NULL)
