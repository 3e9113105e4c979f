import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from generator_service.adapt.denoising import (
    discrepancy,
    draw,
    min_snr_weights,
    noise_error,
    signal_to_noise,
    wanted,
    weighted_mse,
)

SNR = torch.tensor([0.0, 0.5, 5.0, 50.0])


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", [1.0, 1.0, 1.0, 0.1]),
        ("v_prediction", [0.0, 0.5 / 1.5, 5 / 6, 5 / 51]),
        ("sample", [0.0, 0.5, 5.0, 5.0]),
    ],
)
def test_min_snr_weights_by_hand(prediction, expected):
    assert torch.allclose(min_snr_weights(SNR, 5.0, prediction), torch.tensor(expected))
    assert torch.equal(min_snr_weights(SNR, 0.0, prediction), torch.ones(4))


def test_signal_to_noise_is_that_of_diffusers():
    schedule, times = DDPMScheduler(beta_schedule="squaredcos_cap_v2"), torch.arange(0, 1000, 7)
    assert torch.allclose(signal_to_noise(schedule, times), compute_snr(schedule, times), rtol=1e-4)


def test_every_prediction_type_weighs_an_error_of_the_clean_image_alike():
    """A wrong clean image, said as noise, as velocity and as itself: min(SNR, gamma) times its square each time."""
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    rng = torch.Generator().manual_seed(0)
    clean, wrong, noise = torch.randn(3, 12, 2, 3, 3, generator=rng, dtype=torch.float64)
    times = torch.arange(40, 1000, 80)
    schedule.alphas_cumprod = schedule.alphas_cumprod.double()
    noisy, kept = schedule.add_noise(clean, noise, times), schedule.alphas_cumprod[times][:, None, None, None]
    wrong_noise = (noisy - kept.sqrt() * wrong) / (1 - kept).sqrt()
    errors = {
        "sample": wrong - clean,
        "epsilon": wrong_noise - noise,
        "v_prediction": schedule.get_velocity(wrong, wrong_noise, times) - schedule.get_velocity(clean, noise, times),
    }
    snr = signal_to_noise(schedule, times)
    expected = (snr.clamp(max=5) * (wrong - clean).square().mean((1, 2, 3))).mean()
    for prediction, error in errors.items():
        assert torch.allclose(weighted_mse(error, min_snr_weights(snr, 5.0, prediction)), expected)
        assert torch.allclose(noise_error(error, snr, prediction), wrong_noise - noise)


def test_what_is_wanted_of_each_prediction_type():
    rng = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 3, 1, 2, 2, generator=rng)
    times = torch.tensor([0, 500, 999])
    schedule = DDPMScheduler(prediction_type="v_prediction")
    kept = schedule.alphas_cumprod[times][:, None, None, None]
    assert torch.allclose(wanted(schedule, clean, noise, times), kept.sqrt() * noise - (1 - kept).sqrt() * clean)
    assert torch.equal(wanted(DDPMScheduler(prediction_type="epsilon"), clean, noise, times), noise)
    assert torch.equal(wanted(DDPMScheduler(prediction_type="sample"), clean, noise, times), clean)


def test_weighted_mse_by_hand():
    error = torch.tensor([[1.0, 3.0], [2.0, 0.0]])[:, :, None, None]
    assert weighted_mse(error, torch.tensor([1.0, 0.5])).item() == pytest.approx((1.0 * 5 + 0.5 * 2) / 2)


def test_discrepancy_by_hand():
    """Rows 0 and 2 are of one class, row 1 of another: sums (1 + 2*2, 0 + 2*-1) = (5, -2) and (0.5*4, 0.5*6)."""
    error = torch.tensor([[1.0, 0.0], [4.0, 6.0], [2.0, -1.0]])[:, :, None, None]
    value = discrepancy(error, torch.tensor([1.0, 0.5, 2.0]), torch.tensor([7, 3, 7]))
    assert value.item() == pytest.approx((25 + 4 + 4 + 9) / 4)


def test_opposite_errors_cancel_within_a_class_but_not_between_classes():
    error = torch.tensor([1.0, -1.0])[:, None, None, None]
    assert discrepancy(error, torch.ones(2), torch.tensor([0, 0])).item() == 0
    assert discrepancy(error, torch.ones(2), torch.tensor([0, 1])).item() == 1


def test_gradients_agree_with_finite_differences():
    rng = torch.Generator().manual_seed(0)
    error = torch.randn(5, 2, 2, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    snr, labels = torch.rand(5, generator=rng, dtype=torch.float64) * 10, torch.tensor([0, 1, 0, 2, 1])
    for prediction in ("epsilon", "v_prediction", "sample"):
        weights = min_snr_weights(snr, 5.0, prediction)
        assert torch.autograd.gradcheck(lambda e, w=weights: weighted_mse(e, w), error)
        assert torch.autograd.gradcheck(
            lambda e, w=weights, p=prediction: discrepancy(noise_error(e, snr, p), w, labels), error
        )


def test_noise_is_drawn_before_times():
    noise, times = draw(DDPMScheduler(), (4, 1, 2, 2), torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    assert torch.equal(noise, torch.randn(4, 1, 2, 2, generator=rng))
    assert torch.equal(times, torch.randint(1000, (4,), generator=rng))
