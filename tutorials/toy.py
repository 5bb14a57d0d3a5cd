"""The one-dimensional world of the notebooks: two humps, their exact denoiser, the distance to
them, and students for it; `check` and `guess` for what the student writes.
"""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    import mcm
except ImportError:  # not installed: it lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import mcm
from bugs import broken
from checks import check, guess, mixture, schedule

__all__ = ["Network", "Table", "broken", "check", "distilled", "even_noise", "guess", "w2"]

QUANTILES = (torch.arange(4000).double() + 0.5) / 4000
even_noise = (math.sqrt(2) * torch.erfinv(2 * QUANTILES - 1))[:, None]
"""(4000, 1): standard normal, spread evenly, so that no luck is involved."""


def _data_quantiles() -> Tensor:
    fine = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    below = sum(0.25 * (1 + torch.erf((fine - mean) / (0.2 * math.sqrt(2)))) for mean in (-1, 1))
    return fine[torch.searchsorted(below, QUANTILES).clamp_max(60_000)]


TRUTH = _data_quantiles()


def w2(samples: Tensor) -> float:
    """Wasserstein distance of 4,000 samples (4000, 1), drawn from `even_noise`, to the data."""
    return (samples[:, 0].double().sort().values - TRUTH).square().mean().sqrt().item()


class Network(nn.Module):
    """(z, t) -> v. Three hidden layers; t enters as itself and as two waves."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 1),
        )

    def forward(self, z: Tensor, t: Tensor, cond: None = None) -> Tensor:
        t = t[:, None].to(z.dtype)
        return self.layers(torch.cat([z, t, torch.sin(math.pi * t), torch.cos(math.pi * t)], 1))


class Table(nn.Module):
    """A student without a network: x_hat(z, i / T) on a fine grid of z, linear in between. values:
    (T + 1, points), to be filled in.
    """

    schedule = schedule

    def __init__(self, T: int, K: int, points: int):
        super().__init__()
        self.T, self.student_steps = T, K
        self.z = torch.linspace(-6, 6, points, dtype=torch.float64)
        self.values = torch.zeros(T + 1, points).double()

    def forward(self, z: Tensor, t: Tensor, cond: None = None) -> Tensor:
        flat, row = z.flatten(), torch.round(t * self.T).long()
        place = ((flat - self.z[0]) / (self.z[1] - self.z[0])).clamp(0, len(self.z) - 1.001)
        left, w = place.long(), place % 1
        x = (1 - w) * self.values[row, left] + w * self.values[row, left + 1]
        return torch.where(t == 0, flat, x).reshape(z.shape)


def distilled(T: int, K: int, teacher: nn.Module = mixture, points: int = 6001) -> Table:
    """The best K-step student of a teacher (consistency distillation): its target is a function of
    z_t, filled in from t = 0 upwards.
    """
    student, method = Table(T, K, points), mcm.Method(K, (T, T), x_var=None, distance="squared")
    for i in range(1, T + 1):
        t = torch.full((points,), i / T).double()
        noise = (student.z / schedule(t)[1])[:, None]  # with x = 0, so that z_t = z
        student.values[i] = mcm.consistency_loss(
            student,
            torch.zeros(points, 1).double(),
            None,
            method,
            teacher=teacher,
            t=t,
            noise=noise,
        ).x_target[:, 0]
    return student
