"""One training loop, for teachers and students alike: EMA, resume, precision, log.

Everything random in step i is drawn from a generator seeded with (seed, i), and the batch is chosen from (seed, i) too. So the
state of a run is its weights and its step, and a resumed run equals an uninterrupted one bit for bit (on the CPU).
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .data import ImageData, to_float
from .denoiser import Denoiser, read_safetensors, save, write_safetensors
from .errors import InputError
from .losses import LossOutput

LossFunction = Callable[[Denoiser, Tensor, Tensor, float], LossOutput]


@dataclass(frozen=True)
class Training:
    """How long and how to train. batch: images per step; accumulate: in how many parts it goes through the network. lr: Adam's peak
    learning rate, reached after warmup steps and lowered to 0 along a cosine. ema: decay of the averaged weights, which are
    the ones saved for use. clip: largest gradient norm. precision: "fp32" or "bf16" (autocast). log_every, save_every: in steps.
    """

    iterations: int
    batch: int = 128
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.995
    clip: float = 1.0
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 50
    save_every: int = 500

    def lr_at(self, step: int) -> float:
        decay = 0.5 + 0.5 * math.cos(math.pi * step / self.iterations)
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * decay

    def ema_at(self, step: int) -> float:
        """The decay grows with the run, so that the random start is forgotten first."""
        return min(self.ema, (1 + step) / (10 + step))


def mixed(*numbers: int) -> int:
    """One 32-bit seed from several numbers. (PyTorch's CPU generator ignores all higher bits, so they cannot just be packed.)"""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed(seed, epoch, n)))


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """Which of n images make up the batch of this step, (batch,): shuffled passes over the data, as a function of the step alone."""
    position = torch.arange(step * batch, (step + 1) * batch)
    epochs = range(int(position[0]) // n, int(position[-1]) // n + 1)
    return torch.cat([permutation(n, seed, e)[position[position // n == e] - e * n] for e in epochs])


def train(
    denoiser: Denoiser,
    loss_function: LossFunction,
    data: ImageData,
    settings: Training,
    out: Path,
    name: str,
    resume: bool = False,
    **metadata,
) -> Denoiser:
    """Train `denoiser` in place; return its averaged copy, in eval mode.

    loss_function(denoiser, x, labels, progress) -> LossOutput, progress in [0, 1). Writes out/NAME.safetensors (the averaged weights,
    for mcm.load, with `metadata`), out/NAME.state.safetensors (all that resuming needs) and lines to out/log.jsonl. With resume, goes
    on from the state file if there is one. Raises InputError when the loss or the gradient stops being finite, naming the
    step; what was saved before stays.
    """
    device = next(denoiser.parameters()).device
    denoiser.requires_grad_(True).train()
    averaged = copy.deepcopy(denoiser).requires_grad_(False).eval()
    parameters = list(denoiser.parameters())
    optimizer = torch.optim.Adam(parameters, settings.lr, betas=(0.9, 0.99), fused=device.type in ("cpu", "cuda"))
    state_file, model_file, first, elapsed = out / f"{name}.state.safetensors", out / f"{name}.safetensors", 0, 0.0
    if resume and state_file.is_file():
        first, elapsed = load_state(state_file, denoiser, averaged, optimizer, settings)
        averaged.metadata = metadata | {"step": first, "seconds": round(elapsed, 1)}
        save(model_file, averaged, **averaged.metadata)  # a kill may have come between the two files
    K = denoiser.student_steps or 1
    steps = tqdm(range(first, settings.iterations), name, initial=first, total=settings.iterations, unit="it")
    pending, started = [], time.perf_counter()
    for step in steps:
        torch.manual_seed(mixed(settings.seed, step))
        rows = batch_indices(len(data.images), settings.batch, step, settings.seed).to(device)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        for part in rows.chunk(settings.accumulate):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                output = loss_function(denoiser, to_float(data.images[part]), data.labels[part], step / settings.iterations)
            (output.loss * (len(part) / len(rows))).backward()
            pending.append((output.per_sample.detach(), output.t))
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        pending[-1] += (norm,)
        optimizer.step()
        optimizer.zero_grad()
        weight = 1 - settings.ema_at(step)
        torch._foreach_lerp_(list(averaged.parameters()), parameters, weight)

        done = step + 1 == settings.iterations
        if done or (step + 1) % settings.log_every == 0 or (step + 1) % settings.save_every == 0:
            seconds, started = time.perf_counter() - started, time.perf_counter()
            elapsed += seconds
            line = summary(pending, K, step + 1, name)
            pending = []
            rate = settings.batch * line["steps"] / seconds
            line |= {"model": name, "lr": settings.lr_at(step), "seconds": round(seconds, 3), "images_per_second": round(rate, 1)}
            steps.set_postfix(loss=f"{line['loss']:.4f}", img_s=f"{rate:.0f}", refresh=False)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if done or (step + 1) % settings.save_every == 0:
            averaged.metadata = metadata | {"step": step + 1, "seconds": round(elapsed, 1)}
            save_state(state_file, denoiser, averaged, optimizer, settings, step + 1, elapsed)
            save(model_file, averaged, **averaged.metadata)
    return averaged


def summary(pending: list[tuple], K: int, step: int, name: str) -> dict:
    """One line of the log from the (per_sample, t[, gradient norm]) of the steps since the last one; checks that all are finite."""
    losses, times = torch.cat([p[0] for p in pending]).double().cpu(), torch.cat([p[1] for p in pending]).double().cpu()
    norms = torch.stack([p[2] for p in pending if len(p) == 3]).cpu()
    per_step = losses.reshape(len(norms), -1).mean(1)
    bad = (~(per_step.isfinite() & norms.isfinite())).nonzero()
    if len(bad):
        raise InputError(
            f"{name}: the loss or its gradient is no longer finite at step {step - len(norms) + int(bad[0]) + 1}. The last checkpoint is intact. "
            "Lower --lr, or use --precision fp32."
        )

    def binned(n: int) -> list[float | None]:
        index = (torch.ceil(times * n).long() - 1).clamp(0, n - 1)
        count = torch.bincount(index, minlength=n)
        mean = torch.bincount(index, losses, minlength=n) / count.clamp_min(1)
        return [round(m, 6) if c else None for m, c in zip(mean.tolist(), count.tolist())]

    return {
        "step": step, "steps": len(norms), "loss": round(float(losses.mean()), 6), "gradient_norm": round(float(norms.mean()), 4),
        "loss_by_t": binned(10), "loss_by_segment": binned(K),
    }  # fmt: skip


def save_state(path: Path, denoiser: Denoiser, averaged: Denoiser, optimizer: torch.optim.Optimizer, settings: Training, step: int, elapsed: float):
    tensors = {f"raw.{k}": v for k, v in denoiser.state_dict().items()} | {f"ema.{k}": v for k, v in averaged.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{k}": v for k, v in entries.items()}
    write_safetensors(path, tensors, {"step": step, "elapsed": elapsed, **{key: getattr(settings, key) for key in MUST_MATCH}})


MUST_MATCH = ("iterations", "batch", "accumulate", "lr", "ema", "precision", "seed")


def load_state(path: Path, denoiser: Denoiser, averaged: Denoiser, optimizer: torch.optim.Optimizer, settings: Training) -> tuple[int, float]:
    """Put everything back; -> the step to go on from, the seconds spent so far. Raises InputError if it belongs to a run with other settings."""
    tensors, metadata = read_safetensors(path)
    for key in MUST_MATCH:
        if metadata[key] != getattr(settings, key):
            raise InputError(f"{path}: saved with {key} {metadata[key]}, but now it is {getattr(settings, key)}. Give the old value, or another --out.")
    try:
        for prefix, module in (("raw.", denoiser), ("ema.", averaged)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except RuntimeError:
        raise InputError(f"{path}: the network in it has another shape than the one asked for. Give the old settings, or another --out.") from None
    state: dict[int, dict] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, entry = key.split(".", 2)
            state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata["step"], metadata["elapsed"]
