#!/usr/bin/env python3
"""Text-to-image, from top to bottom: an SDXL pipeline, few-step students of it by several recipes, a table, pictures.

python run_latent.py                                        a tiny SDXL trained here on drawn shapes, then MLCM; no download
python run_latent.py --recipe all                           every recipe from the same teacher, side by side
python run_latent.py --data DIR                             the tiny pipeline on your captioned pictures (metadata.jsonl: file_name, text)
python run_latent.py --pretrained DIR_OR_ID --prompts FILE  a full SDXL checkpoint, from prompts alone
"""

import argparse
import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import mcm
from mcm.denoiser import read_safetensors, write_safetensors
from mcm.lab import metrics, plots
from mcm.lab import options as cli
from mcm.lab.data import captioned_folder
from mcm.lab.options import describe, digest, pick_device, recorded, write
from mcm.lab.run import Training
from mcm.latent import shapes
from mcm.latent.distil import Captioned, distil
from mcm.latent.scheduler import MCMScheduler, re_noising_timesteps, uniform_timesteps
from mcm.latent.scorer import CLIPReward, train_scorer
from mcm.latent.sdxl import LORA_FILE, SDXL, Condition, load_pipeline, unconditional
from mcm.latent.tiny_sdxl import train_tiny_sdxl
from mcm.recipes import RECIPES, Recipe
from mcm.sampling import milestones, rows

# What a run is made of; every value can be overridden by the option of the same name.
TINY = dict(
    pictures=16_000,
    vae_iterations=3000,
    teacher_iterations=3200,
    iterations=None,
    evaluations=60,
    batch=64,
    lr=1e-3,
    rank=32,
    guidance=2.0,
    ema=0.95,
    samples=500,
    scorer_iterations=200,
    image_size=32,
    share_run=True,
)
PRESETS = {
    "default": ("about 15 minutes on 2 CPU cores", TINY),
    "long": (
        "a few hours on 2 CPU cores",
        TINY | dict(vae_iterations=6000, teacher_iterations=24_000, evaluations=900, ema=0.99),
    ),
    "tiny": (
        "about a minute on 2 CPU cores, for trying things out; the pictures are not good",
        TINY
        | dict(
            pictures=500,
            vae_iterations=60,
            teacher_iterations=60,
            evaluations=2,
            batch=16,
            samples=130,
            scorer_iterations=30,
        ),
    ),
    "pretrained": (
        "one GPU; see the README for memory",
        TINY
        | dict(
            iterations=12_000,
            evaluations=None,
            batch=4,
            lr=1e-4,
            rank=64,
            guidance=8.0,
            ema=0.99,
            samples=200,
            image_size=None,
            share_run=False,
        ),
    ),
}


