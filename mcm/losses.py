"""The two losses: diffusion, and the one consistency loss that all methods share.

    z_t  --teacher, one solver step-->  z_s
     |                                   |
     | student x_hat(z_t, t)             | student x_hat(z_s, s), no gradient
     v                                   v
    DDIM t->q  .. should agree with ..  DDIM s->q

(arXiv 2403.06807, Algorithm 1.)
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import InputError
from .method import Method
from .sampling import noised
from .schedule import DiscreteSchedule, Schedule, time_dtype
from .solvers import addim_aim, coefficients, ddim, er_sde_aim, expand, joined_aim, mean_over_dims


class LossOutput(NamedTuple):
    """What a loss returns: `loss`, a scalar, is the mean of `per_sample`, (B,).

    x_hat (with gradient), x_target, z_t: like x. t: (B,). x: the clean image behind z_t, or None;
    cond: the conditions used.
    """

    loss: Tensor
    per_sample: Tensor
    x_hat: Tensor
    x_target: Tensor
    z_t: Tensor
    t: Tensor
    x: Tensor | None
    cond: Any


def restored_randomness(device: torch.device):
    """Within this block random numbers are drawn as ever; after it, as if none had been drawn."""
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type=device.type)


def stratified_times(n: int, device: torch.device) -> Tensor:
    """(n,) falling times, one uniform on each of n equal parts of (0, 1].

    So a batch covers all noise levels evenly, and its loss varies less than with independent draws
    (as with the low-discrepancy sampler of arXiv 2107.00630, which shares one draw). Samples must
    not be in an order of their own: the first of a batch gets the most noise.
    """
    u = torch.rand(n, device=device, dtype=time_dtype(device))
    return 1 - (torch.arange(n, device=device) + u) / n


def normal_like(x: Tensor) -> Tensor:
    """Standard normal noise of the shape, type and device of x."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)


