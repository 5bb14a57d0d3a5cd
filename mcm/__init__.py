"""Multistep Consistency Models (arXiv 2403.06807) and their kin, from one loss."""

from .denoiser import Denoiser, GaussianMixture, guided, load, save
from .errors import InputError
from .losses import LossOutput, consistency_loss, diffusion_loss
from .recipes import Stage
from .sampling import sample
from .schedule import CosineSchedule, DiscreteSchedule
from .solvers import addim, ddim, er_sde, inverse_ddim, renoise
from .unet import UNet

__version__ = "0.1.0"

__all__ = [
    "CosineSchedule",
    "Denoiser",
    "DiscreteSchedule",
    "GaussianMixture",
    "InputError",
    "LossOutput",
    "Stage",
    "UNet",
    "addim",
    "consistency_loss",
    "ddim",
    "diffusion_loss",
    "er_sde",
    "guided",
    "inverse_ddim",
    "load",
    "renoise",
    "sample",
    "save",
]
