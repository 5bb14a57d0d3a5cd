"""Methods for text-to-image students: each a list of phases, one after the other on the same
weights.
"""

from dataclasses import dataclass
from typing import Literal

from ..method import Method, multistep


@dataclass(frozen=True)
class Phase:
    """A method, and what a recipe adds to it."""

    method: Method

    share: float = 1.0
    """Of the recipe's iterations, relative to the other phases."""

    lr: float = 1.0
    """The learning rate, as a multiple of the run's."""

    critic_lr: float = 1.0
    """That of its critics (discriminator, fake score), as a multiple of the student's."""

    states: Literal["data", "teacher", "student"] = "data"
    """Where z_t comes from: noised data; the teacher's own denoising run from pure noise (TLCM,
    arXiv 2406.05768, Algorithm 1); or the student's own sample, noised again (Algorithm 2). The
    last two need no images."""

    rollout_steps: int = 8
    """The steps of that run: the teacher's from t = 1 to t = 0 (it stops at z_t), or the student's.
    """

    share_rollout: bool = False
    """Whether one run of the teacher, stopping once in each of its segments, serves that many
    samples: the same kind of states for a fraction of the evaluations. The paper makes a run for
    each sample."""

    target_ema: float | None = None
    """The decay of the averaged student that answers at z_s; None: the student itself."""

    objectives: tuple[tuple[str, float], ...] = ()
    """Further objectives (`distil.make_objective`) by name, with their weights: the norm of their
    gradient at x_hat over that of the consistency loss."""


@dataclass(frozen=True)
class Recipe:
    """phases: trained one after the other. summary: for --help and model cards.

    renoise: how to sample. x_hat noised afresh at every step (then one model serves every number of
        steps), or DDIM from segment to segment (then there is a model for each number).
    """

    phases: tuple[Phase, ...]
    renoise: bool
    summary: str

    @property
    def needs_images(self) -> bool:
        return any(phase.states == "data" for phase in self.phases)

    def evaluations(self) -> float:
        """Network evaluations (forward passes of one sample) for each sample, over all phases.

        Of student and target, of the guided teacher (two each), of what makes z_t, and of the
        further objectives with their critics.
        """
        total = sum(phase.share * evaluations(phase) for phase in self.phases)
        return total / sum(phase.share for phase in self.phases)


FAKE_UPDATES = 2  # of the fake score, per step of the student (DMD2, arXiv 2405.14867, uses 5)

EVALUATIONS = {
    "preference": 0,
    "adversarial": 3,
    "adversarial_diffused": 3,
    "distribution_matching": 3 + FAKE_UPDATES,
}
"""Of each further objective, for a sample: the student's part and the critic's."""


def evaluations(phase: Phase) -> float:
    source = {
        "data": 0,
        "student": phase.rollout_steps,
        "teacher": 2 if phase.share_rollout else phase.rollout_steps + 1,
    }
    further = sum(EVALUATIONS[kind] for kind, _ in phase.objectives)
    return 2 + 2 * phase.method.sub_steps + source[phase.states] + further


ANY_STEPS = "one model for all step counts"


def cm_latent(K: int) -> Recipe:
    method = multistep(1, teacher_steps=(16, 64), distance="squared")
    summary = f"consistency model (arXiv 2303.01469): one segment, from images; {ANY_STEPS}"
    return Recipe((Phase(method),), True, summary)


def mcm_latent(K: int) -> Recipe:
    grid = (min(4 * K, 1000), min(16 * K, 960))
    distance = "squared" if K == 1 else "huber"
    method = multistep(K, teacher_steps=grid, x_var=None, huber_c=1e-3, distance=distance)
    summary = "multistep consistency (arXiv 2403.06807): K segments, from images; one model per K"
    return Recipe((Phase(method),), False, summary)


def lcm_latent(K: int) -> Recipe:
    method = Method(1, (50, 50), x_var=None, weight="x", distance="huber_elementwise", huber_c=1e-3)
    summary = f"latent consistency (arXiv 2310.04378): a grid of 50, from images; {ANY_STEPS}"
    return Recipe((Phase(method, target_ema=0.95),), True, summary)


