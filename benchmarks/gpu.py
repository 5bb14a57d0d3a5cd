#!/usr/bin/env python3
"""Fifteen minutes with a GPU: does it work there, which variant of a step is fastest, and a
CIFAR-10 run with that one in the time left.

    python benchmarks/gpu.py --minutes 14 --data-dir data --out results/gpu
        on a GPU; the same command again goes on where it was
    python benchmarks/gpu.py --toy --minutes 2 --device cpu --out runs/gpu-toy
        anywhere, to see that it works

Checks (the tests that need a GPU); variants of a training step (group norm native or folded, eager,
compiled, compiled block by block, as CUDA graphs), the promising ones first, until 35 % of the time
is spent; other UNets of equal size; the run. --out holds gpu.json and gpu.md, which grow part by
part, a profile of each variant, and the run. A part that fails is noted and does not end the rest;
one that is there is not repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mcm
import run_cifar
from benchmarks.timing import in_turn, profiled, quartiles, seconds, training_step
from mcm import unet as blocks
from mcm.lab.checkpoint import write
from mcm.lab.options import hardware, pick_device, pick_precision
from mcm.lab.run import Training

ROOT = Path(__file__).resolve().parent.parent
PRESETS = {name: run_cifar.PRESETS["cifar10", name][1] for name in ("small", "base")}
TOY = replace(PRESETS["small"], image_size=8, channels=8, multipliers=(1, 1), attention=())
COMPILE = nn.Module.compile
MODES = {  # how run.py's `network.compile(fullgraph=True)` is carried out; None: not at all
    "eager": None,
    "compiled": COMPILE,
    "blocks": lambda network, **how: [COMPILE(block, **how) for block in parts(network)],
    "overhead": lambda network, **how: COMPILE(network, mode="reduce-overhead", **how),
}


class FoldedNorm(nn.GroupNorm):
    """The same group norm as one multiply-add per sample and channel, the block's scale and shift
    folded in: in any memory layout, where PyTorch's own on CUDA wants images channels first.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None):
        grouped = x.unflatten(1, (self.num_groups, -1)).float()
        variance, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
        factor = torch.rsqrt(variance + self.eps)[..., None] * self.weight.view(len(mean[0]), -1)
        offset = self.bias.view(len(mean[0]), -1) - mean[..., None] * factor
        factor, offset = factor.flatten(1), offset.flatten(1)
        if scale is not None:
            factor = factor * (1 + scale.float())
            offset = offset * (1 + scale.float()) + shift.float()
        offset, factor = (a.to(x.dtype)[..., None, None] for a in (offset, factor))
        return torch.addcmul(offset, x, factor)


class FoldedBlock(blocks.ResidualBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.modulation(emb).chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))), scale, shift)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


def folded(network: mcm.UNet) -> mcm.UNet:
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = FoldedNorm
        if type(module) is blocks.ResidualBlock:
            module.__class__ = FoldedBlock
    return network


def parts(network: mcm.UNet) -> list[nn.Module]:
    """Its blocks, to be compiled each alone: much sooner than the whole, but with more launches."""
    kinds = (blocks.ResidualBlock, blocks.Attention)
    return [module for module in network.modules() if isinstance(module, kinds)]


def variants(toy: bool) -> list[dict]:
    """What is measured, in this order: the common case, then what may be faster, then the rest."""
    batches = (8,) if toy else (512, 128)
    presets = ("toy",) if toy else ("small", "base")
    both = list(product(presets, batches, ("teacher", "cd", "ct"), MODES, ("native", "folded")))

    def rank(values: tuple) -> tuple:
        preset, batch, kind, mode, norm = values
        rare = kind != "teacher" and (mode not in ("eager", "compiled") or norm == "folded")
        return rare, preset == "base", batch == 128, list(MODES).index(mode), norm == "folded"

    both.sort(key=rank)
    names = ("preset", "batch", "kind", "mode", "norm")
    return [dict(zip(names, values)) for values in both]


def measured(variant: dict, device: torch.device, out: Path) -> dict:
    """Milliseconds of a step, as the clock has it and as the device is busy; kernels; memory."""
    torch.manual_seed(0)
    network = run_cifar.unet(PRESETS.get(variant["preset"], TOY), 3, 10)
    network = folded(network) if variant["norm"] == "folded" else network
    compiled = MODES[variant["mode"]]
    precision = pick_precision(None, device)
    settings = Training(1, variant["batch"], precision=precision, compile=compiled is not None)
    nn.Module.compile = compiled
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # blocks of many shapes share one code
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        step = training_step(variant["kind"], network, settings, device)
        first = seconds(step, device)
        calls = 10 if cuda else 1
        low, middle, high = quartiles(in_turn({"step": step}, device, 5, calls)["step"])
        row = {"first_seconds": first, "ms": 1000 * middle, "quartiles": [1000 * low, 1000 * high]}
        row["images_per_second"] = variant["batch"] / middle
        if cuda:
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        busy, lines = profiled(step, device)
        name = "-".join(map(str, variant.values()))
        write(out / f"profile-{name}.txt", "\n".join(lines) + "\n")
        return row | busy
    finally:
        nn.Module.compile = COMPILE


def called(name: str, out: Path, timeout: float, *arguments: object) -> dict:
    """Run a script of ours; its output goes to NAME.log. -> its exit code and seconds."""
    began = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            how = {"stdout": log, "stderr": subprocess.STDOUT, "timeout": max(60, timeout)}
            code = subprocess.run(command, cwd=ROOT, **how).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
    return {"code": code, "seconds": round(time.perf_counter() - began, 1)}


