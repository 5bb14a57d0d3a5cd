import pytest
import torch
from pipelines import ENGLISH, untrained_pipeline

import mcm
from mcm.lab.run import Training
from mcm.latent.distil import Distillation, make_objective, total_gradient
from mcm.latent.objectives import (
    Adversarial,
    Balance,
    DistributionMatching,
    Preference,
    gradient,
)
from mcm.latent.recipes import Phase
from mcm.latent.sdxl import SDXL, unconditional
from mcm.latent.states import draw_states
from mcm.solvers import expand


@pytest.fixture
def sdxl(tmp_path):
    return SDXL(untrained_pipeline(tmp_path), rank=4)


def output_of(sdxl, states="data", n=4):
    """What the consistency loss hands to an objective."""
    cond = sdxl.encode(ENGLISH[:n])
    method = mcm.Method(1, (8, 8), x_var=None, weight="x", distance="squared")
    phase = Phase(method, states=states, rollout_steps=2)
    x = torch.randn(n, 4, 8, 8) if states == "data" else None
    student, teacher = sdxl.denoiser("student"), sdxl.denoiser()
    x, z_t, t = draw_states(phase, x, torch.randn(n, 4, 8, 8), cond, student, teacher)
    return mcm.consistency_loss(student, x, cond, method, teacher=teacher, t=t, z_t=z_t)


def reached(sdxl):
    """Which sets of weights have a gradient; everything is cleared."""
    names = set()
    for key, p in sdxl.unet.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 0:
            names.add(
                next((n for n in ("student", "fake", "critic") if f".{n}." in key), "teacher")
            )
        p.grad = None
    for part in (sdxl.pipe.vae, sdxl.pipe.text_encoder, sdxl.pipe.text_encoder_2):
        names |= {"frozen part" for p in part.parameters() if p.grad is not None}
    return names


def trained_student(sdxl):
    for value in sdxl.add_lora("student").values():
        torch.nn.init.normal_(value, std=0.1)


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * torch.tensor([len(p) - 40.0 for p in prompts])


def objectives(sdxl, diffused):
    return [
        Preference(brightness, sdxl.to_images, 16.0, ENGLISH),
        DistributionMatching(sdxl, w=2.0),
        Adversarial(sdxl, diffused),
    ]


@pytest.mark.parametrize("diffused", [False, True])
def test_each_gradient_reaches_only_what_it_should(sdxl, diffused):
    trained_student(sdxl)
    output_of(sdxl).loss.backward()
    assert reached(sdxl) == {"student"}
    for objective in objectives(sdxl, diffused):
        if objective.learner:
            for value in objective.learner.weights.values():
                torch.nn.init.normal_(value, std=0.1)
        output = output_of(sdxl)
        _, extra = gradient(objective, output, ENGLISH)
        assert extra.abs().max() > 0 and reached(sdxl) == set()
        output.x_hat.backward(extra)
        assert reached(sdxl) == {"student"}, objective
        if objective.learner:
            objective.critic_loss(output).backward()
            expected = {"DistributionMatching": {"fake"}, "Adversarial": {"critic"}}[
                type(objective).__name__
            ]
            assert reached(sdxl) == expected


def test_the_critic_leaves_the_encoder_of_the_unet_alone(sdxl):
    critic = Adversarial(sdxl, diffused=True)
    layers = {key.split(".")[0] for key in critic.learner.weights}
    assert layers == {"up_blocks", "conv_out"}


def test_preference_is_a_hinge(sdxl):
    """Nothing is asked of samples whose reward has reached s0; the reward of wrong prompts is
    pushed to 0 and not below.
    """
    trained_student(sdxl)
    output = output_of(sdxl)
    for right, wrong, s0, expected in (
        (5.0, -1.0, 3.0, 0.0),
        (1.0, -1.0, 3.0, 2.0),
        (5.0, 2.0, 3.0, 2.0),
        (1.0, 2.0, 3.0, 4.0),
    ):

        def reward(images, prompts, right=right, wrong=wrong):
            return torch.tensor([right if prompts == ENGLISH else wrong] * len(prompts))

        objective = Preference(reward, sdxl.to_images, s0, ["something else"])
        assert objective.loss(output, ENGLISH).item() == pytest.approx(expected)


def test_a_prompt_is_never_its_own_opposite(sdxl):
    trained_student(sdxl)
    reward = lambda images, prompts: torch.full((len(prompts),), 2.0)  # noqa: E731
    assert Preference(reward, sdxl.to_images, 3.0, ENGLISH[:1]).loss(
        output_of(sdxl, n=1), ENGLISH[:1]
    ).item() == pytest.approx(1.0)


