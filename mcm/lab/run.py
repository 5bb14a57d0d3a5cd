"""One training loop, for teachers and students alike: EMA, resume, precision, log.

Everything random in step i is drawn from a generator seeded with (seed, i), and the batch is chosen from (seed, i) too. So the
state of a run is its weights and its step, and a resumed run equals an uninterrupted one bit for bit (on the CPU).
"""

import contextlib
import copy
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..denoiser import Denoiser, partial_of, read_safetensors, save, write_safetensors
from ..errors import InputError
from ..losses import LossOutput
from . import distributed as parallel
from .data import ImageData, to_float
from .options import write

LossFunction = Callable[[Denoiser, Tensor, Tensor, float], LossOutput]


@dataclass(frozen=True)
class Training:
    """How long and how to train. batch: images per step; accumulate: in how many parts it goes through the network. lr: Adam's peak
    learning rate, reached after warmup steps and lowered to 0 along a cosine. ema: decay of the averaged weights, which are
    the ones saved for use. clip: largest gradient norm. precision: "fp32" or "bf16" (autocast). augment: mirror each image left to
    right half of the time. compile: torch.compile the training steps. log_every, save_every: in steps.
    """

    iterations: int
    batch: int = 128
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    ema: float = 0.995
    clip: float = 1.0
    precision: str = "fp32"
    augment: bool = False
    compile: bool = False
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
    return torch.cat(
        [permutation(n, seed, e)[position[position // n == e] - e * n] for e in epochs]
    )


@contextmanager
def deferred_interrupt():
    """Within this block Ctrl-C and SIGTERM only set a flag, which the yielded function reads: a step is never cut in two."""
    asked = []
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # signals only reach the main thread
        yield lambda: False
        return
    previous = {
        which: signal.signal(which, lambda *_: asked.append(True))
        for which in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(asked)
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)


def same_shape(saved: Tensor, wanted: Tensor) -> Tensor:
    """`saved`, if it has the shape of `wanted`: copy_ would repeat a smaller one. Raises ValueError."""
    if saved.shape != wanted.shape:
        raise ValueError(f"{tuple(saved.shape)} in place of {tuple(wanted.shape)}")
    return saved


class Learner:
    """Weights in training, with their optimiser and their running averages.

    weights: by name. averages: (weights of the same names, decay as a function of the step), each moved towards the weights after
    every update. clip: the largest gradient norm.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        clip: float,
        averages: Sequence[tuple[dict[str, Tensor], Callable[[int], float]]] = (),
        weight_decay: float = 0.0,
    ):
        self.weights, self.clip, self.averages = weights, clip, averages
        self.optimizer = torch.optim.AdamW(
            list(weights.values()), 0.0, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )

    def update(self, lr: float, step: int) -> Tensor:
        """One step along the gradients that have been gathered, or none at all unless they are finite; -> their norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.clip)
        self.optimizer.found_inf = (
            ~norm.isfinite()
        ).float()  # the fused kernels look at it where it is: the host does not wait
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, decay in self.averages:
                torch._foreach_lerp_(
                    [average[k] for k in self.weights], list(self.weights.values()), 1 - decay(step)
                )
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
        """Put back what `state` gave. Raises KeyError, IndexError, ValueError or RuntimeError if it is of other weights."""
        for prefix, group in [("raw.", self.weights)] + [
            (f"average{n}.", average) for n, (average, _) in enumerate(self.averages)
        ]:
            if {k for k in tensors if k.startswith(prefix)} != {prefix + k for k in group}:
                raise KeyError(prefix)
            for key, value in group.items():
                value.copy_(same_shape(tensors[prefix + key], value))
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, entry = key.split(".", 2)
                parameter = self.optimizer.param_groups[0]["params"][int(index)]
                if value.ndim:  # in the parameter's memory layout, which the file does not keep and the fused kernels rely on
                    value = torch.empty_like(parameter).copy_(same_shape(value, parameter))
                state.setdefault(int(index), {})[entry] = value
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )


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
    grids: see `loop`, which does all that. On several processes each has its part of every batch, and only the first writes.
    """
    parallel.check_batch(settings.batch, settings.accumulate)
    device = next(denoiser.parameters()).device
    denoiser.requires_grad_(True).train()
    averaged = copy.deepcopy(denoiser).requires_grad_(False).eval()
    learner = Learner(
        dict(denoiser.named_parameters()),
        settings.clip,
        [(dict(averaged.named_parameters()), settings.ema_at)],
    )
    network, processes = denoiser.network, parallel.place()[1]
    if settings.compile:
        network = torch.compile(network)
    if processes > 1:  # averages the gradients of the processes in every backward pass
        network = parallel.own_randomness(
            DistributedDataParallel(network, broadcast_buffers=False), device
        )
    model = (
        denoiser
        if network is denoiser.network
        else Denoiser(network, denoiser.schedule, denoiser.prediction, denoiser.student_steps)
    )

    def step(index: int) -> Step:
        rows = batch_indices(len(data.images), settings.batch, index, settings.seed).to(
            device, non_blocking=True
        )  # else the host waits for the device
        outputs = []
        for part in rows.chunk(settings.accumulate):
            share = len(part) / len(rows)
            part = parallel.own(part)
            x = to_float(data.images[part])
            if settings.augment:
                x = torch.where(
                    parallel.draw(lambda n: torch.rand(n, 1, 1, 1, device=device), len(x)) < 0.5,
                    x.flip(-1),
                    x,
                )
            # Without the cache: it would hand the target call's weights, cast without gradient, to the student's call.
            with torch.autocast(
                device.type,
                torch.bfloat16,
                enabled=settings.precision == "bf16",
                cache_enabled=False,
            ):
                try:
                    output = loss_function(model, x, data.labels[part], index / settings.iterations)
                except torch._dynamo.exc.TorchDynamoException as error:
                    reason = str(error).splitlines()[0]
                    raise InputError(
                        f"the network cannot be compiled here ({reason}): leave out --compile, or install a C++ compiler (CPU) or Triton (GPU)"
                    ) from None
            (output.loss * share).backward()
            outputs.append(output)
        norm = learner.update(settings.lr_at(index), index)
        return Step(
            torch.cat([o.per_sample.detach() for o in outputs]),
            torch.cat([o.t for o in outputs]),
            norm,
            {},
        )

    def saved(step: int, seconds: float, new: bool) -> Callable[[], None] | None:
        averaged.metadata = metadata | {"step": step, "seconds": round(seconds, 1)}
        if not parallel.first():
            return None
        snapshot = copy.deepcopy(averaged)  # the next step moves the averages
        if preview and new:
            preview(averaged, step)
        return partial(save, out / f"{name}.safetensors", snapshot, **averaged.metadata)

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
    saved: Callable[[int, float, bool], Callable[[], None] | None],
    segments: int = 1,
) -> None:
    """Call step(0), step(1), ... settings.iterations times, each with a random state of its own.

    Every settings.save_every steps and at the end writes out/NAME.state.safetensors (all that resuming needs) and calls saved(step,
    seconds, True), which may return further writing; the state before stays as out/NAME.state.previous.safetensors. Lines of figures go
    to out/log.jsonl. With resume, goes on from the newest state that can be read, if there is one, after saved(step, seconds, False).
    Ctrl-C and SIGTERM finish the step, save and raise KeyboardInterrupt. Steps whose gradient is not finite change nothing and are
    counted in the log; raises InputError after many in a row, naming the first, and if the disk is full; what was saved before stays.
    segments: for the losses by segment in the log.
    """
    state_file, first, elapsed, skipped = out / f"{name}.state.safetensors", 0, 0.0, 0
    if resume and (found := load_state(state_file, learners, settings)):
        first, elapsed = found
        if write_more := saved(first, elapsed, False):  # a kill may have come between the two files
            write_more()
    if parallel.first():
        if not first:
            earlier(state_file).unlink(missing_ok=True)  # of a run that is begun anew
        forget_log(out / "log.jsonl", name, first)
    parallel.wait()  # none may write before all have read

    steps = tqdm(
        range(first, settings.iterations), name, initial=first, total=settings.iterations, unit="it"
    )
    done, started, processes, writing, stop = (
        [],
        time.perf_counter(),
        parallel.place()[1],
        [],
        False,
    )
    with (
        deferred_interrupt() as interrupted,
        ThreadPoolExecutor(1) as writer,
    ):  # the next steps do not wait for the disk
        for index in steps:
            torch.manual_seed(mixed(settings.seed, index))
            done.append(step(index))
            logging = (index + 1) % settings.log_every == 0
            # several processes have to agree, and do so every tenth step
            stop = (
                interrupted()
                if processes == 1
                else (index + 1) % 10 == 0
                and parallel.any_process(interrupted(), done[-1].per_sample.device)
            )
            saving = (
                stop or index + 1 == settings.iterations or (index + 1) % settings.save_every == 0
            )
            if saving or logging:
                done = of_all_processes(done)
                good = finite(done)
                line, skipped = (
                    summary(done, good, segments, index + 1, name),
                    trailing(good, skipped),
                )
                if skipped >= min(MOST_SKIPPED, settings.iterations // 4 + 1):
                    raise InputError(
                        f"{name}: the loss or its gradient is no longer finite, from step {index + 2 - skipped} on. What was saved before is intact. "
                        "Lower the learning rate, or use --precision fp32."
                    )
                seconds, started = time.perf_counter() - started, time.perf_counter()
                elapsed += seconds
                rate = sum(len(d.per_sample) for d in done) / seconds
                line |= {
                    "lr": settings.lr_at(index),
                    "seconds": round(seconds, 3),
                    "images_per_second": round(rate, 1),
                }
                if line["skipped"]:
                    steps.write(
                        f"{name}: {line['skipped']} of the {len(done)} steps up to {index + 1} were skipped, as their gradients were not finite"
                    )
                steps.set_postfix(
                    loss=f"{line['loss'] or math.nan:.4f}", img_s=f"{rate:.0f}", refresh=False
                )
                if parallel.first():
                    with (out / "log.jsonl").open("a") as log:
                        log.write(json.dumps(line) + "\n")
                done = []
            if saving:
                for job in writing:
                    job.result()  # raises what went wrong there
                writing = []
                if parallel.first():
                    tensors = {
                        f"{n}/{key}": value.detach().to("cpu", copy=True)
                        for n, learner in learners.items()
                        for key, value in learner.state().items()
                    }
                    writing.append(
                        writer.submit(save_state, state_file, tensors, settings, index + 1, elapsed)
                    )
                if write_more := saved(index + 1, elapsed, True):
                    writing.append(writer.submit(write_more))
            if stop:
                break
        for job in writing:
            job.result()
        if stop or parallel.any_process(
            interrupted(), next(iter(next(iter(learners.values())).weights.values())).device
        ):
            raise KeyboardInterrupt
    parallel.wait()  # what comes next may read the files


def of_all_processes(done: list[Step]) -> list[Step]:
    """The same steps with every process's samples."""
    if parallel.place()[1] == 1:
        return done
    losses, times = (
        parallel.gathered(torch.stack([getattr(d, key) for d in done], 1))
        for key in ("per_sample", "t")
    )
    return [d._replace(per_sample=losses[:, i], t=times[:, i]) for i, d in enumerate(done)]


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
    write(path, "".join(kept))


def finite(done: list[Step]) -> Tensor:
    """Which of these steps changed something, (n,)."""
    loss, norm = (
        torch.stack([d.per_sample.mean() for d in done]),
        torch.stack([d.gradient_norm for d in done]),
    )
    return (loss.isfinite() & norm.isfinite()).cpu()


def trailing(good: Tensor, before: int) -> int:
    """How many steps in a row, the last one the latest, changed nothing; `before`: of those before these."""
    indices = good.nonzero()
    return len(good) - 1 - int(indices[-1]) if len(indices) else before + len(good)


def summary(done: list[Step], good: Tensor, segments: int, step: int, name: str) -> dict:
    """One line of the log about the steps since the last one; means are over those that are `good`, and null if none is."""
    n, skipped = int(good.sum()), int((~good).sum())
    done = [d for d, counts in zip(done, good.tolist()) if counts]
    if not n:
        return {
            "model": name,
            "step": step,
            "loss": None,
            "gradient_norm": None,
            "loss_by_t": [None] * 10,
            "loss_by_segment": [None] * segments,
            "skipped": skipped,
        }
    loss, t = (
        torch.cat([getattr(d, key) for d in done]).cpu().double() for key in ("per_sample", "t")
    )
    norm = torch.stack([d.gradient_norm for d in done]).cpu()

    def binned(bins: int) -> list[float | None]:
        index = (torch.ceil(t * bins).long() - 1).clamp(0, bins - 1)
        count = torch.bincount(index, minlength=bins)
        mean = torch.bincount(index, loss, minlength=bins) / count.clamp_min(1)
        return [round(m, 6) if c else None for m, c in zip(mean.tolist(), count.tolist())]

    return {
        "model": name,
        "step": step,
        "loss": round(float(loss.mean()), 6),
        "gradient_norm": round(float(norm.mean()), 6),
        "loss_by_t": binned(10),
        "loss_by_segment": binned(segments),
        **{key: round(sum(float(d.figures[key]) for d in done) / n, 6) for key in done[0].figures},
        "skipped": skipped,
    }


MOST_SKIPPED = 20  # steps in a row, before a run stops
MUST_MATCH = ("iterations", "batch", "lr", "ema", "precision", "augment", "seed")


def earlier(path: Path) -> Path:
    return path.with_name(path.name.replace(".state.", ".state.previous."))


def save_state(
    path: Path, tensors: dict[str, Tensor], settings: Training, step: int, elapsed: float
) -> None:
    write_safetensors(
        path,
        tensors,
        {"step": step, "elapsed": elapsed, **{key: getattr(settings, key) for key in MUST_MATCH}},
        earlier(path),
    )


def load_state(
    path: Path, learners: dict[str, Learner], settings: Training
) -> tuple[int, float] | None:
    """Put everything back; -> the step to go on from, the seconds spent so far; None if nothing was saved. Where the newest file is
    damaged, the one before serves. Raises InputError if both are, or if the file belongs to a run with other settings."""
    if (
        not path.is_file() and not partial_of(path).is_file()
    ):  # a kill between the two renamings of a save would leave a partial one
        return None
    found, damage = None, None
    for candidate in (path, earlier(path)):
        try:
            found = read_safetensors(candidate) if candidate.is_file() else None
        except InputError as error:
            damage = damage or error
        if found:
            break
    if damage:
        if not found:
            raise damage
        print(
            f"{damage}\nGoing on from the checkpoint before it, step {found[1]['step']}.",
            file=sys.stderr,
        )
    if not found:
        return None
    tensors, metadata = found
    for key in MUST_MATCH:
        if metadata.get(key) != getattr(settings, key):
            raise InputError(
                f"{path}: saved with {key} {metadata.get(key)}, but now it is {getattr(settings, key)}. Give the old value, or another --out."
            )
    for name, learner in learners.items():
        try:
            learner.load(
                {
                    k.removeprefix(f"{name}/"): v
                    for k, v in tensors.items()
                    if k.startswith(f"{name}/")
                }
            )
        except (KeyError, RuntimeError, IndexError, ValueError):
            raise InputError(
                f"{path}: the network in it has another shape than the one asked for. Give the old settings, or another --out."
            ) from None
    step, elapsed = metadata.get("step"), metadata.get("elapsed")
    if (
        type(step) is not int
        or not 0 <= step <= settings.iterations
        or not isinstance(elapsed, (int, float))
    ):
        raise InputError(
            f"{path}: step {step} and seconds {elapsed} are not those of a run of {settings.iterations} steps. Delete it."
        )
    return step, elapsed
