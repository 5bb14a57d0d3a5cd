#!/usr/bin/env python3
"""Pixels, from top to bottom: train a diffusion teacher, turn it into K-step students, measure both, draw pictures.

python run_cifar.py --data digits                       minutes on a laptop, no download
python run_cifar.py                                     CIFAR-10, class-conditional, on a GPU
python run_cifar.py --preset tiny                       CIFAR-10 at 16x16, on a CPU
python run_cifar.py --data folder --data-dir PICTURES   your own images
torchrun --nproc_per_node=2 run_cifar.py                the same on two GPUs
python run_cifar.py --sample runs/digits/cd-4.safetensors --n 64
"""

import argparse
import contextlib
import dataclasses
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

import mcm
from mcm import recipes
from mcm.denoiser import read_safetensors, write_safetensors
from mcm.lab import distributed as parallel
from mcm.lab import metrics, plots
from mcm.lab import options as cli
from mcm.lab.data import ImageData, load_data, to_float
from mcm.lab.options import describe, digest, pick_device, recorded, write
from mcm.lab.run import Training, train

FID_SAMPLES = 50_000  # what the literature reports FID with

# What a run is made of. Every value can be overridden by the option of the same name. student_iterations by K: fewer steps are further
# from the teacher and take longer to learn; a K that is not named takes the next smaller one's.
BASE = dict(
    image_size=32,
    channels=64,
    multipliers=[1, 2, 2],
    blocks=2,
    attention=[16],
    dropout=0.0,
    label_dropout=0.1,
    noise_scale=[1, 1],
    teacher_iterations=100_000,
    student_iterations={1: 50_000},
    batch=128,
    lr=2e-4,
    student_lr=1e-4,
    ema=0.9999,
    student_ema=0.999,
    grid=[64, 640],
    max_points=1280,
    distance="auto",
    weight="v",
    c=1e-4,
    x_var="auto",
    samples=10_000,
    classifier_iterations=5000,
)
DIGITS = dict(
    image_size=8,
    channels=48,
    multipliers=[1, 1],
    blocks=1,
    attention=[4],
    teacher_iterations=1400,
    student_iterations={1: 740, 2: 700, 4: 460, 8: 420},
    lr=1.5e-3,
    student_lr=1e-3,
    ema=0.995,
    student_ema=0.995,
    grid=[4, 32],
    max_points=16,
    c=1e-3,
    x_var="none",
    samples=1500,
    classifier_iterations=300,
)
PRESETS = {
    "digits": {
        "default": ("under 5 minutes on 2 CPU cores", BASE | DIGITS),
        "long": (
            "under 20 minutes on 2 CPU cores",
            BASE
            | DIGITS
            | dict(
                teacher_iterations=5000,
                student_iterations={1: 3400, 2: 2550, 4: 2125, 8: 1912},
                ema=0.998,
                grid=[4, 64],
                max_points=32,
            ),
        ),
        "tiny": (
            "under 1 minute on 2 CPU cores, for trying things out",
            BASE
            | DIGITS
            | dict(
                channels=32,
                teacher_iterations=300,
                student_iterations={1: 300, 2: 200},
                samples=500,
            ),
        ),
    },
    "cifar10": {
        "small": (
            "3.8 M parameters, for one GPU (not yet measured)",
            BASE
            | dict(
                channels=48,
                multipliers=[1, 2, 4],
                blocks=1,
                attention=[16, 8],
                teacher_iterations=50_000,
                student_iterations={1: 25_000, 2: 20_000},
                lr=5e-4,
                student_lr=2e-4,
            ),
        ),
        "base": (
            "35.5 M parameters, for one GPU (not yet measured)",
            BASE | dict(channels=144, blocks=3, dropout=0.1),
        ),
        "tiny": (
            "1.5 M parameters, images averaged down to 16x16; 45 minutes on 2 CPU cores",
            BASE
            | dict(
                image_size=16,
                channels=32,
                multipliers=[1, 2, 4],
                blocks=1,
                attention=[8],
                teacher_iterations=4000,
                student_iterations={1: 3000, 2: 900, 4: 700},
                batch=64,
                lr=1e-3,
                student_lr=5e-4,
                ema=0.998,
                student_ema=0.995,
                grid=[8, 64],
                c=1e-3,
                samples=1000,
                classifier_iterations=1500,
            ),
        ),
    },
    "imagenet64": {
        "base": (
            "65.2 M parameters, for one GPU (not yet measured)",
            BASE
            | dict(
                image_size=64,
                channels=128,
                multipliers=[1, 2, 3, 4],
                attention=[16, 8],
                dropout=0.1,
                noise_scale=[0.5, 1],
            ),
        ),
    },
    "folder": {
        "default": (
            "depends on the image size; see the bars",
            BASE | dict(image_size=64, channels=64, multipliers=[1, 2, 2, 3], attention=[16, 8]),
        ),
        "small": (
            "0.5 M parameters at 16x16; under an hour on 2 CPU cores",
            BASE
            | dict(
                image_size=16,
                channels=32,
                multipliers=[1, 2],
                attention=[8],
                teacher_iterations=4000,
                student_iterations={1: 1200, 2: 900, 4: 700},
                lr=1e-3,
                student_lr=5e-4,
                ema=0.998,
                student_ema=0.995,
                grid=[8, 64],
                c=1e-3,
                samples=1000,
                classifier_iterations=1000,
            ),
        ),
    },
}