def mlcm_segments(segments: int, share: float, **changes) -> Phase:
    """A phase of MLCM: TLCM's first stage with another number of segments, skip and weight."""
    method = Method(segments, (1000, 1000), skip=40, x_var=None, weight="v", distance="squared")
    return Phase(method, share, states="teacher", rollout_steps=8, **changes)


def mlcm_latent(K: int) -> Recipe:
    """The paper's body was not available: 8, 4, 2, 1 segments, their shares, the teacher's step of
    40 and the preference's weight are ours, the rest is TLCM's first stage. It ends with one
    segment, and spends most of its iterations there: noised afresh at every step, a model samples
    well only if its x_hat is an image, and with more segments x_hat only leads to the start of one.
    """
    phases = (
        mlcm_segments(8, 0.15),
        mlcm_segments(4, 0.1),
        mlcm_segments(2, 0.1),
        mlcm_segments(1, 0.55),
        mlcm_segments(1, 0.1, lr=0.3, objectives=(("preference", 0.1),)),
    )
    summary = (
        "multistep latent consistency (arXiv 2406.05768v1-3): 8, 4, 2, then 1 segment, then a "
        f"preference; from prompts alone; {ANY_STEPS}"
    )
    return Recipe(phases, True, summary)


def tlcm_latent(K: int) -> Recipe:
    """Shares and rates are the paper's: 12,000, 2,000, 500 and 1,000 iterations, at 1e-4 and then
    1e-5, the discriminator at 1e-4. The further objectives' weights, which are not printed, are
    ours.
    """
    first = Method(8, (1000, 1000), skip=20, x_var=None, weight="q", distance="squared")
    second = Method(1, (8, 8), x_var=None, weight="x", distance="squared", sub_steps=3)
    later = {"lr": 0.1, "states": "student", "rollout_steps": 4}
    both = (("distribution_matching", 0.5), ("adversarial_diffused", 0.2))
    phases = (
        Phase(first, 0.77, states="teacher", rollout_steps=8),
        Phase(second, 0.13, **later),
        Phase(second, 0.03, objectives=(("preference", 0.3),), **later),
        Phase(second, 0.07, critic_lr=10, objectives=both, **later),
    )
    summary = (
        "training-efficient latent consistency (arXiv 2406.05768v6): 8 segments, then all at once "
        "on its own samples, preference, distribution matching, adversary; from prompts alone; "
        + ANY_STEPS
    )
    return Recipe(phases, True, summary)


def scott_latent(K: int) -> Recipe:
    """The discriminator's rate is the paper's 2e-5 over 8e-6 for the student; its weight is the
    paper's too.
    """
    solver = {"skip": 24, "sub_steps": 3, "teacher_eta": "er5", "solver_order": 2}
    method = Method(1, (1000, 1000), x_var=None, weight="x", distance="squared", **solver)
    adversary = (("adversarial", 0.4),)
    phase = Phase(method, critic_lr=2.5, target_ema=0.95, objectives=adversary)
    summary = (
        "stochastic consistency distillation (arXiv 2403.01505): the teacher's steps are an SDE's, "
        f"with an adversary, from images; {ANY_STEPS}"
    )
    return Recipe((phase,), True, summary)


RECIPES = {
    "cm": cm_latent,
    "lcm": lcm_latent,
    "mcm": mcm_latent,
    "mlcm": mlcm_latent,
    "tlcm": tlcm_latent,
    "scott": scott_latent,
}
"""Recipes by name, as functions of the number of steps K, which only those with a model per K need.
"""


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
"""In eighths of the time axis, where TLCM (arXiv 2406.05768, its released sampler) evaluates a
student in so many re-noised steps."""


def milestones(steps: int) -> list[float]:
    """Times for `mcm.sample` with `mcm.renoise`: TLCM's for up to 8 steps, equal steps beyond."""
    if steps in MILESTONES:
        return [i / 8 for i in MILESTONES[steps]]
    return [i / steps for i in range(steps, 0, -1)]
