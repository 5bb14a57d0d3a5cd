"""A denoiser answers one question: x_hat = denoiser(z, t, cond), the clean image behind a noisy
one.

z: (B, ...); t: (B,) in [0, 1], 0 = clean and 1 = noise; cond: whatever the network takes (class
labels here) or None. Losses, samplers and metrics see only this call and `denoiser.schedule`; none
of them knows which network is behind it.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .schedule import Schedule
from .solvers import expand


def at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def at_zero(x_hat: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_hat, except where t = 0: there z is the clean image, so the answer is z."""
    return torch.where(expand(t == 0, z).bool(), z.to(x_hat.dtype), x_hat)


class Denoiser(nn.Module):
    """A network with its noise schedule and its prediction type, as a denoiser.

    network: a module or function, called as network(z, t, cond) with the schedule's `network_time`.
        It returns, like z, what `prediction` says:
    prediction: "v" (v = alpha eps - sigma x), "epsilon" (the noise) or "x" (the clean image).
    student_steps: the K that a student was trained for; None for a diffusion model, which takes any
        number of steps.
    Output: like z, at least float32 (what a bfloat16 network returns is cast up before any
    arithmetic). At t = 0 it is z.
    Raises InputError for an unknown prediction, or for epsilon with a schedule whose alpha_1 is 0
    (x_hat would be 0 / 0).
    """

    metadata: dict  # of one that `mcm.load` read: what its file says

    def __init__(
        self,
        network: Callable,
        schedule: Schedule,
        prediction: str = "v",
        student_steps: int | None = None,
    ):
        super().__init__()
        if prediction not in ("v", "epsilon", "x"):
            raise InputError(f'prediction must be "v", "epsilon" or "x", not {prediction!r}')
        if prediction == "epsilon" and schedule(torch.ones(1))[0] == 0:
            raise InputError("epsilon needs alpha_1 > 0: clip the schedule, or predict v or x")
        self.network: Any = network
        self.schedule = schedule
        self.prediction = prediction
        self.student_steps = student_steps

    def forward(self, z: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        wide = at_least_float32(z)
        # Asking a GPU would stall its queue, a compiler cannot know; there at_zero does the same.
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and not t.any():
            return wide
        weights = self.network.parameters() if isinstance(self.network, nn.Module) else ()
        dtype = next(iter(weights), wide).dtype
        output = self.network(wide.to(dtype), self.schedule.network_time(t), cond).to(wide.dtype)
        alpha, sigma = (expand(a, wide) for a in self.schedule(t))
        if self.prediction == "v":
            output = alpha * wide - sigma * output
        elif self.prediction == "epsilon":
            output = (wide - sigma * output) / alpha
        return at_zero(output, wide, t)

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> "Denoiser":
        """A model from a folder or from the Hugging Face Hub, by mcm.lab.hub.from_pretrained."""
        return import_module("mcm.lab.hub").from_pretrained(name, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload it with a model card, by mcm.lab.hub.push_to_hub."""
        return import_module("mcm.lab.hub").push_to_hub(self, repo_id, **options)


def select(cond: Any, index: Tensor | slice) -> Any:
    """The conditions of these samples: of a tensor (B, ...), a named tuple of tensors, or None."""
    if isinstance(cond, tuple):
        return type(cond)(*(select(part, index) for part in cond))
    return None if cond is None else cond[index]


def joined(a: Any, b: Any) -> Any:
    """The conditions of two batches, as those of one."""
    if isinstance(a, tuple):
        return type(a)(*map(joined, a, b))
    return None if a is None else torch.cat([a, b])


class Guided(nn.Module):
    """Classifier-free guidance (arXiv 2207.12598): x_hat = x(null) + w (x(cond) - x(null)).

    w is Imagen's: 1 is the conditional model, 0 the unconditional one; papers that write
    cond + omega (cond - null) mean omega = w - 1. To guide x_hat is to guide the predicted noise,
    both being affine in each other at a given z_t.

    w: a number, (B,), or a function that finds it in cond.
    null_cond: what "no condition" is to the network, or a function that makes it from cond; None is
        passed on as None.
    `conditional` is the denoiser without guidance; `both` gives its answer too.
    """

    def __init__(self, denoiser: nn.Module, w: float | Tensor | Callable, null_cond: Any = None):
        super().__init__()
        self.conditional = denoiser
        self.w = w
        self.null_cond = null_cond
        self.schedule = denoiser.schedule
        self.student_steps = getattr(denoiser, "student_steps", None)

    def forward(self, z: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.both(z, t, cond)[0]

    def both(self, z: Tensor, t: Tensor, cond: Any = None) -> tuple[Tensor, Tensor]:
        """-> x_hat with guidance, and without."""
        null = self.null_cond(cond) if callable(self.null_cond) else self.null_cond
        if isinstance(null, (int, Tensor)) and cond is not None:
            null = torch.as_tensor(null, device=cond.device).expand_as(cond)
        if cond is None or null is None:
            x_null = self.conditional(z, t, null)
            x_cond = self.conditional(z, t, cond)
        else:  # in one batch
            answers = self.conditional(torch.cat([z, z]), torch.cat([t, t]), joined(null, cond))
            x_null, x_cond = answers.chunk(2)
        w = self.w(cond) if callable(self.w) else self.w
        w = expand(w, z) if isinstance(w, Tensor) else w
        return x_null + w * (x_cond - x_null), x_cond


guided = Guided  # as in guided(denoiser, w)
