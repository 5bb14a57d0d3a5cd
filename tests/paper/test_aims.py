"""Every solver step is a DDIM step towards some x: that x, against float64 inverse_ddim of the
formulas that make z_s directly.
"""

import pytest
import torch

import mcm
from mcm.solvers import addim_aim, coefficients, er_sde_aim, joined_aim

COSINE = mcm.CosineSchedule()
SDXL = mcm.DiscreteSchedule.scaled_linear()
SCHEDULES = {"cosine": COSINE, "clipped": mcm.CosineSchedule(clip=15.0), "sdxl": SDXL}
LOG_H = {
    "ode": torch.zeros_like,
    "sde": lambda u: u,
    "er5": lambda u: torch.log(torch.exp(torch.exp(0.3 * u).clamp_max(700)) + 10),
}


def column(a, like):
    return a.reshape(-1, *[1] * (like.ndim - 1))


def addim_by_the_paper(x, z, t, s, schedule, x_var):
    """Equation 14, as printed."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    eps = (z - column(alpha_t, z) * x) / column(sigma_t, z)
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var
    scale = torch.sqrt(sigma_s**2 + z_var / eps.flatten(1).square().mean(1))
    scale = torch.where(s > 0, scale, 0.0)  # a step to 0 returns x_hat
    return column(alpha_s, z) * x + column(scale, z) * eps


def er_sde_by_the_paper(x, z, t, s, schedule, noise, eta, x_prev=None, t_prev=None):
    """The step written for z_s itself (arXiv 2309.06169), with lambda clipped at both ends."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    log_t, log_s = (
        torch.log((b / a.clamp_min(1e-30)).clamp(1e-12, 1e12))
        for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s))
    )
    if isinstance(eta, str):
        u = torch.stack([log_s, log_t])
        h = torch.logaddexp(torch.exp(0.3 * u), torch.tensor(10.0).double().log())
        log_h = h if eta == "er5" else LOG_H[eta](u)
        g = torch.exp(log_h[0] - log_h[1])
    else:
        fresh = eta * torch.sqrt((1 - (alpha_t / alpha_s) ** 2).clamp_min(0)) / sigma_t
        g = torch.sqrt((1 - fresh**2).clamp_min(0))
    g = torch.where(s == t, 1.0, g)
    ratio = sigma_s / sigma_t * g
    z_s = column(ratio, z) * z + column(alpha_s - alpha_t * ratio, z) * x
    z_s = z_s + column(sigma_s * torch.sqrt(1 - g**2), z) * noise
    if x_prev is None:
        return z_s
    alpha_prev, sigma_prev = schedule(t_prev)
    lambda_t, lambda_s, lambda_prev = torch.exp(log_t), torch.exp(log_s), sigma_prev / alpha_prev
    path = log_s + (log_t - log_s) * torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    ten = torch.tensor(10.0).double().log()
    h = {
        "ode": torch.zeros_like,
        "sde": lambda u: u,
        "er5": lambda u: torch.logaddexp(torch.exp(0.3 * u), ten),
    }[eta]
    integral = torch.trapezoid(torch.exp(h(log_s) - h(path)), dim=0) / 100
    integral = integral * (log_t - log_s) * lambda_s
    slope = (lambda_s - lambda_t + integral) / (lambda_t - lambda_prev)
    return z_s + column(alpha_s * slope, z) * (x - x_prev)


def drawn(schedule, n=64, seed=0):
    """x, z and times s < t, t = 1 and s = 0 among them."""
    torch.manual_seed(seed)
    t = torch.rand(n).double() * 0.9 + 0.1
    s = t * torch.rand(n).double() * 0.95
    t[:4] = 1.0
    s[2:8] = 0.0
    x, z, noise = torch.randn(3, n, 3, 4, 4).double()
    return x, z, noise, t, s


def close(ours, z_s, z, t, s, schedule):
    """ours is inverse_ddim(z_s) to rounding: a few ulp of z and x, over the gain."""
    gain = column(coefficients(t, s, schedule)[1], z)
    expected = mcm.inverse_ddim(z_s, z, t, s, schedule)
    size = 1 + z.abs().max() + expected.abs()
    assert ((ours - expected).abs() < 64 * torch.finfo(torch.float64).eps * size / gain).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_addim_aims_at(name):
    schedule = SCHEDULES[name]
    x, z, _, t, s = drawn(schedule)
    x_var = torch.rand(len(t)).double() + 0.1
    ours = addim_aim(x, z, t, s, schedule, x_var)
    close(ours, addim_by_the_paper(x, z, t, s, schedule, x_var), z, t, s, schedule)
    assert torch.equal(ours[s == 0], x[s == 0])
    assert (ours - x)[s > 0].abs().flatten(1).amax(1).min() > 1e-6  # it is not x_hat


