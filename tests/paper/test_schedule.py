import math

import diffusers
import pytest
import torch

import mcm

SCHEDULES = {
    "cosine": mcm.CosineSchedule(),
    "clipped": mcm.CosineSchedule(clip=15.0),
    "shifted": mcm.CosineSchedule(shift_low=-1.4, shift_high=-1.4),
    "interpolated": mcm.CosineSchedule.interpolated(128, 32, 128),
    "clipped and interpolated": mcm.CosineSchedule.interpolated(64, 32, 64, clip=20.0),
    "discrete": mcm.DiscreteSchedule(
        torch.cumprod(
            1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0
        )
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_norm_and_order(name, dtype):
    schedule = SCHEDULES[name]
    t = torch.linspace(0, 1, 1001, dtype=dtype)
    alpha, sigma = schedule(t)
    assert alpha.dtype == sigma.dtype == dtype and alpha.shape == t.shape
    assert alpha[0] == 1 and sigma[0] == 0  # exactly, also when clipped
    # two roundings of numbers below 1, squared and added
    torch.testing.assert_close(
        alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=8 * torch.finfo(dtype).eps
    )
    assert (sigma.diff() > 0).all() and (alpha.diff() <= 0).all()


@pytest.mark.parametrize("name", ["cosine", "shifted", "interpolated"])
def test_an_unclipped_schedule_ends_in_pure_noise(name):
    alpha, sigma = SCHEDULES[name](torch.ones(2))
    assert (alpha == 0).all() and (sigma == 1).all()


def logsnr(schedule, t):
    alpha, sigma = schedule(t)
    return 2 * torch.log(alpha / sigma)


def test_log_snr_is_that_of_simple_diffusion():
    t = torch.rand(100, dtype=torch.float64) * 0.98 + 0.01
    base = -2 * torch.log(torch.tan(math.pi * t / 2))
    torch.testing.assert_close(logsnr(SCHEDULES["cosine"], t), base, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logsnr(SCHEDULES["shifted"], t), base - 1.4, rtol=1e-9, atol=1e-9)
    mixed = t * (base + 2 * math.log(128 / 128)) + (1 - t) * (base + 2 * math.log(32 / 128))
    torch.testing.assert_close(logsnr(SCHEDULES["interpolated"], t), mixed, rtol=1e-9, atol=1e-9)
    ends = logsnr(SCHEDULES["clipped"], torch.tensor([1e-9, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        ends, torch.tensor([15.0, -15.0], dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_discrete_schedule_rounds_to_the_index_it_hands_on():
    schedule, n = SCHEDULES["discrete"], 1000
    i = torch.arange(1, n + 1)
    for jitter in (-0.49, 0.0, 0.49):
        t = ((i + jitter) / n).clamp_max(1.0)
        assert torch.equal(schedule.network_time(t), i - 1)
        torch.testing.assert_close(
            schedule(t.double())[0] ** 2, schedule.alphas_cumprod, rtol=1e-12, atol=0
        )


def test_only_zero_is_free_of_noise():
    schedule = SCHEDULES["discrete"]
    t = torch.tensor([0.0, 1e-9, 4e-4])
    assert schedule.network_time(t).tolist() == [0, 0, 0] and (schedule(t)[1] > 0).tolist() == [
        False,
        True,
        True,
    ]


def test_discrete_schedule_equals_diffusers():
    reference = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    ours = mcm.DiscreteSchedule(reference.alphas_cumprod)
    noise, x = torch.randn(2, 6, 1, 4, 4)
    index = torch.tensor([0, 10, 400, 700, 998, 999])
    alpha, sigma = ours((index + 1) / 1000)
    z = alpha.view(-1, 1, 1, 1) * x + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(z, reference.add_noise(x, noise, index), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_levels_are_remembered_for_a_tensor_of_times_and_no_other(name):
    """While it is as it was, for each schedule apart, and not where there is a gradient."""
    schedule, other = SCHEDULES[name], mcm.CosineSchedule(shift_low=3.0, shift_high=3.0)
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    before = schedule(t)
    assert schedule(t)[0] is before[0] and schedule(t.clone())[0] is not before[0]
    assert not torch.equal(other(t)[0], before[0])
    t += 0.25
    assert torch.equal(schedule(t)[0][:1], before[0][1:]) and schedule(t)[0][1] < before[0][1]
    t.requires_grad_()
    assert schedule(t)[0] is not schedule(t)[0]


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0.5, 0.6]),
        torch.ones(2, 2),
        torch.tensor([1.5, 0.5]),
        torch.tensor([1.0, 0.5]),
        torch.tensor([]),
    ],
)
def test_bad_tables_are_refused(bad):
    with pytest.raises(mcm.InputError):
        mcm.DiscreteSchedule(bad)


def test_a_discrete_schedule_is_copied_to_a_device_once():
    schedule = mcm.DiscreteSchedule.scaled_linear()
    copies = []
    original = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, *a: copies.append(a) or original(self, *a))
        for _ in range(3):
            levels = schedule(torch.rand(4))
    assert len(copies) <= 2 and levels[0].dtype == torch.float32