def test_a_reward_can_be_climbed(sdxl):
    trained_student(sdxl)
    learner = mcm.lab.run.Learner(sdxl.weights("student"), 1.0)
    objective = Preference(
        lambda images, prompts: images.mean((1, 2, 3)) * (prompts != ["x"] * 4),
        sdxl.to_images,
        100.0,
        ["x"],
    )
    losses = []
    for _ in range(15):
        torch.manual_seed(0)
        loss = objective.loss(output_of(sdxl), ENGLISH)
        loss.backward()
        learner.lr = 1e-2
        learner.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_distribution_matching_points_from_the_fake_score_to_the_real_one(sdxl):
    """Its gradient on x_hat is the difference of the two denoised x_hat over the mean distance to
    the real one (DMD2, arXiv 2405.14867).
    """
    trained_student(sdxl)
    matching = DistributionMatching(sdxl, w=2.0)
    for value in matching.learner.weights.values():
        torch.nn.init.normal_(value, std=0.1)
    output = output_of(sdxl)
    x = output.x_hat.detach().requires_grad_()
    torch.manual_seed(4)
    (gradient,) = torch.autograd.grad(matching.loss(output._replace(x_hat=x), ENGLISH), x)
    torch.manual_seed(4)
    with torch.no_grad():
        t = 0.02 + 0.96 * torch.rand(4, dtype=torch.float64)
        alpha, sigma = (expand(a, x) for a in matching.fake.schedule(t))
        z = alpha * x + sigma * torch.randn_like(x)
        # the real score is guided; the fake one is not
        guided = mcm.guided(sdxl.denoiser(), 2.0, unconditional)
        real, fake = guided(z, t, output.cond), sdxl.denoiser("fake")(z, t, output.cond)
        expected = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(gradient * x.numel(), expected, rtol=1e-4, atol=1e-5)
    assert gradient.abs().max() > 0


def test_the_fake_score_learns_the_students_samples(sdxl):
    """x_hat, and not the data that z_t may have come from."""
    trained_student(sdxl)
    matching, losses = DistributionMatching(sdxl, w=2.0), []
    output = output_of(sdxl)
    output = output._replace(x=torch.full_like(output.x, torch.nan))
    for _ in range(30):
        torch.manual_seed(0)
        loss = matching.critic_loss(output)
        loss.backward()
        matching.learner.lr = 3e-3
        matching.learner.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("diffused", [False, True])
def test_the_discriminator_learns_to_tell_real_from_fake(sdxl, diffused):
    trained_student(sdxl)
    adversary, losses = Adversarial(sdxl, diffused), []
    output = output_of(sdxl)
    output = output._replace(x_hat=output.x_hat * 0.2)
    for step in range(40):
        torch.manual_seed(step % 4)
        loss = adversary.critic_loss(output)
        loss.backward()
        adversary.learner.lr = 1e-2
        adversary.learner.update()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    with torch.no_grad():
        real, fake = (
            adversary.logits(x, output.t, torch.zeros_like(x), output).mean()
            for x in (output.x, output.x_hat)
        )
    assert real > fake  # high is real, and that is what the student climbs
    # and the student is then told to look more real: down its gradient the logits of x_hat rise
    x = output.x_hat.detach().requires_grad_()
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(adversary.loss(output._replace(x_hat=x), ENGLISH), x)
    moved = x.detach() - 0.1 * gradient / gradient.abs().max()
    logits = []
    for images in (x.detach(), moved):
        torch.manual_seed(0)
        told = adversary._draw(output)
        with torch.no_grad():
            logits.append(adversary.logits(images, *told, output).mean())
    assert logits[1] > logits[0]


@pytest.mark.parametrize("kind, diffused", [("adversarial", False), ("adversarial_diffused", True)])
def test_what_the_discriminator_sees(sdxl, kind, diffused):
    """Real and fake at one time and, in TLCM, with one noise: else that would tell them apart."""
    trained_student(sdxl)
    output = output_of(sdxl)
    adversary = make_objective(kind, job_of(sdxl))
    seen = []
    adversary.network.register_forward_hook(lambda module, given, out: seen.append(given[:2]))
    adversary.critic_loss(output._replace(x_hat=output.x))  # the same images, real and fake
    (real, told), (fake, told_too) = seen
    assert torch.equal(real, fake) and torch.equal(told, told_too)
    assert torch.equal(real, output.x) != diffused
    if not diffused:
        assert torch.equal(told, sdxl.schedule.network_time(output.t))
    else:  # z = alpha x + sigma noise, at the time that it is told
        t = (told.double() + 1) / 1000
        alpha, sigma = (expand(a, real) for a in sdxl.schedule(t))
        noise = (real - alpha * output.x) / sigma
        assert abs(noise.std() - 1) < 0.2 and told.unique().numel() > 1


def test_the_fake_score_is_trained_to_predict_noise(sdxl):
    """In the units of the noise, as SDXL was: (eps - eps_hat)^2, the v-loss times alpha^2."""
    trained_student(sdxl)
    output = output_of(sdxl)
    matching = DistributionMatching(sdxl, w=2.0)
    asked = []
    matching.fake.network.register_forward_hook(lambda m, given, out: asked.append((given, out)))
    torch.manual_seed(1)
    loss = matching.critic_loss(output)
    ((z, index, _), eps_hat) = asked[0]
    alpha, sigma = (expand(a, z) for a in sdxl.schedule((index.double() + 1) / 1000))
    eps = (z - alpha * output.x_hat.detach()) / sigma
    assert loss.item() == pytest.approx((eps - eps_hat).square().mean().item(), rel=1e-3)


