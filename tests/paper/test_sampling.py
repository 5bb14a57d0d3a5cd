import dataclasses

import diffusers
import pytest
import torch

import mcm
from mcm import sampling

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


@pytest.mark.parametrize("chunk", [1, 3, 5])
@pytest.mark.parametrize("solver", [mcm.ddim, mcm.addim])
def test_chunking_does_not_matter(network, chunk, solver):
    denoiser, z, y = (
        mcm.Denoiser(network, mcm.CosineSchedule()),
        torch.randn(7, 1, 8, 8),
        torch.arange(7) % 4,
    )
    whole, parts = (mcm.sample(denoiser, z, 4, y, solver, chunk=c) for c in (None, chunk))
    assert len(parts) == 7
    torch.testing.assert_close(
        parts, whole, rtol=1e-4, atol=1e-4
    )  # convolutions round differently per batch size


def test_many_steps_reach_the_data():
    z = (
        torch.erfinv(2 * (torch.arange(1, 2000).double() / 2000) - 1)[:, None] * 2**0.5
    )  # normal quantiles
    x = mcm.sample(MIXTURE, z, 512)
    # DDIM is first order: halving the step halves the distance to the limit
    limit = mcm.sample(MIXTURE, z, 4096)
    ratio = (mcm.sample(MIXTURE, z, 256) - limit).norm() / (x - limit).norm()
    assert 1.8 < ratio < 2.4
    # the exact flow map in one dimension matches quantiles: half the noise goes to each mode, whose mean and spread are right
    upper = limit[limit > 0]
    assert (
        abs(len(upper) / len(x) - 0.5) < 1e-3
        and abs(upper.mean() - 1) < 5e-3
        and abs(upper.std() - 0.2) < 5e-3
    )


def test_few_step_sampling_equals_diffusers():
    """The same epsilon function, the same noise, through diffusers' DDIM scheduler and through mcm.sample."""
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
    with pytest.raises(mcm.InputError, match="pass steps="):
        mcm.sample(teacher, z)
    with pytest.raises(mcm.InputError, match="at least 1"):
        mcm.sample(teacher, z, 0)
    student = mcm.Denoiser(network, mcm.CosineSchedule(), student_steps=4)
    with pytest.warns(UserWarning, match="4-step student in 8 steps") as caught:
        x = mcm.sample(student, z.repeat(3, 1, 1, 1), 8, chunk=1)
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


# --- where training states come from ---------------------------------------------------------------------------------------------

TLCM_STAGE = mcm.Stage(8, (1000, 1000), skip=20, x_var=None, z_from="teacher", run=8)


class Counting(torch.nn.Module):
    """A denoiser that writes down which samples it was asked at which time."""

    def __init__(self):
        super().__init__()
        self.schedule, self.asked = mcm.CosineSchedule(), []

    def forward(self, z, t, cond=None):
        self.asked += list(zip(cond.tolist(), t.tolist()))
        return 0.5 * z


def test_the_teachers_run_takes_the_steps_of_algorithm_1():
    """A sample in segment (s, s + 1] of M gets L = M - s equal steps from pure noise down to its t."""
    teacher, t = (
        Counting(),
        torch.tensor([1.0, 0.9, 0.876, 0.875, 0.51, 0.5, 0.126, 0.125, 0.001], dtype=torch.float64),
    )
    expected = [1, 1, 1, 2, 4, 5, 7, 8, 8]
    noise = torch.randn(9, 3)
    z_t, x = sampling.teacher_states(TLCM_STAGE, None, noise, t, torch.arange(9), None, teacher)
    assert x is None
    for i, (L, stop) in enumerate(zip(expected, t)):
        times = [a for sample, a in teacher.asked if sample == i]
        assert times == pytest.approx([1 - (1 - stop.item()) * k / L for k in range(L)])
        z = noise[i : i + 1]
        for k in range(L):
            a, b = (torch.tensor([1 - (1 - stop) * n / L], dtype=torch.float64) for n in (k, k + 1))
            z = mcm.ddim(0.5 * z, z, a, b, teacher.schedule)
        assert torch.allclose(z_t[i], z[0], atol=1e-6)
    assert torch.equal(z_t[0], noise[0])  # t = 1 is pure noise


def test_a_shared_run_gives_the_same_states_as_runs_of_their_own_along_the_same_stops():
    stage, teacher = dataclasses.replace(TLCM_STAGE, share_run=True), Counting()
    stops = torch.linspace(0.97, 0.02, 8, dtype=torch.float64)
    noise, cond = torch.randn(16, 3), torch.arange(16)
    z_t, _ = sampling.teacher_states(stage, None, noise, stops.repeat(2), cond, None, teacher)
    assert len(teacher.asked) == 16 and {c for c, _ in teacher.asked} == {
        0,
        8,
    }  # 8 steps for each run of 8 samples
    z, before = noise[[0, 8]], torch.ones(2, dtype=torch.float64)
    for k, stop in enumerate(stops):
        z, before = mcm.ddim(0.5 * z, z, before, stop.expand(2), teacher.schedule), stop.expand(2)
        assert torch.allclose(z_t[[k, 8 + k]], z, atol=1e-6)


def test_the_students_run_is_its_own_sample_noised_afresh():
    stage = mcm.Stage(1, (8, 8), x_var=None, z_from="student", run=4, sub_steps=3)
    student, t = Counting(), torch.full((4,), 0.5, dtype=torch.float64)
    noise = torch.randn(4, 5000)
    z_t, x = sampling.student_states(stage, None, noise, t, torch.arange(4), student, None)
    assert [a for c, a in student.asked if c == 0] == [1.0, 0.75, 0.5, 0.25]
    assert not torch.equal(x, noise)
    alpha, sigma = student.schedule(t[:1])
    fresh = (z_t - alpha.float() * x) / sigma.float()
    assert abs(fresh.std() - 1) < 5 / 40_000**0.5  # 5 standard errors
    assert (
        abs((fresh * noise).mean()) < 5 / 20_000**0.5
    )  # and it is not the noise that the run began with


def test_tlcms_milestones_as_timesteps():
    """The table of TLCM's released sampler."""
    table = {
        1: [999],
        2: [999, 499],
        3: [999, 499, 124],
        4: [999, 749, 499, 124],
        8: [999, 874, 749, 624, 499, 374, 249, 124],
    }
    table |= {
        5: [999, 749, 499, 249, 124],
        6: [999, 749, 499, 374, 249, 124],
        7: [999, 749, 624, 499, 374, 249, 124],
    }
    schedule = mcm.DiscreteSchedule(torch.linspace(0.99, 0.01, 1000))
    for steps, timesteps in table.items():
        times = torch.tensor(sampling.milestones(steps), dtype=torch.float64)
        assert schedule.network_time(times).tolist() == timesteps


def test_renoised_sampling_asks_at_the_given_times():
    model = Counting()
    mcm.sample(
        model,
        torch.randn(3, 2),
        times=sampling.milestones(3),
        cond=torch.arange(3),
        solver=mcm.renoise,
    )
    assert [t for c, t in model.asked if c == 0] == [1.0, 0.5, 0.125]
