"""From noise to images (arXiv 2403.06807, Algorithm 2), and from images to noise."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .schedule import Schedule, time_dtype
from .solvers import ddim, expand, renoise


def noised(x: Tensor, t: Tensor, noise: Tensor, schedule: Schedule) -> Tensor:
    """z_t = alpha_t x + sigma_t noise."""
    alpha, sigma = schedule(t)
    return expand(alpha, x) * x + expand(sigma, x) * noise


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    z: Tensor,
    steps: int | None = None,
    cond: Any = None,
    solver: Callable[..., Tensor] = ddim,
    generator: torch.Generator | None = None,
    times: Sequence[float] | None = None,
) -> Tensor:
    """Walk from noise z at t = 1 down to an image at t = 0 in equal steps, one evaluation each.

    denoiser: a diffusion model or a student.
    z: (B, ...) standard normal noise; the same z gives nearly the same image whatever the steps.
    steps: None means the student_steps K of the denoiser. A student jumps to the ends of its K
        segments, so any other number asks it questions that it was not trained on: it works, and
        warns (not with mcm.renoise, which does so on purpose).
    cond: what the network takes, (B,) labels for instance, or None.
    solver: called as solver(x_hat, z_t, t, s, schedule): mcm.ddim, mcm.addim, mcm.renoise, ...;
        `generator` goes to one that takes it.
    times: falling from 1, in place of equal steps.
    Raises InputError if steps is not positive, or not known.
    """
    trained = getattr(denoiser, "student_steps", None)
    if times is not None:
        steps = len(times)
    steps = trained if steps is None else steps
    if steps is None:
        raise InputError("a diffusion model has no number of steps of its own: pass steps")
    if steps < 1:
        raise InputError(f"steps must be at least 1, not {steps}")
    # noised afresh, a one-segment model is asked what it knows at any t
    if trained and steps != trained and solver is not renoise:
        warnings.warn(
            f"sampling a {trained}-step student in {steps} steps: it only learned to jump between "
            f"the ends of its {trained} segments. Use steps={trained}, or train a student for "
            f"{steps}.",
            stacklevel=3,  # past torch.no_grad
        )
    parameters = inspect.signature(solver).parameters
    options = {"generator": generator} if "generator" in parameters else {}
    falling = [i / steps for i in range(steps, 0, -1)] if times is None else times
    grid = torch.tensor([*falling, 0.0], dtype=time_dtype(z.device), device=z.device)
    for t, s in pairwise(grid):
        t = t.expand(z.shape[0])
        s = s.expand(z.shape[0])
        z = solver(denoiser(z, t, cond), z, t, s, denoiser.schedule, **options)
    return z
