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


def addim(x_hat: Tensor, z_t: Tensor, t: Tensor, s: Tensor, schedule: Schedule, x_var: Tensor | None = None) -> Tensor:
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
    eps_hat = (z_t - expand(alpha_t, z_t) * x_hat) / expand(torch.where(sigma_t > 0, sigma_t, 1.0), z_t)
    z_var = (alpha_s - alpha_t * _ratio(sigma_s, sigma_t)) ** 2 * x_var
    extra = z_var / mean_over_dims(eps_hat**2).clamp_min(1e-12)
    # sqrt(sigma_s^2 + extra) - sigma_s, written without its cancellation
    inflation = extra / torch.where(s > 0, torch.sqrt(sigma_s**2 + extra) + sigma_s, 1.0)
    return ddim(x_hat, z_t, t, s, schedule) + expand(torch.where(s > 0, inflation, 0.0), z_t) * eps_hat
