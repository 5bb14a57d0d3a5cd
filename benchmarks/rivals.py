#!/usr/bin/env python3
"""What the teacher's own weights do in few steps, by every sampler that needs no training: DDIM,
DPM-Solver++ (2M, diffusers'), re-noised; with guidance, whose steps count twice, and without.

    python benchmarks/rivals.py --samples 1000 --out runs/rivals

Options are those of run_latent.py. Prints a table, and writes it to OUT/rivals.json.
"""

import json
import sys
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import run_latent
from mcm.denoiser import select
from mcm.lab import checkpoint, evaluation, options
from mcm.latent.sdxl import SDXL, load_pipeline
from mcm.solvers import eps_hat, expand


@torch.no_grad()
def dpm_solver(evaluator: run_latent.Evaluator, model: nn.Module, steps: int) -> Tensor:
    """-> latents from the evaluator's noise, by diffusers' DPM-Solver++ 2M from t = 1."""
    config = evaluator.sdxl.pipe.scheduler.config
    how = {"timestep_spacing": "trailing", "algorithm_type": "dpmsolver++", "solver_order": 2}
    parts = []
    for start in range(0, len(evaluator.z), 64):
        scheduler = DPMSolverMultistepScheduler.from_config(config, **how)
        scheduler.set_timesteps(steps)
        index = slice(start, start + 64)
        z, cond = evaluator.z[index], select(evaluator.cond, index)
        for timestep in scheduler.timesteps:
            t = (int(timestep) + 1) / len(scheduler)
            t = torch.full((len(z),), t, dtype=torch.float64)
            output = eps_hat(model(z, t, cond), z, t, model.schedule)
            if evaluator.sdxl.prediction == "v":
                alpha, sigma = (expand(a, z) for a in model.schedule(t))
                output = (output - sigma * z) / alpha
            z = scheduler.step(output, timestep, z).prev_sample
        parts.append(z)
    return torch.cat(parts)


def main(argv: list[str]) -> None:
    config = run_latent.parse(argv)
    device = torch.device("cpu")
    data = run_latent.load_data(config, config.image_size)
    checkpoint.open_out(config.out, run_latent.must_match(config, data), config.resume)
    source = run_latent.tiny_pipeline(config, data, device)
    sdxl = SDXL(load_pipeline(str(source), torch.float32, device), config.rank)
    reward, judge = run_latent.make_scorers(config, data, source, device)
    evaluator = run_latent.Evaluator(config, data, sdxl, reward, judge, source.name)
    target = evaluator.teacher_images()
    rows = []
    for sampler in ("ddim", "dpm++ 2m", "renoise"):
        for guided in (False, True):
            model = evaluator.teacher() if guided else sdxl.denoiser()
            for nfe in (n for n in config.steps if n > 1 or not guided):
                steps = nfe // 2 if guided else nfe
                began = time.perf_counter()
                if sampler == "dpm++ 2m":
                    latents = dpm_solver(evaluator, model, steps)
                else:
                    latents = evaluator.sample(model, len(evaluator.z), sampler, steps)
                name = "guided" if guided else "plain"
                row = run_latent.row_of(name, sampler, steps, 2 if guided else 1)
                row |= evaluator.figures(evaluator.decode(latents), target)
                row["seconds_per_image"] = (time.perf_counter() - began) / len(latents)
                rows.append(row)
                print(evaluation.row_line(row), flush=True)
    about = options.provenance("benchmarks/rivals.py", argv, device, run_latent.PACKAGES)
    checkpoint.write(config.out / "rivals.json", json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(options.run("rivals.py", main, sys.argv[1:]))
