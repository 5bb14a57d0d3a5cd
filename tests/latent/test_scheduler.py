import diffusers
import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler
from torch.utils._python_dispatch import TorchDispatchMode

import mcm
from mcm.latent.scheduler import MCMScheduler, re_noising_timesteps, uniform_timesteps

TLCM = {
    1: [999],
    2: [999, 499],
    3: [999, 499, 124],
    4: [999, 749, 499, 124],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
}


def walk(scheduler, z, network, **options):
    for timestep in scheduler.timesteps:
        z = scheduler.step(network(z, timestep), timestep, z, **options).prev_sample
    return z


def network(z, timestep):
    """Something like a prediction of noise."""
    return torch.tanh(z * (0.3 + timestep / 1500))


def test_tables():
    scheduler = MCMScheduler()
    for steps, timesteps in TLCM.items():
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == timesteps and scheduler.num_inference_steps == steps
    assert uniform_timesteps([1, 4]) == {"1": [999], "4": [999, 749, 499, 249]}
    assert re_noising_timesteps() == {str(k): v for k, v in MCMScheduler().table.items()}
    scheduler.set_timesteps(timesteps=[900, 300])
    assert scheduler.timesteps.tolist() == [900, 300]


def test_without_noise_it_is_the_librarys_sampler():
    scheduler = MCMScheduler(timesteps=uniform_timesteps([4]))
    scheduler.set_timesteps(4)
    z = torch.randn(3, 4, 8, 8)
    model = mcm.Denoiser(
        lambda x, t, cond: torch.stack([network(a, b) for a, b in zip(x, t)]),
        mcm.DiscreteSchedule(scheduler.alphas_cumprod),
        "epsilon",
    )
    assert torch.allclose(walk(scheduler, z, network), mcm.sample(model, z, 4), atol=1e-4)


def test_full_noise_is_diffusers_lcm_scheduler_up_to_its_boundary_term():
    ours, theirs = MCMScheduler(), LCMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    ours.set_timesteps(4)
    theirs.set_timesteps(timesteps=[999, 749, 499, 124])
    z = torch.randn(2, 4, 8, 8)
    a = walk(ours, z, network, eta=1.0, generator=torch.manual_seed(5))
    b = walk(theirs, z, network, generator=torch.manual_seed(5))
    assert torch.allclose(a, b, atol=0.01 * float(b.abs().max()))  # LCM's c_skip is at most 0.0025
    assert not torch.allclose(
        a, walk(ours, z, network, eta=1.0, generator=torch.manual_seed(6)), atol=0.1
    )


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_eta_is_that_of_tcd(eta):
    """One step against diffusers' TCDScheduler: DDIM to (1 - eta) of the next time, then noise. Its
    times are indices, ours index + 1.
    """
    ours, theirs = MCMScheduler(), TCDScheduler(1000, 0.00085, 0.012, "scaled_linear")
    theirs.set_timesteps(timesteps=[999, 749, 499, 249])
    ours.set_timesteps(timesteps=[999, 749, 499, 249])
    z = torch.randn(2, 4, 8, 8)
    a = ours.step(network(z, 999), 999, z, eta=eta, generator=torch.manual_seed(5)).prev_sample
    b = theirs.step(network(z, 999), 999, z, eta=eta, generator=torch.manual_seed(5)).prev_sample
    assert torch.allclose(a, b, atol=0.01)


def test_the_last_step_returns_x_hat():
    scheduler = MCMScheduler()
    scheduler.set_timesteps(1)
    z = torch.randn(2, 4, 8, 8)
    alpha2 = scheduler.alphas_cumprod[999]
    expected = (z - (1 - alpha2).sqrt() * network(z, 999)) / alpha2.sqrt()
    for eta in (0.0, 1.0):
        assert torch.allclose(
            scheduler.step(network(z, 999), 999, z, eta=eta).prev_sample,
            expected,
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_prediction_types(kind):
    base = diffusers.DDIMScheduler(
        1000,
        0.00085,
        0.012,
        "scaled_linear",
        prediction_type=kind,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    ours = MCMScheduler.like(base, uniform_timesteps([4]))
    ours.set_timesteps(4), base.set_timesteps(4)
    z = torch.randn(2, 4, 8, 8)
    a = ours.step(network(z, 999), 999, z).prev_sample
    assert torch.allclose(a, base.step(network(z, 999), 999, z).prev_sample, rtol=1e-3, atol=1e-3)


def test_add_noise_is_diffusers():
    base = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    x, noise, at = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 499, 999])
    assert torch.allclose(
        MCMScheduler().add_noise(x, noise, at), base.add_noise(x, noise, at), atol=1e-6
    )


