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
    """ddim of the true x moves z_t = alpha_t x + sigma_t eps to alpha_s x + sigma_s eps, with the
    same eps.
    """
    x, eps, t, s = drawn((6, 2, 3, 3))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([column(a, x) for a in COSINE(u)] for u in (t, s))
    moved = mcm.ddim(x, alpha_t * x + sigma_t * eps, t, s, COSINE)
    torch.testing.assert_close(moved, alpha_s * x + sigma_s * eps, rtol=0, atol=1e-14)


def test_addim_without_variance_is_ddim():
    x, z, t, s = drawn((5, 3, 8, 8))
    assert torch.equal(
        mcm.addim(x, z, t, s, COSINE, torch.zeros_like(t)), mcm.ddim(x, z, t, s, COSINE)
    )


def test_addim_is_equation_14_sample_by_sample():
    """Written out as printed, one sample at a time: alpha_s (not alpha_t) in front of x_hat, the
    norm of each sample on its own.
    """
    x, z, t, s = drawn((5, 3, 8, 8))
    z[0] *= 10  # a norm over the whole batch would be seen
    x_var = torch.rand(5, dtype=torch.float64)
    ours = mcm.addim(x, z, t, s, COSINE, x_var)
    for b in range(5):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = COSINE(t[b]), COSINE(s[b])
        eps = (z[b] - alpha_t * x[b]) / sigma_t
        z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var[b]
        expected = (
            alpha_s * x[b] + torch.sqrt(sigma_s**2 + eps.numel() / eps.norm() ** 2 * z_var) * eps
        )
        if s[b] > 0:
            torch.testing.assert_close(ours[b], expected, rtol=1e-12, atol=1e-12)


def test_addim_restores_the_expected_norm():
    """If x ~ N(x_hat, x_var) given z_t, the true z_s has mean square |ddim|^2 + z_var; aDDIM has it
    when x_hat and eps_hat are orthogonal.
    """
    t, s, x_var = (
        torch.tensor([0.8]).double(),
        torch.tensor([0.5]).double(),
        torch.tensor([0.3]).double(),
    )
    x, z = torch.randn(2, 1, 4096, dtype=torch.float64)
    alpha_t, sigma_t = COSINE(t)
    eps = z - (z * x).sum() / (x * x).sum() * x  # orthogonal to x
    z = alpha_t * x + sigma_t * eps
    (alpha_s, sigma_s), z_s = COSINE(s), mcm.addim(x, z, t, s, COSINE, x_var)
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    torch.testing.assert_close(
        z_s.square().mean(1),
        mcm.ddim(x, z, t, s, COSINE).square().mean(1) + z_var,
        rtol=1e-12,
        atol=0,
    )


