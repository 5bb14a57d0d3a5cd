#!/usr/bin/env python3
"""How cost grows with parameters, resolution, batch and sampling steps: a table and one picture,
under 3 minutes on one CPU thread.

    python benchmarks/costs.py --out results/speed
    python benchmarks/costs.py --out results/speed --compile

On a GPU: in bf16, larger networks and batches, and peak memory too.

The network is that of CIFAR-10's presets small and tiny: 1, 2 and 4 times its first width, one
block a level, attention in the second. A training step is the v-loss, its gradient, clipping and
the optimiser. Operations are counted, 2 per multiplication with addition; the peak beside which
they are put is that of a large matrix product on the same device, in the same precision, measured
just before. Sampling K steps is compared with K forward passes of the bare network, repeat by
repeat.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullLocator
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
from benchmarks.timing import seconds, training_step
from mcm.lab.checkpoint import write
from mcm.lab.options import hardware, pick_device, pick_precision
from mcm.lab.run import Training

# what varies; the rest is (channels, image size, batch) as in the first line
GRIDS = {
    "cpu": {
        "base": (32, 16, 32),
        "parameters": (16, 32, 48, 64),
        "resolution": (8, 16, 32, 64),
        "batch": (1, 4, 16, 64),
        "steps": (1, 2, 4, 8, 16),
    },
    "cuda": {
        "base": (144, 32, 256),
        "parameters": (48, 96, 144, 192, 256),
        "resolution": (8, 16, 32, 64),
        "batch": (16, 64, 256, 1024, 2048),
        "steps": (1, 2, 4, 8, 16),
    },
}


def enough(work: Callable[[], object], device: torch.device) -> int:
    """How many calls fit into a fifth of a second, after one that warms up."""
    seconds(work, device)
    return max(1, min(50, int(0.2 / seconds(work, device))))


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call."""
    calls = enough(work, device)
    return statistics.median(seconds(work, device, calls) for _ in range(repeats))


def peak(device: torch.device, repeats: int) -> float:
    """Operations per second of a large matrix product, the fastest of several: as such, and as a
    1x1 convolution, which on a CPU is another library's work (on AMD's often a faster one).
    """
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    image, kernel = (
        x.contiguous(memory_format=torch.channels_last)
        for x in (a.view(1, n, 1, n), b.view(n, n, 1, 1))
    )
    products = (lambda: a @ b, lambda: torch.nn.functional.conv2d(image, kernel))
    return (
        2
        * n**3
        / min(timed(product, device, 1) for product in products for _ in range(2 * repeats))
    )


