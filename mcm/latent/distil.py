"""From a text-to-image teacher to a few-step student, by any recipe: the consistency loss and what a stage adds to it, on latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..denoiser import guided
from ..errors import InputError
from ..lab.run import Learner, Step, Training, batch_indices, loop, mixed
from ..losses import LossOutput, consistency_loss
from ..recipes import Phase, Recipe
from ..sampling import rows
from .objectives import Adversarial, DistributionMatching, Preference, gradient
from .scorer import Reward
from .sdxl import SDXL, Condition, unconditional


@dataclass
class Captioned:
    """What a student learns from. prompts: n of them, with their conditions; latents: (n, 4, h, w) of the pictures, or None. On the CPU."""

    prompts: Sequence[str]
    cond: Condition
    latents: Tensor | None = None


def distil(
    sdxl: SDXL,
    recipe: Recipe,
    data: Captioned,
    settings: Training,
    guidance: float | tuple[float, float],
    out: Path,
    name: str,
    resume: bool = False,
    full: bool = False,
    reward: tuple[Reward, float] | None = None,
    saved: Callable[[int, int], None] | None = None,
) -> float:
    """Train a student by all phases of the recipe; its averaged weights are then those named "average" of `sdxl`. -> the seconds it took.

    settings: of the whole recipe; each phase has its share of the iterations and its own warm-up and decay. guidance: w of the teacher, or
    a range to draw it from, which only a fully fine-tuned student can be told (as an input). reward: with the level s0 to reach, for
    recipes with a preference. saved(phase, step) is called after each checkpoint. States of phase n go to out/NAME-n.state.safetensors;
    with resume, finished phases are read from there. Raises InputError if the recipe needs images or a reward and there are none.
    """
    if recipe.needs_images and data.latents is None:
        raise InputError(
            "this recipe learns from images: give captioned images (--data), or use mlcm or tlcm, which learn from prompts alone"
        )
    ranged = isinstance(
        guidance, tuple
    )  # a student is told its guidance only when there is more than one
    if ranged and not full:
        raise InputError(
            "a range of guidance needs a student that is told it, which a LoRA cannot be: use one value, or full fine-tuning"
        )
    if reward is None and any(
        kind == "preference" for phase in recipe.phases for kind, _ in phase.stage.extra
    ):
        raise InputError("this recipe has a preference stage: give it a reward")
    torch.manual_seed(mixed(settings.seed, len(recipe.phases)))
    names = ["student", "average"] + ["target"] * any(
        phase.stage.target_ema is not None for phase in recipe.phases
    )
    spent, weights = (
        {},
        {
            which: sdxl.add(
                which, None if which == "student" else "student", full=full, guidance_input=ranged
            )
            for which in names
        },
    )
    for number, phase in enumerate(recipe.phases):
        torch.manual_seed(
            mixed(settings.seed, number, 1)
        )  # for what the phase initialises, whether the run was resumed or not
        share = phase.share / sum(p.share for p in recipe.phases)
        iterations = max(1, round(settings.iterations * share))
        here = replace(
            settings,
            iterations=iterations,
            lr=settings.lr * phase.lr,
            warmup=min(settings.warmup, iterations // 10 + 1),
            seed=mixed(settings.seed, number),
        )
        averages = [(weights["average"], here.ema_at)]
        if phase.stage.target_ema is not None:
            with torch.no_grad():
                for key, value in weights["target"].items():
                    value.copy_(weights["student"][key])
            averages.append((weights["target"], lambda step, decay=phase.stage.target_ema: decay))
        learner = Learner(weights["student"], here.clip, averages)
        objectives = {
            kind: (weight, _objective(kind, sdxl, data, guidance, reward))
            for kind, weight in phase.stage.extra
        }
        step = _step(sdxl, phase, data, here, guidance, learner, objectives)
        critics = {
            kind: objective.learner
            for kind, (_, objective) in objectives.items()
            if objective.learner
        }

        def on_save(done: int, seconds: float, new: bool, number: int = number) -> None:
            spent[number] = seconds
            if saved and new:
                saved(number, done)

        loop(
            {"student": learner} | critics,
            step,
            here,
            out,
            f"{name}-{number}",
            resume,
            on_save,
            phase.stage.student_steps,
        )
        for which in ("fake", "critic"):
            if which in sdxl.unets:
                sdxl.remove(which)
    return sum(spent.values())


def _step(
    sdxl: SDXL,
    phase: Phase,
    data: Captioned,
    settings: Training,
    guidance,
    learner: Learner,
    objectives: dict,
) -> Callable[[int], Step]:
    """One training step of a phase."""
    stage, device, size, autocast = (
        phase.stage,
        sdxl.device,
        settings.batch // settings.accumulate,
        settings.precision == "bf16",
    )
    student, teacher = sdxl.denoiser("student"), sdxl.denoiser()
    target = None if stage.target_ema is None else sdxl.denoiser("target")

    def loss(chosen: Tensor, progress: float) -> tuple[Tensor, LossOutput, dict[str, Tensor]]:
        if stage.share_run:
            chosen = chosen[:: stage.run].repeat_interleave(stage.run)
        cond = Condition(*(None if c is None else c.to(device) for c in rows(data.cond, chosen)))
        x, w = data.latents[chosen].to(device) if stage.z_from == "data" else None, guidance
        noise = torch.randn(len(chosen), sdxl.channels, sdxl.size, sdxl.size, device=device)
        if isinstance(guidance, tuple):
            cond = cond._replace(
                omega=guidance[0]
                - 1
                + (guidance[1] - guidance[0]) * torch.rand(len(chosen), device=device)
            )
            w = _told
        output = consistency_loss(
            student,
            x,
            cond,
            stage,
            teacher=guided(teacher, w, unconditional),
            target=target,
            progress=progress,
            noise=noise,
        )
        # Every loss acts on x_hat, and only through it on the student. Their scales have nothing to do with each other (a mean over
        # dimensions, logits, a reward), so a weight is the ratio of the gradients' norms there.
        (total,) = torch.autograd.grad(output.loss, output.x_hat)
        norm, figures, prompts = total.norm(), {}, [data.prompts[i] for i in chosen]
        for kind, (weight, objective) in objectives.items():
            figures[kind], extra = gradient(objective, output, prompts)
            total = total + weight * norm / extra.norm().clamp_min(1e-12) * extra
        return total, output, figures

    def step(index: int) -> Step:
        outputs, figures = [], {}
        for chosen in batch_indices(len(data.prompts), settings.batch, index, settings.seed).split(
            size
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
                total, output, figures = loss(chosen, index / settings.iterations)
            output.x_hat.backward(total * (len(chosen) / settings.batch))
            outputs.append(output._replace(x_hat=output.x_hat.detach()))
        norm = learner.update(settings.lr_at(index), index)
        for kind, (_, objective) in objectives.items():
            for _ in range(objective.updates):
                for output in outputs:
                    with torch.autocast(
                        device.type, torch.bfloat16, enabled=autocast, cache_enabled=False
                    ):
                        critic = objective.critic_loss(output)
                    (critic / len(outputs)).backward()
                objective.learner.update(phase.critic_lr * settings.lr_at(index), index)
                figures[f"{kind}_critic"] = critic.detach()
        return Step(
            torch.cat([o.per_sample.detach() for o in outputs]),
            torch.cat([o.t for o in outputs]),
            norm,
            figures,
        )

    return step


def _told(cond: Condition) -> Tensor:
    """The teacher's guidance is what the student is told."""
    return cond.omega + 1


def _objective(
    kind: str,
    sdxl: SDXL,
    data: Captioned,
    guidance: float | tuple[float, float],
    reward: tuple[Reward, float] | None,
):
    w = sum(guidance) / 2 if isinstance(guidance, tuple) else guidance
    if kind == "preference":
        most = None if sdxl.size <= 32 else 2  # a decoder of full size is dear
        return Preference(reward[0], sdxl.to_images, reward[1], data.prompts, most)
    if kind == "distribution_matching":
        return DistributionMatching(sdxl, w)
    if kind in ("adversarial", "adversarial_diffused"):
        return Adversarial(sdxl, diffused=kind == "adversarial_diffused")
    raise InputError(
        f"unknown objective {kind!r}: preference, distribution_matching, adversarial and adversarial_diffused exist"
    )
