"""Where the noisy latents of a phase come from, and at which times students are asked."""

import dataclasses

import pytest
import torch
from affine import Affine

import mcm
from mcm.latent.recipes import RECIPES, Phase, milestones
from mcm.latent.states import draw_states, student_states, teacher_states

METHOD = mcm.Method(8, (1000, 1000), skip=20, x_var=None, weight="q", distance="squared")
TLCM = Phase(METHOD, states="teacher")
COARSE = mcm.Method(1, (8, 8), x_var=None, weight="x", distance="squared", sub_steps=3)


class Counting(torch.nn.Module):
    """A denoiser that writes down which samples it was asked at which time."""

    def __init__(self):
        super().__init__()
        self.schedule = mcm.CosineSchedule()
        self.asked = []

    def forward(self, z, t, cond=None):
        self.asked += list(zip(cond.tolist(), t.tolist()))
        return 0.5 * z


def test_the_teachers_run_takes_the_steps_of_algorithm_1():
    """In segment (s, s + 1] of M: L = M - s equal steps from pure noise down to its t."""
    teacher = Counting()
    t = torch.tensor([1.0, 0.9, 0.876, 0.875, 0.51, 0.5, 0.126, 0.125, 0.001]).double()
    expected = [1, 1, 1, 2, 4, 5, 7, 8, 8]
    noise = torch.randn(9, 3)
    x, z_t = teacher_states(TLCM, None, noise, t, torch.arange(9), None, teacher)
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
    phase = dataclasses.replace(TLCM, share_rollout=True)
    teacher = Counting()
    stops = torch.linspace(0.97, 0.02, 8, dtype=torch.float64)
    noise = torch.randn(16, 3)
    _, z_t = teacher_states(phase, None, noise, stops.repeat(2), torch.arange(16), None, teacher)
    # 8 steps for each run of 8 samples
    assert len(teacher.asked) == 16 and {c for c, _ in teacher.asked} == {0, 8}
    z = noise[[0, 8]]
    before = torch.ones(2, dtype=torch.float64)
    for k, stop in enumerate(stops):
        z = mcm.ddim(0.5 * z, z, before, stop.expand(2), teacher.schedule)
        before = stop.expand(2)
        assert torch.allclose(z_t[[k, 8 + k]], z, atol=1e-6)


def test_the_students_run_is_its_own_sample_noised_afresh():
    phase = Phase(COARSE, states="student", rollout_steps=4)
    student = Counting()
    t = torch.full((4,), 0.5, dtype=torch.float64)
    noise = torch.randn(4, 5000)
    x, z_t = student_states(phase, None, noise, t, torch.arange(4), student, None)
    assert [a for c, a in student.asked if c == 0] == [1.0, 0.75, 0.5, 0.25]
    assert not torch.equal(x, noise)
    alpha, sigma = student.schedule(t[:1])
    fresh = (z_t - alpha.float() * x) / sigma.float()
    assert abs(fresh.std() - 1) < 5 / 40_000**0.5  # 5 standard errors
    # and it is not the noise that the run began with
    assert abs((fresh * noise).mean()) < 5 / 20_000**0.5


@pytest.mark.parametrize("share", [False, True])
def test_times_fall_evenly_through_the_segments(share):
    phase = dataclasses.replace(TLCM, share_rollout=share)
    student, teacher = Affine(0.5, 0.3), Affine(0.8, -0.2)
    noise = torch.randn(32, 3, dtype=torch.float64)
    cond = torch.randn(4, dtype=torch.float64).repeat_interleave(8)
    x, z_t, t = draw_states(phase, None, noise, cond, student, teacher)
    segments = torch.ceil(t * 8 - 1e-9).long()
    if share:  # each run of 8 samples falls through all 8 segments
        assert (segments.reshape(4, 8) == torch.arange(8, 0, -1)).all()
    else:
        assert (torch.bincount(segments)[1:] == 4).all()
    output = mcm.consistency_loss(student, x, cond, METHOD, teacher=teacher, t=t, z_t=z_t)
    assert output.x is None and torch.equal(output.z_t, z_t) and torch.equal(output.t, t)
    output.loss.backward()
    assert student.a.grad != 0 and teacher.a.grad is None


def test_what_the_student_drew_is_handed_on_as_the_clean_image():
    phase = Phase(COARSE, states="student", rollout_steps=4)
    student = Affine(0.5, 0.3)
    noise = torch.randn(32, 3, dtype=torch.float64)
    torch.manual_seed(3)
    x, z_t, t = draw_states(phase, None, noise, None, student, Affine(0.8, -0.2))
    torch.manual_seed(3)
    torch.rand(32, dtype=torch.float64)  # the times come first
    assert torch.equal(x, mcm.sample(student, noise, 4, solver=mcm.renoise))
    assert not x.requires_grad and not z_t.requires_grad
    assert set((t * 8).tolist()) == {1, 2, 3, 4, 5, 6, 7, 8}


def test_a_batch_that_cannot_share_runs():
    phase = dataclasses.replace(TLCM, share_rollout=True)
    with pytest.raises(mcm.InputError, match="multiple of 8"):
        draw_states(phase, None, torch.randn(12, 3), None, Affine(0.5, 0.3), Affine(0.8, -0.2))


def test_scott_is_finite_at_every_point_of_its_grid():
    """Near t = 0 its sub-steps are shorter than an index of the schedule."""
    student = Affine(0.5, 0.3)
    student.schedule = mcm.DiscreteSchedule.scaled_linear()
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    x, noise = torch.randn(2, 1000, 3, dtype=torch.float64)
    method = RECIPES["scott"](4).phases[0].method
    output = mcm.consistency_loss(student, x, None, method, teacher=student, noise=noise, t=t)
    assert output.x_target.isfinite().all() and output.per_sample.isfinite().all()


def test_tlcms_milestones_as_timesteps():
    """The table of TLCM's released sampler."""
    table = {
        1: [999],
        2: [999, 499],
        3: [999, 499, 124],
        4: [999, 749, 499, 124],
        5: [999, 749, 499, 249, 124],
        6: [999, 749, 499, 374, 249, 124],
        7: [999, 749, 624, 499, 374, 249, 124],
        8: [999, 874, 749, 624, 499, 374, 249, 124],
    }
    schedule = mcm.DiscreteSchedule(torch.linspace(0.99, 0.01, 1000))
    for steps, timesteps in table.items():
        times = torch.tensor(milestones(steps), dtype=torch.float64)
        assert schedule.network_time(times).tolist() == timesteps


def test_renoised_sampling_asks_at_the_given_times():
    model = Counting()
    z = torch.randn(3, 2)
    mcm.sample(model, z, times=milestones(3), cond=torch.arange(3), solver=mcm.renoise)
    assert [t for c, t in model.asked if c == 0] == [1.0, 0.5, 0.125]