def parse(argv: list[str]) -> argparse.Namespace:
    epilog = "recipes:\n" + "".join(
        f"  {name:7}{make(4).summary}\n" for name, make in RECIPES.items()
    )
    epilog += "\npresets (pretrained is the one used with --pretrained):\n"
    for name, (cost, values) in PRESETS.items():
        epilog += f"  {name}: {cost}\n    {', '.join(f'{k} {v}' for k, v in values.items())}\n"
    parser = argparse.ArgumentParser(
        prog="run_latent.py",
        description=__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    group = parser.add_argument_group("what to run")
    group.add_argument(
        "--recipe",
        nargs="+",
        default=["mlcm"],
        metavar="NAME",
        help=f"{', '.join(RECIPES)}, several of them, or all (default: mlcm)",
    )
    group.add_argument(
        "--pretrained",
        metavar="DIR_OR_ID",
        help="an SDXL pipeline: a folder, or an id on the hub (default: a tiny one, trained here)",
    )
    group.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one prompt per line, for the recipes that need no images",
    )
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="captioned pictures: metadata.jsonl with file_name and text (default: drawn shapes)",
    )
    group.add_argument(
        "--preset",
        choices=[p for p in PRESETS if p != "pretrained"],
        default="default",
        help="listed below (default: default)",
    )
    group.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        metavar="K",
        help="sampling steps to measure; mcm trains a model for each (default: 1 2 4 8)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out: what is finished is not repeated",
    )

    group = parser.add_argument_group("where and how")
    group.add_argument(
        "--out",
        type=Path,
        default=Path("runs/latent"),
        metavar="DIR",
        help="results, pictures, and a folder for each student (default: runs/latent)",
    )
    group.add_argument(
        "--pipeline",
        type=Path,
        metavar="DIR",
        help="where the tiny pipeline is kept and found again (default: runs/tiny-sdxl-...)",
    )
    group.add_argument(
        "--device", help="cpu, cuda or cuda:1 (default: cuda where there is one, else cpu)"
    )
    group.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="of the networks; losses are float32 (default: bf16 for --pretrained on a GPU, else fp32)",
    )
    group.add_argument(
        "--full", action="store_true", help="fine-tune the whole UNet instead of a LoRA"
    )
    group.add_argument(
        "--guidance-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="with --full: draw the teacher's guidance from this range and tell the student",
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, more time",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="PARTS",
        help="put the batch through the network in this many parts (default: 1)",
    )
    group.add_argument(
        "--clip",
        metavar="DIR_OR_ID",
        help="a CLIP model as the reward, in place of the small scorer trained here",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the students; the teacher's is always 0 (default: 0)",
    )
    group.add_argument(
        "--save-every",
        type=int,
        default=200,
        metavar="STEPS",
        help="training steps between checkpoints (default: 200)",
    )

    group = parser.add_argument_group("preset values")
    group.add_argument("--pictures", type=int, help="drawn shapes to train on")
    group.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="pictures of --data are resized and cropped to this; with --pretrained it is the pipeline's own size",
    )
    group.add_argument(
        "--vae-iterations", type=int, metavar="STEPS", help="training steps of the tiny autoencoder"
    )
    group.add_argument(
        "--teacher-iterations",
        type=int,
        metavar="STEPS",
        help="training steps of the tiny UNet and its text encoders",
    )
    group.add_argument(
        "--scorer-iterations",
        type=int,
        metavar="STEPS",
        help="training steps of the two small scorers: the reward and the evaluator",
    )
    group.add_argument(
        "--evaluations",
        type=float,
        metavar="THOUSANDS",
        help="train each student for so many thousand network evaluations, the teacher's included: equal for all recipes",
    )
    group.add_argument(
        "--iterations",
        type=int,
        metavar="STEPS",
        help="training steps of a student, over all phases of its recipe, in place of --evaluations",
    )
    group.add_argument("--batch", type=int, help="samples per training step of a student")
    group.add_argument("--lr", type=float, help="peak learning rate of a student")
    group.add_argument("--rank", type=int, help="of the LoRA; its alpha is the same")
    group.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="of the teacher: x(null) + W (x(prompt) - x(null)); diffusers' guidance_scale",
    )
    group.add_argument(
        "--share-run",
        action=argparse.BooleanOptionalAction,
        help="let one run of the teacher serve 8 training states, in place of a run for each (mlcm, tlcm)",
    )
    group.add_argument(
        "--ema",
        type=float,
        help="decay of the averaged weights that are saved and measured, per step",
    )
    group.add_argument("--samples", type=int, help="pictures per row of the table")
    args = parser.parse_args(argv)

    args.preset = "pretrained" if args.pretrained else args.preset
    args.cost, preset = PRESETS[args.preset]
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.argv = argv
    args.values = {name: getattr(args, name) for name in preset}
    args.recipe = list(RECIPES) if args.recipe == ["all"] else args.recipe
    args.guidance_range = tuple(args.guidance_range) if args.guidance_range else None
    return args


def check(args: argparse.Namespace) -> None:
    """Everything that can be seen to be wrong before any work is done."""
    unknown = [r for r in args.recipe if r not in RECIPES]
    if unknown:
        raise mcm.InputError(f"unknown recipe {unknown[0]!r}: choose {', '.join(RECIPES)}, or all")
    if args.prompts and not args.pretrained:
        raise mcm.InputError(
            "--prompts goes with --pretrained: a tiny pipeline knows only the words of its own captions"
        )
    if args.prompts and args.data:
        raise mcm.InputError(
            "--prompts and --data: the pictures have captions of their own, so give one of the two"
        )
    imageless = args.pretrained and not args.data
    needing = [r for r in args.recipe if RECIPES[r](4).needs_images]
    if imageless and needing:
        raise mcm.InputError(
            f"{', '.join(needing)} learn from images: add captioned pictures by --data, or choose mlcm or tlcm, which need prompts alone"
        )
    if imageless and not args.prompts:
        raise mcm.InputError(
            "--pretrained needs something to learn from: --prompts FILE, or --data DIR"
        )
    if min(args.steps) < 1 or len(set(args.steps)) < len(args.steps):
        raise mcm.InputError(
            f"--steps {' '.join(map(str, args.steps))} must be positive and each named once"
        )
    if max(args.steps) > 8 and any(RECIPES[r](4).renoise for r in args.recipe):
        raise mcm.InputError(
            f"--steps {max(args.steps)}: the timesteps of re-noising students are tabulated for 1 to 8 steps"
        )
    for name in (
        "pictures",
        "vae_iterations",
        "teacher_iterations",
        "scorer_iterations",
        "batch",
        "lr",
        "rank",
        "samples",
        "accumulate",
        "save_every",
        "image_size",
    ):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise mcm.InputError(
                f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}"
            )
    if (
        args.iterations is not None
        and args.iterations < 1
        or args.evaluations is not None
        and args.evaluations <= 0
    ):
        raise mcm.InputError("--iterations and --evaluations must be positive")
    if args.batch % args.accumulate:
        raise mcm.InputError(
            f"--batch {args.batch} cannot be cut into {args.accumulate} equal parts"
        )
    if (
        args.share_run
        and args.batch // args.accumulate % 8
        and any(
            phase.stage.z_from == "teacher" for r in args.recipe for phase in RECIPES[r](4).phases
        )
    ):
        raise mcm.InputError(
            f"--share-run needs parts of a multiple of 8 samples, not {args.batch // args.accumulate}: change --batch, or use --no-share-run"
        )
    if args.samples < 128:
        raise mcm.InputError(
            f"--samples {args.samples} is too few to measure a distribution: use at least 128"
        )
    if not 0 <= args.ema < 1 or not 0 <= args.seed < 2**31:
        raise mcm.InputError(
            "--ema must be at least 0 and below 1, --seed between 0 and 2147483647"
        )
    if args.guidance_range and not args.full:
        raise mcm.InputError("--guidance-range needs --full: a LoRA has no input for the guidance")


