"""An exact denoiser, for tests and tutorials: the posterior mean of a Gaussian mixture."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import at_least_float32, at_zero
from .errors import InputError
from .schedule import CosineSchedule, Schedule


class GaussianMixture(nn.Module):
    """E[x | z_t] for x from a mixture of M isotropic normals in any dimension. Nothing is learned.

    means: (M, *shape).
    stds: (M,), positive.
    weights: (M,), normalised here; None: equal.
    With cond = (B,) component indices it answers for that component alone (an exact
    class-conditional model); an index of M means the whole mixture, as does None.

    z_t of component m is N(alpha mu_m, alpha^2 std_m^2 + sigma^2), so with v_m its variance

        E[x | z_t, m] = (sigma^2 mu_m + alpha std_m^2 z_t) / v_m,
        p(m | z_t) ~ weight_m N(z_t; alpha mu_m, v_m).

    Raises InputError for shapes that do not fit or a std that is not positive.
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor,
        weights: Tensor | None = None,
        schedule: Schedule = CosineSchedule(),
    ):
        super().__init__()
        means, stds = torch.as_tensor(means), torch.as_tensor(stds)
        if means.ndim < 2 or stds.shape != means.shape[:1] or not (stds > 0).all():
            raise InputError("means must be (M, *shape) and stds (M,) positive")
        self.shape = means.shape[1:]
        self.schedule = schedule
        given = torch.ones_like(stds) if weights is None else weights
        weights = torch.as_tensor(given, dtype=stds.dtype)
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("stds", stds)
        self.register_buffer("weights", weights / weights.sum())

    def forward(self, z: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        z = at_least_float32(z)
        alpha, sigma = (a.to(z.dtype)[:, None] for a in self.schedule(t))  # (B, 1)
        flat = z.flatten(1)
        means = self.means.to(z.dtype)
        prior = self.stds.to(z.dtype) ** 2
        variance = alpha**2 * prior + sigma**2  # (B, M)
        distance = (flat[:, None] - alpha[..., None] * means).square().sum(-1)
        log_density = -distance / (2 * variance) - flat.shape[1] / 2 * variance.log()
        log_weight = self.weights.to(z.dtype).log() + log_density
        if cond is not None:
            components = torch.arange(len(means), device=z.device)
            other = (cond[:, None] != components) & (cond[:, None] < len(means))
            log_weight = log_weight.masked_fill(other, -math.inf)
        share = log_weight.softmax(1) / variance  # (B, M)
        x_hat = (share * sigma**2) @ means + (share * prior).sum(1, True) * alpha * flat
        return at_zero(x_hat.reshape(z.shape), z, t)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape) draws from the mixture."""
        m = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        means = self.means[m]
        noise = torch.empty_like(means).normal_(generator=generator)
        return (means + self.stds[m, None] * noise).reshape(n, *self.shape)