def network(channels: int, size: int, device: torch.device) -> mcm.UNet:
    return mcm.UNet(size, 3, channels, (1, 2, 4), 1, attention=(size // 2,), classes=10).to(device)


def training(
    channels: int, size: int, batch: int, device: torch.device, args: argparse.Namespace
) -> dict:
    """One point: a training step of this network on images of this size."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(channels, size, torch.device("meta"))(
            torch.empty(batch, 3, size, size),
            torch.empty(batch),
            torch.empty(batch, dtype=torch.long),
        ).sum().backward()
    unet = network(channels, size, device)
    torch._dynamo.reset()  # other sizes are other graphs
    precision = pick_precision(None, device)
    settings = Training(1, batch, precision=precision, compile=args.compile)
    step = training_step("teacher", unet, settings, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = timed(step, device, args.repeats)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "size": size,
        "batch": batch,
        "images_per_second": batch / taken,
        "flops": counter.get_total_flops() / taken,
        "memory_gib": memory,
    }


def sampling(
    channels: int,
    size: int,
    batch: int,
    steps: tuple[int, ...],
    device: torch.device,
    args: argparse.Namespace,
) -> list[dict]:
    """mcm.sample in K steps beside K calls of the bare network."""
    unet = network(channels, size, device).eval().requires_grad_(False)
    model = mcm.Denoiser(unet, mcm.CosineSchedule())
    z, labels = (
        torch.randn(batch, 3, size, size, device=device),
        torch.randint(10, (batch,), device=device),
    )
    t = torch.rand(batch, device=device, dtype=torch.float64)

    @torch.no_grad()
    def bare(K: int) -> None:
        for _ in range(K):
            unet(z, t, labels)

    rows = []
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for K in steps:
            works = partial(mcm.sample, model, z, K, labels), partial(bare, K)
            calls = min(enough(work, device) for work in works)
            pairs = [
                [seconds(work, device, calls) for work in works] for _ in range(4 * args.repeats)
            ]
            low, middle, high = statistics.quantiles((a / b for a, b in pairs), n=4)
            rows.append(
                {
                    "steps": K,
                    "seconds_per_image": statistics.median(a for a, _ in pairs) / batch,
                    "over_forwards": middle,
                    "quartiles": [low, high],
                }
            )
    return rows


def draw(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4))

    def line(axis: plt.Axes, x: list[float], y: list[float], labels: list[str]) -> None:
        axis.loglog(x, y, "o-")
        axis.set_xticks(x, labels)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator()), axis.yaxis.set_minor_locator(NullLocator())
        axis.margins(0.15)

    for axis, (what, label) in zip(
        axes, (("parameters", "parameters"), ("size", "image size, pixels"), ("batch", "batch"))
    ):
        rows = result[
            "parameters" if what == "parameters" else "resolution" if what == "size" else "batch"
        ]
        line(
            axis,
            [r[what] for r in rows],
            [1000 / r["images_per_second"] for r in rows],
            [f"{r[what] / 1e6:.1f} M" if what == "parameters" else str(r[what]) for r in rows],
        )
        axis.set(xlabel=label, ylabel="ms per image, training")
        for r in rows:
            axis.annotate(
                f"{r['flops'] / result['peak']:.0%}",
                (r[what], 1000 / r["images_per_second"]),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=8,
            )
    line(
        axes[3],
        [r["steps"] for r in result["steps"]],
        [1000 * r["seconds_per_image"] for r in result["steps"]],
        [str(r["steps"]) for r in result["steps"]],
    )
    axes[3].set(xlabel="sampling steps K", ylabel="ms per image, sampling")
    figure.suptitle(
        f"{result['hardware']}: cost per image; beside each point the share of the peak of a "
        f"matrix product ({result['peak'] / 1e12:.2g} TFLOP/s)",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    parser.add_argument("--device", help="(default: a GPU, where there is one)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: 1)")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the network in training"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write costs-DEVICE.json and costs-DEVICE.png here"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick_device(args.device)
    grid = GRIDS[device.type]
    channels, size, batch = grid["base"]
    result = {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compile": args.compile,
        "peak": peak(device, args.repeats),
    }
    print(
        f"{result['hardware']}, torch {torch.__version__}; a matrix product reaches "
        f"{result['peak'] / 1e12:.3g} TFLOP/s\n"
    )
    print(
        "| parameters | size | batch | images/s in training | GFLOP/s | of the peak | GiB |\n"
        "|---|---|---|---|---|---|---|"
    )
    for what, point in (
        ("parameters", lambda v: (v, size, batch)),
        ("resolution", lambda v: (channels, v, batch)),
        ("batch", lambda v: (channels, size, v)),
    ):
        result[what] = []
        for value in grid[what]:
            try:
                row = training(*point(value), device, args)
            except torch.OutOfMemoryError:
                print(f"{what} {value}: does not fit into memory, left out")
                continue
            result[what].append(row)
            memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}"
            print(
                f"| {row['parameters'] / 1e6:.2f} M | {row['size']} | {row['batch']} | "
                f"{row['images_per_second']:.0f} | {row['flops'] / 1e9:.0f} | "
                f"{row['flops'] / result['peak']:.0%} | {memory} |",
                flush=True,
            )
    result["steps"] = sampling(channels, size, batch, grid["steps"], device, args)
    print("\n| K | ms per image | over K forward passes [quartiles] |\n|---|---|---|")
    for row in result["steps"]:
        print(
            f"| {row['steps']} | {1000 * row['seconds_per_image']:.2f} | "
            f"{row['over_forwards']:.3f} [{row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f}] |"
        )
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write(args.out / f"costs-{device.type}.json", json.dumps(result, indent=1) + "\n")
        draw(result, args.out / f"costs-{device.type}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