def parse(argv: list[str]) -> argparse.Namespace:
    class Help(argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog):
            super().__init__(prog, max_help_position=32, width=110)

    epilog = "presets (every value can be overridden by the option of the same name):\n"
    for data, presets in PRESETS.items():
        for name, (cost, values) in presets.items():
            shown = ", ".join(
                f"{k} {' '.join(map(str, v)) if isinstance(v, list) else v}"
                for k, v in values.items()
            )
            epilog += f"\n  --data {data} --preset {name}: {cost}\n    {shown}\n"
    parser = argparse.ArgumentParser(
        prog="run_cifar.py", description=__doc__, epilog=epilog, formatter_class=Help
    )

    group = parser.add_argument_group("what to run")
    group.add_argument(
        "--data", default="cifar10", help="digits, cifar10, imagenet64 or folder (default: cifar10)"
    )
    group.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where the data is, or is downloaded to (default: data)",
    )
    group.add_argument(
        "--preset", help="network and run length, listed below (default: the first of the data's)"
    )
    group.add_argument(
        "--method",
        choices=["cd", "ct"],
        default="cd",
        help="cd: distil the teacher; ct: consistency training from the images, starting from the teacher's weights (default: cd)",
    )
    group.add_argument(
        "--init",
        choices=["teacher", "random"],
        default="teacher",
        help="where the students' weights start: at the teacher's (default, as in the paper), or where the teacher began",
    )
    group.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="K",
        help="one student for each number of sampling steps (default: 1 2 4 8)",
    )
    group.add_argument(
        "--teacher",
        type=Path,
        metavar="CHECKPOINT",
        help="use this teacher instead of training one",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out: what is finished is not repeated",
    )
    group.add_argument(
        "--sample",
        type=Path,
        metavar="CHECKPOINT",
        help="only draw a grid of samples from this checkpoint, in the number of steps that it was made for",
    )
    group.add_argument(
        "--n", type=int, default=64, help="with --sample: how many images (default: 64)"
    )

    group = parser.add_argument_group("where and how")
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="results, pictures, checkpoints, log (default: runs/DATA)",
    )
    group.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="cache of the feature classifier (default: beside --out, named after the data and its training steps); "
        "or the word inception, for FID, by default with 50,000 samples: needs requirements-fid.txt",
    )
    group.add_argument(
        "--device", help="cpu, cuda or cuda:1 (default: cuda where there is one, else cpu)"
    )
    group.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="bf16: networks in bfloat16 autocast, losses in float32 (default: bf16 on a GPU that has it, else fp32)",
    )
    group.add_argument("--seed", type=int, default=0, help="(default: 0)")
    group.add_argument(
        "--save-every",
        type=int,
        default=500,
        metavar="STEPS",
        help="training steps between checkpoints (default: 500)",
    )

    group = parser.add_argument_group("preset values")
    group.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="a folder's images are resized and cropped to this, the others' averaged down to it",
    )
    group.add_argument("--channels", type=int, help="width of the UNet's first level")
    group.add_argument(
        "--multipliers",
        type=int,
        nargs="+",
        help="width of each level over --channels; one level per halving of the image",
    )
    group.add_argument("--blocks", type=int, help="residual blocks per level, down and up")
    group.add_argument(
        "--attention", type=int, nargs="*", metavar="PIXELS", help="resolutions with attention"
    )
    group.add_argument("--dropout", type=float, help="dropout in the residual blocks, in [0, 1)")
    group.add_argument(
        "--label-dropout",
        type=float,
        help="how often the teacher trains without the class, in [0, 1]; guidance needs it",
    )
    group.add_argument(
        "--noise-scale",
        type=float,
        nargs=2,
        metavar=("CLEAN", "NOISY"),
        help="at t = 0 and at t = 1 the cosine schedule has the noise that suits images this many times the size (interpolated cosine; paper, ImageNet 64: 0.5 1)",
    )
    group.add_argument(
        "--teacher-iterations", type=int, metavar="STEPS", help="teacher training steps"
    )
    group.add_argument(
        "--student-iterations",
        type=int,
        nargs="+",
        metavar="STEPS",
        help="student training steps: one number, or one for each of --steps",
    )
    group.add_argument("--batch", type=int, help="images per training step")
    group.add_argument("--lr", type=float, help="peak learning rate of the teacher")
    group.add_argument("--student-lr", type=float, help="peak learning rate of the students")
    group.add_argument(
        "--ema", type=float, help="decay of the teacher's averaged weights, per step"
    )
    group.add_argument(
        "--student-ema", type=float, help="decay of the students' averaged weights, per step"
    )
    group.add_argument(
        "--grid",
        type=int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help="teacher steps N at the start and from the middle of a student's run on (paper: 64 1280); raised to 4 points per segment at the start",
    )
    group.add_argument(
        "--max-points",
        type=int,
        metavar="N",
        help="but never more than this many grid points per segment: a short run cannot carry the answer through more",
    )
    group.add_argument(
        "--distance",
        choices=["auto", "huber", "squared"],
        help="auto: squared for K = 1, the paper's pseudo-Huber for more steps",
    )
    group.add_argument(
        "--weight",
        choices=["v", "x", "q"],
        help="compare as velocities (paper), clean images, or points at the segment's start",
    )
    group.add_argument("--c", type=float, help="the pseudo-Huber constant, in units of v")
    group.add_argument(
        "--x-var",
        choices=["auto", "mse", "prior", "none"],
        help="variance for aDDIM in the teacher's step; none: DDIM; auto: none for K <= 2, else mse",
    )
    group.add_argument(
        "--samples", type=int, help="generated images per row of the table, classes in turn"
    )
    group.add_argument(
        "--classifier-iterations",
        type=int,
        metavar="STEPS",
        help="training steps of the feature classifier",
    )

    group = parser.add_argument_group("further")
    group.add_argument(
        "--augment",
        action="store_true",
        help="mirror each training image left to right half of the time; not for digits or letters",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network in training: a minute or more at the start, faster steps on a GPU",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="PARTS",
        help="put the batch through the network in this many parts, to save memory; may change with --resume (default: 1)",
    )
    group.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="W",
        help="classifier-free guidance of the teacher, in sampling and in distillation; 1 is none (default: 1)",
    )
    args = parser.parse_args(argv)

    if args.data not in PRESETS:
        raise mcm.InputError(f"unknown data set {args.data!r}: choose {', '.join(PRESETS)}")
    args.preset = args.preset or next(iter(PRESETS[args.data]))
    if args.preset not in PRESETS[args.data]:
        raise mcm.InputError(
            f"no preset {args.preset!r} for {args.data}: choose {', '.join(PRESETS[args.data])}"
        )
    args.cost, preset = PRESETS[args.data][args.preset]
    args.inception = str(args.features) == "inception"
    if args.inception:
        args.features, preset = None, preset | {"samples": FID_SAMPLES}
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.steps_given, args.steps = args.steps, args.steps or [1, 2, 4, 8]
    args.out_given, args.out = args.out, args.out or Path("runs") / args.data
    if isinstance(args.student_iterations, dict):
        known = args.student_iterations
        args.student_iterations = [
            known[max(k for k in known if k <= max(K, 1))] for K in args.steps
        ]
    elif len(args.student_iterations) == 1:
        args.student_iterations = args.student_iterations * len(args.steps)
    args.preset_values = {name: getattr(args, name) for name in preset}
    return args


