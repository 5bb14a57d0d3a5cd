import diffusers
import pytest
import torch

import mcm

MIXTURE = mcm.GaussianMixture(
    torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([0.2, 0.2]).double()
)


def test_algorithm_2_written_out(network):
    """K jumps between the ends of K segments: t = k/K down to (k-1)/K, one evaluation each."""
    student, z, y = (
        mcm.Denoiser(network, mcm.CosineSchedule(), student_steps=3),
        torch.randn(2, 1, 8, 8),
        torch.tensor([0, 2]),
    )
    ours, calls = mcm.sample(student, z, cond=y), []
    student.network.register_forward_hook(lambda m, inputs, out: calls.append(inputs[1]))
    for t, s in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        t, s = torch.full((2,), t, dtype=torch.float64), torch.full((2,), s, dtype=torch.float64)
        z = mcm.ddim(student(z, t, y), z, t, s, student.schedule)
    torch.testing.assert_close(
        ours, z, rtol=1e-5, atol=1e-5
    )  # k/K against these literals: one ulp in t
    assert len(calls) == 3


def test_many_steps_reach_the_data():
    z = (
        torch.erfinv(2 * (torch.arange(1, 2000).double() / 2000) - 1)[:, None] * 2**0.5
    )  # normal quantiles
    x = mcm.sample(MIXTURE, z, 512)
    # DDIM is first order: halving the step halves the distance to the limit
    limit = mcm.sample(MIXTURE, z, 4096)
    ratio = (mcm.sample(MIXTURE, z, 256) - limit).norm() / (x - limit).norm()
    assert 1.8 < ratio < 2.4
    # the exact flow map in one dimension matches quantiles: half the noise goes to each mode, whose
    # mean and spread are right
    upper = limit[limit > 0]
    assert (
        abs(len(upper) / len(x) - 0.5) < 1e-3
        and abs(upper.mean() - 1) < 5e-3
        and abs(upper.std() - 0.2) < 5e-3
    )


def test_few_step_sampling_equals_diffusers():
    """The same epsilon function, the same noise, through diffusers' DDIM scheduler and through
    mcm.sample.
    """
    reference = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    schedule = mcm.DiscreteSchedule(reference.alphas_cumprod)
    exact = mcm.GaussianMixture(torch.randn(4, 3), torch.full((4,), 0.3), schedule=schedule)

    def epsilon(z, index, cond):
        t = (index + 1) / 1000
        alpha, sigma = (a[:, None] for a in schedule(t))
        return (z - alpha * exact(z, t)) / sigma

    z = torch.randn(16, 3)
    for steps in (1, 2, 4, 8, 20):
        x = z
        reference.set_timesteps(steps)
        for index in reference.timesteps:
            x = reference.step(epsilon(x, index.expand(16), None), index, x).prev_sample
        ours = mcm.sample(mcm.Denoiser(epsilon, schedule, "epsilon"), z, steps)
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)  # float32, sigma_1 / alpha_1 = 15


def test_steps_are_known_or_asked_for(network):
    teacher, z = mcm.Denoiser(network, mcm.CosineSchedule()), torch.randn(1, 1, 8, 8)
    with pytest.raises(mcm.InputError, match="pass steps"):
        mcm.sample(teacher, z)
    with pytest.raises(mcm.InputError, match="at least 1"):
        mcm.sample(teacher, z, 0)
    student = mcm.Denoiser(network, mcm.CosineSchedule(), student_steps=4)
    with pytest.warns(UserWarning, match="4-step student in 8 steps") as caught:
        x = mcm.sample(student, z.repeat(3, 1, 1, 1), 8)
    assert (
        len(caught) == 1 and caught[0].filename == __file__ and x.isfinite().all()
    )  # it works, and warns once, where it was called
    with pytest.warns(UserWarning, match="4-step student in 8 steps"):
        mcm.sample(mcm.guided(student, 2.0), z, 8)


def test_a_generator_reaches_the_solver_that_takes_one():
    def noisy(x_hat, z_t, t, s, schedule, generator=None):
        return mcm.ddim(x_hat, z_t, t, s, schedule) + 0.1 * torch.randn(
            z_t.shape, generator=generator
        )

    z = torch.randn(4, 1).double()
    a, b, c = (
        mcm.sample(MIXTURE, z, 4, solver=noisy, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    mcm.sample(MIXTURE, z, 4, generator=torch.Generator())  # DDIM draws nothing
