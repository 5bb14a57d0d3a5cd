"""What TLCM and SCott add to the consistency loss: an adversary, distribution matching, a
preference.

Each is an object with the same parts: `loss(output, prompts)` is for the student, which it reaches
through x_hat alone (see `gradient`); `critic_loss(output)`, for those that train a network of their
own, reaches only that network; `learner` holds it, and takes `updates` steps for each of the
student's. `output` is what consistency_loss returned. The teacher is never trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..denoiser import guided
from ..errors import InputError
from ..lab.run import Learner
from ..losses import LossOutput, diffusion_loss
from ..sampling import noised
from ..schedule import time_dtype
from ..solvers import expand, mean_over_dims
from .recipes import FAKE_UPDATES
from .scorer import Reward
from .sdxl import DECODER, SDXL


class Objective(Protocol):
    """The parts of every objective."""

    learner: Any  # of its critic: a Learner, or None; then there is critic_loss(output), too
    updates: int

    def loss(self, output: LossOutput, prompts: Sequence[str]) -> Tensor:
        """-> a scalar, with gradient at output.x_hat."""


def gradient(
    objective: Objective, output: LossOutput, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """-> the objective's loss, and its gradient with respect to x_hat.

    Nothing is left in any network that it passed through.
    """
    x = output.x_hat.detach().requires_grad_()
    value = objective.loss(output._replace(x_hat=x), prompts)
    return value.detach(), torch.autograd.grad(value, x)[0]


class Balance:
    """What an objective's gradient is multiplied with, so that its weight means something.

    Losses have scales that have nothing to do with each other (a mean over dimensions, logits, a
    reward), so a weight is the ratio of the gradients' norms at x_hat: of their running averages,
    and never more than it was before. So what an objective asks for less and less, as a hinge that
    is satisfied, fades, and a step of one sample cannot be blown up to the weight of a whole batch.

    parts: how many a step's batch is put through in. The norms are those of the whole batch, as far
        as it is known; the averages are kept when it is.
    For checkpoints it looks like a Learner.
    """

    DECAY = 0.9

    def __init__(self, kinds: Sequence[str], device: torch.device, parts: int = 1):
        # of each objective: running averages of the two norms, and the scale
        start = torch.tensor([0.0, 0.0, torch.inf], device=device)
        self.averages = {kind: start.clone() for kind in kinds}
        self.parts = parts
        self.seen: dict[str, list[Tensor]] = {kind: [] for kind in kinds}  # norms in this step
        self.step, self.lr = 0, 0.0

    def scale(self, kind: str, norm: Tensor, further: Tensor) -> Tensor:
        """norm: of the consistency loss's gradient, of this part; further: of this objective's.

        Steps that are skipped, as something is not finite, and those in which nothing is asked for
        do not count.
        """
        kept, seen = self.averages[kind], self.seen[kind]
        seen.append(torch.stack([norm, further]))
        now = (torch.stack(seen).square().mean(0) / self.parts).sqrt()
        counts = now.isfinite().all() & (now[1] > 0)
        averages = kept[:2].lerp(now, 1 - self.DECAY)
        lowest = torch.minimum(kept[2:], averages[:1] / averages[1:])
        new = torch.where(counts, torch.cat([averages, lowest]), kept)
        if len(seen) == self.parts:
            kept.copy_(new)
            seen.clear()
        return torch.where(counts, new[2], 0.0)

    def state(self, finished: bool = False) -> dict[str, Tensor]:
        return self.averages

    def load(self, tensors: dict[str, Tensor]) -> None:
        for kind, value in self.averages.items():
            value.copy_(tensors[kind])


@dataclass
class Preference:
    """A reward on the decoded x_hat, raised to s0 and no further, and lowered to 0 for other
    captions

        max(0, s0 - r(x_hat, its prompt)) + max(0, r(x_hat, another prompt))

    (arXiv 2406.05768, eq. 11).

    reward: see `scorer`.
    s0: the paper's 16 belongs to its MPS scorer; the scripts use the mean reward of the teacher's
        own images.
    pool: prompts to draw the other ones from.
    most: decode so many samples of the batch, chosen at random, and keep the activations of one at
        a time (a VAE of full size is expensive); None: all, together.
    """

    reward: Reward
    decode: Callable[[Tensor], Tensor]
    s0: float
    pool: Sequence[str]
    most: int | None = None
    learner = None
    updates = 0

    def loss(self, output: LossOutput, prompts: Sequence[str]) -> Tensor:
        x = output.x_hat
        if self.most is None:
            images = self.decode(x)
        else:  # a batch's times fall, and each of them is to be chosen now and then
            chosen = torch.randperm(len(x))[: self.most].tolist()
            prompts = [prompts[i] for i in chosen]
            parts = (x[i : i + 1] for i in chosen)
            again = [checkpoint(self.decode, part, use_reentrant=False) for part in parts]
            images = torch.cat(again)
        images = images.clamp(-1.5, 1.5)
        others = [self.pool[i] for i in torch.randint(len(self.pool), (len(prompts),)).tolist()]
        differ = torch.tensor([float(a != b) for a, b in zip(prompts, others)]).to(images.device)
        lacking = (self.s0 - self.reward(images, prompts)).clamp_min(0)
        return (lacking + differ * self.reward(images, others).clamp_min(0)).mean()


class DistributionMatching:
    """Moves x_hat along the difference of two scores, the real one and that of the student's
    samples

        grad = (p_real - p_fake) / mean|p_real|,
        p = x_hat - (denoised x_hat, noised to t'),   t' uniform in [0.02, 0.98]

    (arXiv 2406.05768, eq. 12, with the normalisation of DMD2, arXiv 2405.14867). The real score is
    the frozen, guided teacher's. The fake one is a LoRA of the teacher without guidance, trained by
    the plain noise-prediction loss on the student's x_hat, `updates` times per step of the student
    (DMD2 uses 5; the paper says nothing).

    w: guidance of the real score, as of `guided`.
    """

    updates = FAKE_UPDATES

    def __init__(self, sdxl: SDXL, w: float | Callable):
        self.real = guided(sdxl.denoiser(), w, sdxl.unconditional)
        self.learner = Learner(sdxl.add_lora("fake"), clip=10.0)
        self.fake = sdxl.denoiser("fake")

    def loss(self, output: LossOutput, prompts: Sequence[str]) -> Tensor:
        x = output.x_hat
        with torch.no_grad():
            t = random_times(x)
            z = noised(x, t, torch.randn_like(x), self.fake.schedule)
            p_real = x - self.real(z, t, output.cond)
            p_fake = x - self.fake(z, t, output.cond)
            scale = expand(mean_over_dims(p_real.abs()).clamp_min(1e-8), x)
            towards = torch.nan_to_num((p_real - p_fake) / scale)
        return 0.5 * mean_over_dims((x - (x - towards).detach()) ** 2).mean()

    def critic_loss(self, output: LossOutput) -> Tensor:
        fake = diffusion_loss(self.fake, output.x_hat.detach(), output.cond)
        alpha = self.fake.schedule(fake.t)[0].float()
        # the v-loss times alpha^2 is the noise-prediction loss
        return (fake.per_sample * alpha**2).mean()


class Adversarial:
    """A discriminator in latent space, conditioned on text and time (SCott, arXiv 2403.01505).

    The teacher's UNet with its encoder frozen and a LoRA on its decoder and last layer, whose
    output map is the logits. Hinge loss; the student's part is -D(x_hat). "Real" is the clean image
    behind z_t: data in SCott, the student's own several-step sample in TLCM.

    diffused: False compares clean latents, telling the discriminator the time t of z_t for real and
        fake alike (the paper prints 0 for the real ones, which would give them away). True (TLCM,
        arXiv 2406.05768, eq. 13) noises both to one random time t' first.
    """

    updates = 1

    def __init__(self, sdxl: SDXL, diffused: bool):
        self.diffused = diffused
        self.schedule = sdxl.schedule
        self.learner = Learner(sdxl.add_lora("critic", modules=DECODER), clip=1.0)
        self.network = sdxl.denoiser("critic").network

    def logits(self, x: Tensor, t: Tensor, noise: Tensor, output: LossOutput) -> Tensor:
        """(B, 4, h, w)"""
        z = noised(x, t, noise, self.schedule) if self.diffused else x
        z = z.to(next(self.network.parameters()).dtype)
        return self.network(z, self.schedule.network_time(t), output.cond).float()

    def _draw(self, output: LossOutput) -> tuple[Tensor, Tensor]:
        """-> the times that the discriminator is told, and noise."""
        t = random_times(output.x_hat) if self.diffused else output.t
        return t, torch.randn_like(output.x_hat)

    def loss(self, output: LossOutput, prompts: Sequence[str]) -> Tensor:
        return -self.logits(output.x_hat, *self._draw(output), output).mean()

    def critic_loss(self, output: LossOutput) -> Tensor:
        if output.x is None:
            raise InputError("an adversary needs clean images: states of the data or the student")
        t, noise = self._draw(output)
        real = self.logits(output.x, t, noise, output)
        fake = self.logits(output.x_hat.detach(), t, noise, output)
        return ((1 - real).clamp_min(0) + (1 + fake).clamp_min(0)).mean()


def random_times(like: Tensor) -> Tensor:
    """(B,), uniform in [0.02, 0.98]."""
    return 0.02 + 0.96 * torch.rand(len(like), dtype=time_dtype(like.device), device=like.device)