def check(args: argparse.Namespace) -> None:
    """Everything that can be seen to be wrong before any work is done."""
    if len(args.student_iterations) != len(args.steps):
        raise mcm.InputError(
            f"--student-iterations has {len(args.student_iterations)} numbers for {len(args.steps)} students: give one, or one each"
        )
    if len(set(args.steps)) < len(args.steps):
        raise mcm.InputError(f"--steps {' '.join(map(str, args.steps))} names a student twice")
    for name in (
        "teacher_iterations",
        "batch",
        "samples",
        "classifier_iterations",
        "accumulate",
        "n",
        "save_every",
        "image_size",
        "lr",
        "student_lr",
        "c",
    ):
        if getattr(args, name) <= 0:
            raise mcm.InputError(
                f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}"
            )
    for name, low, below in (
        ("label_dropout", 0, 1),
        ("ema", 0, 1),
        ("student_ema", 0, 1),
        ("seed", 0, 2**31),
    ):
        if not low <= getattr(args, name) < below:
            raise mcm.InputError(
                f"--{name.replace('_', '-')} must be at least {low} and below {below}, not {getattr(args, name)}"
            )
    if min(args.noise_scale) <= 0:
        raise mcm.InputError(
            f"--noise-scale {args.noise_scale[0]} {args.noise_scale[1]} must be positive"
        )
    if min(args.student_iterations) <= 0:
        raise mcm.InputError("--student-iterations must be positive")
    if not 0 < args.grid[0] <= args.grid[1] or args.max_points < 2:
        raise mcm.InputError(
            f"--grid {args.grid[0]} {args.grid[1]} must be positive and not falling, and --max-points at least 2"
        )
    dim = (metrics.Inception if args.inception else metrics.Classifier).DIM
    if args.samples < 2 * dim:
        raise mcm.InputError(
            f"--samples {args.samples} is too few for a covariance of {dim} features: use at least {2 * dim}"
        )
    if args.method == "ct" and args.guidance != 1:
        raise mcm.InputError(
            "--guidance guides the teacher's predictions, and consistency training uses none: drop it, or use --method cd"
        )
    for K in args.steps:
        stage(args, K)
    with torch.device("meta"):  # sizes that do not fit are an error here, before any data is read
        mcm.UNet(
            args.image_size,
            3,
            args.channels,
            tuple(args.multipliers),
            args.blocks,
            tuple(args.attention),
            0,
            args.dropout,
        )