# --- what to learn from, and what to be measured against --------------------------------------------------------------------------


@dataclass
class World:
    """prompts and pictures (n, 3, S, S uint8, or None) to train on; asked: the held-out prompts of the table; real: held-out pictures;
    scenes: of the asked prompts, where an exact reader can judge pictures of them."""

    name: str
    prompts: list[str]
    pictures: Tensor | None
    asked: list[str]
    real: Tensor | None
    scenes: list[shapes.Scene] | None = None


def load_world(args: argparse.Namespace) -> World:
    if args.data:
        prompts, pictures = captioned_folder(
            args.data, args.image_size, args.out.parent if args.pretrained else None
        )
        n = len(prompts) // 10
        if n < 128:
            raise mcm.InputError(
                f"{args.data} has {len(prompts)} captioned pictures; at least 1,280 are needed, to hold a tenth out for measuring"
            )
        return World(
            args.data.name, prompts[n:], pictures[n:], prompts[:n][: args.samples], pictures[:n]
        )
    if args.prompts:
        prompts = read_prompts(args.prompts)
        if len(prompts) < 10:
            raise mcm.InputError(
                f"{args.prompts} has {len(prompts)} prompts; at least 10 are needed, to hold a tenth out for measuring"
            )
        held, kept = prompts[: len(prompts) // 10], prompts[len(prompts) // 10 :]
        return World(
            args.prompts.stem, kept, None, [held[i % len(held)] for i in range(args.samples)], None
        )
    train, held = shapes.split_scenes()
    pool, scenes = shapes.choose(train, args.pictures, 0), shapes.choose(held, args.samples, 1)
    real = shapes.draw(shapes.choose(held, 4 * args.samples, 2), 3)
    return World(
        "shapes",
        [s.caption() for s in pool],
        shapes.draw(pool, 0),
        [s.caption() for s in scenes],
        real,
        scenes,
    )


def read_prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise mcm.InputError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    except OSError as error:
        raise mcm.InputError(f"{path} cannot be read ({error.strerror})") from None
    lines = [line for line in lines if line]
    if not lines:
        raise mcm.InputError(f"{path} has no prompts: write one per line")
    return lines


# --- sampling and measuring ---------------------------------------------------------------------------------------------------


def generate(
    sdxl: SDXL, model, cond, z: Tensor, solver, times: Sequence[float] | int, seed: int, label: str
) -> tuple[Tensor, float]:
    """-> pictures (n, 3, H, W) in [-1, 1] on the CPU, seconds per picture. The same z and seed give all rows the same noise."""
    started = time.perf_counter()
    pictures = decode(sdxl, sample(sdxl, model, cond, z, solver, times, seed, label))
    return pictures, (time.perf_counter() - started) / len(z)


def sample(
    sdxl: SDXL, model, cond, z: Tensor, solver, times: Sequence[float] | int, seed: int, label: str
) -> Tensor:
    """-> latents like z, on the CPU."""
    device, chunk = sdxl.device, at_once(sdxl)
    options = {"steps": times} if isinstance(times, int) else {"times": times}
    generator, parts = torch.Generator(device).manual_seed(seed), []
    bar = tqdm(total=len(z), desc=label, unit="img", leave=False, disable=not label)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=sdxl.unet.dtype == torch.bfloat16),
        torch.no_grad(),
    ):
        for start in range(0, len(z), chunk):
            index = slice(start, start + chunk)
            here = type(cond)(*(None if c is None else c.to(device) for c in rows(cond, index)))
            parts.append(
                mcm.sample(
                    model,
                    z[index].to(device),
                    cond=here,
                    solver=solver,
                    generator=generator,
                    **options,
                ).cpu()
            )
            bar.update(len(parts[-1]))
    bar.close()
    return torch.cat(parts)


