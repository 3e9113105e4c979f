import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from generator_service.rl.logprob import (
    Schedule,
    Transition,
    ddim_transition,
    learned_transition,
    log_prob,
    stochastic,
)

SHAPE = (2, 3, 3)
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SCHEDULES = {
    "linear": {"beta_schedule": "linear"},
    "stable diffusion's": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trailing": {"beta_schedule": "linear", "timestep_spacing": "trailing"},
}


def schedule_of(scheduler) -> Schedule:
    config = scheduler.config
    clip = config.clip_sample_range if config.clip_sample else None
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return Schedule(scheduler.alphas_cumprod, final, config.prediction_type, clip)


def rows(count: int, *, channels: int = SHAPE[0]) -> torch.Tensor:
    return torch.randn(count, channels, *SHAPE[1:], generator=torch.Generator().manual_seed(count + channels))


def ddim_by_diffusers(scheduler, steps: int, eta: float, dtype: torch.dtype):
    """Every step of diffusers' own list: (output, latents, noise, times, previous, what `step` gives)."""
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    output, latents, noise = rows(steps).to(dtype), 2 * rows(steps + 1)[:steps].to(dtype), rows(steps + 2)[:steps]
    options = {"eta": eta, "use_clipped_model_output": bool(scheduler.config.clip_sample)}
    stepped = [
        scheduler.step(o[None], int(t), x[None], variance_noise=z[None], **options).prev_sample
        for o, t, x, z in zip(output, times, latents, noise.to(dtype), strict=True)
    ]
    previous = (times - 1000 // steps).clamp(min=-1)
    return output, latents, noise, times, previous, torch.cat(stepped)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest error of a row, as part of the row's largest value."""
    error = (found.double() - wanted.double()).abs().flatten(1).amax(1)
    return float((error / wanted.double().abs().flatten(1).amax(1)).max())


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_diffusers(name, prediction, clip):
    """In float64 to its rounding, and in float32 to that of float32: diffusers' own float32 schedule is worse."""
    most = 500 if "steps_offset" in SCHEDULES[name] else 1000  # that the offset leaves room for
    for steps, eta in [(most, 1.0), (50, 1.0), (50, 0.3), (7, 1.0), (3, 0.6)]:
        exact = DDIMScheduler(**SCHEDULES[name], prediction_type=prediction, clip_sample=clip, clip_sample_range=1.5)
        exact.alphas_cumprod = exact.alphas_cumprod.double()
        exact.final_alpha_cumprod = exact.final_alpha_cumprod.double()
        output, latents, noise, times, previous, wanted = ddim_by_diffusers(exact, steps, eta, torch.float64)
        schedule = schedule_of(exact)
        mean, std = ddim_transition(schedule, output, latents, times, previous, eta)
        assert mean.dtype == torch.float64 and relative(mean + std * noise, wanted) < 1e-12
        single = Schedule(schedule.alphas.float(), schedule.final_alpha, prediction, schedule.clip)
        mean, std = ddim_transition(single, output.float(), latents.float(), times, previous, eta)
        assert mean.dtype == std.dtype == torch.float32 and relative(mean + std * noise, wanted) < 5e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_is_diffusers_as_it_comes(prediction):
    """With diffusers' schedule in float32, to the error that it makes there."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    output, latents, noise, times, previous, wanted = ddim_by_diffusers(scheduler, 50, 1.0, torch.float32)
    mean, std = ddim_transition(schedule_of(scheduler), output, latents, times, previous, 1.0)
    assert relative(mean + std * noise, wanted) < 1e-4


def test_ddim_by_hand():
    """alpha 0.25 -> 0.64, x = 1, noise 0.5: clean = (1 - sqrt(.75)/2) / .5; variance = (.36/.75) (1 - .25/.64)."""
    schedule = Schedule(torch.tensor([0.64, 0.25]), 1.0, "epsilon", None)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean, std = ddim_transition(schedule, 0.5 * one, one, torch.tensor([1]), torch.tensor([0]), 1.0)
    clean = (1 - math.sqrt(0.75) * 0.5) / 0.5
    variance = 0.36 / 0.75 * (1 - 0.25 / 0.64)
    assert std.item() == pytest.approx(math.sqrt(variance), rel=1e-6)
    assert mean.item() == pytest.approx(0.8 * clean + math.sqrt(0.36 - variance) * 0.5, rel=1e-6)


def test_only_the_prediction_is_read_by_ddim():
    schedule = schedule_of(DDIMScheduler())
    output, latents, times = rows(2, channels=4), rows(2), torch.tensor([700, 20])
    both = ddim_transition(schedule, output, latents, times, times - 20, 1.0)
    half = ddim_transition(schedule, output[:, :2], latents, times, times - 20, 1.0)
    assert torch.equal(both.mean, half.mean) and torch.equal(both.std, half.std)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1000, 40, 6])
def test_learned_variance_is_diffusers(steps, prediction, clip):
    """`step` of diffusers for every time, its noise drawn again from the same seed."""
    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type=prediction, clip_sample=clip)
    scheduler.alphas_cumprod, scheduler.one = scheduler.alphas_cumprod.double(), scheduler.one.double()
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    output, latents = rows(steps, channels=4).double(), rows(steps).double()
    noise, wanted = [], []
    for o, t, x in zip(output, times, latents, strict=True):
        generator = torch.Generator().manual_seed(int(t))
        wanted.append(scheduler.step(o[None], t, x[None], generator=generator).prev_sample)
        noise.append(torch.randn(1, *SHAPE, generator=generator.manual_seed(int(t)), dtype=torch.float64))
    previous = (times - 1000 // steps).clamp(min=-1)
    noise, wanted = torch.cat(noise), torch.cat(wanted)
    schedule = schedule_of(scheduler)
    mean, std = learned_transition(schedule, output, latents, times, previous)
    assert relative(mean + std * noise, wanted) < 1e-12
    mean, std = learned_transition(schedule, output.float(), latents.float(), times, previous)
    assert mean.dtype == std.dtype == torch.float32 and relative(mean + std * noise, wanted) < 1e-5


def test_learned_variance_lies_between_the_two_bounds():
    """Output -1 is the posterior's variance, 1 that of the forward step, 0 their geometric mean."""
    schedule = Schedule(torch.tensor([0.64, 0.25]), 1.0, "epsilon", None)
    latents = torch.ones(3, 1, 1, 1)
    output = torch.tensor([[0.5, -1.0], [0.5, 0.0], [0.5, 1.0]])[:, :, None, None]
    times, previous = torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    forward = 1 - 0.25 / 0.64
    posterior = 0.36 / 0.75 * forward
    std = learned_transition(schedule, output, latents, times, previous).std.flatten()
    wanted = [math.sqrt(posterior), (posterior * forward) ** 0.25, math.sqrt(forward)]
    torch.testing.assert_close(std, torch.tensor(wanted), rtol=1e-6, atol=0)


def test_learned_variance_ends_at_the_clean_image_whatever_ddim_does():
    scheduler = DDIMScheduler(**SCHEDULES["stable diffusion's"], clip_sample=False)
    output, latents, at = rows(2, channels=4), rows(2), torch.tensor([1, 0])
    mean, std = learned_transition(schedule_of(scheduler), output, latents, at, torch.tensor([-1, -1]))
    alpha = scheduler.alphas_cumprod[at][:, None, None, None].double()
    clean = (latents - (1 - alpha).sqrt() * output[:, :2]) / alpha.sqrt()
    torch.testing.assert_close(mean, clean.float(), rtol=1e-5, atol=1e-6)
    assert not std.any()


def test_a_model_that_says_no_variance_is_a_misuse():
    schedule, at = schedule_of(DDIMScheduler()), torch.tensor([500])
    with pytest.raises(AssertionError, match="no variance"):
        learned_transition(schedule, rows(1), rows(1), at, at - 20)


def test_log_prob_is_torch_s_averaged():
    transition = Transition(rows(4), rows(5)[:4].exp())
    drawn = rows(6)[:4]
    wanted = torch.distributions.Normal(*transition).log_prob(drawn).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(transition, drawn), wanted, rtol=1e-5, atol=1e-6)
    same = Transition(transition.mean, torch.full((4, 1, 1, 1), 0.3))
    wanted = torch.distributions.Normal(*same).log_prob(drawn).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(same, drawn), wanted, rtol=1e-5, atol=1e-6)


