#!/usr/bin/env python3
"""What distilling SDXL costs: seconds per training step and peak memory of each recipe, on a UNet
of SDXL-base's size with random weights (no download).

    python benchmarks/sdxl_cost.py --out results/sdxl_cost.json
        on a GPU, 1024x1024, bf16
    python benchmarks/sdxl_cost.py --size tiny --out cost.json
        anywhere, to see that it works; with thin, to see what the host has to do
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.timing import profiled
from mcm.lab.checkpoint import write
from mcm.lab.options import hardware, pick_device
from mcm.lab.run import Training
from mcm.latent.distil import Distillation, add_students, train_phase
from mcm.latent.recipes import RECIPES, Phase, Recipe, evaluations
from mcm.latent.sdxl import SDXL, Condition

SIZES = {
    "base": dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        projection_class_embeddings_input_dim=2816,
        addition_time_embed_dim=256,
    ),
    "thin": dict(  # as deep as base, so as many operations: what the host does, seen anywhere
        sample_size=8,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 4),
        cross_attention_dim=64,
        projection_class_embeddings_input_dim=2816,
        addition_time_embed_dim=256,
    ),
    "tiny": dict(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        norm_num_groups=16,
        cross_attention_dim=2048,
        projection_class_embeddings_input_dim=1280 + 48,
        addition_time_embed_dim=8,
    ),
}


def pipeline(size: str, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """The parts of an SDXL pipeline that training touches, on the device from the start."""
    with torch.device(device):
        unet = UNet2DConditionModel(
            **SIZES[size], use_linear_projection=True, addition_embed_type="text_time"
        ).to(dtype)
        channels = (128, 256, 512, 512) if size == "base" else (32, 32, 32)
        kinds = {
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        }
        vae = AutoencoderKL(
            block_out_channels=channels, layers_per_block=2, scaling_factor=0.13025, **kinds
        ).to(dtype)
    vae.enable_gradient_checkpointing()
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    return SimpleNamespace(
        unet=unet,
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        config=SimpleNamespace(force_zeros_for_empty_prompt=True),
        scheduler=scheduler,
        vae_scale_factor=2 ** (len(channels) - 1),
    )


def phases_of(recipe: Recipe) -> Iterator[tuple[int, Phase]]:
    """Numbered from 1, without those that cost what an earlier one does."""
    seen = set()
    for number, phase in enumerate(recipe.phases, 1):
        kind = (phase.states, phase.objectives, phase.rollout_steps, evaluations(phase))
        if kind not in seen:
            seen.add(kind)
            yield number, phase


def job_for(sdxl: SDXL, batch: int, steps: int, folder: Path) -> Distillation:
    """A training of so many steps, from noise in place of texts and images."""
    n = 8
    width = sdxl.unet.config.cross_attention_dim
    time_ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).expand(n, 6)
    cond = Condition(torch.randn(n, 77, width), torch.randn(n, 1280), time_ids)
    latents = torch.randn(n, 4, sdxl.size, sdxl.size)
    precision = "bf16" if sdxl.unet.dtype == torch.bfloat16 else "fp32"
    settings = Training(steps, batch, lr=1e-4, save_every=0, log_every=1, precision=precision)
    job = Distillation(sdxl, ["a"] * n, cond, latents, settings, folder, "x", guidance=8.0)
    job.reward, job.reward_level = lambda images, prompts: images.mean((1, 2, 3)), 1.0
    return job


def measure(job: Distillation, phase: Phase, name: str) -> dict:
    """Seconds of a step (the fastest third of all but the first) and peak memory; on a GPU also how
    long that was busy, and with how many kernels. The job has its students.
    """
    sdxl, settings = job.sdxl, job.settings
    if sdxl.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train_phase(job, phase, settings, name)
    log = (job.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in map(json.loads, log) if line["model"] == name]
    took = sorted(line["seconds"] for line in lines[1:])
    took = took[: max(1, len(took) // 3)]
    row = {"batch": settings.batch, "seconds_per_step": sum(took) / len(took)}
    if sdxl.device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        drop_critics(sdxl)
        one = replace(settings, iterations=1)
        row |= profiled(partial(train_phase, job, phase, one, "profiled"), sdxl.device)[0]
    drop_critics(sdxl)
    return row


def drop_critics(sdxl: SDXL) -> None:
    for name in {"fake", "critic"} & sdxl.unets.keys():
        sdxl.remove(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    how = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--checkpointing", **how)
    parser.add_argument("--device")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a JSON file; rows that it holds already are kept, so that a run cut short goes on",
    )
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rank = args.rank if args.size == "base" else min(args.rank, 16)
    results = {"hardware": hardware(device), "torch": torch.__version__, "rows": []}
    results |= {"size": args.size, "rank": rank, "checkpointing": args.checkpointing}
    if args.out.is_file():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    sdxl = SDXL(pipeline(args.size, device, dtype), rank, checkpointing=args.checkpointing)
    if args.checkpointing:
        sdxl.unet.train()
    for name in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            job = job_for(sdxl, 1, args.steps, Path(folder))
            add_students(job, RECIPES[name](4))
            for batch, (number, phase) in product(args.batches, phases_of(RECIPES[name](4))):
                about = {"recipe": name, "phase": number, "batch": batch}
                if any(about.items() <= row.items() for row in results["rows"]):
                    continue
                settings = replace(job.settings, batch=batch)
                try:
                    row = measure(replace(job, settings=settings), phase, f"{batch}-{number}")
                except torch.OutOfMemoryError:
                    drop_critics(sdxl)
                    row = {"peak_gib": "does not fit"}
                results["rows"].append(about | row)
                print(results["rows"][-1], flush=True)
                write(args.out, json.dumps(results, indent=1) + "\n")
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
        sdxl.remove_all()


if __name__ == "__main__":
    main()
