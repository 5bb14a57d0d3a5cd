import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from pipelines import drawn, untrained_pipeline
from safetensors.torch import load_file

import mcm
from mcm.denoiser import Guided, select
from mcm.lab.data import to_float
from mcm.lab.run import Learner, Run, Training
from mcm.latent import distil as distil_module
from mcm.latent.distil import Distillation, begin_averages, distil, dry_run
from mcm.latent.recipes import RECIPES
from mcm.latent.sdxl import SDXL, unconditional
from mcm.latent.tiny_sdxl import train_unet
from mcm.sampling import noised

W = 2.0
NEVER = 10**6


def trained_pipeline(folder, iterations):
    """Its latents are coarse images: 8x8 RGB and their grey."""
    captions, images = drawn()
    pipe = untrained_pipeline(folder, captions, channels=(16, 32))
    small = F.avg_pool2d(to_float(images), 4)
    latents = torch.cat([small, small.mean(1, keepdim=True)], 1) * 1.5
    settings = Training(iterations, 32, lr=3e-3, warmup=20, save_every=NEVER)
    train_unet(pipe, captions, latents, 32, settings, folder, resume=False)
    return pipe, captions, latents


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline whose UNet has hardly seen anything: for all but quality."""
    return trained_pipeline(tmp_path_factory.mktemp("teacher"), 5)


@pytest.fixture(scope="module")
def good_teacher(tmp_path_factory):
    """A pipeline whose UNet has seen enough to be worth distilling."""
    return trained_pipeline(tmp_path_factory.mktemp("good"), 300)


def reward(images, prompts):
    """Prefers bright images where the caption says white, and dark ones elsewhere."""
    sign = torch.tensor([1.0 if "white" in p else -1.0 for p in prompts])
    return 10 * torch.tanh(images).mean((1, 2, 3)) * sign


def job_of(teacher, out, iterations=60, save_every=NEVER, **changes):
    pipe, captions, latents = teacher
    parts = {k: copy.deepcopy(v) if k == "unet" else v for k, v in pipe.components.items()}
    sdxl = SDXL(type(pipe)(**parts), rank=16)
    settings = Training(
        iterations, 16, lr=1e-3, warmup=5, ema=0.9, save_every=save_every, log_every=5
    )
    about = dict(guidance=W, reward=reward, reward_level=1.0, out=out, name="student") | changes
    return Distillation(
        sdxl, captions, sdxl.encode(captions), latents=latents, settings=settings, **about
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_student_ends_closer_to_the_teacher_than_the_undistilled_teacher(
    good_teacher, recipe, tmp_path
):
    """To its many-step images, in one step, from fixed noise.

    (This teacher is a crude one, whose second step already brings it close to them.)
    """
    job = job_of(good_teacher, tmp_path, iterations=100)
    z = torch.randn(48, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    cond = select(job.cond, slice(0, 48))
    distil(job, RECIPES[recipe](1))
    plain = job.sdxl.denoiser()
    guided = mcm.guided(plain, W, unconditional)
    many = mcm.sample(guided, z, 25, cond)
    models = {"student": job.sdxl.denoiser("average"), "plain": plain, "guided": guided}
    apart = {
        name: (mcm.sample(model, z, 1, cond) - many).square().mean().sqrt().item()
        for name, model in models.items()
    }
    assert apart["student"] < 0.99 * min(apart["plain"], apart["guided"]), apart


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "recipe, phase, step",
    [
        pytest.param("mlcm", 3, 4, marks=pytest.mark.slow),
        pytest.param("tlcm", 1, 2, marks=pytest.mark.slow),
        pytest.param("tlcm", 2, 1, marks=pytest.mark.slow),
        pytest.param("tlcm", 3, 2, marks=pytest.mark.slow),
        ("scott", 0, 2),
    ],
)
def test_resuming_in_the_middle_of_any_phase_changes_nothing(
    teacher, recipe, phase, step, tmp_path, monkeypatch
):
    """Bit for bit: student, target, critics and their optimisers.

    Also at the end of a phase (TLCM's phases have 31, 5, 1 and 3 steps).
    """
    iterations = {"mlcm": 15, "tlcm": 40, "scott": 4}[recipe]

    def stop(run):
        if run.name == f"student-{phase}" and run.step + 1 == step:
            raise Stopped

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = job_of(teacher, tmp_path / "whole", iterations, save_every=2)
    distil(whole, RECIPES[recipe](1))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "save_model", stop)
        distil(job_of(teacher, tmp_path / "cut", iterations, save_every=2), RECIPES[recipe](1))
    again = job_of(teacher, tmp_path / "cut", iterations, save_every=2, resume=True)
    distil(again, RECIPES[recipe](1))
    for which in ("average", "student"):
        for key, value in whole.sdxl.weights(which).items():
            assert torch.equal(value, again.sdxl.weights(which)[key]), (which, key)


def test_full_fine_tuning_with_a_range_of_guidance(teacher, tmp_path):
    job = job_of(teacher, tmp_path, iterations=8, full=True, guidance=(1.0, 4.0))
    sdxl = job.sdxl
    before = {k: v.clone() for k, v in sdxl.unet.state_dict().items()}
    distil(job, RECIPES["lcm"](1))
    # the teacher is as it was
    assert all(torch.equal(v, before[k]) for k, v in sdxl.unet.state_dict().items())
    cond = select(job.cond, slice(0, 2))
    z = torch.randn(2, 4, 8, 8)
    t = torch.full((2,), 0.7, dtype=torch.float64)
    conds = [cond._replace(omega=torch.full((2,), w)) for w in (0.0, 3.0)]
    low, high = (sdxl.denoiser("average")(z, t, c) for c in conds)
    assert not torch.equal(low, high)
    sdxl.save(tmp_path, "average")
    sdxl.load("again", tmp_path, full=True)
    assert torch.equal(sdxl.denoiser("again")(z, t, conds[1]), high)


def one_phase(recipe, number=0, **changes):
    phase = dataclasses.replace(recipe.phases[number], **changes)
    return dataclasses.replace(recipe, phases=(phase,))


@pytest.mark.parametrize("share", [False, True])
def test_the_teacher_is_guided_as_the_student_is_told_wherever_z_t_comes_from(
    teacher, share, tmp_path
):
    job = job_of(teacher, tmp_path, iterations=2, full=True, guidance=(1.0, 4.0))
    distil(job, one_phase(RECIPES["mlcm"](4), share_rollout=share))


@pytest.mark.slow
def test_data_free_recipes_never_touch_an_image(teacher, tmp_path):
    for recipe in ("mlcm", "tlcm"):
        assert not RECIPES[recipe](4).needs_images
        job = job_of(teacher, tmp_path, iterations=12)
        job.latents = None
        vae = job.sdxl.pipe.vae
        hooks = [
            part.register_forward_hook(lambda *_: pytest.fail("an image was encoded"))
            for part in (vae.encoder, vae.quant_conv)
        ]
        distil(job, RECIPES[recipe](1))
        for hook in hooks:
            hook.remove()


def test_the_target_and_the_average_are_two_things(teacher, tmp_path):
    """LCM's target follows the student at 0.95; the average that is saved has its own decay."""
    job = job_of(teacher, tmp_path, iterations=6)
    distil(job, RECIPES["lcm"](1))
    student, target, average = (job.sdxl.weights(n) for n in ("student", "target", "average"))
    key = next(k for k in student if "lora_B" in k)
    assert not torch.equal(student[key], target[key])
    assert not torch.equal(average[key], target[key])
    assert target[key].abs().max() > 0  # where it started


def test_a_target_begins_where_the_student_is_in_each_phase(teacher, tmp_path):
    """Not where an earlier phase has left it."""
    job = job_of(teacher, tmp_path)
    for name in ("student", "average", "target"):
        job.sdxl.add_lora(name)
    with torch.no_grad():
        for value in job.sdxl.weights("student").values():
            value += 0.1
    phase = RECIPES["lcm"](4).phases[0]
    averages = begin_averages(job.sdxl, phase, job.settings)
    student, target, average = (job.sdxl.weights(n) for n in ("student", "target", "average"))
    assert all(torch.equal(student[k], target[k]) for k in student)
    assert not any(torch.equal(student[k], average[k]) for k in student)
    assert [decay(10**6) for _, decay in averages] == [job.settings.ema, phase.target_ema]
    plain = dataclasses.replace(phase, target_ema=None)
    assert len(begin_averages(job.sdxl, plain, job.settings)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_number_of_network_evaluations_is_as_counted(teacher, recipe, tmp_path):
    """What makes recipes comparable: `Recipe.evaluations` for each sample, phase by phase."""
    job = job_of(teacher, tmp_path, iterations=3)
    counted = []
    job.sdxl.unet.register_forward_pre_hook(lambda m, args: counted.append(len(args[0])))
    for share in (False, True):
        whole = RECIPES[recipe](4)
        for number, phase in enumerate(whole.phases):
            shared = share and phase.states == "teacher"
            one = one_phase(whole, number, share_rollout=shared)
            counted.clear()
            distil(job, one)
            for name in [name for name in job.sdxl.unets if name]:
                job.sdxl.remove(name)
            # a denoiser is not asked at t = 0, and a run of the teacher is shorter or longer by
            # where t falls: both by one sample in eight or so
            assert sum(counted) / (3 * 16) == pytest.approx(one.evaluations(), rel=0.1)


@pytest.mark.parametrize(
    "recipe, changes, says",
    [
        *[(name, dict(latents=None), "learns from images") for name in ("cm", "lcm", "scott")],
        ("mcm", dict(latents=None), "learns from images"),
        ("lcm", dict(guidance=(1.0, 3.0)), "cannot be told its guidance"),
        ("mlcm", dict(reward=None), "give it a reward"),
    ],
)
def test_what_a_recipe_cannot_do_without(teacher, tmp_path, recipe, changes, says):
    job = dataclasses.replace(job_of(teacher, tmp_path), **changes)
    with pytest.raises(mcm.InputError, match=says):
        distil(job, RECIPES[recipe](4))


# --- what a run does with what a phase says -------------------------------------------------------


class Told(Exception):
    """A test has seen enough."""


def spied(monkeypatch, name, module=distil_module):
    """The calls of a function of the training loop: (arguments, keywords, result) each."""
    calls = []
    original = getattr(module, name)

    def spy(*arguments, **keywords):
        result = original(*arguments, **keywords)
        calls.append((arguments, keywords, result))
        return result

    monkeypatch.setattr(module, name, spy)
    return calls


@pytest.mark.parametrize(
    "recipe, names", [("lcm", ["target"]), ("cm", None), ("scott", ["target"])]
)
def test_the_target_answers_at_z_s_where_there_is_one(
    teacher, tmp_path, monkeypatch, recipe, names
):
    calls = spied(monkeypatch, "consistency_loss")
    distil(job_of(teacher, tmp_path, iterations=2), RECIPES[recipe](4))
    for arguments, keywords, _ in calls:
        target = keywords["target"]
        assert (target and target.network.names) == names
        assert arguments[0].network.names == ["student"]
        assert isinstance(keywords["teacher"], Guided) and keywords["teacher"].w == W


def test_learning_rates_are_the_runs_times_the_phases(teacher, tmp_path, monkeypatch):
    """And of critics the student's times the phase's critic_lr."""
    rates = {}

    def update(learner):
        layers = {key.split(".")[0] for key in learner.weights}
        kind = "critic" if layers == {"up_blocks", "conv_out"} else "student or fake"
        rates.setdefault(kind, []).append(learner.lr * learner.lr_scale)
        for value in learner.weights.values():
            value.grad = None
        learner.norm = torch.zeros(())

    monkeypatch.setattr(Learner, "update", update)
    job = job_of(teacher, tmp_path, iterations=4)
    phase = RECIPES["scott"](4).phases[0]
    recipe = dataclasses.replace(
        RECIPES["scott"](4), phases=(dataclasses.replace(phase, lr=0.3, critic_lr=7.0),)
    )
    distil(job, recipe)
    settings = dataclasses.replace(job.settings, lr=0.3 * job.settings.lr, warmup=1)
    expected = [settings.lr_at(step) for step in range(4)]
    assert rates["student or fake"] == pytest.approx(expected)
    assert rates["critic"] == pytest.approx([7 * lr for lr in expected])


def test_a_batch_in_parts_has_the_gradient_of_the_whole(teacher, tmp_path, monkeypatch):
    """Each part counts by its share. Noise and times are those of the prompt, whatever the part."""
    job = job_of(teacher, tmp_path, iterations=1)
    noise = torch.randn(len(job.prompts), 4, 8, 8)

    def batch(job, phase, chosen):
        cond = select(job.cond, chosen)
        return job.latents[chosen], noise[chosen], cond

    def draw_states(phase, x, noise, cond, student, teacher, progress):
        t = ((noise[:, 0, 0, 0].sigmoid() * 50).ceil() / 50).double()
        return x, noised(x, t, noise, student.schedule), t

    gradients = {}

    def update(learner):
        gradients[parts] = {k: v.grad.clone() for k, v in learner.weights.items()}
        raise Told

    monkeypatch.setattr(distil_module, "batch", batch)
    monkeypatch.setattr(distil_module, "draw_states", draw_states)
    monkeypatch.setattr(Learner, "update", update)
    for parts in (1, 2, 4):
        again = job_of(teacher, tmp_path, iterations=1)
        again.settings = dataclasses.replace(again.settings, accumulate=parts)
        with pytest.raises(Told):
            distil(again, RECIPES["cm"](4))
    for parts in (2, 4):
        for key, value in gradients[1].items():
            assert torch.allclose(gradients[parts][key], value, rtol=1e-3, atol=1e-7), key


def test_prompts_are_those_of_the_conditions_also_where_runs_are_shared(
    teacher, tmp_path, monkeypatch
):
    calls = spied(monkeypatch, "total_gradient")
    job = job_of(teacher, tmp_path, iterations=2)
    for share in (False, True):
        calls.clear()
        distil(job, one_phase(RECIPES["mlcm"](4), 4, share_rollout=share))
        job.sdxl.remove_all()
        for (output, _, _, prompts, _), _, _ in calls:
            assert len(prompts) == len(output.t) == 16
            assert len(set(prompts)) == 2 if share else len(set(prompts)) > 2
            for prompt, states in zip(prompts, output.cond.states):
                own = job.cond.states[job.prompts.index(prompt)]
                assert torch.equal(states, own), prompt


def test_a_student_is_told_one_less_than_the_teachers_guidance(teacher, tmp_path):
    """omega = w - 1, as in LCM (arXiv 2310.04378) and as diffusers' pipelines tell it."""
    job = job_of(teacher, tmp_path, full=True, guidance=(3.0, 5.0))
    _, _, cond = distil_module.batch(job, RECIPES["lcm"](4).phases[0], torch.arange(64))
    assert cond.omega.min() >= 2 and cond.omega.max() <= 4 and cond.omega.std() > 0.3
    assert torch.equal(distil_module.told_guidance(cond), cond.omega + 1)
    # the states of one run of the teacher have the guidance of that run
    shared = dataclasses.replace(RECIPES["mlcm"](4).phases[0], share_rollout=True)
    _, _, cond = distil_module.batch(job, shared, torch.arange(16))
    runs = cond.omega.unflatten(0, (2, 8))
    assert torch.equal(runs, runs[:, :1].expand(2, 8)) and runs[0, 0] != runs[1, 0]
    matching = distil_module.make_objective("distribution_matching", job)
    assert torch.equal(matching.real.w(cond), cond.omega + 1)


def test_a_dry_run_leaves_nothing_behind(teacher, tmp_path):
    """Of weights, files and random state; and what it does not survive is raised."""
    job = job_of(teacher, tmp_path / "out")
    before = {key: value.clone() for key, value in job.sdxl.unet.state_dict().items()}
    dry_run(job, RECIPES["tlcm"](4))
    assert list(job.sdxl.unets) == [None] and not (tmp_path / "out").exists()
    after = {k.replace(".base_layer.", "."): v for k, v in job.sdxl.unet.state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())

    def greedy(images, prompts):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        dry_run(dataclasses.replace(job, reward=greedy), RECIPES["mlcm"](4))


def test_a_finished_phase_keeps_its_weights_only(teacher, tmp_path):
    job = job_of(teacher, tmp_path, iterations=40, save_every=2)
    distil(job, RECIPES["tlcm"](4))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"student-{n}.state.safetensors" for n in range(4)]
    for path in tmp_path.glob("*.safetensors"):
        assert not [key for key in load_file(path) if "adam." in key], path
