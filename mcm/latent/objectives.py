"""What TLCM and SCott add to the consistency loss: an adversary, distribution matching, a preference.

Each is an object with the same three parts: `loss(output, prompts)` is for the student, which it reaches through x_hat alone (see
`gradient`); `critic_loss(output)`, for those that train a network of their own, reaches only that network; `learner` holds it.
`output` is what consistency_loss returned. The teacher is never trained.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..denoiser import guided
from ..errors import InputError
from ..lab.run import Learner
from ..losses import LossOutput, diffusion_loss
from ..recipes import FAKE_UPDATES
from ..sampling import noised
from ..solvers import expand, mean_over_dims
from .scorer import Reward
from .sdxl import DECODER, SDXL, unconditional


def gradient(objective, output: LossOutput, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """-> the objective's loss, its gradient with respect to x_hat. Nothing is left in any network that it passed through."""
    x = output.x_hat.detach().requires_grad_()
    value = objective.loss(output._replace(x_hat=x), prompts)
    return value.detach(), torch.autograd.grad(value, x)[0]


class Preference:
    """A reward on the decoded x_hat, raised to s0 and no further, and lowered to 0 for other captions (arXiv 2406.05768, eq. 11):

        max(0, s0 - r(x_hat, its prompt)) + max(0, r(x_hat, another prompt))

    reward: see mcm.scorer; s0: the paper's 16 belongs to its MPS scorer; here it is an argument, and the scripts use the mean reward of
    the teacher's own pictures. pool: prompts to draw the other ones from. most: samples of the batch that are decoded (the VAE is
    dear); None: all.
    """

    learner = None
    updates = 0

    def __init__(
        self,
        reward: Reward,
        decode: Callable[[Tensor], Tensor],
        s0: float,
        pool: Sequence[str],
        most: int | None = None,
    ):
        self.reward, self.decode, self.s0, self.pool, self.most = reward, decode, s0, pool, most

    def loss(self, output: LossOutput, prompts: Sequence[str]) -> Tensor:
        part = torch.linspace(
            0, len(output.x_hat) - 1, min(self.most or len(output.x_hat), len(output.x_hat))
        ).long()
        prompts = [prompts[i] for i in part]
        images = self.decode(output.x_hat[part.to(output.x_hat.device)]).clamp(-1.5, 1.5)
        others = [self.pool[i] for i in torch.randint(len(self.pool), (len(prompts),)).tolist()]
        differ = torch.tensor(
            [float(a != b) for a, b in zip(prompts, others)], device=images.device
        )
        return (
            (self.s0 - self.reward(images, prompts)).clamp_min(0)
            + differ * self.reward(images, others).clamp_min(0)
        ).mean()


class DistributionMatching:
    """Moves x_hat along the difference of two scores, the real one (the frozen, guided teacher) and that of the student's own samples
    (arXiv 2406.05768, eq. 12, with the normalisation of DMD2, arXiv 2405.14867):

        grad = (p_real - p_fake) / mean|p_real|,   p = x_hat - (denoised x_hat, noised to t'),   t' uniform in [0.02, 0.98]

    The fake score is a LoRA of the teacher, trained by the plain noise-prediction loss on the student's x_hat, `updates` times per step
    of the student (DMD2 uses 5; the paper says nothing). w: guidance of the real score; the fake one has none.
    """

    def __init__(self, sdxl: SDXL, w: float, updates: int = FAKE_UPDATES, clip: float = 10.0):
        self.real, self.updates = guided(sdxl.denoiser(), w, unconditional), updates
        self.learner, self.fake = Learner(sdxl.add("fake"), clip), sdxl.denoiser("fake")

    def loss(self, output: LossOutput, prompts: Sequence[str]) -> Tensor:
        x = output.x_hat
        with torch.no_grad():
            t = 0.02 + 0.96 * torch.rand(len(x), dtype=torch.float64, device=x.device)
            z = noised(x, t, torch.randn_like(x), self.fake.schedule)
            p_real, p_fake = x - self.real(z, t, output.cond), x - self.fake(z, t, output.cond)
            gradient = (p_real - p_fake) / expand(mean_over_dims(p_real.abs()).clamp_min(1e-8), x)
            gradient = torch.nan_to_num(gradient)
        return 0.5 * mean_over_dims((x - (x - gradient).detach()) ** 2).mean()

    def critic_loss(self, output: LossOutput) -> Tensor:
        fake = diffusion_loss(self.fake, output.x_hat.detach(), output.cond)
        alpha = self.fake.schedule(fake.t)[0].float()
        return (
            fake.per_sample * alpha**2
        ).mean()  # the v-loss times alpha^2 is the noise-prediction loss


class Adversarial:
    """A discriminator in latent space, conditioned on text and time: the teacher's UNet with its encoder frozen and a LoRA on its
    decoder and last layer, whose output map is the logits (SCott, arXiv 2403.01505). Hinge loss; the student's part is -D(x_hat).

    diffused: False compares clean latents, telling the discriminator the time t of z_t for real and fake alike (the paper prints 0 for
        the real ones, which would give them away). True (TLCM, arXiv 2406.05768, eq. 13) noises both to one random time t' first.
    "Real" is the clean image behind z_t: data in SCott, the student's own several-step sample in TLCM.
    """

    updates = 1

    def __init__(self, sdxl: SDXL, diffused: bool, clip: float = 1.0):
        self.diffused, self.schedule = diffused, sdxl.schedule
        self.learner, self.network = (
            Learner(sdxl.add("critic", modules=DECODER), clip),
            sdxl.denoiser("critic").network,
        )

    def logits(self, x: Tensor, t: Tensor, noise: Tensor, output: LossOutput) -> Tensor:
        """(B, 4, h, w)"""
        z = noised(x, t, noise, self.schedule) if self.diffused else x
        return self.network(
            z.to(next(self.network.parameters()).dtype), self.schedule.network_time(t), output.cond
        ).float()

    def _draw(self, output: LossOutput) -> tuple[Tensor, Tensor]:
        t = (
            0.02 + 0.96 * torch.rand(len(output.t), dtype=torch.float64, device=output.t.device)
            if self.diffused
            else output.t
        )
        return t, torch.randn_like(output.x_hat)

    def loss(self, output: LossOutput, prompts: Sequence[str]) -> Tensor:
        return -self.logits(output.x_hat, *self._draw(output), output).mean()

    def critic_loss(self, output: LossOutput) -> Tensor:
        if output.x is None:
            raise InputError(
                "an adversary needs clean images to call real: a stage whose z_t come from data or from the student"
            )
        t, noise = self._draw(output)
        real, fake = (
            self.logits(output.x, t, noise, output),
            self.logits(output.x_hat.detach(), t, noise, output),
        )
        return ((1 - real).clamp_min(0) + (1 + fake).clamp_min(0)).mean()