def diffusion_loss(
    denoiser: nn.Module,
    x: Tensor,
    cond: Any = None,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> LossOutput:
    """The v-prediction loss: mean over dimensions of (v - v_hat)^2 = ((x - x_hat) / sigma_t)^2.

    x: (B, ...) images in [-1, 1]. cond: passed to the denoiser. t: (B,) in (0, 1] and noise: like
    x; both are drawn when not given.
    """
    schedule = denoiser.schedule
    t = stratified_times(len(x), x.device) if t is None else t
    noise = normal_like(x) if noise is None else noise
    z_t = noised(x, t, noise, schedule)
    x_hat = denoiser(z_t, t, cond)
    per_sample = mean_over_dims(((x - x_hat) / expand(schedule(t)[1], x)) ** 2)
    return LossOutput(per_sample.mean(), per_sample, x_hat, x, z_t, t, x, cond)


def consistency_loss(
    student: nn.Module,
    x: Tensor | None,
    cond: Any,
    method: Method,
    *,
    teacher: nn.Module | None = None,
    target: nn.Module | None = None,
    progress: float = 1.0,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    z_t: Tensor | None = None,
) -> LossOutput:
    """The multistep consistency loss, in clean-image space (arXiv 2403.06807, eqs. 6-8).

    student: its x_hat(z_t, t) is compared with the target, and has a gradient.
    x: (B, ...) images in [-1, 1].
    cond: passed to every network.
    teacher: a frozen diffusion denoiser (distillation, CD), or None: the image itself takes its
        place (consistency training, CT).
    target: the network that answers at z_s; None is the student itself without gradient. If the
        student has dropout, both its calls share one mask.
    progress: the fraction of the run done, which sets the grid.
    t: (B,) in (0, 1], moved up to the next grid point; noise: like x. Drawn, as all that is random
        here, from torch's own random state when not given.
    z_t: noisy images at these t, in place of noised x; t must be points of the grid, as
        `draw_times` gives. Then x may be None: with a teacher, and unless method.x_var is "mse".

    Asking that DDIM t->q of the student's x_hat land where DDIM s->q of x_hat(z_s, s) does, and
    solving for x_hat, gives a convex combination of what the teacher's step aims at and of
    x_hat(z_s, s): `joined_aim`. At s = q it is the teacher's alone, so the student has no say: this
    keeps the loss from collapsing. With one segment q = 0, and it is x_hat(z_s, s) for s > 0: the
    loss of consistency models. With as many segments as grid points always s = q, and in CT the
    step aims at x: diffusion.

    Raises InputError if an input is missing, or if the grid is finer than a discrete schedule's
    own.
    """
    schedule = student.schedule
    if z_t is None and x is None or z_t is not None and t is None:
        raise InputError("pass images x, or noisy images z_t together with their times t")
    if x is None and (teacher is None or method.x_var == "mse" and not method.teacher_eta):
        raise InputError("without images x, pass a teacher, and a method whose x_var is not 'mse'")

    # 1. A time t, a little lower s, and the start q of their segment.
    if t is None:
        t = draw_times(method, len(x), progress, x.device)
    t, s, q = _segment_times(method, t, progress, schedule)

    # 2. A noisy image at t.
    if z_t is None:
        noise = normal_like(x) if noise is None else noise
        z_t = noised(x, t, noise, schedule)

    with torch.no_grad():
        # 3. One teacher step down to s (no teacher: the true noise takes its place), as a DDIM step
        #    towards x_step.
        if teacher is None:
            x_step = x
            z_s = ddim(x, z_t, t, s, schedule)
        else:
            x_step, z_s = _teacher_step(method, teacher, x, z_t, t, s, cond, schedule)

        # 4. The student's own answer there, without gradient. This call comes first and leaves the
        #    random state as it found it: in step 6 the student draws the same dropout mask.
        with restored_randomness(z_t.device):
            x_s = (student if target is None else target)(z_s, s, cond)

        # 5. The x_hat whose DDIM step t -> q lands where those two steps do: t -> s -> q.
        x_target = joined_aim(x_step, x_s, t, s, q, schedule)

    # 6. Compare.
    x_hat = student(z_t, t, cond)
    difference = expand(WEIGHTS[method.weight](t, q, schedule), z_t) * (x_target - x_hat)
    per_sample = DISTANCES[method.distance](difference, method.huber_c)
    return LossOutput(per_sample.mean(), per_sample, x_hat, x_target, z_t, t, x, cond)


# The factor on the difference of clean images, (B,), by the name of what it makes of it.
WEIGHTS = {
    "v": lambda t, q, schedule: 1 / schedule(t)[1],
    "x": lambda t, q, schedule: torch.ones_like(t),
    "q": lambda t, q, schedule: coefficients(t, q, schedule)[1],
}

# (B, ...), c -> (B,)
DISTANCES = {
    "huber": lambda r, c: torch.sqrt(mean_over_dims(r**2) + c**2) - c,
    "huber_elementwise": lambda r, c: mean_over_dims(torch.sqrt(r**2 + c**2) - c),
    "squared": lambda r, c: mean_over_dims(r**2),
}


def draw_times(method: Method, n: int, progress: float, device: torch.device) -> Tensor:
    """(n,) points of the method's grid at this progress, one in each of n equal strata."""
    grid = method.points_per_segment(progress) * method.student_steps
    t = stratified_times(n, device)
    return grid_points(t, grid).to(t.dtype) / grid


def grid_points(t: Tensor, grid: int) -> Tensor:
    """(B,) times -> the integer i of the next grid point i / grid above, or of t's own."""
    rounding = 4 * grid * torch.finfo(t.dtype).eps
    return torch.ceil(t * grid - rounding).long().clamp(1, grid)


def _segment_times(
    method: Method, t: Tensor, progress: float, schedule: Schedule
) -> tuple[Tensor, Tensor, Tensor]:
    """-> t, s, q, (B,) each: the grid point at t, one `skip` below it, their segment's start."""
    per_segment = method.points_per_segment(progress)
    grid = per_segment * method.student_steps
    if isinstance(schedule, DiscreteSchedule) and grid > len(schedule.alphas_cumprod):
        levels = f"the schedule's {len(schedule.alphas_cumprod)} steps"
        raise InputError(f"a grid of {grid} points is finer than {levels}: lower teacher_steps")
    dtype = time_dtype(t.device)
    i = grid_points(t, grid)
    # the top of a segment, i = q + T/K, belongs to it: the sampler starts there
    i_q = (i - 1) // per_segment * per_segment
    i_s = torch.maximum(i - method.skip, i_q)
    return i.to(dtype) / grid, i_s.to(dtype) / grid, i_q.to(dtype) / grid


def _teacher_step(
    method: Method,
    teacher: nn.Module,
    x: Tensor | None,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Any,
    schedule: Schedule,
) -> tuple[Tensor, Tensor]:
    """The teacher's sub-steps. -> the x towards which one DDIM step does the same, and z_s."""
    # the last one is s itself: rounded to 1e-17, 0 would not be the clean image
    times = [*(t - (t - s) * k / method.sub_steps for k in range(method.sub_steps)), s]
    both = getattr(teacher, "both", lambda *inputs: (teacher(*inputs),) * 2)
    z = z_t
    x_step: Any = None
    before: dict[str, Any] = {}
    for a, b in pairwise(times):
        x_hat, x_plain = both(z, a, cond)  # with guidance, if it is guided, and without
        if method.teacher_eta:
            aim = er_sde_aim(x_hat, z, a, b, schedule, noise_scale=method.teacher_eta, **before)
            before = {"x_hat_prev": x_hat, "t_prev": a} if method.solver_order == 2 else {}
        elif method.x_var:
            x_var = None  # "prior" is addim's own default
            if method.x_var == "mse":  # the error of the teacher *without* guidance
                x_var = method.x_var_fraction * mean_over_dims((x_plain - x).to(a.dtype) ** 2)
            aim = addim_aim(x_hat, z, a, b, schedule, x_var)
        else:
            aim = x_hat
        x_step = aim if x_step is None else joined_aim(x_step, aim, t, a, b, schedule)
        z = ddim(aim, z, a, b, schedule)
    return x_step, z
