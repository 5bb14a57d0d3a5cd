"""A denoiser answers one question: x_hat = denoiser(z, t, cond), the clean image expected behind a noisy one.

z: (B, ...), t: (B,) in [0, 1] with 0 = clean and 1 = noise, cond: whatever the network takes (class labels here) or None.
Losses, samplers and metrics see only this call and `denoiser.schedule`; none of them knows which network is behind it.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError
from .schedule import CosineSchedule, DiscreteSchedule, Schedule
from .solvers import expand
from .unet import UNet


def at_zero(x_hat: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_hat, except where t = 0: there z is the clean image, so the answer is z."""
    return torch.where(expand(t == 0, z).bool(), z.to(x_hat.dtype), x_hat)


def at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


class Denoiser(nn.Module):
    """A network with its noise schedule and its prediction type, as a denoiser.

    network: a module or function called as network(z, t, cond), t being the schedule's `network_time`, that returns
        prediction "v": v = alpha eps - sigma x, "epsilon": the noise, or "x": the clean image; all like z.
    student_steps: the K a student was trained for; None for a diffusion model, which takes any number of steps.
    Output: like z, at least float32 (a bfloat16 network's output is cast up before any arithmetic). At t = 0 it is z.
    Raises InputError for an unknown prediction, or for epsilon with a schedule whose alpha_1 is 0 (x_hat would be 0 / 0).
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: str = "v",
        student_steps: int | None = None,
    ):
        super().__init__()
        if prediction not in ("v", "epsilon", "x"):
            raise InputError(f'prediction must be "v", "epsilon" or "x", not {prediction!r}')
        if prediction == "epsilon" and schedule(torch.ones(1))[0] == 0:
            raise InputError(
                "epsilon-prediction needs alpha > 0 at t = 1: clip the schedule, or predict v or x"
            )
        self.network, self.schedule, self.prediction, self.student_steps = (
            network,
            schedule,
            prediction,
            student_steps,
        )

    def forward(self, z: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        # Asking a GPU whether all t are 0 would stall its queue; there the `where` of at_zero alone gives the same value.
        wide = at_least_float32(z)
        if t.device.type == "cpu" and not t.any():
            return wide
        weights = (
            next(iter(self.network.parameters()), wide)
            if isinstance(self.network, nn.Module)
            else wide
        )
        output = self.network(wide.to(weights.dtype), self.schedule.network_time(t), cond).to(
            wide.dtype
        )
        alpha, sigma = (expand(a, wide) for a in self.schedule(t))
        if self.prediction == "v":
            output = alpha * wide - sigma * output
        elif self.prediction == "epsilon":
            output = (wide - sigma * output) / alpha
        return at_zero(output, wide, t)


def joined(a: Any, b: Any) -> Any:
    """The conditions of two batches, as those of one."""
    if isinstance(a, tuple):
        return type(a)(*(None if x is None else joined(x, y) for x, y in zip(a, b)))
    return torch.cat([a, b])


class Guided(nn.Module):
    """What `guided` returns; `.conditional` is the denoiser without guidance (x_var is estimated from that one)."""

    def __init__(self, conditional: nn.Module, w: float | Tensor | Callable, null_cond: Any):
        super().__init__()
        self.conditional, self.w, self.null_cond, self.schedule = (
            conditional,
            w,
            null_cond,
            conditional.schedule,
        )
        self.student_steps = getattr(conditional, "student_steps", None)

    def forward(self, z: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        null = self.null_cond(cond) if callable(self.null_cond) else self.null_cond
        null = null.expand_as(cond) if isinstance(null, Tensor) else null
        if cond is None or null is None:
            x_null, x_cond = self.conditional(z, t, null), self.conditional(z, t, cond)
        else:  # in one batch
            x_null, x_cond = self.conditional(
                torch.cat([z, z]), torch.cat([t, t]), joined(null, cond)
            ).chunk(2)
        w = self.w(cond) if callable(self.w) else self.w
        w = expand(w, z) if isinstance(w, Tensor) else w
        return x_null + w * (x_cond - x_null)


def guided(denoiser: nn.Module, w: float | Tensor | Callable, null_cond: Any = None) -> nn.Module:
    """Classifier-free guidance: x_hat = x(null) + w (x(cond) - x(null)) (arXiv 2207.12598; w as in Imagen).

    w = 1 is the conditional model, w = 0 the unconditional one; papers that write cond + omega (cond - null) mean omega = w - 1.
    w: a number, (B,), or a function that finds it in cond. null_cond: what "no condition" is to the network, or a function that makes it from cond; None is passed on as None.
    Guiding x_hat or the predicted noise is the same thing, both being affine in each other at a given z_t.
    """
    return Guided(denoiser, w, null_cond)


class GaussianMixture(nn.Module):
    """An exact denoiser: E[x | z_t] for x from a mixture of M isotropic normals in any dimension. Nothing is learned.

    means: (M, *shape); stds: (M,) > 0; weights: (M,), normalised here. With cond = (B,) component indices it answers for
    that component alone (an exact class-conditional model); an index of M means the whole mixture, as does None.

    z_t of component m is N(alpha mu_m, alpha^2 std_m^2 + sigma^2), so with v_m its variance
        E[x | z_t, m] = (sigma^2 mu_m + alpha std_m^2 z_t) / v_m,   p(m | z_t) ~ weight_m N(z_t; alpha mu_m, v_m).
    """

    def __init__(
        self,
        means: Tensor,
        stds: Tensor,
        weights: Tensor | None = None,
        schedule: Schedule = CosineSchedule(),
    ):
        super().__init__()
        means, stds = torch.as_tensor(means), torch.as_tensor(stds)
        if means.ndim < 2 or stds.shape != means.shape[:1] or not (stds > 0).all():
            raise InputError("means must be (M, *shape) and stds (M,) positive")
        self.shape, self.schedule, self.student_steps = means.shape[1:], schedule, None
        weights = (
            torch.ones_like(stds) if weights is None else torch.as_tensor(weights, dtype=stds.dtype)
        )
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("stds", stds)
        self.register_buffer("weights", weights / weights.sum())

    def forward(self, z: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        z = at_least_float32(z)
        alpha, sigma = (a.to(z.dtype)[:, None] for a in self.schedule(t))  # (B, 1)
        flat, means = z.flatten(1), self.means.to(z.dtype)
        prior = self.stds.to(z.dtype) ** 2
        variance = alpha**2 * prior + sigma**2  # (B, M)
        distance = (flat[:, None] - alpha[..., None] * means).square().sum(-1)
        log_weight = (
            self.weights.to(z.dtype).log()
            - distance / (2 * variance)
            - flat.shape[1] / 2 * variance.log()
        )
        if cond is not None:
            other = (cond[:, None] != torch.arange(len(means), device=z.device)) & (
                cond[:, None] < len(means)
            )
            log_weight = log_weight.masked_fill(other, -math.inf)
        posterior = log_weight.softmax(1)  # (B, M)
        x_hat = (posterior / variance * sigma**2) @ means + (posterior / variance * prior).sum(
            1, True
        ) * alpha * flat
        return at_zero(x_hat.reshape(z.shape), z, t)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape) draws from the mixture."""
        m = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(
            n,
            self.means.shape[1],
            generator=generator,
            dtype=self.means.dtype,
            device=self.means.device,
        )
        return (self.means[m] + self.stds[m, None] * noise).reshape(n, *self.shape)


