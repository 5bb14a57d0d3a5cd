"""What the benchmarks share: a clock that waits for the device, and a whole training step."""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mcm
from mcm.lab.data import ImageData
from mcm.lab.run import DenoiserRun, Training


def seconds(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def in_turn(
    works: dict[str, Callable[[], object]], device: torch.device, repeats: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of a call of each, after one to warm up. One after the other, again and again:
    machines drift, and ratios within a repeat are what can be trusted.
    """
    for work in works.values():
        seconds(work, device)
    taken = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(seconds(work, device, calls))
    return taken


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower one, the median, the upper one."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4))


def training_step(
    kind: str, network: mcm.UNet, settings: Training, device: torch.device, K: int = 8
) -> Callable[[], None]:
    """A whole training step as run_cifar.py takes it, on random images: choosing the batch, the
    loss, its gradient, and the update of weights and averages.

    kind: teacher, cd or ct.
    """
    shape = (network.arguments["in_channels"], *[network.arguments["image_size"]] * 2)
    images = torch.randint(0, 256, (2 * settings.batch, *shape), dtype=torch.uint8)
    labels = torch.arange(len(images)) % max(1, network.arguments["classes"])
    data = ImageData("noise", images, labels, images[:1], labels[:1], 10).to(device)
    teacher = mcm.Denoiser(copy.deepcopy(network), mcm.CosineSchedule()).to(device).eval()
    steps = None if kind == "teacher" else K
    student = mcm.Denoiser(network, mcm.CosineSchedule(), student_steps=steps).to(device)
    run = DenoiserRun("step", student, settings, Path("unused"))
    frozen = run.frozen(teacher.requires_grad_(False)) if kind == "cd" else None
    method = mcm.multistep(K)
    (learner,) = run.learners.values()
    learner.lr = 1e-5

    def step() -> None:
        for x, cond, t, noise in run.parts(data):
            asked = {"t": t, "noise": noise}
            if kind == "teacher":
                run.backward(mcm.diffusion_loss(run.model, x, cond, **asked))
            else:
                loss = mcm.consistency_loss(run.model, x, cond, method, teacher=frozen, **asked)
                run.backward(loss)
        run.update()
        run.forget()

    return step


def profiled(work: Callable[[], object], device: torch.device) -> tuple[dict, list[str]]:
    """Of one call: how long the device was busy and in how many kernels, and the 15 longest."""
    cuda = device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as profile:
        work()
        if cuda:
            torch.cuda.synchronize()
    where = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [e for e in profile.key_averages() if e.device_type == where]
    taken = {id(e): e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    events.sort(key=lambda e: -taken[id(e)])
    lines = [f"{taken[id(e)] / 1000:9.3f} ms {e.count:5} x {e.key[:100]}" for e in events[:15]]
    busy = {"busy_ms": sum(taken.values()) / 1000, "kernels": sum(e.count for e in events)}
    return busy, lines
