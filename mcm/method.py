"""A training method as data.

Every method in scope asks one question at a time t: where does the student land at the start q of
its segment, seen from z_t and seen from the slightly cleaner z_s? A `Method` says how t, s and q
are chosen, how z_s is made from z_t, and how the two answers are compared. `consistency_loss` reads
all of these fields and knows no method by name.
"""

import math
from dataclasses import dataclass
from typing import Literal

from .errors import InputError


@dataclass(frozen=True)
class Method:
    """Defaults: Multistep Consistency Models (arXiv 2403.06807), Algorithm 1 and appendix A.1.

    The time axis is a grid of T = K * max(1, round(N / K)) points i / T, cut into K segments of
    equal length. The segment of a point i is (q, q + T / K]: q is the last border strictly below
    i. s is the grid point `skip` below i, but never below q.
    """

    student_steps: int
    """K: the number of segments, which is the number of sampling steps. K = T is diffusion, K = 1
    is a consistency model."""

    teacher_steps: tuple[int, int] = (64, 1280)
    """N at the start and at the end of the annealing, log-linear in between: few, large steps
    first (fast, biased), then many."""

    anneal: float = 0.5
    """The fraction of the run after which N has reached its end value."""

    skip: int = 1
    """s is so many grid points below t, but never below q."""

    x_var: Literal["mse", "prior"] | None = "mse"
    """The teacher's step from z_t to z_s is aDDIM with this variance. "mse": x_var_fraction times
    the squared error of the teacher on this very image; "prior": 0.1 / (2 + SNR); None: plain DDIM.
    Without a teacher the step is DDIM as well: the true noise needs no adjustment."""

    x_var_fraction: float = 0.75
    """The factor in front of the squared error (the paper's xvar_frac)."""

    weight: Literal["v", "x", "q"] = "v"
    """Compare the two answers as velocities (the paper), as clean images, or as points at q. All
    three are the same difference of clean images times 1 / sigma_t, 1, or the gain of DDIM t -> q.
    """

    distance: Literal["huber", "huber_elementwise", "squared"] = "huber"
    """With r the weighted difference: sqrt(mean(r^2) + c^2) - c for each sample,
    mean(sqrt(r^2 + c^2) - c), or mean(r^2)."""

    huber_c: float = 1e-4
    """c, the pseudo-Huber constant, in units of r."""

    sub_steps: int = 1
    """In how many equal solver steps the teacher goes from z_t to z_s."""

    teacher_eta: float | Literal["ode", "sde", "er5"] = 0.0
    """How random these steps are: DDIM's eta, or a noise scale of `er_sde`. 0: the deterministic
    step that `x_var` describes."""

    solver_order: Literal[1, 2] = 1
    """The order of er_sde; second order needs a sub-step before, so the first one is of order 1."""

    def __post_init__(self):
        for name in ("student_steps", "skip", "sub_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if min(self.teacher_steps) < 1 or self.student_steps > max(self.teacher_steps):
            raise InputError(f"{self.student_steps} student steps need as many teacher steps")

    def points_per_segment(self, progress: float) -> int:
        """T / K at this fraction of the run (progress in [0, 1])."""
        first, last = self.teacher_steps
        fraction = min(progress / self.anneal, 1.0) if self.anneal else 1.0
        n = first * math.exp(fraction * math.log(last / first))
        return max(1, math.floor(n / self.student_steps + 0.5))


def multistep(student_steps: int, **changes) -> Method:
    """Multistep Consistency Models for K steps; K = 1 is a consistency model (arXiv 2303.01469).

    Distillation or consistency training is decided by whether the loss is given a teacher. The
    teacher's step is DDIM for K <= 2 and aDDIM from 4 on, whichever is better in the paper's table
    4 (its table 1 was made with aDDIM at every K: pass x_var="mse").
    """
    return Method(student_steps, **{"x_var": None if student_steps <= 2 else "mse"} | changes)


def diffusion(steps: int) -> Method:
    """The infinity-step limit: every grid point is a segment of its own.

    Without a teacher, the loss and its gradient are those of a diffusion model.
    """
    return Method(steps, teacher_steps=(steps, steps), x_var=None, distance="squared")
