"""A training method as data.

Every method in scope asks one question at a time t: where does the student land at the start q of its segment, seen from z_t and
seen from the slightly cleaner z_s? A `Stage` says how t, s and q are chosen, how z_s is made from z_t, and how the two answers are
compared. `consistency_loss` reads these fields and knows no method by name; a recipe is a list of stages.
"""

import math
from dataclasses import dataclass
from typing import Literal

from .errors import InputError


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe. Defaults: Multistep Consistency Models (arXiv 2403.06807), Algorithm 1 and appendix A.1.

    The time axis is a grid of T = K * max(1, round(N / K)) points i / T, cut into K segments of equal length. A point i belongs to the
    segment (q, q + T / K] above whose lower end q it lies; s is the grid point `skip` below it, but never below q.
    """

    student_steps: int
    """K: the number of segments, which is the number of sampling steps. K = T is diffusion, K = 1 is a consistency model."""
    teacher_steps: tuple[int, int] = (64, 1280)
    """N at the start and at the end of the annealing, log-linear in between: few, large steps first (fast, biased), then many."""
    anneal: float = 0.5
    """The fraction of the run after which N has reached its end value."""
    skip: int = 1
    """How many grid points lie between t and s."""
    x_var: Literal["mse", "prior"] | None = "mse"
    """The step from z_t to z_s is aDDIM with this variance: "mse": eta times the squared error of the teacher on this very image;
    "prior": 0.1 / (2 + SNR); None: plain DDIM, which is also the step without a teacher: the true noise needs no adjustment."""
    eta: float = 0.75
    """The factor in front of the squared error (the paper's xvar_frac)."""
    weight: Literal["v", "x", "q"] = "v"
    """Compare the two answers as velocities (the paper), as clean images, or as points at q. All three are the same difference of
    clean images times 1 / sigma_t, 1, or alpha_q - alpha_t sigma_q / sigma_t."""
    distance: Literal["huber", "huber_elementwise", "squared"] = "huber"
    """With r the weighted difference: sqrt(mean(r^2) + c^2) - c for each sample, mean(sqrt(r^2 + c^2) - c), or mean(r^2)."""
    c: float = 1e-4
    """The pseudo-Huber constant, in units of r."""
    sub_steps: int = 1
    """In how many equal solver steps the teacher goes from z_t to z_s."""
    noise: float | Literal["ode", "sde", "er5"] = 0.0
    """How random these steps are: DDIM's eta, or a noise scale of `er_sde`. 0: the deterministic step that `x_var` describes."""
    order: Literal[1, 2] = 1
    """The order of er_sde; second order needs a sub-step before, so the first one is of order 1."""
    z_from: Literal["data", "teacher", "student"] = "data"
    """Where z_t comes from: noised data; the teacher's own denoising run from pure noise (TLCM, arXiv 2406.05768, algorithm 1); or the
    student's own sample, noised again (algorithm 2). The last two need no images."""
    run: int = 8
    """The steps of that run: the teacher's from t = 1 to t = 0 (it stops at z_t), or the student's."""
    share_run: bool = False
    """Whether one run of the teacher, stopping once in each of its `run` segments, serves that many samples: the same kind of states
    for a fraction of the evaluations. The paper makes a run for each sample."""
    target_ema: float | None = None
    """The decay of the averaged student that answers at z_s; None: the student itself."""
    extra: tuple[tuple[str, float], ...] = ()
    """Further objectives (`mcm.objectives`) by name, with their weights: the norm of their gradient at x_hat over that of this loss."""

    def __post_init__(self):
        if self.student_steps < 1:
            raise InputError(
                f"the number of student steps must be at least 1, not {self.student_steps}"
            )
        if self.student_steps > max(self.teacher_steps):
            raise InputError(
                f"{self.student_steps} student steps do not fit on a grid of {max(self.teacher_steps)} teacher steps: "
                "use fewer student steps or more teacher steps"
            )

    def points_per_segment(self, progress: float) -> int:
        """T / K at this fraction of the run (progress in [0, 1])."""
        first, last = self.teacher_steps
        fraction = min(progress / self.anneal, 1.0) if self.anneal else 1.0
        n = first * math.exp(fraction * math.log(last / first))
        return max(1, math.floor(n / self.student_steps + 0.5))


def mcm(student_steps: int, **changes) -> Stage:
    """Multistep Consistency Models for K steps: DDIM for K <= 2 and aDDIM from 4 (arXiv 2403.06807, table 4). CT or CD is decided
    by whether the loss is given a teacher."""
    return Stage(student_steps, **{"x_var": None if student_steps <= 2 else "mse"} | changes)


def cm(**changes) -> Stage:
    """A consistency model (arXiv 2303.01469) on the same footing: one segment."""
    return mcm(1, **changes)


def diffusion(steps: int) -> Stage:
    """The infinity-step limit: every grid point is a segment of its own, and without a teacher the loss is the diffusion loss."""
    return Stage(steps, teacher_steps=(steps, steps), x_var=None, distance="squared")


# --- recipes for text-to-image students: several stages, one after the other ---------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A stage in its place in a recipe: its share of the iterations, its learning rate as a multiple of the run's, and that of its critics
    (discriminator, fake score) as a multiple of the student's."""

    stage: Stage
    share: float = 1.0
    lr: float = 1.0
    critic_lr: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """phases: trained one after the other, on the same weights. renoise: how to sample: x_hat noised afresh at every step (then one model
    serves every number of steps), or DDIM from segment to segment (then there is a model for each number). summary: for --help."""

    phases: tuple[Phase, ...]
    renoise: bool
    summary: str

    @property
    def needs_images(self) -> bool:
        return any(phase.stage.z_from == "data" for phase in self.phases)

    def evaluations(self) -> float:
        """Network evaluations (forward passes of one sample) that training takes for each sample of a batch, over all phases: of student
        and target, of the guided teacher (two each), of what makes z_t, and of the further objectives with their critics."""
        extra = {
            "preference": 0,
            "adversarial": 3,
            "adversarial_diffused": 3,
            "distribution_matching": 3 + FAKE_UPDATES,
        }
        total = 0.0
        for phase in self.phases:
            stage = phase.stage
            source = {
                "data": 0,
                "student": stage.run,
                "teacher": 2 if stage.share_run else stage.run + 1,
            }[stage.z_from]
            total += phase.share * (
                2 + 2 * stage.sub_steps + source + sum(extra[kind] for kind, _ in stage.extra)
            )
        return total / sum(phase.share for phase in self.phases)


FAKE_UPDATES = 2  # of the fake score in distribution matching, per step of the student (DMD2, arXiv 2405.14867, uses 5)


def cm_latent(K: int) -> Recipe:
    stage = cm(teacher_steps=(16, 64), distance="squared")
    return Recipe(
        (Phase(stage),),
        True,
        "consistency model (arXiv 2303.01469): one segment, from images; one model for all step counts",
    )


def mcm_latent(K: int) -> Recipe:
    points = (min(4 * K, 1000), min(16 * K, 960))
    stage = mcm(
        K, teacher_steps=points, x_var=None, c=1e-3, distance="squared" if K == 1 else "huber"
    )
    return Recipe(
        (Phase(stage),),
        False,
        "multistep consistency model (arXiv 2403.06807): K segments, from images; one model per K",
    )


def lcm_latent(K: int) -> Recipe:
    stage = Stage(
        1, (50, 50), x_var=None, weight="x", distance="huber_elementwise", c=1e-3, target_ema=0.95
    )
    return Recipe(
        (Phase(stage),),
        True,
        "latent consistency model (arXiv 2310.04378): one segment of 50 steps, from images; one model for all step counts",
    )


def mlcm_latent(K: int, preference: float = 0.1) -> Recipe:
    """The paper's body was not available: 8, 4, 2, 1 segments, their shares, the teacher's step of 40 and the weight are ours, the rest is
    TLCM's first stage. It ends with one segment, and spends most of its iterations there: noised afresh at every step, a model samples well
    only if its x_hat is a picture, and with more segments x_hat only leads to the start of one. preference: weight, not printed."""

    def stage(segments: int, **changes) -> Stage:
        return Stage(
            segments,
            (1000, 1000),
            skip=40,
            x_var=None,
            weight="v",
            distance="squared",
            z_from="teacher",
            run=8,
            **changes,
        )

    last = stage(1, extra=(("preference", preference),))
    phases = (
        Phase(stage(8), 0.15),
        Phase(stage(4), 0.1),
        Phase(stage(2), 0.1),
        Phase(stage(1), 0.55),
        Phase(last, 0.1, 0.3),
    )
    return Recipe(
        phases,
        True,
        "multistep latent consistency (arXiv 2406.05768v1-3): 8, 4, 2, then 1 segment, then a preference; from prompts alone; one model for all step counts",
    )


def tlcm_latent(
    K: int, preference: float = 0.3, matching: float = 0.5, adversarial: float = 0.2
) -> Recipe:
    """Shares and rates are the paper's: 12,000, 2,000, 500 and 1,000 iterations, at 1e-4 and then 1e-5, the discriminator at 1e-4. The
    weights of the further objectives are not printed."""
    first = Stage(
        8,
        (1000, 1000),
        skip=20,
        x_var=None,
        weight="q",
        distance="squared",
        z_from="teacher",
        run=8,
    )

    def later(**changes) -> Stage:
        return Stage(
            1,
            (8, 8),
            x_var=None,
            weight="x",
            distance="squared",
            sub_steps=3,
            z_from="student",
            run=4,
            **changes,
        )

    both = (("distribution_matching", matching), ("adversarial_diffused", adversarial))
    phases = (
        Phase(first, 0.77),
        Phase(later(), 0.13, 0.1),
        Phase(later(extra=(("preference", preference),)), 0.03, 0.1),
        Phase(later(extra=both), 0.07, 0.1, 10),
    )
    return Recipe(
        phases,
        True,
        "training-efficient latent consistency (arXiv 2406.05768v6): 8 segments, then all at once on its own samples, preference, distribution matching, adversary; from prompts alone; one model for all step counts",
    )


def scott_latent(K: int, adversarial: float = 0.4) -> Recipe:
    """The discriminator's rate is the paper's 2e-5 over 8e-6 for the student."""
    stage = Stage(
        1,
        (1000, 1000),
        skip=24,
        x_var=None,
        weight="x",
        distance="squared",
        sub_steps=3,
        noise="er5",
        order=2,
        target_ema=0.95,
        extra=(("adversarial", adversarial),),
    )
    return Recipe(
        (Phase(stage, critic_lr=2.5),),
        True,
        "stochastic consistency distillation (arXiv 2403.01505): the teacher's steps are an SDE's, with an adversary, from images; one model for all step counts",
    )


RECIPES = {
    "cm": cm_latent,
    "lcm": lcm_latent,
    "mcm": mcm_latent,
    "mlcm": mlcm_latent,
    "tlcm": tlcm_latent,
    "scott": scott_latent,
}
"""Recipes by name, as functions of the number of steps K, which only those with a model per K heed."""
