#!/usr/bin/env python3
"""What distilling SDXL costs: seconds per training step and peak memory of each recipe, on a UNet
of SDXL-base's size with random weights (no download).

    python benchmarks/sdxl_cost.py --out results/sdxl_cost.json
        on a GPU, 1024x1024, bf16
    python benchmarks/sdxl_cost.py --size tiny --out cost.json
        anywhere, to see that it works
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mcm.errors import InputError
from mcm.lab.checkpoint import write
from mcm.lab.options import hardware, pick_device
from mcm.lab.run import Training
from mcm.latent.distil import Distillation, distil
from mcm.latent.recipes import RECIPES
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


def measure(
    size: str,
    recipe: str,
    batch: int,
    checkpointing: bool,
    rank: int,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict:
    """One row per phase of the recipe: seconds per step (the fastest third, after the first two)
    and peak memory.
    """
    sdxl = SDXL(pipeline(size, device, dtype), rank, checkpointing=checkpointing)
    if checkpointing:
        sdxl.unet.train()
    n, latent = 8, sdxl.size
    cond = Condition(
        torch.randn(n, 77, 2048),
        torch.randn(n, 1280),
        torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).expand(n, 6),
    )
    latents = torch.randn(n, 4, latent, latent)
    rows = []
    made = RECIPES[recipe](4)
    for number, phase in enumerate(made.phases):
        one = made.__class__((phase,), made.renoise, made.summary)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        settings = Training(
            steps,
            batch,
            lr=1e-4,
            save_every=10**9,
            log_every=1,
            precision="bf16" if dtype == torch.bfloat16 else "fp32",
        )
        with tempfile.TemporaryDirectory() as folder:
            job = Distillation(
                sdxl,
                ["a"] * n,
                cond,
                latents,
                settings,
                Path(folder),
                "x",
                guidance=8.0,
                reward=lambda images, prompts: images.mean((1, 2, 3)),
                reward_level=1.0,
            )
            distil(job, one)
            lines = [
                json.loads(line)
                for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
            ]
        took = sorted(line["seconds"] for line in lines[2:] or lines)
        seconds = sum(took[: max(1, len(took) // 3)]) / max(1, len(took) // 3)
        rows.append(
            {
                "recipe": recipe,
                "phase": number + 1,
                "batch": batch,
                "checkpointing": checkpointing,
                "seconds_per_step": round(seconds, 4),
                "images_per_second": round(batch / seconds, 3),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
            }
        )
        for which in [w for w in sdxl.unets if w]:
            sdxl.remove(which)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
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
    rank = min(args.rank, 16) if args.size == "tiny" else args.rank
    results = (
        json.loads(args.out.read_text(encoding="utf-8"))
        if args.out.is_file()
        else {"hardware": hardware(device), "size": args.size, "rank": rank, "rows": []}
    )
    have = {(r["recipe"], r["batch"], r["checkpointing"]) for r in results["rows"]}
    for batch in args.batches:
        for checkpointing in (True, False):
            for recipe in args.recipes:
                if (recipe, batch, checkpointing) in have:
                    continue
                try:
                    results["rows"] += measure(
                        args.size, recipe, batch, checkpointing, rank, args.steps, device, dtype
                    )
                except torch.cuda.OutOfMemoryError:
                    results["rows"].append(
                        {
                            "recipe": recipe,
                            "batch": batch,
                            "checkpointing": checkpointing,
                            "seconds_per_step": None,
                            "peak_gib": "does not fit",
                        }
                    )
                except InputError as error:
                    print(f"{recipe}: {error}")
                write(args.out, json.dumps(results, indent=1) + "\n")
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
