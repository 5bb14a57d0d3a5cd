"""The two losses: diffusion, and the one consistency loss that all recipes share (arXiv 2403.06807, Algorithm 1).

z_t  --teacher, one solver step-->  z_s
 |                                   |
 | student x_hat(z_t, t)             | student x_hat(z_s, s), no gradient
 v                                   v
DDIM t->q  .. should agree with ..  DDIM s->q
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import InputError
from .lab import distributed as parallel
from .recipes import Stage
from .sampling import STATES, noised, rows
from .schedule import DiscreteSchedule, Schedule
from .solvers import addim, ddim, er_sde, expand, inverse_ddim, mean_over_dims


class LossOutput(NamedTuple):
    """loss: scalar, the mean of per_sample (B,). x_hat (with gradient), x_target, z_t: like x. t: (B,). x: the clean image that z_t was
    noised from, None if it was not; cond: the conditions used."""

    loss: Tensor
    per_sample: Tensor
    x_hat: Tensor
    x_target: Tensor
    z_t: Tensor
    t: Tensor
    x: Tensor | None
    cond: Any


def stratified_times(
    n: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """(n,) times, each uniform on (0, 1], one in each of n equal strata: a batch covers all noise levels evenly, so its loss varies
    less than with independent draws (the low-discrepancy sampler of variational diffusion models, arXiv 2107.00630)."""

    def whole(n: int) -> Tensor:
        u = torch.rand(n, device=device, generator=generator, dtype=torch.float64)
        return 1 - (torch.arange(n, device=device) + u) / n

    return parallel.draw(whole, n)


def normal_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape, type and device of x, (B, ...)."""
    return parallel.draw(
        lambda n: torch.randn(n, *x.shape[1:], dtype=x.dtype, device=x.device, generator=generator),
        len(x),
    )