def job_of(sdxl, **changes):
    settings = Training(1)
    return Distillation(sdxl, ENGLISH, None, None, settings, None, "", 2.0, brightness, **changes)


# --- the weight of an objective -------------------------------------------------------------------


def test_a_weight_is_a_ratio_of_gradients(sdxl):
    """At the first step exactly, whatever the scale of the objective."""
    trained_student(sdxl)
    phase = Phase(mcm.Method(1, (8, 8)), objectives=(("preference", 0.3),))
    for factor in (1.0, 1000.0):
        torch.manual_seed(2)
        output = output_of(sdxl)
        reward = lambda images, prompts: factor * brightness(images, prompts)  # noqa: B023, E731
        objective = Preference(reward, sdxl.to_images, 1e6, ENGLISH)
        balance = Balance(["preference"], torch.device("cpu"))
        (own,) = torch.autograd.grad(output.loss, output.x_hat, retain_graph=True)
        total, _ = total_gradient(output, {"preference": objective}, phase, ENGLISH, balance)
        assert ((total - own).norm() / own.norm()).item() == pytest.approx(0.3, rel=1e-3)


def test_what_an_objective_asks_for_less_and_less_fades():
    """A hinge that is satisfied by all but one sample does not get a whole batch's weight."""
    balance = Balance(["preference"], torch.device("cpu"))
    one = torch.tensor(1.0)
    first = balance.scale("preference", one, 2 * one)
    assert first == pytest.approx(0.5)
    for n in range(200):  # it vanishes
        scale = balance.scale("preference", one, one * 0.9**n)
        assert scale <= first and scale * 0.9**n < 1
    assert scale * 0.9**n < 1e-6
    for idle in (0.0, float("nan"), float("inf")):  # as if the step had not been
        before = balance.state()["preference"].clone()
        assert balance.scale("preference", one, torch.tensor(idle)) == 0
        assert torch.equal(balance.state()["preference"], before)
    asleep = Balance(["preference"], torch.device("cpu"))
    for _ in range(20):
        asleep.scale("preference", one, torch.tensor(0.0))
    assert asleep.scale("preference", one, 2 * one) == pytest.approx(0.5)
    again = Balance(["preference"], torch.device("cpu"))
    again.load(balance.state())
    assert again.scale("preference", one, one) == balance.scale("preference", one, one)


def test_a_batch_in_parts_has_the_weights_of_the_whole():
    """What is kept after a step does not depend on how many parts it was computed in."""
    cpu = torch.device("cpu")
    whole, parts = Balance(["preference"], cpu), Balance(["preference"], cpu, parts=4)
    scales = []
    for step in range(50):
        norms = torch.rand(4, 2).exp() * torch.tensor([1.0, 1.1**step])
        norms[1:, 1] *= step % 2  # in some steps only one part is asked for something
        scale = whole.scale("preference", *(norms.square().sum(0).sqrt() / 4))
        by_part = [parts.scale("preference", own, further) for own, further in norms]
        assert by_part[-1] == pytest.approx(scale.item(), rel=1e-5)
        assert torch.allclose(whole.state()["preference"], parts.state()["preference"])
        scales += by_part
    assert max(scales[100:]) <= scales[3]


def test_every_time_hears_the_reward(sdxl):
    """A batch's times fall, so fixed rows of it would be fixed parts of the time axis."""
    trained_student(sdxl)
    output = output_of(sdxl)
    objective = Preference(brightness, sdxl.to_images, 1e6, ENGLISH, most=2)
    heard = torch.zeros(4)
    for _ in range(60):
        _, extra = gradient(objective, output, ENGLISH)
        reached = extra.flatten(1).abs().amax(1) > 0
        assert reached.sum() == 2
        heard += reached
    assert heard.min() >= 15  # of 30 to be expected


def test_decoding_one_by_one_is_decoding_together(sdxl):
    trained_student(sdxl)
    output = output_of(sdxl)
    results = []
    for most in (None, 4):
        torch.manual_seed(0)
        objective = Preference(brightness, sdxl.to_images, 1e6, ["another"], most=most)
        results.append(gradient(objective, output, ENGLISH))
    (value, extra), (other, same) = results
    assert torch.allclose(value, other) and torch.allclose(extra, same, rtol=1e-3, atol=1e-6)


def test_an_adversary_needs_something_real(sdxl):
    trained_student(sdxl)
    output = output_of(sdxl, states="teacher")
    with pytest.raises(mcm.InputError, match="needs clean images"):
        Adversarial(sdxl, diffused=False).critic_loss(output)
