"""Four broken losses for notebook 8. Do not read on before you have found them.

One of `MISTAKES` sits in each; which letter has which follows from a hash, so that you do not see
it by accident.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import mcm

MISTAKES = ("gradient", "border", "guidance", "mask")


def _loss(
    mistake: str,
    student: nn.Module,
    x: Tensor,
    t: Tensor,
    noise: Tensor,
    T: int,
    K: int,
    teacher: nn.Module | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """The multistep consistency loss, squared, with one mistake in it.

    x, noise: (B, 1); t: (B,) multiples of 1 / T; cond: (B,) labels, for guidance of w = 3.
    """
    schedule = student.schedule
    i = torch.round(t * T)
    q = torch.floor((i if mistake == "border" else i - 1) / (T / K)) / K
    s = torch.maximum((i - 1) / T, q)
    z_t = mcm.sampling.noised(x, t, noise, schedule)
    if cond is not None:
        teacher = mcm.guided(teacher, 2.0 if mistake == "guidance" else 3.0, torch.tensor(2))
    with torch.set_grad_enabled(mistake == "gradient"):
        x_teacher = x if teacher is None else teacher(z_t, t, cond)
        z_s = mcm.ddim(x_teacher, z_t, t, s, schedule)
        state = torch.get_rng_state()
        x_s = student(z_s, s, cond)
        target = mcm.solvers.joined_aim(x_teacher, x_s, t, s, q, schedule)
    if mistake != "mask":
        torch.set_rng_state(state)
    difference = (target - student(z_t, t, cond)) / schedule(t)[1][:, None]
    return difference.square().mean()


_order = sorted(MISTAKES, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
broken: dict[str, Callable[..., Tensor]] = {
    letter: partial(_loss, mistake) for letter, mistake in zip("ABCD", _order)
}
