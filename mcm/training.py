"""One training loop, for teachers and students alike: EMA, resume, precision, log.

Everything random in step i is drawn from a generator seeded with (seed, i), and the batch is chosen from (seed, i) too. So the
state of a run is its weights and its step, and a resumed run equals an uninterrupted one bit for bit (on the CPU).
"""

import contextlib
import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
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


@contextmanager
def deferred_interrupt():
    """Within this block Ctrl-C only sets a flag, which the yielded function reads: a step is never cut in two."""
    pressed = []
    if threading.current_thread() is not threading.main_thread():  # signals only reach the main thread
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)


def train(
    denoiser: Denoiser,
    loss_function: LossFunction,
    data: ImageData,
    settings: Training,
    out: Path,
    name: str,
    resume: bool = False,
    preview: Callable[[Denoiser, int], None] | None = None,
    **metadata,
) -> Denoiser:
    """Train `denoiser` in place; return its averaged copy, in eval mode.

    loss_function(denoiser, x, labels, progress) -> LossOutput, progress in [0, 1). Every settings.save_every steps, and at the end,
    writes out/NAME.safetensors (the averaged weights, for mcm.load, with `metadata`) and out/NAME.state.safetensors (all that
    resuming needs), and calls preview(averaged, step), for sample grids. Lines of figures go to out/log.jsonl. With resume, goes on
    from the state file if there is one. Ctrl-C finishes the step, saves and raises KeyboardInterrupt. Raises InputError when
    the loss or the gradient stops being finite, naming the step; what was saved before stays.
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
    forget_log(out / "log.jsonl", name, first)

    K = denoiser.student_steps or 1
    steps = tqdm(range(first, settings.iterations), name, initial=first, total=settings.iterations, unit="it")
    losses, times, norms, started = [], [], [], time.perf_counter()
    with deferred_interrupt() as interrupted:
        for step in steps:
            torch.manual_seed(mixed(settings.seed, step))
            rows = batch_indices(len(data.images), settings.batch, step, settings.seed).to(device)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(step)
            for part in rows.chunk(settings.accumulate):
                # Without the cache: it would hand the target call's weights, cast without gradient, to the student's call.
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16", cache_enabled=False):
                    output = loss_function(denoiser, to_float(data.images[part]), data.labels[part], step / settings.iterations)
                (output.loss * (len(part) / len(rows))).backward()
                losses.append(output.per_sample.detach())
                times.append(output.t)
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_lerp_(list(averaged.parameters()), parameters, 1 - settings.ema_at(step))

            stop = interrupted()
            saving = stop or step + 1 == settings.iterations or (step + 1) % settings.save_every == 0
            if saving or (step + 1) % settings.log_every == 0:
                line = summary(losses, times, norms, K, step + 1, name)
                seconds, started = time.perf_counter() - started, time.perf_counter()
                elapsed += seconds
                rate = settings.batch * len(norms) / seconds
                line |= {"lr": settings.lr_at(step), "seconds": round(seconds, 3), "images_per_second": round(rate, 1)}
                steps.set_postfix(loss=f"{line['loss']:.4f}", img_s=f"{rate:.0f}", refresh=False)
                with (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                losses, times, norms = [], [], []
            if saving:
                averaged.metadata = metadata | {"step": step + 1, "seconds": round(elapsed, 1)}
                save_state(state_file, denoiser, averaged, optimizer, settings, step + 1, elapsed)
                save(model_file, averaged, **averaged.metadata)
                if preview:
                    preview(averaged, step + 1)
            if stop:
                raise KeyboardInterrupt
    return averaged


def forget_log(path: Path, name: str, step: int) -> None:
    """Drop the lines of this model after `step`, which a resumed run will write again, and a last line cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if line["model"] != name or line["step"] <= step:
                kept.append(text + "\n")
    path.write_text("".join(kept))


def summary(losses: list[Tensor], times: list[Tensor], norms: list[Tensor], K: int, step: int, name: str) -> dict:
    """One line of the log about the steps since the last one; raises InputError unless all their losses and gradients are finite."""
    n = len(norms)
    loss, t, norm = torch.cat(losses).cpu().double(), torch.cat(times).cpu().double(), torch.stack(norms).cpu()
    bad = (~(loss.reshape(n, -1).mean(1).isfinite() & norm.isfinite())).nonzero()
    if len(bad):
        raise InputError(
            f"{name}: the loss or its gradient is no longer finite at step {step - n + int(bad[0]) + 1}. What was saved before is intact. "
            "Lower the learning rate, or use --precision fp32."
        )

    def binned(bins: int) -> list[float | None]:
        index = (torch.ceil(t * bins).long() - 1).clamp(0, bins - 1)
        count = torch.bincount(index, minlength=bins)
        mean = torch.bincount(index, loss, minlength=bins) / count.clamp_min(1)
        return [round(m, 6) if c else None for m, c in zip(mean.tolist(), count.tolist())]

    return {
        "model": name, "step": step, "loss": round(float(loss.mean()), 6), "gradient_norm": round(float(norm.mean()), 6),
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
            parameter = optimizer.param_groups[0]["params"][int(index)]
            if value.ndim:  # in the parameter's memory layout, which the file does not keep and the fused kernels rely on
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata["step"], metadata["elapsed"]