def test_round_trip(tmp_path):
    ours = MCMScheduler(
        beta_end=0.02, timesteps=uniform_timesteps([2, 4]), prediction_type="v_prediction"
    )
    ours.save_pretrained(tmp_path)
    again = MCMScheduler.from_pretrained(tmp_path)
    assert again.table == ours.table and again.config.prediction_type == "v_prediction"
    assert torch.equal(again.alphas_cumprod, ours.alphas_cumprod)


def test_bad_input():
    scheduler = MCMScheduler(timesteps=uniform_timesteps([2, 4]))
    with pytest.raises(mcm.InputError, match="not trained for 3 steps: use 2, 4"):
        scheduler.set_timesteps(3)
    for wrong in ([499, 999], [999, 999], [1000], [], [5, -1]):
        with pytest.raises(mcm.InputError, match="must fall strictly"):
            scheduler.set_timesteps(timesteps=wrong)
    scheduler.set_timesteps(2)
    with pytest.raises(mcm.InputError, match="is none of"):
        scheduler.step(torch.zeros(1, 4, 2, 2), 500, torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("eta", [1.5, 7.0, -0.5, float("nan")])
def test_an_eta_that_cannot_be(eta):
    scheduler = MCMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(mcm.InputError, match=rf"eta {eta} must be in \[0, 1\]"):
        scheduler.step(torch.zeros(1, 4, 2, 2), 999, torch.zeros(1, 4, 2, 2), eta=eta)


def test_predictions_that_cannot_be():
    with pytest.raises(mcm.InputError, match="prediction type 'flow' is not supported: epsilon"):
        MCMScheduler(prediction_type="flow")
    with pytest.raises(mcm.InputError, match="'epsilon' with rescale_betas_zero_snr"):
        MCMScheduler(rescale_betas_zero_snr=True)
    scheduler = MCMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    assert walk(scheduler, torch.randn(2, 4, 8, 8), network).isfinite().all()


def test_image_to_image_that_has_no_step_left():
    """Strength 0.2 of 4 steps: pipelines then ask for noise at no timestep at all."""
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(mcm.InputError, match="strength x num_inference_steps must be at least 1"):
        MCMScheduler().add_noise(x, x, torch.tensor([], dtype=torch.long))


@pytest.mark.parametrize("steps", [500, 1000])
def test_tables_of_a_schedule_of_another_length(steps):
    for table in (re_noising_timesteps(steps), uniform_timesteps([1, 4, 8], steps)):
        scheduler = MCMScheduler(num_train_timesteps=steps, timesteps=table)
        for K in table:
            scheduler.set_timesteps(int(K))
            assert scheduler.timesteps[0] == steps - 1
            assert scheduler._time(int(scheduler.timesteps[0]), 1) == 1


class NoFloat64(TorchDispatchMode):
    """Fails as Apple's GPUs do; the meta device stands for one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.device.type == "meta":
            assert result.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_no_float64_where_the_images_are(eta):
    scheduler = MCMScheduler()
    scheduler.set_timesteps(2)
    z = torch.empty(2, 4, 8, 8, device="meta")
    with NoFloat64():
        for timestep in (999, 499):
            scheduler.step(z, timestep, z, eta=eta)
        scheduler.add_noise(z, z, torch.tensor([3, 999]))
    with pytest.raises(AssertionError), NoFloat64():
        z.double()  # it would be seen
