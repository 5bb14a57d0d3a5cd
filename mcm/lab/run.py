"""The training loop belongs to the script; what surrounds it is here.

    run = DenoiserRun("teacher", denoiser, settings, out, resume)
    for step in run:
        for x, labels, t, noise in run.parts(data):
            run.backward(mcm.diffusion_loss(run.model, x, labels, t=t, noise=noise))
        run.update()
    return run.averaged

The iterator owns resume, seeds, signals, log and checkpoints; the caller owns the step. Everything
random in step i is drawn from a generator seeded with (seed, i), and the batch is chosen from
(seed, i) too. So the state of a run is its weights and its step, and a resumed run equals an
uninterrupted one bit for bit (on the CPU).
"""

import contextlib
import copy
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..denoiser import Denoiser
from ..errors import InputError
from ..losses import LossOutput, stratified_times
from . import distributed
from .board import Board
from .checkpoint import partial_of, read_safetensors, save, write, write_safetensors
from .data import ImageData, batch_indices, mixed, to_float


@dataclass(frozen=True)
class Training:
    """How long and how to train."""

    iterations: int
    """Steps."""

    batch: int = 128
    """Samples per step."""

    accumulate: int = 1
    """In how many parts a batch goes through the network."""

    lr: float = 1e-3
    """Adam's peak learning rate, reached after `warmup` steps and lowered to 0 along a cosine."""

    warmup: int = 50
    """Steps."""

    ema: float = 0.995
    """Decay, per step, of the averaged weights, which are the ones saved for use."""

    clip: float = 1.0
    """The largest gradient norm."""

    precision: str = "fp32"
    """ "fp32", or "bf16": networks compute in bfloat16; weights, losses, updates stay float32."""

    augment: bool = False
    """Mirror each image left to right half of the time."""

    compile: bool = False
    """torch.compile the network."""

    seed: int = 0

    log_every: int = 50
    """Steps between lines of the log."""

    save_every: int = 500
    """Steps between checkpoints; 0: none, not even at the end."""

    tensorboard: bool = False
    """Write to out/tensorboard/NAME too."""

    def lr_at(self, step: int) -> float:
        decay = 0.5 + 0.5 * math.cos(math.pi * step / self.iterations)
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * decay

    def ema_at(self, step: int) -> float:
        """The decay grows with the run, so that the random start is forgotten first."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(eq=False)
class Learner:
    """Weights in training, with their optimiser and their running averages.

    weights: by name.
    clip: the largest gradient norm.
    averages: (weights of the same names, decay as a function of the step), each moved towards the
        weights after every update.
    lr_scale: its learning rate as a multiple of the run's.
    copies: the weights in bfloat16, by the same names, where a network computes with those; they
        follow every update. (Autocast would cast every weight at every call, and every gradient.)
    """

    weights: Mapping[str, Tensor]
    clip: float
    averages: Sequence[tuple[Mapping[str, Tensor], Callable[[int], float]]] = ()
    weight_decay: float = 0.0
    lr_scale: float = 1.0
    copies: dict[str, Tensor] = field(default_factory=dict)
    lr: float = 0.0
    step: int = 0
    norm: Tensor | None = None
    """Of the gradient of the last update."""

    def __post_init__(self):
        weights = list(self.weights.values())
        options = {"betas": (0.9, 0.99), "weight_decay": self.weight_decay, "fused": True}
        self.optimizer = torch.optim.AdamW(weights, 0.0, **options)

    def update(self) -> None:
        """One step along the gradients that were gathered, or none if they are not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.lr_scale
        self.norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.clip)
        # the fused kernels look at it where it is: the host does not wait
        self.optimizer.found_inf = (~self.norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._refresh()
        with torch.no_grad():
            towards = list(self.weights.values())
            for average, decay in self.averages:
                moved = [average[k] for k in self.weights]
                torch._foreach_lerp_(moved, towards, 1 - decay(self.step))

    def gather(self) -> None:
        """Take over the gradients of the copies, in float32: to be called after each backward."""
        used = [k for k, copied in self.copies.items() if copied.grad is not None]
        if not used:
            return
        wide = [torch.empty_like(self.weights[k]) for k in used]
        grads: list = [self.copies[k].grad for k in used]
        torch._foreach_copy_(wide, grads)  # all in one call
        before: list = [self.weights[k].grad for k in used]
        if before[0] is not None:
            torch._foreach_add_(wide, before)
        for key, grad in zip(used, wide):
            self.weights[key].grad = grad
            self.copies[key].grad = None

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.weights.values()))

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        averages = {f"average{n}.": weights for n, (weights, _) in enumerate(self.averages)}
        return {"raw.": self.weights, **averages}

    def state(self, finished: bool = False) -> dict[str, Tensor]:
        """All that resuming needs; a finished run needs no optimiser."""
        groups = self._groups().items()
        tensors = {prefix + k: v for prefix, group in groups for k, v in group.items()}
        entries_of = {} if finished else self.optimizer.state_dict()["state"]
        for index, entries in entries_of.items():
            tensors |= {f"adam.{index}.{k}": v for k, v in entries.items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises KeyError, IndexError, ValueError or RuntimeError if it is of other weights.
        """
        for prefix, group in self._groups().items():
            if {k for k in tensors if k.startswith(prefix)} != {prefix + k for k in group}:
                raise KeyError(prefix)
            for key, value in group.items():
                value.copy_(same_shape(tensors[prefix + key], value))
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, entry = key.split(".", 2)
                parameter = self.optimizer.param_groups[0]["params"][int(index)]
                if value.ndim:
                    # in the parameter's memory layout, which the file does not keep and the fused
                    # kernels rely on
                    value = torch.empty_like(parameter).copy_(same_shape(value, parameter))
                state.setdefault(int(index), {})[entry] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._refresh()


def same_shape(saved: Tensor, wanted: Tensor) -> Tensor:
    """`saved`, if it has the shape of `wanted`: copy_ would repeat a smaller one. Raises
    ValueError.
    """
    if saved.shape != wanted.shape:
        raise ValueError(f"{tuple(saved.shape)} in place of {tuple(wanted.shape)}")
    return saved


class Step(NamedTuple):
    """What a step tells the log. per_sample, t: (B,); norm: scalar; figures: further scalars."""

    per_sample: Tensor
    t: Tensor
    norm: Tensor
    figures: dict[str, Tensor]


MOST_SKIPPED = 20  # steps in a row, before a run stops
MUST_MATCH = ("iterations", "batch", "lr", "ema", "precision", "augment", "seed")


@dataclass(eq=False)
class Run:
    """`for step in run:` counts the steps of one training run, each with a random state of its own.

    name: of the model in the log; the state is kept in out/NAME.state.safetensors.
    learners: what is trained, by name. `run.update()` moves the first.
    settings, out: how and where.
    resume: continue from the newest state that can be read, if there is one.
    segments: for the losses by segment in the log.
    lean: of a finished run keep the weights only, once: it is one of many.

    Every settings.save_every steps and at the end the state (all that resuming needs) is written
    while the next steps run; the state before stays as out/NAME.state.previous.safetensors. Lines
    of figures go to out/log.jsonl. Ctrl-C and SIGTERM finish the step, save and raise
    KeyboardInterrupt. Steps whose gradient is not finite change nothing and are counted in the log;
    raises InputError after many in a row, naming the first, and if the disk is full: what was saved
    before stays.
    """

    name: str
    learners: dict[str, Learner]
    settings: Training
    out: Path
    resume: bool = False
    segments: int = 1
    lean: bool = False
    step: int = 0
    seconds: float = 0.0
    """What the run took so far, in all its parts, up to the last line of the log."""

    def __post_init__(self):
        self.state_file = self.out / f"{self.name}.state.safetensors"
        self._main = next(iter(self.learners.values()))
        self.update = self._main.update
        self.device = next(iter(self._main.weights.values())).device
        self._recorded: list[tuple[Tensor, Tensor]] = []
        self._figures: dict[str, Tensor] = {}
        self._steps: list[Step] = []  # since the last line of the log
        self._skipped = 0
        self._writing: list[Future] = []
        self._board: Board | None = None

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, in [0, 1)."""
        return self.step / self.settings.iterations

    def elapsed(self) -> float:
        """Seconds of training in this part of the run, so far."""
        return time.perf_counter() - self._started

    @property
    def at_checkpoint(self) -> bool:
        """Whether the state is written after this step."""
        done = self.step + 1
        every = self.settings.save_every
        return every > 0 and (done == self.settings.iterations or done % every == 0)

    def record(self, per_sample: Tensor, t: Tensor | None = None) -> None:
        """Note, for the log, the losses of (a part of) this step and their times, (B,) each."""
        t = torch.ones(len(per_sample)) if t is None else t
        self._recorded.append((per_sample.detach(), t))

    def note(self, **figures: Tensor) -> None:
        """Note, for the log, further scalars of this step."""
        self._figures |= {key: value.detach() for key, value in figures.items()}

    def forget(self) -> None:
        """Drop what was recorded of this step."""
        self._recorded = []
        self._figures = {}

    def __iter__(self) -> Iterator[int]:
        settings = self.settings
        stop = False
        with deferred_interrupt() as interrupted, ThreadPoolExecutor(1) as self._writer:
            first = self._begin()
            self._started = self._clock = time.perf_counter()
            bar = tqdm(total=settings.iterations, initial=first, desc=self.name, unit="it")
            for self.step in range(first, settings.iterations):
                torch.manual_seed(mixed(settings.seed, self.step))
                for learner in self.learners.values():
                    learner.step = self.step
                    learner.lr = settings.lr_at(self.step)
                yield self.step
                self._close_step()
                bar.update()
                stop = self._asked_to_stop(interrupted)
                if stop or self.at_checkpoint or (self.step + 1) % settings.log_every == 0:
                    self._log(bar)
                if stop or self.at_checkpoint:
                    self._save()
                if stop:
                    break
            bar.close()
            self._finish_writing()
            if self._board:
                self._board.close()
            if stop or distributed.any_process(interrupted(), self.device):
                raise KeyboardInterrupt
        distributed.barrier()  # what comes next may read the files

    def autocast(self) -> torch.autocast:
        """bf16, if it was asked for.

        Without the cache: it would hand the target call's weights, cast without gradient, to the
        student's call.
        """
        enabled = self.settings.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled, cache_enabled=False)

    def show(self, picture: Path) -> None:
        """A picture of what the model does by now, for TensorBoard, if it is asked for."""
        if self._board:
            self._board.show("samples", picture, self.step + 1)

    def save_model(self) -> None:
        """Called with every state: what else there is to write, by `write_later`."""

    def write_later(self, function: Callable, *arguments, **options) -> None:
        """Call it in another thread, after what was handed over before: no step waits."""
        self._writing.append(self._writer.submit(function, *arguments, **options))

    def _begin(self) -> int:
        """-> the step to continue from; the log is cut there."""
        first = 0
        if self.resume and (found := load_state(self.state_file, self.learners, self.settings)):
            first, self.seconds = found
            self.step = first - 1
            self.save_model()  # a kill may have come between the two files
            self._finish_writing()
        if distributed.is_main():
            if not first:
                previous_state(self.state_file).unlink(missing_ok=True)  # of a run that is redone
            forget_log(self.out / "log.jsonl", self.name, first)
            if self.settings.tensorboard:
                self._board = Board(self.out / "tensorboard" / self.name, first + 1)
        distributed.barrier()  # none may write before all have read
        return first

    def _close_step(self) -> None:
        per_sample, t = (torch.cat(parts) for parts in zip(*self._recorded))
        self._steps.append(Step(per_sample, t, self._main.norm, self._figures))
        self.forget()

    def _asked_to_stop(self, interrupted: Callable[[], bool]) -> bool:
        """Several processes have to agree, and do so every tenth step."""
        if distributed.world_size() == 1:
            return interrupted()
        return (self.step + 1) % 10 == 0 and distributed.any_process(interrupted(), self.device)

    def _log(self, bar: tqdm) -> None:
        """One line of the log about the steps since the last one."""
        steps = of_all_processes(self._steps)
        self._steps = []
        good = finite(steps)
        self._skipped = trailing(good, self._skipped)
        done = self.step + 1
        if self._skipped >= min(MOST_SKIPPED, self.settings.iterations // 4 + 1):
            raise InputError(
                f"{self.name}: the loss or its gradient is no longer finite, from step "
                f"{done + 1 - self._skipped} on. Lower the learning rate, or use --precision fp32."
            )
        seconds = time.perf_counter() - self._clock
        self._clock += seconds
        self.seconds += seconds
        rate = sum(len(step.per_sample) for step in steps) / seconds
        line = {"model": self.name, "step": done} | summary(steps, good, self.segments)
        line["lr"] = self.settings.lr_at(self.step)
        line["seconds"] = round(seconds, 3)
        line["images_per_second"] = round(rate, 1)
        if line["skipped"]:
            skipped = f"{line['skipped']} of the {len(steps)} steps up to {done}"
            bar.write(f"{self.name}: {skipped} were skipped, as their gradients were not finite")
        bar.set_postfix(loss=f"{line['loss'] or math.nan:.4f}", img_s=f"{rate:.0f}", refresh=False)
        if distributed.is_main():
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            if self._board:
                self._board.write(line)

    def _save(self) -> None:
        self._finish_writing()
        if distributed.is_main():
            finished = self.lean and self.step + 1 == self.settings.iterations
            tensors = {
                f"{name}/{key}": value.detach().to("cpu", copy=True)
                for name, learner in self.learners.items()
                for key, value in learner.state(finished).items()
            }
            metadata = {"step": self.step + 1, "elapsed": self.seconds}
            metadata |= {key: getattr(self.settings, key) for key in MUST_MATCH}
            previous = previous_state(self.state_file)
            self.write_later(write_safetensors, self.state_file, tensors, metadata, previous)
            if finished:
                self.write_later(previous.unlink, missing_ok=True)
        self.save_model()

    def _finish_writing(self) -> None:
        for job in self._writing:
            job.result()  # raises what went wrong there
        self._writing = []


class DenoiserRun(Run):
    """A run that trains a Denoiser in place, on images. What comes out is `averaged`, in eval mode.

    `model` is the denoiser to call in the loop: compiled, or one of several processes, where asked.
    out/NAME.safetensors receives the averaged weights, for mcm.load, with `metadata`.
    """

    def __init__(
        self,
        name: str,
        denoiser: Denoiser,
        settings: Training,
        out: Path,
        resume: bool = False,
        **metadata,
    ):
        processes = distributed.world_size()
        parts = processes * settings.accumulate
        if processes > 1 and settings.batch % parts:
            raise InputError(
                f"{processes} processes and --accumulate {settings.accumulate} need a batch of a "
                f"multiple of {parts}, not {settings.batch}"
            )
        denoiser.requires_grad_(True).train()
        self.averaged = copy.deepcopy(denoiser).requires_grad_(False).eval()
        averages = [(dict(self.averaged.named_parameters()), settings.ema_at)]
        learner = Learner(dict(denoiser.named_parameters()), settings.clip, averages)
        segments = denoiser.student_steps or 1
        super().__init__(name, {"model": learner}, settings, out, resume, segments)
        self.model = denoiser
        if settings.precision == "bf16":
            self.model = copy.deepcopy(denoiser)
            learner.copies = dict(self.model.named_parameters())
        self._make_fast(self.model)
        if processes > 1:
            network = distributed.Parallel(self.model.network, self.device)
            how = (denoiser.schedule, denoiser.prediction, denoiser.student_steps)
            self.model = Denoiser(network, *how)
        self.metadata = metadata
        self.averaged.metadata = metadata

    def frozen(self, teacher: nn.Module) -> nn.Module:
        """A copy of a teacher as this run computes: its weights in bfloat16, compiled, if asked."""
        teacher = copy.deepcopy(teacher)
        self._make_fast(teacher)
        return teacher

    def _make_fast(self, model: nn.Module) -> None:
        if self.settings.precision == "bf16":
            for weight in model.parameters():  # no buffers: a time's frequencies are not rounded
                weight.data = weight.data.bfloat16()
        for part in model.modules():
            if self.settings.compile and isinstance(part, Denoiser):
                # networks of equal shape share their code; one graph, so that none is left
                # uncompiled without a word
                part.network.compile(fullgraph=True)

    def parts(
        self, data: ImageData, label_dropout: float = 0.0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """This process's share of the step's batch, in settings.accumulate parts.

        -> x (b, C, H, W) in [-1, 1], labels, times t and noise of each part: all that is random in
        it. label_dropout: how often the label is data.classes instead, "no class".
        """
        settings = self.settings
        rows = batch_indices(len(data.images), settings.batch, self.step, settings.seed)
        rows = rows.to(self.device, non_blocking=True)  # else the host waits for the device
        for part in rows.chunk(settings.accumulate):
            n = len(part)
            self._share = n / len(rows)
            part = distributed.shard(part)
            x = to_float(data.images[part])
            labels = data.labels[part]
            if settings.augment:
                mirrored = distributed.shard(torch.rand(n, 1, 1, 1, device=self.device)) < 0.5
                x = torch.where(mirrored, x.flip(-1), x)
            if label_dropout:
                dropped = distributed.shard(torch.rand(n, device=self.device)) < label_dropout
                labels = torch.where(dropped, data.classes, labels)
            t = distributed.shard(stratified_times(n, self.device))
            noise = distributed.shard(torch.randn(n, *x.shape[1:], device=self.device))
            yield x, labels, t, noise

    def backward(self, output: LossOutput) -> None:
        """Add the gradient of a part's loss, and note it for the log."""
        (output.loss * self._share).backward()
        self._main.gather()
        self.record(output.per_sample, output.t)

    def save_model(self) -> None:
        reached = {"step": self.step + 1, "seconds": round(self.seconds, 1)}
        self.averaged.metadata = self.metadata | reached
        if distributed.is_main():
            snapshot = copy.deepcopy(self.averaged)  # the next step moves the averages
            path = self.out / f"{self.name}.safetensors"
            self.write_later(save, path, snapshot, **self.averaged.metadata)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within this block Ctrl-C and SIGTERM only set a flag, which the yielded function reads.

    So a step is never cut in two.
    """
    asked = []
    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        yield lambda: False
        return
    handle = lambda *_: asked.append(True)  # noqa: E731
    previous = {which: signal.signal(which, handle) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)


def of_all_processes(steps: list[Step]) -> list[Step]:
    """The same steps with every process's samples."""
    if distributed.world_size() == 1:
        return steps
    losses = distributed.gathered(torch.stack([step.per_sample for step in steps], 1))
    times = distributed.gathered(torch.stack([step.t for step in steps], 1))
    return [step._replace(per_sample=losses[:, i], t=times[:, i]) for i, step in enumerate(steps)]


def finite(steps: list[Step]) -> Tensor:
    """Which of these steps changed something, (n,)."""
    loss = torch.stack([step.per_sample.mean() for step in steps])
    norm = torch.stack([step.norm for step in steps])
    return (loss.isfinite() & norm.isfinite()).cpu()


def trailing(good: Tensor, before: int) -> int:
    """How many steps in a row, the last one the latest, changed nothing.

    before: of those before these.
    """
    indices = good.nonzero()
    return len(good) - 1 - int(indices[-1]) if len(indices) else before + len(good)


def summary(steps: list[Step], good: Tensor, segments: int) -> dict:
    """Means over those steps that are `good`, null if none is; the others are counted."""
    line: dict = {"loss": None, "gradient_norm": None}
    line |= {"loss_by_t": [None] * 10, "loss_by_segment": [None] * segments}
    steps = [step for step, counts in zip(steps, good.tolist()) if counts]
    if steps:
        per_sample = torch.cat([step.per_sample for step in steps]).cpu().double()
        t = torch.cat([step.t for step in steps]).cpu().double()
        norm = torch.stack([step.norm for step in steps]).cpu().mean()
        line["loss"] = round(float(per_sample.mean()), 6)
        line["gradient_norm"] = round(float(norm), 6)
        line["loss_by_t"] = binned(per_sample, t, 10)
        line["loss_by_segment"] = binned(per_sample, t, segments)
        for key in steps[0].figures:
            line[key] = round(sum(float(step.figures[key]) for step in steps) / len(steps), 6)
    return line | {"skipped": int((~good).sum())}


def binned(loss: Tensor, t: Tensor, bins: int) -> list[float | None]:
    """The mean loss (n,) of the times (n,) in each of so many equal parts of (0, 1]."""
    index = (torch.ceil(t * bins).long() - 1).clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins)
    mean = torch.bincount(index, loss, minlength=bins) / count.clamp_min(1)
    return [round(m, 6) if c else None for m, c in zip(mean.tolist(), count.tolist())]


def forget_log(path: Path, name: str, step: int) -> None:
    """Drop this model's lines after `step`, which will be written again, and a line cut short."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if line["model"] != name or line["step"] <= step:
                kept.append(text + "\n")
    write(path, "".join(kept))


def previous_state(path: Path) -> Path:
    """Where the state before the newest one is kept."""
    return path.with_name(path.name.replace(".state.", ".state.previous."))


def load_state(
    path: Path, learners: dict[str, Learner], settings: Training
) -> tuple[int, float] | None:
    """Put everything back; -> the step to continue from, the seconds spent so far; None if new.

    Where the newest file is damaged, the one before serves. Raises InputError if both are, or if
    the file belongs to a run with other settings.
    """
    previous = previous_state(path)
    # a kill between the two renamings of a save would leave a partial file
    if not path.is_file() and not (partial_of(path).is_file() and previous.is_file()):
        return None
    damage = None
    try:
        tensors, metadata = read_safetensors(path if path.is_file() else previous)
    except InputError as error:
        if not previous.is_file():
            raise
        damage = error
        tensors, metadata = read_safetensors(previous)
    step: Any = metadata.get("step")
    elapsed: Any = metadata.get("elapsed")
    if damage:
        print(f"{damage}\nContinuing from the checkpoint before it, step {step}.", file=sys.stderr)
    for key in MUST_MATCH:
        if metadata.get(key) != getattr(settings, key):
            change = f"saved with {key} {metadata.get(key)}, but now it is {getattr(settings, key)}"
            raise InputError(f"{path}: {change}. Give the old value, or another --out.")
    for name, learner in learners.items():
        prefix = f"{name}/"
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            learner.load(own)
        except (KeyError, RuntimeError, IndexError, ValueError):
            raise InputError(
                f"{path}: of a network of another shape. Give the old settings, or another --out."
            ) from None
    in_range = type(step) is int and 0 <= step <= settings.iterations
    if not in_range or not isinstance(elapsed, (int, float)):
        raise InputError(
            f"{path}: step {step}, seconds {elapsed}, in a run of {settings.iterations}: delete it"
        )
    return step, elapsed
