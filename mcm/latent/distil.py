"""From a text-to-image teacher to a few-step student, by any recipe."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import guided, select
from ..errors import InputError
from ..lab.data import batch_indices, mixed
from ..lab.evaluation import on_device
from ..lab.run import Learner, Run, Training
from ..losses import LossOutput, consistency_loss
from .objectives import (
    Adversarial,
    Balance,
    DistributionMatching,
    Objective,
    Preference,
    gradient,
)
from .recipes import EVALUATIONS, Phase, Recipe
from .scorer import Reward
from .sdxl import SDXL, Condition
from .states import draw_states


@dataclass
class Distillation:
    """What all phases of a student's training share."""

    sdxl: SDXL
    prompts: Sequence[str]
    """n captions to learn from."""
    cond: Condition
    """Their conditions, on the CPU."""
    latents: Tensor | None
    """(n, 4, h, w) of their images, on the CPU, or None."""
    settings: Training
    """Of the whole recipe: each phase has its share of the iterations, and a warm-up and decay of
    its own."""
    out: Path
    name: str
    """States of phase n go to out/NAME-n.state.safetensors."""
    guidance: float | tuple[float, float]
    """w of the teacher, or a range to draw it from, which only a fully fine-tuned student can be
    told (as an input)."""
    full: bool = False
    """Fine-tune the whole UNet instead of a LoRA."""
    reward: Reward | None = None
    """For recipes with a preference."""
    reward_level: float = 0.0
    """The s0 that the preference is to reach."""
    resume: bool = False
    """Finished phases are read from their states."""

    @property
    def guidance_input(self) -> bool:
        """A student is told its guidance only when there is more than one."""
        return isinstance(self.guidance, tuple)


