"""One step along a trajectory, z_t -> z_s, given a prediction x_hat of the clean image at the end of it.

All functions take z of shape (B, ...) and times t, s of shape (B,) with s <= t, and return the dtype of z_t. The
coefficients are computed in the dtype of t, so pass float64 times where the device has them. A step from t to t returns
z_t exactly, also at t = 0, as long as x_hat is finite.
"""

import torch
from torch import Tensor

from .schedule import Schedule


def expand(a: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) in the dtype of `like`, to broadcast over it."""
    return a.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def mean_over_dims(a: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean over the dimensions of each sample."""
    return a.flatten(1).mean(1)


def _ratio(sigma_s: Tensor, sigma_t: Tensor) -> Tensor:
    """sigma_s / sigma_t, and 1 at t = s = 0 where it is 0 / 0."""
    return torch.where(sigma_t > 0, sigma_s / torch.where(sigma_t > 0, sigma_t, 1.0), 1.0)


def ddim(x_hat: Tensor, z_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """DDIM (arXiv 2403.06807, eq. 4): z_s = alpha_s x_hat + (sigma_s / sigma_t)(z_t - alpha_t x_hat).

    Collected by z_t and x_hat, so that for s = t the coefficients are exactly 1 and 0.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    ratio = _ratio(sigma_s, sigma_t)
    return expand(ratio, z_t) * z_t + expand(alpha_s - alpha_t * ratio, z_t) * x_hat


def inverse_ddim(z_s: Tensor, z_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """The x_hat for which ddim(x_hat, z_t, t, s) = z_s (arXiv 2403.06807, eq. 5).

    The denominator is of order t - s: rounding of z is amplified by its inverse, so use float64 for neighbouring times.
    Where s = t no x_hat is singled out and the result is not finite.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    ratio = _ratio(sigma_s, sigma_t)
    return (z_s - expand(ratio, z_t) * z_t) / expand(alpha_s - alpha_t * ratio, z_t)


def addim(
    x_hat: Tensor,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    schedule: Schedule,
    x_var: Tensor | None = None,
) -> Tensor:
    """Adjusted DDIM (arXiv 2403.06807, section 3.2, eqs. 10-14): DDIM with the noise inflated to the right norm.

    E[x|z_t] is an average, so DDIM's z_s has too little variance: the missing part is (alpha_s - alpha_t sigma_s / sigma_t)^2
    Var[x|z_t] per dimension. aDDIM adds it along eps_hat, scaled by the norm of each sample on its own:

        z_s = alpha_s x_hat + sqrt(sigma_s^2 + z_var / mean(eps_hat^2)) eps_hat,   z_var = (...)^2 x_var

    x_var: (B,) variance per dimension of x given z_t; None means the paper's analytic 0.1 / (2 + SNR(t)), a tenth of the posterior
        variance under a Gaussian prior of variance 0.5 (used for sampling, where there is no data to estimate it from).
    A step to s = 0 returns x_hat; x_var = 0 is DDIM.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    if x_var is None:
        x_var = 0.1 * sigma_t**2 / (2 * sigma_t**2 + alpha_t**2)
    eps_hat = (z_t - expand(alpha_t, z_t) * x_hat) / expand(
        torch.where(sigma_t > 0, sigma_t, 1.0), z_t
    )
    z_var = (alpha_s - alpha_t * _ratio(sigma_s, sigma_t)) ** 2 * x_var
    extra = z_var / mean_over_dims(eps_hat**2).clamp_min(1e-12)
    # sqrt(sigma_s^2 + extra) - sigma_s, written without its cancellation
    inflation = extra / torch.where(s > 0, torch.sqrt(sigma_s**2 + extra) + sigma_s, 1.0)
    return (
        ddim(x_hat, z_t, t, s, schedule) + expand(torch.where(s > 0, inflation, 0.0), z_t) * eps_hat
    )


def renoise(
    x_hat: Tensor,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    schedule: Schedule,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1): forget z_t and noise x_hat afresh, z_s = alpha_s x_hat + sigma_s noise."""
    alpha_s, sigma_s = schedule(s)
    noise = torch.randn(z_t.shape, dtype=z_t.dtype, device=z_t.device, generator=generator)
    return expand(alpha_s, z_t) * x_hat + expand(sigma_s, z_t) * noise


# log h(lambda) of the noise scale functions phi = lambda h(lambda) of arXiv 2309.06169, as a function of u = log lambda
NOISE_SCALES = {
    "ode": torch.zeros_like,  # phi = lambda: no noise, DDIM
    "sde": lambda u: u,  # phi = lambda^2: the reverse SDE, ancestral sampling
    "er5": lambda u: torch.logaddexp(
        torch.exp(0.3 * u), torch.tensor(10.0, dtype=u.dtype, device=u.device).log()
    ),  # lambda (exp(lambda^0.3) + 10)
}


def er_sde(
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
    """A step of an extended reverse-time SDE (arXiv 2309.06169; the teacher's step of SCott, arXiv 2403.01505).

    noise_scale: "ode" (this is DDIM), "sde" (ancestral sampling: DDIM with eta = 1), "er5" (between them), or a number:
        DDIM's eta in [0, 1]. x_hat_prev, t_prev: the prediction of the step before, at t_prev > t; with it the step is of second
        order (not for a number). It falls back to the first order where that is undefined: no step before, or alpha(t_prev) = 0.

    With lambda = sigma / alpha, phi the noise scale function and r = phi(lambda_s) / phi(lambda_t), the paper's first-order step is
    z_s = (alpha_s / alpha_t) r z_t + alpha_s (1 - r) x_hat + alpha_s sqrt(lambda_s^2 - lambda_t^2 r^2) noise. For phi = lambda h it is

        z_s = (sigma_s / sigma_t) g z_t + alpha_s (1 - g lambda_s / lambda_t) x_hat + sigma_s sqrt(1 - g^2) noise,   g = h(lambda_s) / h(lambda_t):

    DDIM with a share g of the old noise and the rest fresh, which has no infinity at alpha_t = 0. The second order adds
    alpha_s (lambda_s - lambda_t + phi(lambda_s) I) (x_hat - x_hat_prev) / (lambda_t - lambda_prev), I = integral of d lambda / phi from s to t.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    log_t, log_s = (
        torch.log((sigma / alpha.clamp_min(1e-30)).clamp(1e-12, 1e12))
        for alpha, sigma in ((alpha_t, sigma_t), (alpha_s, sigma_s))
    )
    if isinstance(noise_scale, str):
        log_h = NOISE_SCALES[noise_scale]
        g = torch.exp(log_h(log_s) - log_h(log_t))
    else:
        # DDIM's sigma(eta) / sigma_s = eta sqrt(1 - alpha_t^2 / alpha_s^2) / sigma_t
        fresh = (
            noise_scale
            * torch.sqrt((1 - (alpha_t / alpha_s.clamp_min(1e-30)) ** 2).clamp_min(0))
            / torch.where(sigma_t > 0, sigma_t, 1.0)
        )
        g = torch.sqrt((1 - fresh**2).clamp_min(0))
    g = torch.where(s == t, 1.0, g)
    ratio = _ratio(sigma_s, sigma_t) * g
    noise = torch.randn(z_t.shape, dtype=z_t.dtype, device=z_t.device, generator=generator)
    z_s = (
        expand(ratio, z_t) * z_t
        + expand(alpha_s - alpha_t * ratio, z_t) * x_hat
        + expand(sigma_s * torch.sqrt(1 - g**2), z_t) * noise
    )
    if x_hat_prev is None or not isinstance(noise_scale, str):
        return z_s
    alpha_prev, sigma_prev = schedule(t_prev)
    lambda_t, lambda_s, lambda_prev = (
        torch.exp(log_t),
        torch.exp(log_s),
        sigma_prev / torch.where(alpha_prev > 0, alpha_prev, 1.0),
    )
    # by the noise levels, not the times: a discrete schedule may round different times to one level
    defined = (alpha_prev > 0) & (lambda_prev - lambda_t > 1e-9 * lambda_t) & (log_s < log_t)
    path = (
        log_s + (log_t - log_s) * torch.linspace(0, 1, 101, dtype=t.dtype, device=t.device)[:, None]
    )
    # phi(lambda_s) I, with d lambda / phi = d log lambda / h
    integral = (
        torch.trapezoid(torch.exp(log_h(log_s) - log_h(path)), dim=0)
        / 100
        * (log_t - log_s)
        * lambda_s
    )
    factor = (
        alpha_s
        * (lambda_s - lambda_t + integral)
        / torch.where(defined, lambda_t - lambda_prev, 1.0)
    )
    return z_s + expand(torch.where(defined, factor, 0.0), z_t) * (x_hat - x_hat_prev)