# --- checkpoints: tensors and JSON, nothing that could execute ---------------------------------------------------------

FORMAT = "mcm-1"
SCHEDULES = {"cosine": CosineSchedule, "discrete": DiscreteSchedule}


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def write_safetensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict, earlier: Path | None = None
) -> None:
    """Write tensors and JSON-able metadata so that a crash half-way leaves the previous file intact, which is kept as `earlier`, if given.
    Raises InputError if they cannot be written, for want of room or of rights."""
    path = Path(path)
    partial = partial_of(path)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        save_file(tensors, partial, {"format": FORMAT, "mcm": json.dumps(metadata)})
        if earlier and path.is_file():
            os.replace(path, earlier)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} could not be written ({error}). What was saved before is intact: make room, and go on with --resume."
        ) from None


def read_header(path: str | Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """-> metadata, shapes of the tensors by name, of a file of ours. Raises InputError for a file that is missing, damaged, a pickle or
    not ours."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(
                    f"{path}: a safetensors file, but not a checkpoint written by mcm.save"
                )
            metadata = json.loads(header["mcm"])
            if not isinstance(metadata, dict):
                raise ValueError(f"its header is {type(metadata).__name__}")
            return metadata, {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not a readable checkpoint ({error}). It is truncated, or another format; pickles (.pt, .ckpt) are never "
            "loaded, since they can run code. Use a .safetensors file written by mcm.save."
        ) from None


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """-> tensors, metadata of a file of ours. Raises InputError as `read_header` does."""
    metadata, _ = read_header(path)
    return load_file(path), metadata


def save(path: str | Path, denoiser: Denoiser, **metadata) -> None:
    """Save a Denoiser around a UNet: weights as safetensors; network arguments, schedule, prediction, student_steps and any further
    JSON-able `metadata` in the header. `load` needs nothing else."""
    schedule = denoiser.schedule
    kind = next(name for name, cls in SCHEDULES.items() if isinstance(schedule, cls))
    arguments = (
        vars(schedule) if kind == "cosine" else {"alphas_cumprod": schedule.alphas_cumprod.tolist()}
    )
    metadata |= {
        "network": denoiser.network.arguments,
        "schedule": {"kind": kind, **arguments},
        "prediction": denoiser.prediction,
        "student_steps": denoiser.student_steps,
    }
    write_safetensors(path, denoiser.network.state_dict(), metadata)


def load(path: str | Path, device: str | torch.device = "cpu") -> Denoiser:
    """-> the Denoiser that `save` wrote, in eval mode, with everything from the header in `denoiser.metadata`.

    Raises InputError if the file is missing, truncated, a pickle, not ours, or does not fit the network its header describes, which is
    looked at before memory is taken.
    """
    metadata, shapes = read_header(path)
    if "network" not in metadata:
        raise InputError(
            f"{path}: a file of ours, but not a model: training state and feature classifiers cannot be sampled"
        )
    try:
        check_size(metadata, shapes)
        arguments = dict(metadata["schedule"])
        schedule = SCHEDULES[arguments.pop("kind")](**arguments)
        schedule(torch.tensor([0.0]))  # it can be computed
        network = UNet(**metadata["network"])
        network.load_state_dict(load_file(path))
        denoiser = Denoiser(network, schedule, metadata["prediction"], metadata["student_steps"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: its weights do not fit the network that its header describes ({reason})"
        ) from None
    denoiser.metadata = metadata
    return denoiser.to(device).eval().requires_grad_(False)


def check_size(metadata: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError, or what a missing entry raises, where a header describes more than the tensors of these shapes: the widest weights of
    every level are compared before any is made."""
    network, steps = metadata["network"], metadata["student_steps"]
    channels, blocks, multipliers = network["channels"], network["blocks"], network["multipliers"]
    if len(multipliers) * blocks > len(shapes):
        raise ValueError(f"{blocks} blocks in each of {len(multipliers)} levels")
    described = {"first.weight": (channels, network["in_channels"], 3, 3)}
    described |= {
        f"down.{i * blocks}.block.conv2.weight": (channels * m, channels * m, 3, 3)
        for i, m in enumerate(multipliers)
    }
    if network["classes"]:
        described["label.weight"] = (network["classes"] + 1, 4 * channels)
    for name, shape in described.items():
        if shapes.get(name) != shape:
            raise ValueError(f"{name} would be {shape}, but is {shapes.get(name)}")
    if not 0 < network["image_size"] <= 4096 or steps is not None and not 0 < steps <= 100_000:
        raise ValueError(f"image size {network['image_size']}, student steps {steps}")