def test_log_prob_has_the_gradient_of_a_density():
    """Of the mean and of a learned variance, through all prediction types and the clip's flat parts."""
    times, previous = torch.tensor([900, 300]), torch.tensor([880, 280])
    latents, drawn = rows(2).double(), rows(3)[:2].double()
    for prediction in PREDICTIONS:
        for clip in (None, 0.7):
            schedule = Schedule(DDIMScheduler().alphas_cumprod, 1.0, prediction, clip)
            output = rows(2, channels=4).double().requires_grad_()
            assert torch.autograd.gradcheck(
                lambda o, s=schedule: log_prob(ddim_transition(s, o, latents, times, previous, 0.8), drawn), output
            )
            assert torch.autograd.gradcheck(
                lambda o, s=schedule: log_prob(learned_transition(s, o, latents, times, previous), drawn), output
            )


def test_the_steps_without_a_density_are_told():
    schedule = schedule_of(DDIMScheduler())
    times, previous = torch.tensor([500, 19, 0]), torch.tensor([480, -1, -1])
    output, latents = rows(3, channels=4), rows(3)
    random = ddim_transition(schedule, output, latents, times, previous, 1.0)
    assert stochastic(random).tolist() == [True, False, False]
    assert not stochastic(ddim_transition(schedule, output, latents, times, previous, 0.0)).any()
    learned = learned_transition(schedule, output, latents, times, previous)
    assert stochastic(learned).tolist() == [True, False, False]
    assert log_prob(random, latents).isnan().tolist() == [False, True, True]
    assert log_prob(random, random.mean).isnan().tolist() == [False, True, True]


