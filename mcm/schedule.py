"""Noise schedules: t -> (alpha, sigma), with z_t = alpha_t x + sigma_t eps and alpha_t^2 +
sigma_t^2 = 1.

t runs from 0 (clean image) to 1 (noise). Every schedule gives exactly (1, 0) at t = 0, so that a
sampler's last step returns x_hat itself, and a step from t to t is exactly the identity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import InputError

_LEVELS = WeakTensorKeyDictionary()


def once(levels: Callable) -> Callable:
    """alpha and sigma of one tensor of times, computed once: a loss needs them 20 times over."""

    @wraps(levels)
    def remembered(schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.requires_grad or t.is_inference():
            return levels(schedule, t)
        known = _LEVELS.setdefault(t, {})
        key = (schedule, t._version)  # it may have been changed in place
        known[key] = known.get(key) or levels(schedule, t)
        return known[key]

    return remembered


@lru_cache(maxsize=64)
def copied(table: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A table on another device, or in another dtype, copied once."""
    return table.to(device, dtype)


def time_dtype(device: torch.device) -> torch.dtype:
    """What times are kept in: float64, or float32 on Apple's GPUs, which have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class CosineSchedule:
    """The cosine schedule, optionally clipped, shifted or interpolated (arXiv 2301.11093, section
    3.1).

    Unclipped and unshifted, alpha = cos(pi t / 2) and sigma = sin(pi t / 2), that is
    logSNR(t) = -2 log tan(pi t / 2).

    clip: before any shift, keep logSNR within [-clip, clip] (but at t = 0) by shrinking the range
        of the angle; None: unclipped (alpha_1 = 0 exactly).
    shift_low, shift_high: added to logSNR with weight 1 - t and t. One shift for all t is
        shift_low = shift_high = 2 log(n / d): the noise that suits n x n images, applied to d x d
        ones. Two values interpolate, which is what Multistep Consistency Models (arXiv 2403.06807)
        trains with; see `interpolated`.
    """

    clip: float | None = None
    shift_low: float = 0.0
    shift_high: float = 0.0

    @classmethod
    def interpolated(
        cls, resolution: int, noise_low: float, noise_high: float, clip: float | None = None
    ) -> "CosineSchedule":
        """What MCM calls "interpolated cosine noise_low -> noise_high", for square images of this
        side.
        """
        shifts = (2 * math.log(noise / resolution) for noise in (noise_low, noise_high))
        return cls(clip, *shifts)

    @once
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: any shape, in [0, 1] -> alpha, sigma of the same shape and dtype."""
        first, last = 0.0, math.pi / 2
        if self.clip is not None:
            first = math.atan(math.exp(-self.clip / 2))
            last = math.atan(math.exp(self.clip / 2))
        sin = torch.sin(first + t * (last - first))
        # cos(x) as sin(pi/2 - x): exactly 0 at x = pi/2, where cos in floating point is not.
        cos = torch.sin((math.pi / 2 - first) - t * (last - first))
        if self.shift_low or self.shift_high:
            # logSNR + shift means sigma / alpha times exp(-shift / 2); the norm makes
            # alpha^2 + sigma^2 = 1 again.
            shift = self.shift_low + t * (self.shift_high - self.shift_low)
            sin = sin * torch.exp(-shift / 2)
            norm = torch.hypot(sin, cos)
            sin = sin / norm
            cos = cos / norm
        clean = t == 0
        return cos.masked_fill(clean, 1.0), sin.masked_fill(clean, 0.0)

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given as its time: t itself."""
        return t


class DiscreteSchedule:
    """A schedule tabulated at N steps, as in DDPM or SDXL: t = i / N means index i - 1.

    t > 0 is rounded to the nearest index, and the network receives that same index, so that both
    always speak of one noise level. t = 0 is the clean image.
    """

    def __init__(self, alphas_cumprod: Tensor):
        """alphas_cumprod: (N,), alpha^2 falling from just below 1. Raises InputError if it is not
        that.
        """
        values = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        inside = ((values >= 0) & (values < 1)).all()
        if values.ndim != 1 or not len(values) or not inside or not (values.diff() < 0).all():
            raise InputError("alphas_cumprod must be (N,), in [0, 1), and strictly falling")
        self.alphas_cumprod = values
        alpha2 = torch.cat([torch.ones(1, dtype=torch.float64), values])  # entry 0 is t = 0
        self._levels = (alpha2.sqrt(), (1 - alpha2).sqrt())

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "DiscreteSchedule":
        """Stable Diffusion's and SDXL's schedule: the square roots of beta lie on a line."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64)
        return cls(torch.cumprod(1 - roots**2, 0))

    @once
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t: any shape, in [0, 1] -> alpha, sigma of the same shape and dtype."""
        alpha, sigma = (copied(a, t.device, t.dtype) for a in self._levels)
        return alpha[step := self._step(t)], sigma[step]

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given: the index (int64) that t means; 0 at t = 0, where it is not
        used.
        """
        return (self._step(t) - 1).clamp_min(0)

    def _step(self, t: Tensor) -> Tensor:
        step = torch.round(t * len(self.alphas_cumprod)).long()
        return torch.where(t > 0, step.clamp_min(1), step)  # only t = 0 itself is free of noise


Schedule = CosineSchedule | DiscreteSchedule
