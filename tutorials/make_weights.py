"""Make the weights that notebooks 4 and 5 load, in half precision: about an hour on 2 CPU cores. In
the repository's folder:

    python -m tutorials.make_weights           all of them
    python -m tutorials.make_weights digits    a teacher and students of 1, 2, 4, 8 steps
    python -m tutorials.make_weights latent    a pipeline, and its students by MLCM and TLCM

What is finished is kept in runs/tutorials; run it again to go on after an interruption.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import run_cifar
import run_latent
from mcm.lab.checkpoint import read_safetensors, write_safetensors
from mcm.latent.sdxl import LORA_FILE, load_pipeline
from mcm.latent.tiny_sdxl import train_tiny_sdxl

WORK, WEIGHTS = Path("runs/tutorials"), Path(__file__).parent / "weights"


def digits() -> None:
    out = WORK / "digits"
    resume = ["--resume"] * (out / "run.json").is_file()
    if run_cifar.run(
        ["--data", "digits", "--preset", "long", "--channels", "32", "--out", str(out), *resume]
    ):
        sys.exit(1)
    (WEIGHTS / "digits").mkdir(parents=True, exist_ok=True)
    for name in ("teacher", "cd-1", "cd-2", "cd-4", "cd-8"):
        tensors, metadata = read_safetensors(out / f"{name}.safetensors")
        write_safetensors(
            WEIGHTS / "digits" / f"{name}.safetensors",
            {k: v.half() for k, v in tensors.items()},
            metadata,
        )


def latent() -> None:
    out, pipeline = WORK / "latent", WORK / "pipeline"
    config = run_latent.parse([])
    if not (pipeline / "model_index.json").is_file():
        # smaller than run_latent.py's, to be light in the repository
        data = run_latent.load_data(config, config.image_size)
        vae = run_latent.training(config, config.vae_iterations, 4, 1e-3, clip=0.1)
        unet = run_latent.training(config, 4000, 24, 1e-3)
        train_tiny_sdxl(data.prompts, data.images, pipeline, vae, unet, channels=(48, 96))
    names, resume = ["mlcm", "tlcm"], ["--resume"] * (out / "run.json").is_file()
    if run_latent.run(
        [
            "--pipeline",
            str(pipeline),
            "--recipe",
            *names,
            "--rank",
            "16",
            "--evaluations",
            "180",
            "--out",
            str(out),
            *resume,
        ]
    ):
        sys.exit(1)
    shutil.rmtree(WEIGHTS / "latent", ignore_errors=True)
    pipe = load_pipeline(str(pipeline), torch.float16, torch.device("cpu"))
    pipe.save_pretrained(WEIGHTS / "latent" / "pipeline", max_shard_size="1400KB")
    for name in names:
        folder = WEIGHTS / "latent" / name
        folder.mkdir()
        with safe_open(out / name / LORA_FILE, "pt") as file:
            tensors, metadata = (
                {key: file.get_tensor(key).half() for key in file.keys()},
                file.metadata(),
            )
        save_file(tensors, folder / LORA_FILE, metadata)
        shutil.copy(out / name / "scheduler_config.json", folder)


if __name__ == "__main__":
    for part in sys.argv[1:] or ("digits", "latent"):
        {"digits": digits, "latent": latent}[part]()