def at_once(sdxl: SDXL) -> int:
    """How many pictures go through the networks together."""
    return 64 if sdxl.size <= 16 else 1


@torch.no_grad()
def decode(sdxl: SDXL, latents: Tensor) -> Tensor:
    return torch.cat(
        [
            sdxl.to_images(part.to(sdxl.device)).clamp(-1, 1).cpu()
            for part in latents.split(at_once(sdxl))
        ]
    )


class Judge:
    """Measures rows of pictures, and keeps what it measured in rows.json, so that a resumed run repeats nothing."""

    def __init__(
        self, args, world: World, sdxl: SDXL, cond: Condition, reward, evaluator, same: dict
    ):
        self.args, self.world, self.sdxl, self.reward, self.evaluator = (
            args,
            world,
            sdxl,
            reward,
            evaluator,
        )
        self.cond = cond
        self.z = torch.randn(
            len(world.asked),
            sdxl.channels,
            sdxl.size,
            sdxl.size,
            generator=torch.Generator().manual_seed(args.seed + 1_000_000),
        )
        self.store, self.same, self.reference = args.out / "rows.json", same, None
        saved = json.loads(self.store.read_text()) if args.resume and self.store.is_file() else {}
        self.rows = saved["rows"] if saved.get("of") == same else {}
        self.real = None
        if world.real is not None:
            latents = sdxl.to_latents(world.real)
            self.components = metrics.principal_components(latents)
            self.real = self.components(latents)

    def teacher_pictures(self) -> Tensor:
        """Its 25 steps; the latents are kept in teacher.safetensors for a resumed run, which on SDXL saves minutes."""
        if self.reference is None:
            file, started = self.args.out / "teacher.safetensors", time.perf_counter()
            tensors, about = (
                read_safetensors(file) if self.args.resume and file.is_file() else ({}, {})
            )
            kept = about.get("of") == self.same
            latents = (
                tensors["latents"]
                if kept
                else sample(
                    self.sdxl,
                    self.teacher(),
                    self.cond,
                    self.z,
                    mcm.ddim,
                    25,
                    self.args.seed,
                    "teacher, 25 steps",
                )
            )
            pictures = decode(self.sdxl, latents)
            seconds = about["seconds"] if kept else (time.perf_counter() - started) / len(latents)
            if not kept:
                write_safetensors(file, {"latents": latents}, {"of": self.same, "seconds": seconds})
            self.reference = pictures, seconds
        return self.reference[0]

    def teacher(self):
        return mcm.guided(self.sdxl.denoiser(), self.args.guidance, unconditional)

    def measure(self, key: str, of: str, row: dict, model, cond, solver, times) -> None:
        """One row, unless it is there for the same weights (`of`)."""
        if self.rows.get(key, {}).get("of") == of:
            return
        target = self.teacher_pictures()
        if key == "teacher ddim 25":
            pictures, seconds = self.reference
        else:
            pictures, seconds = generate(
                self.sdxl, model, cond, self.z, solver, times, self.args.seed, key
            )
        row = row | self.figures(pictures, target) | {"seconds_per_image": seconds}
        self.rows[key] = {"of": of, "row": row}
        write(self.store, json.dumps({"of": self.same, "rows": self.rows}))
        print(line(row))

    def figures(self, pictures: Tensor, target: Tensor) -> dict:
        world, row = (
            self.world,
            {"rmse_to_teacher": (pictures - target).square().mean().sqrt().item()},
        )
        if self.reward:
            with torch.no_grad():
                score = [
                    self.reward(
                        pictures[i : i + 100].to(self.sdxl.device), world.asked[i : i + 100]
                    ).cpu()
                    for i in range(0, len(pictures), 100)
                ]
            row["reward"] = torch.cat(score).mean().item()
        if self.real is not None:
            features = self.components(self.sdxl.to_latents(pictures))
            precision, recall = metrics.precision_recall(self.real[: len(features)], features)
            row |= {
                "frechet": metrics.frechet(self.real, features),
                "precision": precision,
                "recall": recall,
                "coverage": metrics.coverage(self.real[: len(features)], features),
            }
        if world.scenes:
            row["alignment"] = shapes.alignment(pictures, world.scenes).double().mean().item()
        elif self.evaluator:
            row["alignment"] = retrieval(self.evaluator, pictures, world.asked)
        return {k: None if not math.isfinite(v) else v for k, v in row.items()}