def distil(job: Distillation, recipe: Recipe) -> float:
    """Train a student by all phases of the recipe. -> the seconds it took.

    Its averaged weights are then those named "average" of job.sdxl. Raises InputError if the recipe
    needs images or a reward and there are none.
    """
    if recipe.needs_images and job.latents is None:
        raise InputError("this recipe learns from images: give some, or use mlcm or tlcm")
    if job.guidance_input and not job.full:
        raise InputError("a LoRA cannot be told its guidance: use one value, or full fine-tuning")
    wanted = {kind for phase in recipe.phases for kind, _ in phase.objectives}
    if "preference" in wanted and job.reward is None:
        raise InputError("this recipe has a preference phase: give it a reward")
    add_students(job, recipe)
    seed = job.settings.seed
    whole = sum(phase.share for phase in recipe.phases)
    seconds = 0.0
    for number, phase in enumerate(recipe.phases):
        # for what the phase initialises, whether the run was resumed or not
        torch.manual_seed(mixed(seed, number, 1))
        iterations = max(1, round(job.settings.iterations * phase.share / whole))
        settings = replace(
            job.settings,
            iterations=iterations,
            lr=job.settings.lr * phase.lr,
            warmup=min(job.settings.warmup, iterations // 10 + 1),
            seed=mixed(seed, number),
        )
        seconds += train_phase(job, phase, settings, f"{job.name}-{number}")
        for name in ("fake", "critic"):
            if name in job.sdxl.unets:
                job.sdxl.remove(name)
    return seconds


def add_students(job: Distillation, recipe: Recipe) -> None:
    """The sets of weights that training needs: "student", "average", and maybe "target"."""
    torch.manual_seed(mixed(job.settings.seed, len(recipe.phases)))
    averaged_targets = any(phase.target_ema is not None for phase in recipe.phases)
    for name in ["student", "average"] + ["target"] * averaged_targets:
        like = None if name == "student" else "student"
        if job.full:
            job.sdxl.add_copy(name, like, job.guidance_input)
        else:
            job.sdxl.add_lora(name, like)


def dry_run(job: Distillation, recipe: Recipe) -> None:
    """One step of each phase, of which nothing stays.

    What does not fit into memory, or does not work, says so now and not after hours.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(job.settings, iterations=1, save_every=0, tensorboard=False)
        distil(replace(job, settings=settings, out=Path(folder), resume=False), recipe)
    job.sdxl.remove_all()


def make_objective(kind: str, job: Distillation) -> Any:
    """A further objective by the name that a Phase has for it. Raises InputError."""
    if kind == "preference":
        most = None if job.sdxl.size <= 32 else 2  # a decoder of full size is expensive
        return Preference(job.reward, job.sdxl.to_images, job.reward_level, job.prompts, most)
    if kind == "distribution_matching":
        w = told_guidance if job.guidance_input else job.guidance
        return DistributionMatching(job.sdxl, w)
    if kind in ("adversarial", "adversarial_diffused"):
        return Adversarial(job.sdxl, diffused=kind == "adversarial_diffused")
    raise InputError(f"unknown objective {kind!r}: choose {', '.join(EVALUATIONS)}")


def begin_averages(sdxl: SDXL, phase: Phase, settings: Training) -> list[tuple[dict, Callable]]:
    """The averages that follow the student; the target starts where the student is."""
    averages = [(sdxl.weights("average"), settings.ema_at)]
    if phase.target_ema is not None:
        target = sdxl.weights("target")
        with torch.no_grad():
            for key, value in sdxl.weights("student").items():
                target[key].copy_(value)
        averages.append((target, lambda _: phase.target_ema))  # type: ignore[return-value]
    return averages


def train_phase(job: Distillation, phase: Phase, settings: Training, name: str) -> float:
    """-> the seconds that it took."""
    sdxl = job.sdxl
    student = sdxl.denoiser("student")
    target = None if phase.target_ema is None else sdxl.denoiser("target")
    w = told_guidance if job.guidance_input else job.guidance
    teacher = guided(sdxl.denoiser(), w, sdxl.unconditional)
    averages = begin_averages(sdxl, phase, settings)
    learner = Learner(sdxl.weights("student"), settings.clip, averages)
    objectives = {kind: make_objective(kind, job) for kind, _ in phase.objectives}
    critics = {kind: o.learner for kind, o in objectives.items() if o.learner}
    for critic in critics.values():
        critic.lr_scale = phase.critic_lr
    balance = Balance(objectives, sdxl.device, settings.accumulate)
    learners = {"student": learner, **critics, "balance": balance}
    segments = phase.method.student_steps
    run = Run(name, learners, settings, job.out, job.resume, segments, lean=True)
    for step in run:
        rows = batch_indices(len(job.prompts), settings.batch, step, settings.seed)
        outputs = []
        for chosen in rows.split(settings.batch // settings.accumulate):
            if phase.share_rollout:
                first = chosen[:: phase.rollout_steps]
                chosen = first.repeat_interleave(phase.rollout_steps)
            x, noise, cond = batch(job, phase, chosen)
            with run.autocast():
                x, z_t, t = draw_states(phase, x, noise, cond, student, teacher, run.progress)
                asked = {"teacher": teacher, "target": target, "progress": run.progress}
                output = consistency_loss(student, x, cond, phase.method, t=t, z_t=z_t, **asked)
                prompts = [job.prompts[i] for i in chosen]
                total, values = total_gradient(output, objectives, phase, prompts, balance)
            output.x_hat.backward(total * (len(chosen) / settings.batch))
            run.record(output.per_sample, output.t)
            run.note(**values)
            outputs.append(output._replace(x_hat=output.x_hat.detach()))
        run.update()
        for kind, critic in critics.items():
            for _ in range(objectives[kind].updates):
                for output in outputs:
                    with run.autocast():
                        loss = objectives[kind].critic_loss(output)
                    (loss / len(outputs)).backward()
                critic.update()
            run.note(**{f"{kind}_critic": loss})
    return run.seconds


def batch(
    job: Distillation, phase: Phase, chosen: Tensor
) -> tuple[Tensor | None, Tensor, Condition]:
    """-> latents (or None), noise and conditions of the chosen prompts, on the device."""
    sdxl = job.sdxl
    cond = on_device(select(job.cond, chosen), sdxl.device)
    x = job.latents[chosen].to(sdxl.device) if phase.states == "data" else None
    noise = torch.randn(len(chosen), sdxl.channels, sdxl.size, sdxl.size, device=sdxl.device)
    if job.guidance_input:
        low, high = job.guidance  # type: ignore[misc]
        omega = low - 1 + (high - low) * torch.rand(len(chosen), device=sdxl.device)
        if phase.share_rollout:  # states of one run of the teacher have its guidance
            omega = omega[:: phase.rollout_steps].repeat_interleave(phase.rollout_steps)
        cond = cond._replace(omega=omega)
    return x, noise, cond


def told_guidance(cond: Condition) -> Tensor:
    """The teacher's guidance is what the student is told."""
    return cond.omega + 1  # type: ignore[return-value]


def total_gradient(
    output: LossOutput,
    objectives: dict[str, Objective],
    phase: Phase,
    prompts: Sequence[str],
    balance: Balance,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> the gradient at x_hat of the consistency loss and the further objectives, their values.

    Every loss acts on x_hat, and only through it on the student.
    """
    (total,) = torch.autograd.grad(output.loss, output.x_hat)
    norm = total.norm()
    values = {}
    for kind, weight in phase.objectives:
        values[kind], further = gradient(objectives[kind], output, prompts)
        total = total + weight * balance.scale(kind, norm, further.norm()) * further
    return total, values
