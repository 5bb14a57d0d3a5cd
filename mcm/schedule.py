"""Noise schedules: t -> (alpha, sigma) with z_t = alpha_t x + sigma_t eps and alpha_t^2 + sigma_t^2 = 1.

t runs from 0 (clean image) to 1 (noise). Every schedule gives exactly (1, 0) at t = 0, so that a sampler's last step
returns x_hat itself, and a step from t to t is exactly the identity.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class CosineSchedule:
    """The cosine schedule, optionally clipped, shifted or interpolated (simple diffusion, arXiv 2301.11093, section 3.1).

    Unclipped and unshifted, alpha = cos(pi t / 2) and sigma = sin(pi t / 2), i.e. logSNR(t) = -2 log tan(pi t / 2).

    clip: keep logSNR within [-clip, clip] by shrinking the range of the angle; None means unclipped (alpha_1 = 0 exactly).
    shift_low, shift_high: added to logSNR with weight 1 - t and t. One resolution shift is shift_low = shift_high =
        2 log(n / d): the noise that suits n x n images, applied to d x d ones. Two values interpolate, which is what
        Multistep Consistency Models (arXiv 2403.06807) trains with; see `interpolated`.
    """

    clip: float | None = None
    shift_low: float = 0.0
    shift_high: float = 0.0

    @classmethod
    def interpolated(
        cls, resolution: int, noise_low: int, noise_high: int, clip: float | None = None
    ) -> "CosineSchedule":
        """The schedule that MCM writes as "interpolated cosine noise_low -> noise_high" for resolution x resolution images."""
        return cls(
            clip, 2 * math.log(noise_low / resolution), 2 * math.log(noise_high / resolution)
        )

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: any shape, in [0, 1] -> alpha, sigma of the same shape and dtype."""
        a, b = (
            (0.0, math.pi / 2)
            if self.clip is None
            else (math.atan(math.exp(-self.clip / 2)), math.atan(math.exp(self.clip / 2)))
        )
        # cos(x) as sin(pi/2 - x): exactly 0 at x = pi/2, where cos in floating point is not.
        sin, cos = torch.sin(a + t * (b - a)), torch.sin((math.pi / 2 - a) - t * (b - a))
        if self.shift_low or self.shift_high:
            # logSNR + shift means sigma / alpha times exp(-shift / 2); dividing by the norm restores alpha^2 + sigma^2 = 1.
            sin = sin * torch.exp(-(self.shift_low + t * (self.shift_high - self.shift_low)) / 2)
            norm = torch.hypot(sin, cos)
            sin, cos = sin / norm, cos / norm
        return torch.where(t == 0, 1.0, cos), torch.where(t == 0, 0.0, sin)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given as its time: t itself."""
        return t


class DiscreteSchedule:
    """A schedule tabulated at N steps, as in DDPM or SDXL: t = i / N means index i - 1; t = 0 is the clean image.

    t > 0 is rounded to the nearest index, and the network receives that same index, so both always speak of one noise level.
    """

    def __init__(self, alphas_cumprod: Tensor):
        """alphas_cumprod: (N,) falling from just below 1; alpha = sqrt(alphas_cumprod). Raises InputError if it is not that."""
        values = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        if (
            values.ndim != 1
            or not len(values)
            or not ((values >= 0) & (values < 1)).all()
            or not (values.diff() < 0).all()
        ):
            raise InputError(
                "alphas_cumprod must be one-dimensional, at least 0, below 1, and strictly falling"
            )
        self.alphas_cumprod = values

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: any shape, in [0, 1] -> alpha, sigma of the same shape and dtype."""
        padded = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod]).to(
            t.device
        )  # entry 0 is t = 0
        alpha2 = padded[self._step(t)]
        return alpha2.sqrt().to(t.dtype), (1 - alpha2).sqrt().to(t.dtype)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given as its time: the index (int64) that t means; 0 at t = 0, where its answer is not used."""
        return (self._step(t) - 1).clamp_min(0)

    def _step(self, t: Tensor) -> Tensor:
        step = torch.round(t.double() * len(self.alphas_cumprod)).long()
        return torch.where(t > 0, step.clamp_min(1), step)  # only t = 0 itself is free of noise


Schedule = CosineSchedule | DiscreteSchedule