def test_addim_default_variance_is_the_prior_of_the_paper():
    x, z, t, s = drawn((5, 3, 4, 4))
    alpha, sigma = COSINE(t)
    snr = (alpha / sigma) ** 2
    torch.testing.assert_close(
        mcm.addim(x, z, t, s, COSINE),
        mcm.addim(x, z, t, s, COSINE, 0.1 / (2 + snr)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_addim_approaches_ddim_quadratically():
    """sqrt(sigma_s^2 + O((t-s)^2)) - sigma_s = O((t-s)^2) while sigma_s > 0: halving the step
    quarters the difference.
    """
    x, z = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    s, x_var = torch.tensor([0.2, 0.5, 0.8]).double(), torch.full((3,), 0.4).double()
    gaps = []
    for h in (1e-2, 5e-3, 2.5e-3):
        difference = mcm.addim(x, z, s + h, s, COSINE, x_var) - mcm.ddim(x, z, s + h, s, COSINE)
        gaps.append(difference.flatten(1).norm(dim=1))
    for larger, smaller in zip(gaps, gaps[1:]):
        assert (
            (larger / smaller - 4).abs() < 0.15
        ).all()  # the next order is h times smaller: a few percent at h = 1e-2


def test_ddim_equals_diffusers():
    reference = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=0
    )
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
            # x_hat is up to 1 / alpha_1 = 160 times z in this schedule; a few float32 roundings of
            # that
            torch.testing.assert_close(
                mcm.ddim(x_hat, z, t, s, schedule), expected, rtol=2e-6, atol=2e-5
            )


SDXL = mcm.DiscreteSchedule(
    torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
)
MADE = [COSINE, SDXL]


@pytest.mark.parametrize("schedule", MADE)
@pytest.mark.parametrize("noise_scale", ["ode", 0.0])
def test_er_sde_without_noise_is_ddim(schedule, noise_scale):
    x, z, t, s = drawn((9, 3))
    assert torch.allclose(
        mcm.er_sde(x, z, t, s, schedule, noise_scale=noise_scale),
        mcm.ddim(x, z, t, s, schedule),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_er_sde_with_a_number_is_diffusers_ddim_with_that_eta(eta):
    scheduler = diffusers.DDIMScheduler(
        1000,
        0.00085,
        0.012,
        "scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(8)
    x, z, noise = torch.randn(3, 5, 4, 2, 2, dtype=torch.float64)
    alphas, schedule = scheduler.alphas_cumprod, mcm.DiscreteSchedule(scheduler.alphas_cumprod)
    for index, following in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:]):
        eps = (z - alphas[index].double().sqrt() * x) / (1 - alphas[index].double()).sqrt()
        theirs = scheduler.step(eps, index, z, eta=eta, variance_noise=noise).prev_sample
        t, s = (
            torch.full((5,), (i.item() + 1) / 1000, dtype=torch.float64) for i in (index, following)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *a, **k: noise)
            ours = mcm.er_sde(x, z, t, s, schedule, noise_scale=eta)
        assert torch.allclose(
            ours, theirs, atol=2e-6
        )  # diffusers keeps its coefficients in float32


@pytest.mark.parametrize("schedule", MADE)
def test_er_sde_with_phi_squared_is_ancestral_sampling(schedule):
    """phi = lambda^2 is DDIM with eta = 1."""
    x, z, t, s = drawn((9, 3))
    torch.manual_seed(1)
    one = mcm.er_sde(x, z, t, s, schedule, noise_scale="sde")
    torch.manual_seed(1)
    assert torch.allclose(
        one, mcm.er_sde(x, z, t, s, schedule, noise_scale=1.0), rtol=0, atol=1e-10
    )


def test_er_sde_5_has_the_published_form():
    """Mean and variance of the first-order step, written with phi = lambda (exp(lambda^0.3) + 10)
    itself.
    """
    t, s = torch.tensor([0.9, 0.5, 0.1]).double(), torch.tensor([0.8, 0.2, 0.05]).double()
    x, z = torch.randn(2, 3, 4000, dtype=torch.float64)
    (a_t, s_t), (a_s, s_s) = SDXL(t), SDXL(s)
    l_t, l_s = s_t / a_t, s_s / a_s
    phi = lambda v: v * (torch.exp(v**0.3) + 10)  # noqa: E731
    r = phi(l_s) / phi(l_t)
    mean = (a_s / a_t * r)[:, None] * z + (a_s * (1 - r))[:, None] * x
    rest = mcm.er_sde(x, z, t, s, SDXL, noise_scale="er5") - mean
    expected = a_s * torch.sqrt(l_s**2 - l_t**2 * r**2)
    assert ((rest.std(1) / expected - 1).abs() < 5 / (2 * 4000) ** 0.5).all()  # 5 standard errors
    assert (rest.mean(1).abs() < 5 * expected / 4000**0.5).all()


@pytest.mark.parametrize("noise_scale", ["ode", "sde", "er5"])
def test_second_order_integrates_a_prediction_that_is_linear_in_lambda(noise_scale):
    """If x_hat is linear in lambda along the path, the second-order step is exact: one step equals
    the mean of many, whose first order is exact in the limit.
    """
    t, s, before = (torch.full((1,), v, dtype=torch.float64) for v in (0.6, 0.4, 0.7))
    z, slope, base = torch.randn(3, 1, 5, dtype=torch.float64)

    def x_hat(u):
        alpha, sigma = COSINE(u)
        return base + slope * (sigma / alpha)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, **k: torch.zeros(shape, dtype=torch.float64))
        second = mcm.er_sde(x_hat(t), z, t, s, COSINE, x_hat(before), before, noise_scale)
        first, fine, n = mcm.er_sde(x_hat(t), z, t, s, COSINE, noise_scale=noise_scale), z, 1000
        for k in range(n):
            a, b = t - (t - s) * k / n, t - (t - s) * (k + 1) / n
            fine = mcm.er_sde(x_hat(a), fine, a, b, COSINE, noise_scale=noise_scale)
    assert (second - fine).abs().max() < 1e-3 < 0.02 < (first - fine).abs().max()


def test_second_order_falls_back_where_it_is_undefined():
    x, z, t, s = drawn((4, 3))
    t, s, before = (
        torch.tensor([0.9, 0.9, 0.5, 0.5]).double(),
        torch.tensor([0.8, 0.0, 0.5, 0.4]).double(),
        torch.tensor([1.0, 1.0, 0.6, 0.5]).double(),
    )
    torch.manual_seed(1)
    second = mcm.er_sde(
        x, z, t, s, COSINE, 2 * x, before, "er5"
    )  # alpha is 0 at t = 1; s = t; no step before
    torch.manual_seed(1)
    assert torch.equal(second, mcm.er_sde(x, z, t, s, COSINE, noise_scale="er5"))
    assert second.isfinite().all()


def test_second_order_on_times_that_a_discrete_schedule_rounds_to_one_level():
    """SCott's sub-steps near t = 0 are shorter than an index."""
    t, s, before = (
        torch.tensor(v, dtype=torch.float64)
        for v in ([0.0007, 0.0013, 0.0020], [0.0003, 0.0007, 0.0013], [0.0010, 0.0020, 0.0027])
    )
    x, z = torch.randn(2, 3, 5, dtype=torch.float64)
    assert mcm.er_sde(x, z, t, s, SDXL, 1.1 * x, before, "er5").isfinite().all()


def test_renoising_has_the_variance_of_the_schedule():
    x, t, s = (
        torch.full((2, 50_000), 0.7, dtype=torch.float64),
        torch.ones(2).double(),
        torch.tensor([0.5, 0.0]).double(),
    )
    z = mcm.renoise(x, x, t, s, COSINE)
    assert torch.equal(z[1], x[1])
    alpha, sigma = COSINE(s)
    assert abs(z[0].mean() - alpha[0] * 0.7) < 5 * sigma[0] / 50_000**0.5
    assert abs(z[0].std() / sigma[0] - 1) < 5 / 100_000**0.5
