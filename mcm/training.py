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
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

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


class Learner:
    """Weights in training, with their optimiser and their running averages.

    weights: by name. averages: (weights of the same names, decay as a function of the step), each moved towards the weights after
    every update. clip: the largest gradient norm.
    """

    def __init__(self, weights: dict[str, Tensor], clip: float, averages: Sequence[tuple[dict[str, Tensor], Callable[[int], float]]] = (), weight_decay: float = 0.0):
        self.weights, self.clip, self.averages = weights, clip, averages
        device = next(iter(weights.values())).device.type
        self.optimizer = torch.optim.AdamW(list(weights.values()), 0.0, betas=(0.9, 0.99), weight_decay=weight_decay, fused=device in ("cpu", "cuda"))

    def update(self, lr: float, step: int) -> Tensor:
        """One step along the gradients that have been gathered; -> their norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, decay in self.averages:
                torch._foreach_lerp_([average[k] for k in self.weights], list(self.weights.values()), 1 - decay(step))
        return norm

    def state(self) -> dict[str, Tensor]:
        tensors = {f"raw.{k}": v for k, v in self.weights.items()}
        for n, (average, _) in enumerate(self.averages):
            tensors |= {f"average{n}.{k}": v for k, v in average.items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in entries.items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave. Raises KeyError or RuntimeError if it is of other weights."""
        for prefix, group in [("raw.", self.weights)] + [(f"average{n}.", average) for n, (average, _) in enumerate(self.averages)]:
            if {k for k in tensors if k.startswith(prefix)} != {prefix + k for k in group}:
                raise KeyError(prefix)
            for key, value in group.items():
                value.copy_(tensors[prefix + key])
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, entry = key.split(".", 2)
                parameter = self.optimizer.param_groups[0]["params"][int(index)]
                if value.ndim:  # in the parameter's memory layout, which the file does not keep and the fused kernels rely on
                    value = torch.empty_like(parameter).copy_(value)
                state.setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


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

    loss_function(denoiser, x, labels, progress) -> LossOutput, progress in [0, 1). Writes out/NAME.safetensors (the averaged weights,
    for mcm.load, with `metadata`), out/NAME.state.safetensors and out/log.jsonl, and calls preview(averaged, step), for sample
    grids: see `loop`, which does all that.
    """
    device = next(denoiser.parameters()).device
    denoiser.requires_grad_(True).train()
    averaged = copy.deepcopy(denoiser).requires_grad_(False).eval()
    learner = Learner(dict(denoiser.named_parameters()), settings.clip, [(dict(averaged.named_parameters()), settings.ema_at)])

    def step(index: int) -> Step:
        rows = batch_indices(len(data.images), settings.batch, index, settings.seed).to(device)
        outputs = []
        for part in rows.chunk(settings.accumulate):
            # Without the cache: it would hand the target call's weights, cast without gradient, to the student's call.
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16", cache_enabled=False):
                output = loss_function(denoiser, to_float(data.images[part]), data.labels[part], index / settings.iterations)
            (output.loss * (len(part) / len(rows))).backward()
            outputs.append(output)
        norm = learner.update(settings.lr_at(index), index)
        return Step(torch.cat([o.per_sample.detach() for o in outputs]), torch.cat([o.t for o in outputs]), norm, {})

    def saved(step: int, seconds: float, new: bool) -> None:
        averaged.metadata = metadata | {"step": step, "seconds": round(seconds, 1)}
        save(out / f"{name}.safetensors", averaged, **averaged.metadata)
        if preview and new:
            preview(averaged, step)

    loop({"model": learner}, step, settings, out, name, resume, saved, denoiser.student_steps or 1)
    return averaged


class Step(NamedTuple):
    """What a step tells the log. per_sample, t: (B,); gradient_norm: scalar; figures: further scalars by name."""

    per_sample: Tensor
    t: Tensor
    gradient_norm: Tensor
    figures: dict[str, Tensor]


def loop(
    learners: dict[str, Learner],
    step: Callable[[int], Step],
    settings: Training,
    out: Path,
    name: str,
    resume: bool,
    saved: Callable[[int, float, bool], None],
    segments: int = 1,
) -> None:
    """Call step(0), step(1), ... settings.iterations times, each with a random state of its own.

    Every settings.save_every steps and at the end writes out/NAME.state.safetensors (all that resuming needs) and calls
    saved(step, seconds, True). Lines of figures go to out/log.jsonl. With resume, goes on from the state file if there is one, after
    saved(step, seconds, False). Ctrl-C finishes the step, saves and raises KeyboardInterrupt. Raises InputError when the loss or the
    gradient stops being finite, naming the step; what was saved before stays. segments: for the losses by segment in the log.
    """
    state_file, first, elapsed = out / f"{name}.state.safetensors", 0, 0.0
    if resume and state_file.is_file():
        first, elapsed = load_state(state_file, learners, settings)
        saved(first, elapsed, False)  # a kill may have come between the two files
    forget_log(out / "log.jsonl", name, first)

    steps = tqdm(range(first, settings.iterations), name, initial=first, total=settings.iterations, unit="it")
    done, started = [], time.perf_counter()
    with deferred_interrupt() as interrupted:
        for index in steps:
            torch.manual_seed(mixed(settings.seed, index))
            done.append(step(index))
            stop = interrupted()
            saving = stop or index + 1 == settings.iterations or (index + 1) % settings.save_every == 0
            if saving or (index + 1) % settings.log_every == 0:
                line = summary(done, segments, index + 1, name)
                seconds, started = time.perf_counter() - started, time.perf_counter()
                elapsed += seconds
                rate = sum(len(d.per_sample) for d in done) / seconds
                line |= {"lr": settings.lr_at(index), "seconds": round(seconds, 3), "images_per_second": round(rate, 1)}
                steps.set_postfix(loss=f"{line['loss']:.4f}", img_s=f"{rate:.0f}", refresh=False)
                with (out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                done = []
            if saving:
                save_state(state_file, learners, settings, index + 1, elapsed)
                saved(index + 1, elapsed, True)
            if stop:
                raise KeyboardInterrupt


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


def summary(done: list[Step], segments: int, step: int, name: str) -> dict:
    """One line of the log about the steps since the last one; raises InputError unless all their losses and gradients are finite."""
    n = len(done)
    loss, t = (torch.cat([getattr(d, key) for d in done]).cpu().double() for key in ("per_sample", "t"))
    norm = torch.stack([d.gradient_norm for d in done]).cpu()
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
        "loss_by_t": binned(10), "loss_by_segment": binned(segments),
        **{key: round(sum(float(d.figures[key]) for d in done) / n, 6) for key in done[0].figures},
    }  # fmt: skip


MUST_MATCH = ("iterations", "batch", "accumulate", "lr", "ema", "precision", "seed")


def save_state(path: Path, learners: dict[str, Learner], settings: Training, step: int, elapsed: float) -> None:
    tensors = {f"{name}/{key}": value for name, learner in learners.items() for key, value in learner.state().items()}
    write_safetensors(path, tensors, {"step": step, "elapsed": elapsed, **{key: getattr(settings, key) for key in MUST_MATCH}})


def load_state(path: Path, learners: dict[str, Learner], settings: Training) -> tuple[int, float]:
    """Put everything back; -> the step to go on from, the seconds spent so far. Raises InputError if it belongs to a run with other settings."""
    tensors, metadata = read_safetensors(path)
    for key in MUST_MATCH:
        if metadata[key] != getattr(settings, key):
            raise InputError(f"{path}: saved with {key} {metadata[key]}, but now it is {getattr(settings, key)}. Give the old value, or another --out.")
    for name, learner in learners.items():
        try:
            learner.load({k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")})
        except (KeyError, RuntimeError, IndexError):
            raise InputError(f"{path}: the network in it has another shape than the one asked for. Give the old settings, or another --out.") from None
    return metadata["step"], metadata["elapsed"]
