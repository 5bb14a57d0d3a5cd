"""The students' sampler for stock diffusers pipelines: MCMScheduler.from_pretrained(folder)."""

import inspect
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import InputError
from ..sampling import noised
from ..schedule import DiscreteSchedule
from ..solvers import ddim, expand
from .recipes import MILESTONES

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x"}
"""diffusers' names for what a network predicts, and ours."""


def prediction_of(config: dict) -> str:
    """What the network predicts, in our words, by the configuration of a scheduler.

    Raises InputError for what is not supported.
    """
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise InputError(f"prediction type {kind!r} is not supported: {known} are")
    if kind == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise InputError(
            "prediction type 'epsilon' with rescale_betas_zero_snr: there is no image in pure "
            "noise that it could be told from; use 'v_prediction', or do not rescale"
        )
    return PREDICTIONS[kind]


def re_noising_timesteps(train_steps: int = 1000) -> dict[str, list[int]]:
    """TLCM's table (arXiv 2406.05768, its released sampler): timesteps for 1 to 8 steps."""
    eighths = MILESTONES.items()
    return {str(k): [round(i * train_steps / 8) - 1 for i in times] for k, times in eighths}


def uniform_timesteps(steps: Sequence[int], train_steps: int = 1000) -> dict[str, list[int]]:
    """The upper ends of K equal segments (arXiv 2403.06807, Algorithm 2), for each K in steps."""
    return {str(k): [round(i * train_steps / k) - 1 for i in range(k, 0, -1)] for k in steps}


class MCMScheduler(SchedulerMixin, ConfigMixin):
    """Few-step sampling at the timesteps that the training used.

    timesteps: number of steps (as a string) -> the timesteps, falling. The other arguments describe
        the noise schedule and prediction type of the base model; `like` takes them over. Raises
        InputError for a prediction type that cannot be.

    step(..., eta): as in TCD (arXiv 2402.19159), where it is called gamma; pipelines forward the
    name eta. 0 walks on along DDIM (MCM's Algorithm 2); 1 noises x_hat afresh (consistency
    sampling); between, DDIM goes to (1 - eta) of the next time and noise is added back.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        timesteps: dict[str, list[int]] | None = None,
    ):
        same = inspect.signature(DDIMScheduler.__init__).parameters
        base = DDIMScheduler(**{k: v for k, v in self.config.items() if k in same})
        self.prediction = prediction_of(self.config)
        self.alphas_cumprod = base.alphas_cumprod
        self.schedule = DiscreteSchedule(self.alphas_cumprod)
        timesteps = timesteps or re_noising_timesteps(num_train_timesteps)
        self.table = {int(k): list(v) for k, v in timesteps.items()}
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    @classmethod
    def like(
        cls, scheduler: SchedulerMixin, timesteps: dict[str, list[int]] | None = None
    ) -> "MCMScheduler":
        """With the noise schedule of the scheduler that came with a pipeline."""
        names = set(inspect.signature(cls.__init__).parameters) - {"self", "timesteps"}
        taken = {name: value for name, value in scheduler.config.items() if name in names}
        return cls(**taken, timesteps=timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ):
        """Take the table's timesteps for this number of steps, or the ones given.

        Raises InputError for a number that is not in the table, or for timesteps that do not fall.
        """
        if timesteps is None:
            if num_inference_steps not in self.table:
                known = ", ".join(map(str, sorted(self.table)))
                raise InputError(
                    f"not trained for {num_inference_steps} steps: use {known}, or pass timesteps="
                )
            timesteps = self.table[num_inference_steps]
        timesteps = [int(t) for t in timesteps]
        falling = sorted(set(timesteps), reverse=True) == timesteps
        if not timesteps or not falling or timesteps[-1] < 0 or timesteps[0] >= len(self):
            raise InputError(
                f"timesteps {timesteps} must fall strictly and lie between 0 and {len(self) - 1}"
            )
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.tensor(timesteps, device=device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From the network's output at this timestep to the sample at the next one.

        From the last timestep, to x_hat itself. Raises InputError for a timestep that is not set,
        or an eta that is not in [0, 1].
        """
        if not 0 <= eta <= 1:
            raise InputError(f"eta {eta} must be in [0, 1]: 0 is DDIM, 1 noises x_hat afresh")
        place = (self.timesteps == timestep).nonzero()
        if len(place) != 1:
            known = self.timesteps.tolist()
            raise InputError(f"timestep {int(timestep)} is none of {known}: call set_timesteps")
        t = self._time(int(timestep), len(sample))
        following = self.timesteps[place[0, 0] + 1 :]
        z = sample.float()
        x_hat = Denoiser(lambda *_: model_output, self.schedule, self.prediction)(z, t)
        previous = x_hat
        if len(following):
            after = self._time(int(following[0]), len(z))
            between = (1 - eta) * after
            previous = ddim(x_hat, z, t, between, self.schedule)
        if len(following) and eta > 0:
            # z_after given z_between: the forward process from the one to the other
            kept = self.schedule(after)[0] / self.schedule(between)[0]
            noise = randn_tensor(z.shape, generator=generator, device=z.device)
            previous = expand(kept, z) * previous + expand(torch.sqrt(1 - kept**2), z) * noise
        previous = previous.to(sample.dtype)
        return SchedulerOutput(previous) if return_dict else (previous,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if not timesteps.numel():
            raise InputError(
                "no timestep to start from: in image-to-image strength x num_inference_steps must "
                "be at least 1"
            )
        x = original_samples.float()
        t = timesteps.cpu().double().add(1).div(len(self)).expand(len(x))
        return noised(x, t, noise.float(), self.schedule).to(original_samples.dtype)

    def _time(self, timestep: int, n: int) -> Tensor:
        """(n,), on the CPU, as all coefficients: Apple's GPUs have no float64."""
        return torch.full((n,), (timestep + 1) / len(self), dtype=torch.float64)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
