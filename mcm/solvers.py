"""One step along a trajectory, z_t -> z_s, given a prediction x_hat of the clean image behind z_t.

**Every step is a DDIM step towards some x.** DDIM goes towards x_hat itself. What another solver
adds to DDIM's z_s, it could have had from DDIM by aiming elsewhere: at the x that `addim_aim` and
`er_sde_aim` return. So `addim` and `er_sde` are `ddim` towards that x, and two steps one after the
other are a single one towards a weighted mean of their two aims (`joined_aim`).

All functions take z of shape (B, ...) and times t, s of shape (B,) with s <= t, and return the
wider dtype of z_t and x_hat. Coefficients are computed in the dtype of t: pass float64 times where
the device has them; images may stay float32. A step from t to t returns z_t exactly, also at t = 0,
as long as x_hat is finite.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .schedule import Schedule


def expand(a: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in the dtype of `like` and on its device, to broadcast over it."""
    return a.to(like).reshape(-1, *[1] * (like.ndim - 1))


def mean_over_dims(a: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean over the dimensions of each sample."""
    return a.flatten(1).mean(1)


def divide(a: Tensor, b: Tensor, otherwise: float) -> Tensor:
    """a / b where b > 0, elsewhere a constant."""
    none = b <= 0
    return (a / b.masked_fill(none, 1.0)).masked_fill(none, otherwise)


def eps_hat(x_hat: Tensor, z_t: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The noise that x_hat leaves in z_t: (z_t - alpha_t x_hat) / sigma_t, and finite at t = 0."""
    alpha_t, sigma_t = schedule(t)
    sigma_t = sigma_t.masked_fill(sigma_t <= 0, 1.0)
    return (z_t - expand(alpha_t, z_t) * x_hat) / expand(sigma_t, z_t)


def coefficients(t: Tensor, s: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """-> keep, gain, (B,) each: DDIM's step is z_s = keep z_t + gain x_hat, with

        keep = sigma_s / sigma_t,   gain = alpha_s - alpha_t keep.

    For s = t they are exactly 1 and 0.
    """
    alpha_t, sigma_t = schedule(t)
    alpha_s, sigma_s = schedule(s)
    keep = divide(sigma_s, sigma_t, otherwise=1.0)
    return keep, alpha_s - alpha_t * keep


def ddim(x_hat: Tensor, z_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """DDIM (arXiv 2403.06807, eq. 4): x_hat is kept, and so is the noise that it leaves in z_t,

    z_s = alpha_s x_hat + (sigma_s / sigma_t)(z_t - alpha_t x_hat).
    """
    keep, gain = coefficients(t, s, schedule)
    return expand(keep, z_t) * z_t + expand(gain, z_t) * x_hat


def towards(aim: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Turn an aim into a solver: a DDIM step towards aim(x_hat, z_t, t, s, schedule, ...)."""

    @wraps(aim)
    def step(x_hat, z_t, t, s, schedule, *more, **options) -> Tensor:
        x = aim(x_hat, z_t, t, s, schedule, *more, **options)
        return ddim(x, z_t, t, s, schedule)

    return step


def inverse_ddim(z_s: Tensor, z_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """The x_hat for which ddim(x_hat, z_t, t, s) = z_s (arXiv 2403.06807, eq. 5).

    The denominator is of order t - s, so rounding of z is amplified by its inverse: use float64 for
    neighbouring times. Where s = t no x_hat is singled out and the result is not finite. (The loss
    does without: it knows what its steps aim at.)
    """
    keep, gain = coefficients(t, s, schedule)
    return (z_s - expand(keep, z_t) * z_t) / expand(gain, z_t)


def joined_aim(
    x_first: Tensor, x_second: Tensor, t: Tensor, s: Tensor, q: Tensor, schedule: Schedule
) -> Tensor:
    """Two DDIM steps, t -> s towards x_first, then s -> q towards x_second, as one: -> its x.

    Let g(t, s) be the gain of a step. Two steps give z_q = keep z_t + keep(s, q) g(t, s) x_first +
    g(s, q) x_second. With both x the same this must be one DDIM step, so the two weights add up to
    g(t, q), and

        x = (1 - m) x_first + m x_second,   m = g(s, q) / g(t, q),

    a convex combination: nothing cancels, however close the times are. For s < t, m is exactly 0 at
    s = q and exactly 1 at q = 0 < s; at s = t it is 1, as nothing was done towards x_first. (In
    z / sigma against u = alpha / sigma a DDIM step is a straight line of slope x, so a slope of
    two lines in turn is the mean of theirs: m = (u_q - u_s) / (u_q - u_t).)
    """
    second = coefficients(s, q, schedule)[1]
    both = coefficients(t, q, schedule)[1]
    return torch.lerp(x_first, x_second, expand(divide(second, both, otherwise=1.0), x_first))


def addim_aim(
    x_hat: Tensor,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    schedule: Schedule,
    x_var: Tensor | None = None,
) -> Tensor:
    """Adjusted DDIM (arXiv 2403.06807, section 3.2, Algorithm 3): with noise of the right norm.

    E[x|z_t] is an average, so DDIM's z_s has too little variance: the missing part is
    (alpha_s - alpha_t sigma_s / sigma_t)^2 Var[x|z_t] per dimension. aDDIM adds it along eps_hat,
    scaled by the norm of each sample on its own:

        z_s = alpha_s x_hat + sqrt(sigma_s^2 + z_var / mean(eps_hat^2)) eps_hat,
        z_var = (alpha_s - alpha_t sigma_s / sigma_t)^2 x_var.

    x_var: (B,) variance per dimension of x given z_t. None means the paper's analytic
        0.1 / (2 + SNR(t)), a tenth of the posterior variance under a Gaussian prior of variance 0.5
        (used for sampling, where there is no data to estimate it from).
    A step to s = 0 returns x_hat (there is no noise left to correct); x_var = 0 is DDIM.

    `addim_aim` is x_hat + delta / gain, where delta is what `addim` adds to DDIM's z_s:
    (sqrt(a^2 + b) - a) eps_hat with a = sigma_s and b = z_var / mean(eps_hat^2). It is written
    without its cancellation, as b / (sqrt(a^2 + b) + a); one gain of b is divided out.
    """
    alpha_t, sigma_t = schedule(t)
    sigma_s = schedule(s)[1]
    gain = coefficients(t, s, schedule)[1]
    if x_var is None:
        x_var = 0.1 * sigma_t**2 / (2 * sigma_t**2 + alpha_t**2)  # 0.1 / (2 + SNR)
    eps = eps_hat(x_hat, z_t, t, schedule)
    relative = gain * x_var / mean_over_dims(eps**2).clamp_min(1e-12)
    scale = divide(relative, torch.sqrt(sigma_s**2 + gain * relative) + sigma_s, otherwise=0.0)
    return x_hat + expand(torch.where(s > 0, scale, 0.0), z_t) * eps


addim = towards(addim_aim)


def renoise(
    x_hat: Tensor,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Consistency sampling (arXiv 2303.01469, Algorithm 1): forget z_t and noise x_hat afresh, to
    s.
    """
    alpha_s, sigma_s = schedule(s)
    noise = torch.randn(z_t.shape, dtype=z_t.dtype, device=z_t.device, generator=generator)
    return expand(alpha_s, z_t) * x_hat + expand(sigma_s, z_t) * noise


# The noise scale functions phi = lambda h(lambda) of arXiv 2309.06169, as log h of u = log lambda.
NOISE_SCALES = {
    "ode": torch.zeros_like,  # phi = lambda: no noise, DDIM
    "sde": lambda u: u,  # phi = lambda^2: the reverse SDE, ancestral sampling
    # phi = lambda (exp(lambda^0.3) + 10)
    "er5": lambda u: torch.logaddexp(torch.exp(0.3 * u), torch.full_like(u, 10.0).log()),
}


def _log_lambda(t: Tensor, schedule: Schedule) -> Tensor:
    alpha, sigma = schedule(t)
    return torch.log((sigma / alpha.clamp_min(1e-30)).clamp(1e-12, 1e12))


def _kept_noise(t: Tensor, s: Tensor, schedule: Schedule, noise_scale: float | str) -> Tensor:
    """g, (B,): the share of the old noise in the new; the rest is fresh: variances add up."""
    if isinstance(noise_scale, str):
        log_h = NOISE_SCALES[noise_scale]
        g = torch.exp(log_h(_log_lambda(s, schedule)) - log_h(_log_lambda(t, schedule)))
    else:
        # DDIM's sigma(eta) / sigma_s = eta sqrt(1 - alpha_t^2 / alpha_s^2) / sigma_t
        alpha_t, sigma_t = schedule(t)
        lost = (1 - (alpha_t / schedule(s)[0].clamp_min(1e-30)) ** 2).clamp_min(0)
        fresh = divide(noise_scale * torch.sqrt(lost), sigma_t, otherwise=0.0)
        g = torch.sqrt((1 - fresh**2).clamp_min(0))
    return torch.where(s == t, 1.0, g)


def _curvature(t: Tensor, s: Tensor, schedule: Schedule, t_prev: Any, noise_scale: str) -> Tensor:
    """(B,): the factor on x_hat - x_hat_prev that the second order adds to z_s, 0 if undefined."""
    log_h = NOISE_SCALES[noise_scale]
    log_t = _log_lambda(t, schedule)
    log_s = _log_lambda(s, schedule)
    alpha_prev, sigma_prev = schedule(t_prev)
    lambda_s = torch.exp(log_s)
    lambda_t = torch.exp(log_t)
    lambda_prev = divide(sigma_prev, alpha_prev, otherwise=0.0)
    # by the noise levels, not the times: a discrete schedule may round different times to one level
    defined = (alpha_prev > 0) & (lambda_prev - lambda_t > 1e-9 * lambda_t) & (log_s < log_t)
    # phi(lambda_s) times the integral of d lambda / phi = d log lambda / h from s to t
    path = torch.linspace(0, 1, 101, dtype=t.dtype, device=t.device)[:, None]
    integrand = torch.exp(log_h(log_s) - log_h(log_s + (log_t - log_s) * path))
    integral = torch.trapezoid(integrand, dim=0) / 100 * (log_t - log_s) * lambda_s
    slope = (lambda_s - lambda_t + integral) / torch.where(defined, lambda_t - lambda_prev, 1.0)
    return torch.where(defined, schedule(s)[0] * slope, 0.0)


def er_sde_aim(
    x_hat: Tensor,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    schedule: Schedule,
    x_hat_prev: Tensor | None = None,
    t_prev: Tensor | None = None,
    noise_scale: float | str = "er5",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A step of an extended reverse-time SDE (arXiv 2309.06169), as SCott's teacher takes it.

    noise_scale: "ode" (this is DDIM), "sde" (ancestral sampling: DDIM with eta = 1), "er5" (between
        them), or a number: DDIM's eta in [0, 1].
    x_hat_prev, t_prev: the prediction of the step before, at t_prev > t; with it the step is of
        second order (not for a number). It falls back to the first order where that is undefined:
        no step before, or alpha(t_prev) = 0.

    With lambda = sigma / alpha, phi the noise scale function and r = phi(lambda_s) / phi(lambda_t),
    the paper's first-order step is z_s = (alpha_s / alpha_t) r z_t + alpha_s (1 - r) x_hat +
    alpha_s sqrt(lambda_s^2 - lambda_t^2 r^2) noise. For phi = lambda h it is

        z_s = alpha_s x_hat + sigma_s (g eps_hat + sqrt(1 - g^2) noise),
        g = h(lambda_s) / h(lambda_t):

    DDIM with a share g of the old noise and the rest fresh, which has no infinity at alpha_t = 0.
    The second order adds alpha_s (lambda_s - lambda_t + phi(lambda_s) I) (x_hat - x_hat_prev) /
    (lambda_t - lambda_prev), with I = integral of d lambda / phi from s to t.

    `er_sde_aim` is x_hat + delta / gain, where delta is what `er_sde` adds to DDIM's z_s. Of fresh
    noise there is of order sqrt(t - s) in a step, so this x is far from any image when s is close
    to t; over many steps the noise averages out.
    """
    sigma_s = schedule(s)[1]
    gain = coefficients(t, s, schedule)[1]
    g = _kept_noise(t, s, schedule, noise_scale)
    noise = torch.randn(z_t.shape, dtype=z_t.dtype, device=z_t.device, generator=generator)
    fresh = divide(sigma_s * torch.sqrt(1 - g**2), gain, otherwise=0.0)
    lost = divide(sigma_s * (1 - g), gain, otherwise=0.0)
    x = x_hat + expand(fresh, z_t) * noise - expand(lost, z_t) * eps_hat(x_hat, z_t, t, schedule)
    if x_hat_prev is None or not isinstance(noise_scale, str):
        return x
    curvature = divide(_curvature(t, s, schedule, t_prev, noise_scale), gain, otherwise=0.0)
    return x + expand(curvature, z_t) * (x_hat - x_hat_prev)


er_sde = towards(er_sde_aim)