def diffusion_loss(
    denoiser: nn.Module,
    x: Tensor,
    cond: Any = None,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LossOutput:
    """The v-loss |v - v_hat|^2 = |x - x_hat|^2 / sigma_t^2, averaged over dimensions (arXiv 2202.00512).

    x: (B, ...) images in [-1, 1]; cond: passed to the denoiser; t: (B,) in (0, 1] and noise: like x, drawn when not given.
    """
    t = stratified_times(len(x), x.device, generator) if t is None else t
    noise = normal_like(x, generator) if noise is None else noise
    z_t = noised(x, t, noise, denoiser.schedule)
    x_hat = denoiser(z_t, t, cond)
    per_sample = mean_over_dims(((x - x_hat) / expand(denoiser.schedule(t)[1], x)) ** 2)
    return LossOutput(per_sample.mean(), per_sample, x_hat, x, z_t, t, x, cond)


def consistency_loss(
    student: nn.Module,
    x: Tensor | None,
    cond: Any,
    stage: Stage,
    *,
    teacher: nn.Module | None = None,
    target: nn.Module | None = None,
    progress: float = 1.0,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LossOutput:
    """The multistep consistency loss, in clean-image space (arXiv 2403.06807, eqs. 6-8 and Algorithm 1).

    x: (B, ...) images in [-1, 1]; cond: passed to every network. teacher: a frozen diffusion denoiser (distillation, CD), or None:
    the image itself takes its place (consistency training, CT). target: the network that answers at z_s; None is the student
    itself without gradient. progress: the fraction of the run done, which sets the grid. t: (B,) in (0, 1], moved to the
    nearest grid point; noise: like x; both are drawn when not given. If the student has dropout, both its calls share one mask.
    A stage whose z_t do not come from data needs no x: then `noise` is the pure noise that its runs start from, and must be given.

    The target. Let lambda = sigma / alpha, and let x_step be the x_hat for which plain DDIM makes the teacher's step z_t -> z_s
    (x_step = inverse_ddim(z_s, z_t); the teacher's x_hat itself when its step is DDIM). Asking that DDIM t->q of the student's x_hat land where DDIM s->q of x_hat(z_s, s) does,
    and solving for x_hat, gives a convex combination:

        x_target = (1 - rho) x_hat(z_s, s) + rho x_step,   rho = lambda_q (lambda_t - lambda_s) / (lambda_s (lambda_t - lambda_q)).

    (In the coordinates z / alpha, DDIM moves on a straight line in lambda towards x_hat; the two straight lines t->s and s->q are
    replaced by the one t->q, whose slope is the average of theirs, weighted by lambda_t - lambda_s and lambda_s - lambda_q.)
    At s = q rho is 1, so the student has no say: this is what keeps the loss from collapsing. With one segment q = 0 and rho = 0 for
    s > 0: the loss of consistency models. With as many segments as grid points always s = q, and in CT x_step = x: diffusion.
    inverse_ddim divides by a difference of order t - s; float64 keeps its rounding below the Huber constant.

    Raises InputError if the grid is finer than a discrete schedule's own.
    """
    schedule, per_segment = student.schedule, stage.points_per_segment(progress)
    grid = per_segment * stage.student_steps
    if isinstance(schedule, DiscreteSchedule) and grid > len(schedule.alphas_cumprod):
        raise InputError(
            f"a grid of {grid} points is finer than the schedule's {len(schedule.alphas_cumprod)} steps: lower teacher_steps"
        )
    if x is None and noise is None:
        raise InputError(
            "without images, pass the noise that the runs start from: its shape is the images'"
        )
    B, device = len(noise if x is None else x), (noise if x is None else x).device
    if t is not None:
        i = torch.round(t.double() * grid)
    else:
        i = torch.ceil(stratified_times(B, device, generator) * grid)
    if stage.share_run:  # neighbours fall through the segments of one run
        if B % stage.run:
            raise InputError(
                f"a batch of {B} cannot share teacher runs of {stage.run} states: use a multiple of {stage.run}"
            )
        i = i if t is not None else i.reshape(stage.run, -1).T.flatten()
        cond = rows(cond, torch.arange(B, device=device) // stage.run * stage.run)
    i = i.long().clamp(1, grid)
    i_q = (
        (i - 1) // per_segment * per_segment
    )  # the top of a segment, i = q + T/K, belongs to it: the sampler starts there
    i_s = torch.maximum(i - stage.skip, i_q)
    t, s, q = (index.double() / grid for index in (i, i_s, i_q))

    noise = normal_like(x, generator) if noise is None else noise
    z_t, x = STATES[stage.z_from](stage, x, noise, t, cond, student, teacher, generator)
    with torch.no_grad():
        z_s, x_step = _teacher_step(stage, x, z_t, t, s, cond, student, teacher, generator)
        # The target's call comes first and leaves the random state as it found it: the student below draws the same dropout mask.
        with torch.random.fork_rng(
            [] if z_t.device.type == "cpu" else [z_t.device], device_type=z_t.device.type
        ):
            x_s = (student if target is None else target)(z_s.to(z_t.dtype), s, cond)
        rho = expand(_rho(t, s, q, schedule), x_step)
        x_target = ((1 - rho) * x_s + rho * x_step).to(z_t.dtype)

    x_hat = student(z_t, t, cond)
    residual = expand(_weight(stage, t, q, schedule), z_t) * (x_target - x_hat)
    if stage.distance == "squared":
        per_sample = mean_over_dims(residual**2)
    elif stage.distance == "huber":
        per_sample = torch.sqrt(mean_over_dims(residual**2) + stage.c**2) - stage.c
    else:
        per_sample = mean_over_dims(torch.sqrt(residual**2 + stage.c**2) - stage.c)
    return LossOutput(per_sample.mean(), per_sample, x_hat, x_target, z_t, t, x, cond)


def _teacher_step(
    stage: Stage,
    x: Tensor | None,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Any,
    student: nn.Module,
    teacher: nn.Module | None,
    generator,
) -> tuple[Tensor, Tensor]:
    """-> z_s, and the x_hat for which plain DDIM makes this step, both float64."""
    schedule, z = student.schedule, z_t.double()
    if teacher is None:  # consistency training: the true noise needs no adjustment
        return ddim(x.double(), z, t, s, schedule), x.double()
    x_prev = t_prev = None
    for k in range(stage.sub_steps):
        a, b = (t - (t - s) * n / stage.sub_steps for n in (k, k + 1))
        x_step = teacher(z.to(z_t.dtype), a, cond).double()
        if stage.noise:
            z = er_sde(x_step, z, a, b, schedule, x_prev, t_prev, stage.noise, generator)
            x_prev, t_prev = (x_step, a) if stage.order == 2 else (None, None)
        elif stage.x_var:
            z = addim(x_step, z, a, b, schedule, _x_var(stage, x, x_step, teacher, z, a, cond))
        else:
            z = ddim(x_step, z, a, b, schedule)
    if stage.sub_steps == 1 and not stage.noise and not stage.x_var:
        return z, x_step
    return z, inverse_ddim(z, z_t.double(), t, s, schedule)


def _rho(t: Tensor, s: Tensor, q: Tensor, schedule: Schedule) -> Tensor:
    """The weight of x_step in the target, times alpha_t alpha_s alpha_q above and below so that alpha_1 = 0 does no harm."""
    (alpha_t, sigma_t), (alpha_s, sigma_s), (alpha_q, sigma_q) = (
        schedule(t),
        schedule(s),
        schedule(q),
    )
    above = sigma_q * (sigma_t * alpha_s - sigma_s * alpha_t)
    below = sigma_s * (sigma_t * alpha_q - sigma_q * alpha_t)
    return torch.where(s == q, 1.0, above / torch.where(s == q, 1.0, below))


def _weight(stage: Stage, t: Tensor, q: Tensor, schedule: Schedule) -> Tensor:
    """The factor on the difference of clean images that `stage.weight` names."""
    (alpha_t, sigma_t), (alpha_q, sigma_q) = schedule(t), schedule(q)
    if stage.weight == "v":
        return 1 / sigma_t
    return torch.ones_like(t) if stage.weight == "x" else alpha_q - alpha_t * sigma_q / sigma_t


def _x_var(
    stage: Stage, x: Tensor, x_teacher: Tensor, teacher: nn.Module, z_t: Tensor, t: Tensor, cond
) -> Tensor | None:
    """aDDIM's variance per dimension, (B,). For "mse" the paper asks for the teacher *without* guidance."""
    if stage.x_var == "prior":
        return None  # addim's own default
    conditional = getattr(teacher, "conditional", None)
    x_plain = x_teacher if conditional is None else conditional(z_t, t, cond)
    return stage.eta * mean_over_dims((x_plain - x).to(t.dtype) ** 2)
