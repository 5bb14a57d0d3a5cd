"""Where the noisy latents z_t of a phase come from: functions of one signature, by `Phase.states`.

phase: a Phase. x: (B, ...) clean latents, or None. noise: like x, pure noise. t: (B,). cond: what
the networks take. student, teacher: denoisers. -> the clean image behind z_t (or None), and z_t.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import select
from ..errors import InputError
from ..losses import draw_times, normal_like
from ..sampling import noised, sample
from ..solvers import ddim, renoise
from .recipes import Phase

States = tuple[Tensor | None, Tensor]


def data_states(phase, x, noise, t, cond, student, teacher) -> States:
    """Noised data."""
    return x, noised(x, t, noise, student.schedule)


@torch.no_grad()
def teacher_states(phase, x, noise, t, cond, student, teacher) -> States:
    """The teacher's own denoising run from pure noise, stopped at t (arXiv 2406.05768, Algorithm
    1).

    With M = phase.rollout_steps segments, a sample in segment (s, s + 1] takes L = M - s equal DDIM
    steps from 1 to its t: 1 in the noisiest segment (t = 1 is pure noise), M in the cleanest; large
    steps on purpose. With phase.share_rollout, M neighbouring samples share the noise and condition
    of the first, and t must fall through the M segments: one run of M steps, stopping at each t.
    """
    M = phase.rollout_steps
    if phase.share_rollout:
        z = noise[::M]
        shared = select(cond, slice(None, None, M))
        stops = t.reshape(-1, M)
        before = torch.ones_like(stops[:, 0])
        z_t = []
        for stop in stops.unbind(1):
            z = ddim(teacher(z, before, shared), z, before, stop, teacher.schedule)
            before = stop
            z_t.append(z)
        return None, torch.stack(z_t, 1).flatten(0, 1)
    steps = M + 1 - torch.ceil(t * M).long().clamp(1, M)
    z = noise.clone()
    for k in range(int(steps.max())):
        active = (steps > k).nonzero()[:, 0]
        a, b = (1 - (1 - t[active]) * n / steps[active] for n in (k, k + 1))
        x_hat = teacher(z[active], a, select(cond, active))
        z[active] = ddim(x_hat, z[active], a, b, teacher.schedule).to(z.dtype)
    return None, z


@torch.no_grad()
def student_states(phase, x, noise, t, cond, student, teacher) -> States:
    """The student's own sample in several re-noised steps, noised afresh to t (Algorithm 2)."""
    x = sample(student, noise, phase.rollout_steps, cond, renoise)
    return x, noised(x, t, normal_like(x), student.schedule)


STATES = {"data": data_states, "teacher": teacher_states, "student": student_states}


def draw_states(
    phase: Phase,
    x: Tensor | None,
    noise: Tensor,
    cond: Any,
    student: nn.Module,
    teacher: nn.Module,
    progress: float = 1.0,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """-> x, z_t and t for `consistency_loss`. Raises InputError if a batch cannot share runs."""
    t = draw_times(phase.method, len(noise), progress, noise.device)
    M = phase.rollout_steps
    if phase.share_rollout:  # neighbours fall through the segments of one run
        if len(noise) % M:
            raise InputError(f"a batch that shares teacher runs must be a multiple of {M} samples")
        t = t.reshape(M, -1).T.flatten()
    x, z_t = STATES[phase.states](phase, x, noise, t, cond, student, teacher)
    return x, z_t, t
