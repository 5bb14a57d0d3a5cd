"""Apple's GPUs have no float64. None is at hand, so here is a device that is one in this respect:
PyTorch's "meta", whose tensors have no values, with an error for each that is float64.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mcm
from mcm import losses, sampling, schedule
from mcm.lab.data import digits
from mcm.lab.run import DenoiserRun, Training

APPLE = torch.device("meta")


class NoFloat64(TorchDispatchMode):
    """Counts the operations on the device; raises where one is given or makes a float64 tensor."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs or {}, result)):
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                self.seen += 1
                if value.dtype in (torch.float64, torch.complex128):
                    raise TypeError(f"{function}: float64 on the device")
        return result


@pytest.fixture
def apple(monkeypatch):
    """The device is taken for Apple's where the code asks."""

    def told(device):
        return schedule.time_dtype(torch.device("mps") if device == APPLE else device)

    for module in (sampling, losses):
        monkeypatch.setattr(module, "time_dtype", told)
    with NoFloat64() as mode:
        yield
    assert mode.seen > 100  # it was really used


def denoiser(schedule=None, prediction="v", K=None):
    with torch.device(APPLE):
        network = mcm.UNet(8, 1, 32, (1,), 1, (8,), 10)
    schedule = schedule or mcm.CosineSchedule()
    return mcm.Denoiser(network, schedule, prediction, student_steps=K)


SCHEDULES = [
    (mcm.CosineSchedule(), "v"),
    (mcm.CosineSchedule.interpolated(64, 32, 64), "v"),
    (mcm.DiscreteSchedule.scaled_linear(), "epsilon"),
]


def test_the_device_refuses_float64():
    with pytest.raises(TypeError, match="float64 on the device"), NoFloat64():
        torch.zeros(3, device=APPLE).double()


@pytest.mark.parametrize("schedule, prediction", SCHEDULES, ids=["cosine", "shifted", "discrete"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"x_var": None},
        {"x_var": "prior"},
        {"sub_steps": 2, "teacher_eta": "er5", "solver_order": 2},
    ],
    ids=str,
)
def test_losses_and_their_gradients(apple, schedule, prediction, changes):
    method = mcm.Method(4, (16, 64), **changes)
    student = denoiser(schedule, prediction, K=4)
    teacher = mcm.guided(denoiser(schedule, prediction), 2.0, torch.tensor(10, device=APPLE))
    x = torch.randn(4, 1, 8, 8, device=APPLE)
    labels = torch.arange(4, device=APPLE)
    for loss in (
        mcm.diffusion_loss(student, x, labels),
        mcm.consistency_loss(student, x, labels, method, teacher=teacher, progress=0.3),
        mcm.consistency_loss(student, x, labels, method),
    ):
        assert loss.loss.device == APPLE and loss.loss.dtype == torch.float32
        loss.loss.backward()


@pytest.mark.parametrize("schedule, prediction", SCHEDULES, ids=["cosine", "shifted", "discrete"])
def test_the_inverse_of_a_step(apple, schedule, prediction):
    z = torch.randn(3, 1, 8, 8, device=APPLE)
    t = torch.full((3,), 0.75, device=APPLE)
    assert mcm.inverse_ddim(z, z, t, t / 2, schedule).dtype == torch.float32
    for _ in range(20):  # enough to be counted
        mcm.ddim(z, z, t, t / 2, schedule)


@pytest.mark.parametrize("solver", [mcm.ddim, mcm.addim, mcm.renoise, mcm.er_sde])
@pytest.mark.parametrize("schedule, prediction", SCHEDULES, ids=["cosine", "shifted", "discrete"])
def test_sampling(apple, schedule, prediction, solver):
    z = torch.randn(3, 1, 8, 8, device=APPLE)
    labels = torch.zeros(3, dtype=torch.long, device=APPLE)
    model = denoiser(schedule, prediction)
    images = mcm.sample(model, z, 4, labels, solver)
    assert images.device == APPLE and images.dtype == torch.float32


class Unfused(torch.optim.AdamW):
    def __init__(self, weights, lr, **options):
        super().__init__(weights, lr, **options | {"fused": False})

    def step(self):
        assert self.found_inf.device == APPLE
        del self.found_inf  # only the fused kernel looks at it
        super().step()


def test_a_training_run(apple, tmp_path, monkeypatch):
    """The loop with its optimizer and averages. Its log takes all values to the CPU, and has to be
    left out here, where there are none; so has the optimizer's fused kernel.
    """
    monkeypatch.setattr(torch.optim, "AdamW", Unfused)
    settings = Training(iterations=3, batch=4, log_every=100, save_every=0, augment=True)
    student = denoiser(K=4)
    data = digits().to(APPLE)
    run = DenoiserRun("student", student, settings, tmp_path)
    teacher = run.frozen(denoiser())
    method = mcm.Method(4, (16, 64))
    for _ in run:
        for x, labels, t, noise in run.parts(data, 0.1):
            how = {"teacher": teacher, "progress": run.progress}
            run.backward(
                mcm.consistency_loss(run.model, x, labels, method, t=t, noise=noise, **how)
            )
        run.update()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_scheduler_of_pipelines(apple, eta):
    diffusers = pytest.importorskip("diffusers")
    from mcm.latent.scheduler import MCMScheduler

    base = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085)
    scheduler = MCMScheduler.from_config(base.config)
    scheduler.set_timesteps(4)
    z = torch.randn(2, 4, 8, 8, device=APPLE)
    noise = torch.randn(2, 4, 8, 8, device=APPLE)
    for timestep in scheduler.timesteps.tolist():
        z = scheduler.step(noise, timestep, z, eta=eta).prev_sample
    assert z.device == APPLE and z.dtype == torch.float32
