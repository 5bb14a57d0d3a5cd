import diffusers
import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler

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