def stage(args: argparse.Namespace, K: int) -> recipes.Stage:
    """The student's training stage; the pieces of it that depend on K."""
    distance = args.distance if args.distance != "auto" else ("squared" if K == 1 else "huber")
    changes = (
        {} if args.x_var == "auto" else {"x_var": None if args.x_var == "none" else args.x_var}
    )
    first, last = (min(n, K * args.max_points) for n in (max(args.grid[0], 4 * K), args.grid[1]))
    return recipes.mcm(
        K,
        teacher_steps=(min(first, last), last),
        distance=distance,
        weight=args.weight,
        c=args.c,
        **changes,
    )


def is_fid(args: argparse.Namespace) -> bool:
    """What is called by that name: Inception's features, enough samples, and images of the size that the data has."""
    native = (
        args.data == "folder"
        or args.image_size == next(iter(PRESETS[args.data].values()))[1]["image_size"]
    )
    return args.inception and args.samples >= FID_SAMPLES and native


def training(args: argparse.Namespace, iterations: int, lr: float, ema: float) -> Training:
    return Training(
        iterations,
        args.batch,
        args.accumulate,
        lr,
        warmup=min(1000, iterations // 20),
        ema=ema,
        precision=args.precision,
        augment=args.augment,
        compile=args.compile,
        seed=args.seed,
        log_every=min(100, max(10, iterations // 50)),
        save_every=args.save_every,
    )


def finished(path: Path, iterations: int) -> bool:
    """Whether this checkpoint is the end of a run, not a stop on the way; a damaged one is neither, and is made anew from its state."""
    with contextlib.suppress(mcm.InputError):
        return path.is_file() and mcm.load(path).metadata.get("step") == iterations
    return False


def load_teacher(
    path: Path, args: argparse.Namespace, data: ImageData, device: torch.device
) -> mcm.Denoiser:
    """A finished teacher, if it fits the data."""
    teacher = mcm.load(path, device)
    wanted = (args.image_size, data.image_shape[0], data.classes)
    found = tuple(teacher.network.arguments[k] for k in ("image_size", "in_channels", "classes"))
    if found != wanted:
        raise mcm.InputError(
            f"{path} is for (image size, channels, classes) = {found}, but {args.data} needs {wanted}"
        )
    if teacher.student_steps:
        raise mcm.InputError(
            f"{path} is a {teacher.student_steps}-step student; a teacher is a diffusion model"
        )
    return teacher


def train_teacher(args: argparse.Namespace, data: ImageData, device: torch.device) -> mcm.Denoiser:
    """The diffusion model, finished earlier or trained now on the v-loss."""
    if args.resume and finished(args.out / "teacher.safetensors", args.teacher_iterations):
        return load_teacher(args.out / "teacher.safetensors", args, data, device)
    torch.manual_seed(args.seed)
    network = mcm.UNet(
        args.image_size,
        data.image_shape[0],
        args.channels,
        tuple(args.multipliers),
        args.blocks,
        tuple(args.attention),
        data.classes,
        args.dropout,
    )
    schedule = mcm.CosineSchedule.interpolated(
        args.image_size, *(scale * args.image_size for scale in args.noise_scale)
    )
    teacher = mcm.Denoiser(network, schedule).to(device)

    def loss(denoiser: mcm.Denoiser, x: Tensor, labels: Tensor, progress: float) -> mcm.LossOutput:
        dropped = (
            parallel.draw(lambda n: torch.rand(n, device=device), len(labels)) < args.label_dropout
        )
        return mcm.diffusion_loss(denoiser, x, torch.where(dropped, data.classes, labels))

    settings = training(args, args.teacher_iterations, args.lr, args.ema)
    return train(
        teacher,
        loss,
        data,
        settings,
        args.out,
        "teacher",
        args.resume,
        previewer(args, data, "teacher", 16),
        trained_on=args.data,
    )


def train_student(
    args: argparse.Namespace, K: int, iterations: int, teacher: mcm.Denoiser, data: ImageData
) -> mcm.Denoiser:
    """A K-step student: finished earlier, or trained now from the teacher's weights, with the one consistency loss."""
    name, device = f"{args.method}-{K}", data.images.device
    path = args.out / f"{name}.safetensors"
    if args.resume and finished(path, iterations):
        return mcm.load(path, device)
    torch.manual_seed(args.seed)
    network = mcm.UNet(**teacher.network.arguments | {"dropout": args.dropout}).to(device)
    if args.init == "teacher":
        network.load_state_dict(teacher.network.state_dict())
    student = mcm.Denoiser(network, teacher.schedule, teacher.prediction, student_steps=K)
    how, source = stage(args, K), guide(teacher, args, data) if args.method == "cd" else None

    def loss(denoiser: mcm.Denoiser, x: Tensor, labels: Tensor, progress: float) -> mcm.LossOutput:
        return mcm.consistency_loss(denoiser, x, labels, how, teacher=source, progress=progress)

    settings = training(args, iterations, args.student_lr, args.student_ema)
    preview = previewer(args, data, name, K)
    return train(
        student,
        loss,
        data,
        settings,
        args.out,
        name,
        args.resume,
        preview,
        trained_on=args.data,
        method=args.method,
    )


def previewer(args: argparse.Namespace, data: ImageData, name: str, steps: int):
    """-> a function that draws a grid of 50 samples, the same noise each time, while the model is being trained."""
    (args.out / "previews").mkdir(exist_ok=True)
    z = torch.randn(50, *data.image_shape, generator=torch.Generator().manual_seed(args.seed)).to(
        data.images.device
    )
    labels = torch.arange(50, device=z.device) % data.classes

    def preview(model: mcm.Denoiser, step: int) -> None:
        save_grid(
            mcm.sample(model, z, steps, labels),
            args.out / "previews" / f"{name}-{step:06d}.png",
            columns=10,
        )

    return preview


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    scale = max(1, 96 // images.shape[-1])
    save_image(
        torch.nn.functional.interpolate((images.clamp(-1, 1) + 1) / 2, scale_factor=scale),
        path,
        nrow=columns,
    )


def guide(teacher: mcm.Denoiser, args: argparse.Namespace, data: ImageData):
    null = torch.tensor(data.classes, device=data.images.device)
    return teacher if args.guidance == 1 else mcm.guided(teacher, args.guidance, null)


def generate(
    model,
    z: Tensor,
    labels: Tensor,
    steps: int,
    solver,
    device: torch.device,
    label: str,
    precision: str,
) -> tuple[Tensor, float]:
    """-> images (n, C, H, W) in [-1, 1] on the CPU, seconds per image."""
    started, pixels = time.perf_counter(), z.shape[-1] * z.shape[-2]
    chunk = max(
        1, (2**14 if device.type == "cpu" else 2**20) // pixels
    )  # a CPU is twice as fast while a layer fits its cache
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        images = mcm.sample(
            model,
            parallel.own(z).to(device),
            steps,
            parallel.own(labels).to(device),
            solver,
            chunk=chunk,
            progress=label,
        )
    return parallel.gathered(images).clamp(-1, 1).cpu(), (time.perf_counter() - started) / len(z)


def real_features(args, data: ImageData, extractor) -> Tensor:
    """Of the training images, (n, d) on the CPU. Inception's take minutes, and are kept."""
    if not args.inception:
        return metrics.embed(extractor, data.images)[0]
    path = (
        args.out.parent / f"inception-{args.data}-{data.fingerprint()}.safetensors"
    )  # of hundreds of MB: only the first process reads it
    if not path.is_file():
        features = parallel.gathered(
            metrics.embed(extractor, parallel.own(data.images))[0].to(data.images.device)
        ).cpu()
        if parallel.first():
            write_safetensors(path, {"features": features}, {})
    parallel.wait()
    return read_safetensors(path)[0]["features"] if parallel.first() else torch.empty(0)


def evaluate(
    args,
    data: ImageData,
    teacher,
    students: dict[int, mcm.Denoiser],
    classifier,
    extractor,
    real: Tensor,
    device,
) -> tuple[list[dict], float]:
    """One row per model and number of steps, all from the same noise and classes -> rows, seconds (in the first process). They are kept in rows.json as they are
    made, with what they were made from, so that a resumed run takes over those, and only those, that still hold."""
    n, started = args.samples, time.perf_counter()
    z = torch.randn(
        n, *data.image_shape, generator=torch.Generator().manual_seed(args.seed + 1_000_000)
    )
    labels = (
        torch.arange(n) % data.classes
    )  # each class equally often, as class-conditional benchmarks do
    teacher_file, store = args.teacher or args.out / "teacher.safetensors", args.out / "rows.json"
    same = {
        "samples": n,
        "seed": args.seed,
        "guidance": args.guidance,
        "teacher": digest(teacher_file),
        "features": "inception" if args.inception else digest(args.features),
    }
    saved = json.loads(store.read_text()) if args.resume and store.is_file() else {}
    rows, before = (saved["rows"], saved["seconds"]) if saved.get("of") == same else ({}, 0.0)
    for key in list(rows):
        path = args.out / f"{rows[key]['of']}.safetensors"
        if rows[key]["of"] != "teacher" and not (
            path.is_file() and digest(path) == rows[key]["digest"]
        ):
            del rows[key]

    plan = [("teacher", steps, mcm.ddim) for steps in (64, 32, 16, 8, 4, 2, 1)] + [
        ("teacher", steps, mcm.addim) for steps in (16, 8, 4, 2)
    ]
    plan += [(f"{args.method}-{K}", K, mcm.ddim) for K in students]
    reference = None
    for name, steps, solver in plan:
        key = f"{name} {solver.__name__} {steps}"
        if key in rows:
            continue
        if reference is None:
            reference, seconds = generate(
                guide(teacher, args, data),
                z,
                labels,
                64,
                mcm.ddim,
                device,
                "teacher, 64 steps",
                args.precision,
            )
        images, is_teacher = reference, name == "teacher"
        if (name, steps) != ("teacher", 64):
            model = guide(teacher, args, data) if is_teacher else students[steps]
            images, seconds = generate(
                model, z, labels, steps, solver, device, f"{name}, {steps} steps", args.precision
            )
        own = parallel.own(images).to(device)
        features, predicted = (
            parallel.gathered(a.to(device)).cpu()
            for a in (metrics.embed(extractor, own)[0], metrics.embed(classifier, own)[1])
        )
        if not parallel.first():
            continue
        precision, recall = metrics.precision_recall(real, features)
        row = {
            "model": "teacher" if is_teacher else "student",
            **({} if is_teacher else {"recipe": f"mcm-{args.method}"}),
            "sampler": solver.__name__,
            "steps": steps,
            "nfe": steps * (2 if is_teacher and args.guidance != 1 else 1),
            "frechet": metrics.frechet(real, features),
            "precision": precision,
            "recall": recall,
            "rmse_to_teacher": (images - reference).square().mean().sqrt().item(),
            "class_accuracy": (predicted == labels).double().mean().item()
            if data.classes > 1
            else None,
            "seconds_per_image": seconds,
        }
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        rows[key] = {
            "of": name,
            "digest": digest(teacher_file if is_teacher else args.out / f"{name}.safetensors"),
            "row": row,
        }
        write(
            store,
            json.dumps(
                {"of": same, "rows": rows, "seconds": before + time.perf_counter() - started}
            ),
        )
    if not parallel.first():
        return [], 0.0
    rows = [entry["row"] for entry in rows.values()]
    rows.sort(
        key=lambda row: (
            row["model"] == "student",
            row.get("recipe", ""),
            row["sampler"] == "addim",
            row["steps"],
        )
    )
    return rows, json.loads(store.read_text())["seconds"]


def draw_samples(args, data: ImageData, teacher, students: dict[int, mcm.Denoiser], device) -> None:
    """samples.png: the same noise and class down each column; on top the training image nearest to the teacher's."""
    n = 20 if data.image_shape[1] <= 16 else 12
    z = torch.randn(
        n, *data.image_shape, generator=torch.Generator().manual_seed(args.seed + 2_000_000)
    ).to(device)
    labels = (
        torch.arange(n) * data.classes // n if data.classes > n else torch.arange(n) % data.classes
    ).to(device)
    drawn = {"teacher, 64 steps": mcm.sample(guide(teacher, args, data), z, 64, labels)}
    for K in sorted(students, reverse=True):
        drawn[f"{args.method.upper()}, K = {K}"] = mcm.sample(students[K], z, cond=labels)
    neighbours = to_float(data.images[metrics.nearest(drawn["teacher, 64 steps"], data.images)])
    plots.sample_rows({"nearest training image": neighbours, **drawn}, args.out / "samples.png")


def table(results: dict) -> str:
    """results.md, and what is printed."""
    metric, floor = results["metric"], results["reference_floor"]
    lines = [
        f"{results['data']}, seed {results['seed']}: Fréchet distance in the {metric['dim']} features of {metric['features']}, {metric['n_generated']:,} samples",
        f"against the {metric['n_reference']:,} training images{'' if metric['name'] == 'fid' else ' (not FID)'}. Two halves of the real data, {floor['n']:,} images each: {floor['frechet']:.3f}.",
        "",
        f"| model | sampler | steps | NFE | {'FID' if metric['name'] == 'fid' else 'Fréchet'} | precision | recall | RMSE to teacher | class accuracy | s/image |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    digits = {
        "frechet": 3,
        "precision": 3,
        "recall": 3,
        "rmse_to_teacher": 3,
        "class_accuracy": 3,
        "seconds_per_image": 5,
    }
    for row in results["rows"]:
        figures = ["" if row[key] is None else f"{row[key]:.{n}f}" for key, n in digits.items()]
        lines.append(
            f"| {' | '.join([row.get('recipe') or row['model'], row['sampler'], str(row['steps']), str(row['nfe']), *figures])} |"
        )
    seconds = results["seconds"]
    spent = ", ".join(f"K = {K} {s:.0f}" for K, s in seconds["students"].items())
    lines += [
        "",
        f"Seconds: teacher {seconds['teacher'] or 0:.0f}, students {spent}, evaluation {seconds['evaluation']:.0f}, total {seconds['total']:.0f} ({results['hardware']}; processes: {results['processes']}).",
    ]
    return "\n".join(lines) + "\n"


def open_out(args: argparse.Namespace) -> None:
    free = (
        "student_iterations",
        "samples",
        "classifier_iterations",
    )  # these are checked where they matter
    settings = {k: v for k, v in args.preset_values.items() if k not in free}
    given = digest(args.teacher) if args.teacher else None
    mine = {
        "data": args.data,
        "seed": args.seed,
        "guidance": args.guidance,
        "augment": args.augment,
        "init": args.init,
        "teacher": given,
        **settings,
    }
    cli.open_out(args.out, mine, args.resume)


def draw_only(args: argparse.Namespace) -> None:
    """--sample: a grid of images from any checkpoint."""
    device = pick_device(parallel.start(args.device))
    args.precision = cli.pick_precision(args.precision, device)
    denoiser = mcm.load(args.sample, device)
    steps = args.steps_given[0] if args.steps_given else denoiser.student_steps or 64
    shape = denoiser.network.arguments
    z = torch.randn(
        args.n,
        shape["in_channels"],
        shape["image_size"],
        shape["image_size"],
        generator=torch.Generator().manual_seed(args.seed),
    )
    labels = torch.arange(args.n) % max(1, shape["classes"])
    model = (
        denoiser
        if args.guidance == 1
        else mcm.guided(denoiser, args.guidance, torch.tensor(shape["classes"], device=device))
    )
    images, seconds = generate(
        model, z, labels, steps, mcm.ddim, device, f"{steps} steps", args.precision
    )
    lead = parallel.first()
    parallel.stop()
    if not lead:
        return
    path = (args.out_given or args.sample.parent) / f"{args.sample.stem}-{steps}-steps.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(images, path, columns=math.ceil(math.sqrt(args.n)))
    print(f"{path}: {args.n} images, {steps} steps each, {seconds:.4f} seconds per image")


def main(argv: list[str]) -> None:
    args, started = parse(argv), time.perf_counter()
    check(args)
    if args.sample:
        return draw_only(args)
    device = pick_device(parallel.start(args.device))
    args.precision = cli.pick_precision(args.precision, device)
    print(f"{args.data}, preset {args.preset}: {args.cost}")
    print(
        "  "
        + ", ".join(
            f"{k} {' '.join(map(str, v)) if isinstance(v, list) else v}"
            for k, v in args.preset_values.items()
        )
    )
    data = parallel.in_turn(lambda: load_data(args.data, args.data_dir, args.image_size)).to(device)
    args.features = (
        args.features
        or args.out.parent
        / f"features-{args.data}-{data.fingerprint()}-{args.classifier_iterations}.safetensors"
    )
    given = load_teacher(args.teacher, args, data, device) if args.teacher else None
    if parallel.first():
        open_out(args)
    inception = (
        parallel.in_turn(lambda: metrics.Inception().to(device)) if args.inception else None
    )  # before hours are spent, not after
    classifier, accuracy = parallel.in_turn(
        lambda: metrics.train_classifier(data, args.classifier_iterations, args.features)
    )
    print(
        f"{len(data.images):,} training images, {len(data.held_images):,} held out; the feature classifier is right on {accuracy:.1%} of those"
    )

    teacher = given or train_teacher(args, data, device)
    print(f"the network has {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f} M parameters")
    stages = {K: stage(args, K) for K in args.steps}
    for K, how in stages.items():
        print(
            f"K = {K}: a grid of {' to '.join(str(how.points_per_segment(p) * K) for p in (0, 1))} points, {how.distance} distance, teacher step {'aDDIM' if how.x_var else 'DDIM'}"
        )
    students = {
        K: train_student(args, K, n, teacher, data)
        for K, n in zip(args.steps, args.student_iterations)
    }

    extractor = inception or classifier
    real = real_features(args, data, extractor)
    rows, evaluation = evaluate(args, data, teacher, students, classifier, extractor, real, device)
    lead, processes = parallel.first(), parallel.place()[1]
    parallel.stop()
    if not lead:
        return
    draw_samples(args, data, teacher, students, device)
    order, half = (
        torch.randperm(len(real), generator=torch.Generator().manual_seed(0)),
        len(real) // 2,
    )
    trained = {str(K): s.metadata["seconds"] for K, s in students.items()}
    taught = None if given else teacher.metadata["seconds"]
    parts = (taught or 0) + sum(trained.values()) + evaluation
    results = {
        "data": args.data,
        "seed": args.seed,
        "device": str(device),
        "hardware": describe(device),
        "processes": processes,
        "command": recorded("run_cifar.py", argv),
        "versions": {
            "mcm": mcm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "metric": {
            "name": "fid" if is_fid(args) else "frechet",
            "features": "Inception-v3"
            if args.inception
            else f"a classifier trained on {args.data}",
            "dim": extractor.DIM,
            "n_generated": args.samples,
            "n_reference": len(real),
            "reference": "train",
            "classifier_accuracy": accuracy,
        },
        "reference_floor": {
            "frechet": metrics.frechet(real[order[:half]], real[order[half : 2 * half]]),
            "n": half,
        },
        "rows": rows,
        # of a resumed run: the sum of what its parts took, whenever that was
        "seconds": {
            "teacher": taught,
            "students": trained,
            "evaluation": round(evaluation, 1),
            "total": round(max(time.perf_counter() - started, parts), 1),
        },
        "settings": args.preset_values
        | {
            "method": args.method,
            "guidance": args.guidance,
            "precision": args.precision,
            "augment": args.augment,
            "init": args.init,
        },
        "stages": {str(K): dataclasses.asdict(how) for K, how in stages.items()},
    }
    write(args.out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write(args.out / "results.md", table(results))
    plots.quality_vs_steps(results, args.out / "quality_vs_steps.png")
    if (args.out / "log.jsonl").is_file():
        plots.training_curves(args.out / "log.jsonl", args.out / "training.png")
    print("\n" + table(results))
    print(
        f"{args.out}: results.json, results.md, samples.png, quality_vs_steps.png, training.png, previews, checkpoints, log.jsonl"
    )


def run(argv: list[str]) -> int:
    return cli.run("run_cifar.py", main, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
