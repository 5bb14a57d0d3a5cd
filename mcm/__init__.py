"""Multistep Consistency Models (arXiv 2403.06807) and their relatives, from one loss.

Three rooms. This folder is the paper; each file needs only those above it:

    schedule   t to alpha and sigma
    solvers    one step along a trajectory: DDIM, aDDIM, ER-SDE
    unet       the network, by hand
    denoiser   network to x_hat; guidance
    mixture    an exact denoiser
    method     a training method as data
    sampling   noise to images
    losses     the diffusion loss and the one consistency loss

`mcm.lab` is how an experiment is run, `mcm.latent` the same loss on an SDXL pipeline.
"""

from .denoiser import Denoiser as Denoiser
from .denoiser import guided as guided
from .errors import InputError as InputError
from .lab.checkpoint import load as load
from .lab.checkpoint import save as save
from .losses import LossOutput as LossOutput
from .losses import consistency_loss as consistency_loss
from .losses import diffusion_loss as diffusion_loss
from .method import Method as Method
from .method import diffusion as diffusion
from .method import multistep as multistep
from .mixture import GaussianMixture as GaussianMixture
from .sampling import sample as sample
from .schedule import CosineSchedule as CosineSchedule
from .schedule import DiscreteSchedule as DiscreteSchedule
from .solvers import addim as addim
from .solvers import ddim as ddim
from .solvers import er_sde as er_sde
from .solvers import inverse_ddim as inverse_ddim
from .solvers import renoise as renoise
from .unet import UNet as UNet

__version__ = "0.2.0"

_LATENT = {"SDXL": "sdxl", "MCMScheduler": "scheduler", "RECIPES": "recipes", "distil": "distil"}


def __getattr__(name: str):
    """Names of `mcm.latent`, on demand: pixels need no diffusers."""
    if name not in _LATENT:
        raise AttributeError(f"module 'mcm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".latent.{_LATENT[name]}", __name__), name)