@pytest.mark.parametrize("name", ["cosine", "sdxl"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0, "ode", "sde", "er5"])
@pytest.mark.parametrize("order", [1, 2])
def test_what_er_sde_aims_at(name, eta, order, monkeypatch):
    schedule = SCHEDULES[name]
    x, z, noise, t, s = drawn(schedule)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: noise)
    before = (None, None)
    if order == 2:
        if not isinstance(eta, str):
            pytest.skip("a number has no second order")
        t = t * 0.8  # so that there is a time before, with alpha > 0
        s = s * 0.8
        before = (x + torch.roll(x, 1, 0), t + 0.1)
    ours = er_sde_aim(x, z, t, s, schedule, *before, eta)
    close(ours, er_sde_by_the_paper(x, z, t, s, schedule, noise, eta, *before), z, t, s, schedule)


@pytest.mark.parametrize("aim", [addim_aim, er_sde_aim])
def test_a_step_to_its_own_time_aims_at_x_hat(aim):
    """Also where a discrete schedule rounds two times to one level."""
    x, z = torch.randn(2, 6, 3)
    t = torch.tensor([0.0, 1e-3, 0.3, 0.77, 1.0, 0.5]).double()
    assert torch.equal(aim(x, z, t, t, COSINE), x)
    t = torch.tensor([0.0013, 0.0021, 0.5001, 0.2502, 0.7503, 0.0004]).double()
    s = torch.tensor([0.0011, 0.0019, 0.4999, 0.2499, 0.7498, 0.0002]).double()
    assert torch.equal(SDXL(t)[0], SDXL(s)[0]) and (s < t).all()
    assert torch.equal(aim(x, z, t, s, SDXL), x)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_several_steps_are_one(n, name):
    """Towards the x's own weighted mean; also over levels that a schedule does not tell apart."""
    schedule = SCHEDULES[name]
    _, z, _, t, s = drawn(schedule)
    times = [*(t - (t - s) * k / n for k in range(n)), s]
    x, z_k = torch.zeros_like(z), z
    for k in range(n):
        towards = torch.randn_like(z)
        x = joined_aim(x, towards, t, times[k], times[k + 1], schedule)
        z_k = mcm.ddim(towards, z_k, times[k], times[k + 1], schedule)
    close(x, z_k, z, t, s, schedule)
    fine = torch.tensor([0.0016, 0.0021]).double()  # sub-steps shorter than an index
    steps = [fine - 0.0005 * k / 3 for k in range(4)]
    x = torch.zeros(2, 3)
    for a, b in zip(steps, steps[1:]):
        x = joined_aim(x, torch.randn(2, 3), fine, a, b, SDXL)
    assert x.isfinite().all() and x.abs().max() < 10


def test_neighbouring_points_of_a_fine_grid_in_float32():
    """T = 1280: images in float32, coefficients in float64. The old way fails, ours does not."""
    torch.manual_seed(0)
    i = torch.randint(2, 1281, (256,))
    t, m, s = i.double() / 1280, (i - 1).double() / 1280, (i - 2).double() / 1280
    x, y, z = torch.randn(3, 256, 3, 4, 4)
    x_var = torch.rand(256).double()

    def worst(x, y, z):
        aims = [addim_aim(a, z, t, m, COSINE, x_var) for a in (x, y)]
        return joined_aim(aims[0], aims[1], t, m, s, COSINE), aims

    exact, aims = worst(x.double(), y.double(), z.double())
    ours, in_float32 = worst(x, y, z)
    assert (ours - exact).abs().max() < 2e-6 and (in_float32[0] - aims[0]).abs().max() < 2e-6
    landed = mcm.ddim(in_float32[1], mcm.ddim(in_float32[0], z, t, m, COSINE), m, s, COSINE)
    old = mcm.inverse_ddim(landed, z, t, s, COSINE)
    assert (old - exact).abs().max() > 1e-4  # of the size of the paper's Huber constant


def test_float32_times_are_enough_for_training():
    """Where a device has no float64: the target is wrong by less than a tenth of 1 %."""
    torch.manual_seed(0)
    i = torch.randint(1, 257, (256,))
    t, s, q = i.double() / 256, (i - 1).double() / 256, (i - 1) // 64 * 64 / 256
    x, y = torch.randn(2, 256, 3)
    exact = joined_aim(x, y, t, s, q.double(), COSINE)
    rough = joined_aim(x, y, t.float(), s.float(), q.float(), COSINE)
    assert (rough - exact).abs().max() < 1e-3