def fastest(rows: list[dict], kind: str, left: float) -> dict | None:
    """Of the variants that run_cifar.py has: native norm, eager or compiled, at the large batch.

    Its first step counts, as one that compiles takes long: which takes most steps in the time left?
    """
    found = [r for r in rows if r["kind"] == kind and "ms" in r and r["norm"] == "native"]
    found = [r for r in found if r["mode"] in ("eager", "compiled") and r["preset"] != "base"]
    most = max((r["batch"] for r in found), default=0)
    found = [r for r in found if r["batch"] == most]
    steps = {id(r): (left - r["first_seconds"]) / r["ms"] for r in found}
    return max(found, key=lambda r: steps[id(r)], default=None)


def cifar_run(args: argparse.Namespace, rows: list[dict], left: float) -> list[str]:
    """The options of a run that fits into so many seconds: 55 % for the teacher's training, 30 %
    for the students' (0.4 of it for K = 1), the rest for classifier, compiling and table.
    """
    teacher = fastest(rows, "teacher", 0.55 * left)
    student = fastest(rows, "cd", 0.3 * left)
    ms = (teacher["ms"] if teacher else 50, student["ms"] if student else 80)
    teaching = int(0.55 * left * 1000 / ms[0])
    learning = [int(share * 0.3 * left * 1000 / ms[1]) for share in (0.4, 0.2, 0.2, 0.2)]
    given = ["--data-dir", args.data_dir, "--batch", teacher["batch"] if teacher else 512]
    given += ["--lr", 1e-3, "--student-lr", 5e-4, "--ema", 0.999, "--student-ema", 0.998]
    given += ["--grid", 16, 128, "--c", 1e-3, "--save-every", 2000, "--augment"]
    if args.toy:
        given = ["--data", "digits", "--channels", 16, "--samples", 128, "--batch", 32]
        given += ["--classifier-iterations", 20]
        teaching, learning = 20, [8, 8, 8, 8]
    if teacher and student and teacher["mode"] == student["mode"] == "compiled":
        given.append("--compile")
    given += ["--teacher-iterations", max(1, teaching), "--student-iterations"]
    return [*given, *(max(1, n) for n in learning)]


def table(found: dict) -> str:
    lines = [f"{found['hardware']}, torch {found['torch']}, bf16 where the device has it.", ""]
    lines += ["| preset | batch | step | mode | norm | ms | busy ms | kernels | images/s | GiB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for row in found["variants"]:
        cells = [str(row[k]) for k in ("preset", "batch", "kind", "mode", "norm")]
        figures = [f"{row['ms']:.1f}", f"{row['busy_ms']:.1f}"] if "ms" in row else [row["error"]]
        if "ms" in row:
            figures += [str(row["kernels"]), f"{row['images_per_second']:.0f}"]
            figures += [f"{row['memory_gib']:.1f}" if "memory_gib" in row else ""]
        lines.append(f"| {' | '.join([*cells, *figures])} |")
    for name in ("checks", "peers", "run"):
        if name in found:
            lines += ["", f"{name}: {found[name]}"]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    began = time.perf_counter()
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--minutes", type=float, default=14, help="in all (default: 14)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="CIFAR-10's folder")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--device", help="(default: a GPU, where there is one)")
    parser.add_argument("--toy", action="store_true", help="tiny networks, digits")
    every = ("checks", "variants", "peers", "run")
    how = {"nargs": "+", "choices": every, "default": every, "metavar": "PART"}
    parser.add_argument("--parts", help=f"some of {', '.join(every)} (default: all)", **how)
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.json"
    found = {"hardware": hardware(device), "torch": torch.__version__, "variants": []}
    if file.is_file():
        found |= json.loads(file.read_text(encoding="utf-8"))

    def left(share: float = 1.0) -> float:
        return 60 * args.minutes * share - (time.perf_counter() - began)

    def keep() -> None:
        write(file, json.dumps(found, indent=1) + "\n")
        write(out / "gpu.md", table(found))

    if "checks" in args.parts and "checks" not in found:
        tests = ("-m", "pytest", "-q", "--all", "tests/lab/test_cuda.py")
        found["checks"] = called("checks", out, left(0.2), *tests)
        keep()
    known = [{k: row[k] for k in list(row)[:5]} for row in found["variants"]]
    share = 0.35 if "run" in args.parts else 1.0
    for variant in variants(args.toy) if "variants" in args.parts else ():
        if variant in known or left(share) < 0:
            continue
        try:
            row = measured(variant, device, out)
        except Exception as error:  # whatever it is, the rest may work
            row = {"error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"[:200]}
        found["variants"].append(variant | row)
        print(variant, {k: round(v, 2) for k, v in row.items() if isinstance(v, float)}, flush=True)
        keep()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if "peers" in args.parts and "peers" not in found:
        sizes = ("--parameters", 3e5, "--size", 8, "--batch", 2, "--repeats", 2)
        if not args.toy:
            sizes = ("--parameters", 3.8e6, "--batch", 256, "--steps", 20, "--repeats", 3)
        where = ("--device", device, "--out", out / "peers.json")
        found["peers"] = called(
            "peers", out, left(0.45), "benchmarks/unet_speed.py", *sizes, *where
        )
        keep()
    run = out / "run"
    if "run" in args.parts and not (run / "results.json").is_file():
        options = cifar_run(args, found["variants"], left() - 60)
        if (run / "run.json").is_file():  # as it was begun
            options = found["options"]
        found["options"] = options = list(map(str, options))
        keep()
        more = ["--device", device, "--out", run, *["--resume"] * (run / "run.json").is_file()]
        found["run"] = called("run", out, left(), "run_cifar.py", *options, *more)
        keep()
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
