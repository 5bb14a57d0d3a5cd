"""From noise to images (arXiv 2403.06807, Algorithm 2)."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import InputError
from .solvers import ddim


def fine(device: torch.device) -> torch.dtype:
    """float64, for times and for algebra that cancels; float32 on the one device type that lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    z: Tensor,
    steps: int | None = None,
    cond: Tensor | None = None,
    solver: Callable[..., Tensor] = ddim,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Walk from noise z at t = 1 down to an image at t = 0 in equal steps: one network evaluation each, no re-noising.

    denoiser: a diffusion model or a student. z: (B, ...) standard normal noise; the same z gives nearly the same image whatever the
    steps. steps: None means the student_steps K of the denoiser. A student jumps to the ends of its K segments, so any other
    number asks it questions that it was not trained on: it warns. solver: solver(x_hat, z_t, t, s, schedule), e.g. mcm.ddim or
    mcm.addim. generator: passed on to a solver that draws noise. Raises InputError if steps is not positive, or not known.
    """
    trained = getattr(denoiser, "student_steps", None)
    steps = trained if steps is None else steps
    if steps is None:
        raise InputError("this is a diffusion model, with no number of steps of its own: pass steps=")
    if steps < 1:
        raise InputError(f"steps must be at least 1, not {steps}")
    if trained and steps != trained:
        warnings.warn(
            f"sampling a {trained}-step student in {steps} steps: it only learned to jump between the ends of its {trained} segments. "
            f"Use steps={trained}, or train a student for {steps}.",
            stacklevel=2,
        )
    options = {} if generator is None else {"generator": generator}
    times = torch.arange(steps, -1, -1, dtype=fine(z.device), device=z.device) / steps
    for t, s in zip(times[:-1], times[1:]):
        t, s = t.expand(len(z)), s.expand(len(z))
        z = solver(denoiser(z, t, cond), z, t, s, denoiser.schedule, **options)
    return z
