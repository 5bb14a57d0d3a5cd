import diffusers
import pytest
import torch

import mcm

COSINE = mcm.CosineSchedule()
SHAPES = [(7, 3), (5, 3, 8, 8), (4, 1)]


def drawn(shape, dtype=torch.float64):
    """Random x_hat, z_t and times 0 <= s < t <= 1, the edges included."""
    t = torch.rand(shape[0], dtype=dtype) * 0.9 + 0.1
    s = t * torch.rand(shape[0], dtype=dtype)
    t[0], s[1] = 1.0, 0.0
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), t, s


def column(a, like):
    return a.reshape(-1, *[1] * (like.ndim - 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_inverse_ddim_undoes_ddim(shape):
    x, z, t, s = drawn(shape)
    back = mcm.inverse_ddim(mcm.ddim(x, z, t, s, COSINE), z, t, s, COSINE)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = COSINE(t), COSINE(s)
    # rounding of z_s (a few ulp of numbers below 5) divided by the denominator
    tolerance = 32 * torch.finfo(torch.float64).eps / (alpha_s - alpha_t * sigma_s / sigma_t)
    assert ((back - x).abs() < column(tolerance, x)).all()


@pytest.mark.parametrize("step", [mcm.ddim, mcm.addim])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_from_t_to_t_is_exactly_the_identity(step, dtype):
    x, z = torch.randn(2, 6, 2, 4, 4, dtype=dtype)
    t = torch.tensor([0.0, 1e-3, 0.3, 0.77, 1.0, 0.0], dtype=dtype)
    assert torch.equal(step(x, z, t, t, COSINE), z)


@pytest.mark.parametrize("step", [mcm.ddim, mcm.addim])
def test_a_step_to_zero_returns_x_hat(step):
    x, z, t, _ = drawn((6, 2, 3, 3))
    torch.testing.assert_close(step(x, z, t, torch.zeros_like(t), COSINE), x, rtol=0, atol=1e-14)


def test_ddim_keeps_the_noise_it_sees():
    """ddim of the true x moves z_t = alpha_t x + sigma_t eps to alpha_s x + sigma_s eps, with the same eps."""
    x, eps, t, s = drawn((6, 2, 3, 3))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([column(a, x) for a in COSINE(u)] for u in (t, s))
    moved = mcm.ddim(x, alpha_t * x + sigma_t * eps, t, s, COSINE)
    torch.testing.assert_close(moved, alpha_s * x + sigma_s * eps, rtol=0, atol=1e-14)


def test_addim_without_variance_is_ddim():
    x, z, t, s = drawn((5, 3, 8, 8))
    assert torch.equal(mcm.addim(x, z, t, s, COSINE, torch.zeros_like(t)), mcm.ddim(x, z, t, s, COSINE))


def test_addim_is_equation_14_sample_by_sample():
    """Written out as printed, one sample at a time: alpha_s (not alpha_t) in front of x_hat, the norm of each sample on its own."""
    x, z, t, s = drawn((5, 3, 8, 8))
    z[0] *= 10  # a norm over the whole batch would be seen
    x_var = torch.rand(5, dtype=torch.float64)
    ours = mcm.addim(x, z, t, s, COSINE, x_var)
    for b in range(5):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = COSINE(t[b]), COSINE(s[b])
        eps = (z[b] - alpha_t * x[b]) / sigma_t
        z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var[b]
        expected = alpha_s * x[b] + torch.sqrt(sigma_s**2 + eps.numel() / eps.norm() ** 2 * z_var) * eps
        if s[b] > 0:
            torch.testing.assert_close(ours[b], expected, rtol=1e-12, atol=1e-12)


def test_addim_restores_the_expected_norm():
    """If x ~ N(x_hat, x_var) given z_t, the true z_s has mean square |ddim|^2 + z_var; aDDIM has it when x_hat and eps_hat are orthogonal."""
    t, s, x_var = torch.tensor([0.8]).double(), torch.tensor([0.5]).double(), torch.tensor([0.3]).double()
    x, z = torch.randn(2, 1, 4096, dtype=torch.float64)
    alpha_t, sigma_t = COSINE(t)
    eps = z - (z * x).sum() / (x * x).sum() * x  # orthogonal to x
    z = alpha_t * x + sigma_t * eps
    (alpha_s, sigma_s), z_s = COSINE(s), mcm.addim(x, z, t, s, COSINE, x_var)
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    torch.testing.assert_close(z_s.square().mean(1), mcm.ddim(x, z, t, s, COSINE).square().mean(1) + z_var, rtol=1e-12, atol=0)


def test_addim_default_variance_is_the_prior_of_the_paper():
    x, z, t, s = drawn((5, 3, 4, 4))
    alpha, sigma = COSINE(t)
    snr = (alpha / sigma) ** 2
    torch.testing.assert_close(mcm.addim(x, z, t, s, COSINE), mcm.addim(x, z, t, s, COSINE, 0.1 / (2 + snr)), rtol=1e-12, atol=1e-12)


def test_addim_approaches_ddim_quadratically():
    """sqrt(sigma_s^2 + O((t-s)^2)) - sigma_s = O((t-s)^2) while sigma_s > 0: halving the step quarters the difference."""
    x, z = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    s, x_var = torch.tensor([0.2, 0.5, 0.8]).double(), torch.full((3,), 0.4).double()
    gaps = []
    for h in (1e-2, 5e-3, 2.5e-3):
        difference = mcm.addim(x, z, s + h, s, COSINE, x_var) - mcm.ddim(x, z, s + h, s, COSINE)
        gaps.append(difference.flatten(1).norm(dim=1))
    for larger, smaller in zip(gaps, gaps[1:]):
        assert ((larger / smaller - 4).abs() < 0.15).all()  # the next order is h times smaller: a few percent at h = 1e-2


def test_ddim_equals_diffusers():
    reference = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=0)
    schedule = mcm.DiscreteSchedule(reference.alphas_cumprod)
    z, eps = torch.randn(2, 1, 3, 8, 8)
    for steps in (1, 4, 10, 50):
        reference.set_timesteps(steps)
        for k, index in enumerate(reference.timesteps):
            t, s = torch.tensor([(steps - k) / steps]), torch.tensor([(steps - k - 1) / steps])
            assert schedule.network_time(t) == index
            alpha, sigma = schedule(t)
            x_hat = (z - column(sigma, z) * eps) / column(alpha, z)
            expected = reference.step(eps, index, z).prev_sample
            # x_hat is up to 1 / alpha_1 = 160 times z in this schedule; a few float32 roundings of that
            torch.testing.assert_close(mcm.ddim(x_hat, z, t, s, schedule), expected, rtol=2e-6, atol=2e-5)