def test_a_chain_that_ends_at_the_first_alpha_may_be_random_to_the_end():
    """Stable Diffusion's: the last time is 1, and its step leads to alphas[0] < 1."""
    schedule = schedule_of(DDIMScheduler(**SCHEDULES["stable diffusion's"]))
    last = ddim_transition(schedule, rows(2), rows(2), torch.tensor([1, 0]), torch.tensor([-1, -1]), 1.0)
    assert stochastic(last).tolist() == [True, False]


def test_rows_without_a_density_leave_no_trace_in_the_gradients():
    schedule = schedule_of(DDIMScheduler())
    times, previous = torch.tensor([500, 0]), torch.tensor([480, -1])
    output = rows(2, channels=4).requires_grad_()
    transition = learned_transition(schedule, output, rows(2), times, previous)
    mean, std = (part[stochastic(transition)] for part in transition)
    (gradient,) = torch.autograd.grad(log_prob(Transition(mean, std), rows(2)[:1]).sum(), output)
    assert gradient.isfinite().all() and gradient[0].abs().max() > 0 and gradient[1].abs().max() == 0


@pytest.mark.parametrize("learned", [False, True])
def test_replay_on_unchanged_weights_is_equal_to_the_bit(learned):
    """A chain is drawn step by step without gradients, then all its steps of a batch are computed again with them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
    schedule = schedule_of(DDIMScheduler(clip_sample=True))
    latents, generator, chain = rows(16), torch.Generator().manual_seed(1), []

    def transition(latents, time):
        times = torch.full((len(latents),), time)
        if learned:
            return learned_transition(schedule, model(latents), latents, times, times - 100)
        return ddim_transition(schedule, model(latents), latents, times, times - 100, 1.0)

    for time in range(900, 0, -100):
        with torch.no_grad():
            mean, std = transition(latents, time)
            drawn = mean + std * torch.randn(latents.shape, generator=generator)
            chain.append((latents, time, drawn, log_prob(Transition(mean, std), drawn)))
        latents = drawn
    for latents, time, drawn, old in chain:
        again = log_prob(transition(latents, time), drawn)
        assert again.requires_grad and torch.equal(again, old)
        assert torch.equal((again - old).exp(), torch.ones(16))
