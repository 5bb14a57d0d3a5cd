"""From noise to images (arXiv 2403.06807, Algorithm 2), and to the states in between that students are trained on."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import InputError
from .recipes import Stage
from .schedule import Schedule
from .solvers import ddim, expand, renoise


def rows(cond: Any, index: Tensor | slice) -> Any:
    """The conditions of these samples: of a tensor (B, ...), of a named tuple of tensors, or None."""
    if isinstance(cond, tuple):
        return type(cond)(*(rows(part, index) for part in cond))
    return None if cond is None else cond[index]


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
    chunk: int | None = None,
    progress: str | None = None,
    times: Sequence[float] | None = None,
) -> Tensor:
    """Walk from noise z at t = 1 down to an image at t = 0 in equal steps, one network evaluation each.

    denoiser: a diffusion model or a student. z: (B, ...) standard normal noise; the same z gives nearly the same image whatever the
    steps. steps: None means the student_steps K of the denoiser. A student jumps to the ends of its K segments, so any other
    number asks it questions that it was not trained on: it works, and warns (not with mcm.renoise, which does so on purpose). cond: what the network takes, (B,) labels for
    instance, or None. solver: solver(x_hat, z_t, t, s, schedule), e.g. mcm.ddim, mcm.addim or mcm.renoise; generator goes to a solver
    that takes one. times: falling from 1, in place of equal steps (`MILESTONES` has those of TLCM). chunk: how many images go through the network
    at a time (default: all); the result is the same. progress: label of a progress bar. Raises InputError if steps is not
    positive, or not known.
    """
    trained = getattr(denoiser, "student_steps", None)
    steps = len(times) if times is not None else trained if steps is None else steps
    if steps is None:
        raise InputError(
            "this is a diffusion model, with no number of steps of its own: pass steps="
        )
    if steps < 1:
        raise InputError(f"steps must be at least 1, not {steps}")
    if (
        trained and steps != trained and solver is not renoise
    ):  # noised afresh, a one-segment model is asked what it knows at any t
        warnings.warn(
            f"sampling a {trained}-step student in {steps} steps: it only learned to jump between the ends of its {trained} segments. "
            f"Use steps={trained}, or train a student for {steps}.",
            stacklevel=3,  # past torch.no_grad
        )
    options = (
        {"generator": generator} if "generator" in inspect.signature(solver).parameters else {}
    )
    times = [i / steps for i in range(steps, 0, -1)] if times is None else times
    times = torch.tensor([*times, 0.0], dtype=torch.float64, device=z.device)
    images = []
    with tqdm(
        total=len(z), desc=progress, unit="img", leave=False, disable=progress is None
    ) as bar:
        for start in range(0, len(z), chunk or max(1, len(z))):
            index = slice(start, start + (chunk or len(z)))
            part, y = z[index], rows(cond, index)
            for t, s in zip(times[:-1], times[1:]):
                t, s = t.expand(len(part)), s.expand(len(part))
                part = solver(denoiser(part, t, y), part, t, s, denoiser.schedule, **options)
            images.append(part)
            bar.update(len(part))
    return torch.cat(images) if images else z


MILESTONES = {
    1: (8,),
    2: (8, 4),
    3: (8, 4, 1),
    4: (8, 6, 4, 1),
    5: (8, 6, 4, 2, 1),
    6: (8, 6, 4, 3, 2, 1),
    7: (8, 6, 5, 4, 3, 2, 1),
    8: (8, 7, 6, 5, 4, 3, 2, 1),
}
"""In eighths of the time axis, where TLCM (arXiv 2406.05768, its released sampler) evaluates a student in so many re-noised steps."""


def milestones(steps: int) -> list[float]:
    """Times for `sample` with `renoise`: TLCM's for up to 8 steps, equal steps beyond."""
    return (
        [i / 8 for i in MILESTONES[steps]]
        if steps in MILESTONES
        else [i / steps for i in range(steps, 0, -1)]
    )


# --- where the states z_t of training come from: functions of one signature, chosen by Stage.z_from ----------------------------------------


def data_states(
    stage: Stage,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    cond: Any,
    student: nn.Module,
    teacher: nn.Module,
    generator=None,
):
    """Noised data. -> z_t, the clean image behind it (x itself)."""
    return noised(x, t, noise, student.schedule), x


@torch.no_grad()
def teacher_states(
    stage: Stage,
    x: None,
    noise: Tensor,
    t: Tensor,
    cond: Any,
    student: nn.Module,
    teacher: nn.Module,
    generator=None,
):
    """The teacher's own denoising run from pure noise, stopped at t (TLCM, arXiv 2406.05768, algorithm 1). -> z_t, None.

    With M = stage.run segments, a sample in segment (s, s + 1] takes L = M - s equal DDIM steps from 1 to its t: 1 in the noisiest
    segment (t = 1 is pure noise), M in the cleanest; large steps on purpose. With stage.share_run, M neighbouring samples share the
    noise and condition of the first, and t must fall through the M segments: one run of M steps, stopping at each t.
    """
    M = stage.run
    if stage.share_run:
        z, z_t, stops, shared = noise[::M], [], t.reshape(-1, M), rows(cond, slice(None, None, M))
        before = torch.ones_like(stops[:, 0])
        for stop in stops.unbind(1):
            z = ddim(teacher(z, before, shared), z, before, stop, teacher.schedule)
            before = stop
            z_t.append(z)
        return torch.stack(z_t, 1).flatten(0, 1), None
    steps = M + 1 - torch.ceil(t * M).long().clamp(1, M)
    z = noise.clone()
    for k in range(int(steps.max())):
        active = (steps > k).nonzero()[:, 0]
        a, b = (1 - (1 - t[active]) * n / steps[active] for n in (k, k + 1))
        z[active] = ddim(
            teacher(z[active], a, rows(cond, active)), z[active], a, b, teacher.schedule
        ).to(z.dtype)
    return z, None


@torch.no_grad()
def student_states(
    stage: Stage,
    x: None,
    noise: Tensor,
    t: Tensor,
    cond: Any,
    student: nn.Module,
    teacher: nn.Module,
    generator=None,
):
    """The student's own sample in stage.run re-noised steps, noised afresh to t (TLCM, arXiv 2406.05768, algorithm 2). -> z_t, that sample."""
    x = sample(student, noise, stage.run, cond, renoise, generator)
    fresh = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return noised(x, t, fresh, student.schedule), x


STATES = {"data": data_states, "teacher": teacher_states, "student": student_states}