def retrieval(evaluator, pictures: Tensor, prompts: list[str], among: int = 32) -> float:
    """The share of pictures whose own prompt scores highest among 32."""
    right = []
    with torch.no_grad():
        for start in range(0, len(prompts), among):
            part = prompts[start : start + among]
            features = evaluator.features(
                pictures[start : start + among].to(evaluator.places.device)
            )
            logits = evaluator.logits(features, part).cpu()
            right += [part[i] == part[j] for i, j in enumerate(logits.argmax(1).tolist())]
    return sum(right) / len(right)


COLUMNS = {
    "frechet": 3,
    "coverage": 3,
    "precision": 3,
    "recall": 3,
    "alignment": 3,
    "reward": 2,
    "rmse_to_teacher": 3,
    "seconds_per_image": 4,
}


def line(row: dict) -> str:
    figures = ["" if row.get(key) is None else f"{row[key]:.{n}f}" for key, n in COLUMNS.items()]
    return f"| {' | '.join([row.get('recipe') or row['model'], row['sampler'], str(row['steps']), str(row['nfe']), *figures])} |"


def table(results: dict) -> str:
    """results.md, and what is printed."""
    metric, lines = (
        results["metric"],
        [
            f"{results['data']}, seed {results['seed']}: {results['metric']['n_generated']:,} held-out prompts."
        ],
    )
    if metric["n_reference"]:
        lines += [
            f"Fréchet distance, coverage, precision and recall in {metric['dim']} features: {metric['features']};",
            f"against {metric['n_reference']:,} held-out pictures (not FID; two halves of those: {metric['floor']:.3f}). Alignment: {metric['alignment']}.",
        ]
    lines += [
        "Undistilled: the teacher's own weights in the students' sampler. NFE: network evaluations per picture.",
        "",
        "| model | sampler | steps | NFE | Fréchet | coverage | precision | recall | alignment | reward | RMSE to teacher | s/image |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line(row) for row in results["rows"]]
    spent = ", ".join(f"{name} {s:.0f}" for name, s in results["seconds"]["students"].items())
    lines += [
        "",
        f"Seconds: pipeline {results['seconds']['teacher']:.0f}, students {spent}, total {results['seconds']['total']:.0f} ({results['hardware']}).",
    ]
    return "\n".join(lines) + "\n"


# --- the run ------------------------------------------------------------------------------------------------------------------


def open_out(args: argparse.Namespace) -> None:
    mine = {
        "pretrained": args.pretrained and Path(args.pretrained).name,
        "data": args.data and args.data.name,
        "seed": args.seed,
        "full": args.full,
        "clip": args.clip,
        "guidance_range": args.guidance_range and list(args.guidance_range),
        "prompts": args.prompts and digest(args.prompts),
        "pipeline": args.pipeline and args.pipeline.name,
    } | {k: v for k, v in args.values.items() if k != "samples"}
    cli.open_out(args.out, mine, args.resume)


def training(args, iterations: int, batch: int, lr: float, seed: int = 0, **changes) -> Training:
    values = dict(
        warmup=min(100, iterations // 10 + 1),
        seed=seed,
        log_every=min(100, max(5, iterations // 40)),
        save_every=args.save_every,
    )
    return Training(iterations, batch, lr=lr, **values | changes)


def tiny_pipeline(args, world: World, device: torch.device):
    """-> the pipeline trained on this world, now or earlier, and where it is."""
    made_of = (
        repr((world.name, world.prompts, args.vae_iterations, args.teacher_iterations)).encode()
        + world.pictures[::50].numpy().tobytes()
    )
    mark = hashlib.sha256(made_of).hexdigest()[:8]
    folder = args.pipeline or args.out.parent / f"tiny-sdxl-{world.name}-{mark}"
    if (folder / "model_index.json").is_file():
        print(f"the tiny pipeline is there already: {folder}")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        vae = training(args, args.vae_iterations, 4, 1e-3, clip=0.1)
        train_tiny_sdxl(
            world.prompts,
            world.pictures,
            folder,
            vae,
            training(args, args.teacher_iterations, 24, 1e-3),
            device=device,
        )
    return load_pipeline(str(folder), torch.float32, device), str(folder)


def adapted(recipe: Recipe, args, reward) -> Recipe:
    """The recipe with what this run decides: whether runs of the teacher are shared, and without a reward no preference."""
    phases = []
    for phase in recipe.phases:
        extra = tuple(
            (kind, weight) for kind, weight in phase.stage.extra if kind != "preference" or reward
        )
        stage = dataclasses.replace(
            phase.stage, extra=extra, share_run=args.share_run and phase.stage.z_from == "teacher"
        )
        phases.append(dataclasses.replace(phase, stage=stage))
    return dataclasses.replace(recipe, phases=tuple(phases))


def get_scorers(args, world: World, folder: Path, device: torch.device):
    """-> the reward that students may be trained against, the evaluator that measures them where no exact reader can: other seeds, other pictures."""
    if world.pictures is None:
        if not args.clip:
            print("without pictures or --clip there is no reward: preference stages go without it")
        return (CLIPReward(args.clip, device) if args.clip else None), None
    half, scorers = len(world.prompts) // 2, []
    small = torch.cat([shrunk(part) for part in world.pictures.split(256)])
    for n, (name, part) in enumerate(
        (("reward", slice(0, half)), ("evaluator", slice(half, None)))[: 1 if world.scenes else 2]
    ):
        settings = training(args, args.scorer_iterations, 96, 2e-3, seed=n + 1)
        path = folder.parent / f"{folder.name}-{name}-{args.scorer_iterations}.safetensors"
        scorers.append(train_scorer(small[part].to(device), world.prompts[part], settings, path))
    return (
        CLIPReward(args.clip, device) if args.clip else scorers[0]
    ), None if world.scenes else scorers[1]


def shrunk(pictures: Tensor, size: int = 32) -> Tensor:
    """(n, 3, S, S) uint8 -> (n, 3, 32, 32) uint8, which is all that the scorers look at."""
    if pictures.shape[-1] == size:
        return pictures
    return (
        torch.nn.functional.interpolate(
            pictures.float(), size=(size, size), mode="bilinear", antialias=True
        )
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )


def main(argv: list[str]) -> None:
    args, started = parse(argv), time.perf_counter()
    check(args)
    device = pick_device(args.device)
    args.precision = args.precision or (
        "bf16" if args.pretrained and device.type == "cuda" else "fp32"
    )
    print(f"{', '.join(args.recipe)}; preset {args.preset}: {args.cost}")
    world = load_world(args) if not args.pretrained or args.prompts else None
    if args.pretrained:  # before --out is claimed: it may not be there, or be something else
        pipe, source = (
            load_pipeline(
                args.pretrained,
                torch.bfloat16 if args.precision == "bf16" else torch.float32,
                device,
            ),
            args.pretrained,
        )
        args.image_size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    world = world or load_world(args)
    open_out(args)
    if not args.pretrained:
        pipe, source = tiny_pipeline(args, world, device)
    folder = args.out / "pretrained" if args.pretrained else Path(source)
    reward, evaluator = get_scorers(args, world, folder, device)
    taught = time.perf_counter() - started

    sdxl = SDXL(pipe, args.rank, checkpointing=args.checkpointing)
    imageless = world.pictures is None or not any(RECIPES[r](4).needs_images for r in args.recipe)
    scratch = args.out if args.pretrained else None  # what does not fit into memory is kept there
    data = Captioned(
        world.prompts,
        sdxl.encode(world.prompts, folder=scratch),
        None if imageless else sdxl.to_latents(world.pictures, scratch),
    )
    judge_cond = sdxl.encode(world.asked)
    for part in (pipe.text_encoder, pipe.text_encoder_2):
        part.to("cpu")  # all texts are encoded now
    same = {
        "samples": args.samples,
        "seed": args.seed,
        "guidance": args.guidance,
        "pipeline": Path(source).name,
    }
    judge = Judge(args, world, sdxl, judge_cond, reward, evaluator, same)
    measure_teacher(args, judge)
    if reward:
        with torch.no_grad():  # the level to reach is that of the teacher's own pictures
            reward = (
                reward,
                reward(judge.teacher_pictures()[:100].to(device), world.asked[:100]).mean().item(),
            )

    seconds, used, drawn = {}, {}, {}
    for recipe in args.recipe:
        for K in args.steps if not RECIPES[recipe](1).renoise else [None]:
            name = recipe if K is None else f"{recipe}-{K}"
            used[name] = adapted(RECIPES[recipe](K or 4), args, reward)
            seconds[name], pictures = student(
                args, judge, data, used[name], recipe, name, K, reward, source
            )
            drawn |= pictures
    if len(seconds) > 1:
        draw_side_by_side(judge, drawn, args.out / "students.png")
    report(args, judge, world, seconds, used, taught, started, device, source)


def measure_teacher(args, judge: Judge) -> None:
    """The teacher in 25 and fewer steps, and the rows that every student must beat: the teacher's weights in the students' sampler."""
    plain, guide = judge.sdxl.denoiser(), judge.teacher()
    for steps in sorted({25, *args.steps}, reverse=True):
        row = {"model": "teacher", "sampler": "ddim", "steps": steps, "nfe": 2 * steps}
        judge.measure(f"teacher ddim {steps}", "teacher", row, guide, judge.cond, mcm.ddim, steps)
    kinds = {RECIPES[recipe](1).renoise for recipe in args.recipe}
    for steps in sorted(args.steps, reverse=True):
        for name, model, cost in (("undistilled", plain, 1), ("undistilled, guided", guide, 2)):
            if True in kinds:
                row = {"model": name, "sampler": "renoise", "steps": steps, "nfe": cost * steps}
                judge.measure(
                    f"{name} renoise {steps}",
                    "teacher",
                    row,
                    model,
                    judge.cond,
                    mcm.renoise,
                    milestones(steps),
                )
        if False in kinds:  # with guidance this is the teacher's own row
            row = {"model": "undistilled", "sampler": "ddim", "steps": steps, "nfe": steps}
            judge.measure(
                f"undistilled ddim {steps}", "teacher", row, plain, judge.cond, mcm.ddim, steps
            )


def student(
    args,
    judge: Judge,
    data: Captioned,
    recipe: Recipe,
    recipe_name: str,
    name: str,
    K: int | None,
    reward,
    source: str,
) -> tuple[float, dict]:
    """Train one student, save it for stock diffusers, measure it. -> the seconds that training took, some pictures by (name, steps)."""
    sdxl, out = judge.sdxl, args.out / name
    weights = out / ("unet/diffusion_pytorch_model.safetensors" if args.full else LORA_FILE)
    finished = out / "finished.json"
    if args.resume and finished.is_file() and weights.is_file():
        sdxl.load("average", out, args.full)
        seconds = json.loads(finished.read_text())["seconds"]
    else:
        out.mkdir(exist_ok=True)
        iterations = args.iterations or max(
            len(recipe.phases), round(1000 * args.evaluations / (args.batch * recipe.evaluations()))
        )
        settings = training(
            args,
            iterations,
            args.batch,
            args.lr,
            args.seed,
            ema=args.ema,
            accumulate=args.accumulate,
            precision=args.precision,
        )
        seconds = distil(
            sdxl,
            recipe,
            data,
            settings,
            args.guidance_range or args.guidance,
            args.out,
            name,
            args.resume,
            args.full,
            reward,
        )
        sdxl.save(out)
        table = re_noising_timesteps() if recipe.renoise else uniform_timesteps([K])
        MCMScheduler.like(sdxl.pipe.scheduler, table).save_pretrained(out)
        write(out / "README.md", card(args, recipe, recipe_name, out, source, K or 4, iterations))
        write(finished, json.dumps({"seconds": round(seconds, 1)}))
    cond = judge.cond
    if args.guidance_range:
        cond = cond._replace(omega=torch.full((len(cond.states),), args.guidance - 1.0))
    for steps in sorted(args.steps if K is None else [K], reverse=True):
        row = {
            "model": "student",
            "recipe": name,
            "sampler": "renoise" if recipe.renoise else "ddim",
            "steps": steps,
            "nfe": steps,
        }
        times, solver = (milestones(steps), mcm.renoise) if recipe.renoise else (steps, mcm.ddim)
        judge.measure(
            f"{name} {steps}", digest(weights), row, sdxl.denoiser("average"), cond, solver, times
        )
    pictures = draw_rows(args, judge, name, recipe, K, cond)
    for which in [w for w in sdxl.unets if w]:
        sdxl.remove(which)
    for state in args.out.glob(f"{name}-[0-9].state.*safetensors"):
        state.unlink()
    return seconds, pictures


def draw_rows(
    args, judge: Judge, name: str, recipe: Recipe, K: int | None, cond
) -> dict[tuple[str, int], Tensor]:
    """NAME.png: the teacher's 25 steps, then the student's, the same captions and noise down each column."""
    n, sdxl = min(10, len(judge.world.asked)), judge.sdxl
    part = slice(0, n)
    drawn = {}
    for steps in sorted(args.steps if K is None else [K], reverse=True):
        times, solver = (milestones(steps), mcm.renoise) if recipe.renoise else (steps, mcm.ddim)
        drawn[name, steps] = generate(
            sdxl,
            sdxl.denoiser("average"),
            rows(cond, part),
            judge.z[part],
            solver,
            times,
            args.seed,
            "",
        )[0]
    labelled = {
        f"{name}, {steps} step{'s' * (steps > 1)}": pictures
        for (name, steps), pictures in drawn.items()
    }
    plots.sample_rows(
        {"teacher, 25 steps": judge.teacher_pictures()[part]} | labelled,
        args.out / f"{name}.png",
        columns=judge.world.asked[part],
    )
    return drawn


def draw_side_by_side(judge: Judge, drawn: dict[tuple[str, int], Tensor], path: Path) -> None:
    """students.png: the teacher's 25 steps, then every student in 4 steps, 2 and 1, the same captions and noise down each column."""
    rows_ = {"teacher, 25 steps": judge.teacher_pictures()[: len(next(iter(drawn.values())))]}
    for wanted in (4, 2, 1):
        rows_ |= {
            f"{name}, {steps} step{'s' * (steps > 1)}": pictures
            for (name, steps), pictures in drawn.items()
            if steps == wanted
        }
    plots.sample_rows(rows_, path, columns=judge.world.asked[: len(rows_["teacher, 25 steps"])])


def card(
    args, recipe: Recipe, recipe_name: str, out: Path, source: str, steps: int, iterations: int
) -> str:
    eta = 1.0 if recipe.renoise else 0.0
    if args.full:
        load = f'pipe.unet = UNet2DConditionModel.from_pretrained("{out}/unet").to(pipe.device)'
        imports = "from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel"
    else:
        load, imports = (
            f'pipe.load_lora_weights("{out}")',
            "from diffusers import StableDiffusionXLPipeline",
        )
    guidance = args.guidance if args.guidance_range else 0
    return f"""# {recipe_name} student of {Path(source).name}

{recipe.summary[0].upper() + recipe.summary[1:]}.

```python
{imports}
from mcm.latent.scheduler import MCMScheduler

pipe = StableDiffusionXLPipeline.from_pretrained("{source}")
{load}
pipe.scheduler = MCMScheduler.from_pretrained("{out}")
image = pipe("a small red circle above a large blue square on black", num_inference_steps={steps}, guidance_scale={guidance}, eta={eta}).images[0]
image.save("image.png")
```

eta = 1 noises the prediction afresh at every step, which is how a recipe with one model for all step counts was trained; eta = 0 walks on along DDIM, as a recipe with one model per
K does. Steps: {", ".join(MCMScheduler.from_pretrained(out).table and map(str, sorted(MCMScheduler.from_pretrained(out).table)))}. No guidance is needed: the teacher's (w = {args.guidance_range or args.guidance}) was distilled into the weights.
Rank {args.rank}, alpha {args.rank}; seed {args.seed}; {iterations} iterations of {args.batch}.
"""


def report(
    args,
    judge: Judge,
    world: World,
    seconds: dict[str, float],
    used: dict[str, Recipe],
    taught: float,
    started: float,
    device: torch.device,
    source: str,
) -> None:
    rows_ = [entry["row"] for entry in judge.rows.values()]
    alignment = (
        "pictures that an exact reader finds to show all that the caption says"
        if world.scenes
        else "own caption ranked first among 32 by a scorer that no student saw"
    )
    results = {
        "data": world.name,
        "pipeline": Path(source).name,
        "seed": args.seed,
        "device": str(device),
        "hardware": describe(device),
        "command": recorded("run_latent.py", args.argv),
        "versions": {
            "mcm": mcm.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "metric": {
            "name": "frechet",
            "features": "leading principal components of the held-out pictures' latents, each of variance 1",
            "dim": 16,
            "n_generated": len(world.asked),
            "n_reference": 0 if world.real is None else len(world.real),
            "reference": "held-out",
            "alignment": alignment,
            "floor": None
            if judge.real is None
            else metrics.frechet(judge.real[::2], judge.real[1::2]),
        },
        "rows": rows_,
        "seconds": {
            "teacher": round(taught, 1),
            "students": seconds,
            "total": round(time.perf_counter() - started, 1),
        },
        "settings": args.values
        | {"guidance_range": args.guidance_range, "full": args.full, "precision": args.precision},
        "recipes": {
            name: dataclasses.asdict(recipe) | {"evaluations_per_sample": recipe.evaluations()}
            for name, recipe in used.items()
        },
    }
    write(args.out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write(args.out / "results.md", table(results))
    if world.real is not None:
        plots.quality_vs_steps(results, args.out / "quality_vs_steps.png")
    plots.training_curves(args.out / "log.jsonl", args.out / "training.png")
    print("\n" + table(results))
    print(
        f"{args.out}: results.json, results.md, pictures, and a folder with a model card for each student"
    )


def run(argv: list[str]) -> int:
    return cli.run("run_latent.py", main, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
