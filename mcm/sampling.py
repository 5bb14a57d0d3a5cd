"""From noise to images (arXiv 2403.06807, Algorithm 2)."""

import inspect
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import InputError
from .solvers import ddim


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    z: Tensor,
    steps: int | None = None,
    cond: Tensor | None = None,
    solver: Callable[..., Tensor] = ddim,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
    progress: str | None = None,
) -> Tensor:
    """Walk from noise z at t = 1 down to an image at t = 0 in equal steps: one network evaluation each, no re-noising.

    denoiser: a diffusion model or a student. z: (B, ...) standard normal noise; the same z gives nearly the same image whatever the
    steps. steps: None means the student_steps K of the denoiser. A student jumps to the ends of its K segments, so any other
    number asks it questions that it was not trained on: it works, and warns. cond: (B,) or None. solver: solver(x_hat, z_t, t, s,
    schedule), e.g. mcm.ddim or mcm.addim; generator goes to a solver that takes one. chunk: how many images go through the network
    at a time (default: all); the result is the same. progress: label of a progress bar. Raises InputError if steps is not
    positive, or not known.
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
            stacklevel=3,  # past torch.no_grad
        )
    options = {"generator": generator} if "generator" in inspect.signature(solver).parameters else {}
    times = torch.arange(steps, -1, -1, dtype=torch.float64, device=z.device) / steps
    images = []
    with tqdm(total=len(z), desc=progress, unit="img", leave=False, disable=progress is None) as bar:
        for rows in torch.arange(len(z)).split(chunk or max(1, len(z))):
            part, y = z[rows[0] : rows[-1] + 1], None if cond is None else cond[rows[0] : rows[-1] + 1]
            for t, s in zip(times[:-1], times[1:]):
                t, s = t.expand(len(part)), s.expand(len(part))
                part = solver(denoiser(part, t, y), part, t, s, denoiser.schedule, **options)
            images.append(part)
            bar.update(len(part))
    return torch.cat(images) if images else z
