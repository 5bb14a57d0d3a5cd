import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from pipelines import drawn, untrained_pipeline

import mcm
from mcm.lab.data import to_float
from mcm.lab.run import Training
from mcm.latent.distil import Captioned, distil
from mcm.latent.sdxl import SDXL, unconditional
from mcm.latent.tiny_sdxl import train_unet
from mcm.recipes import RECIPES
from mcm.sampling import rows

W = 2.0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline whose UNet has seen enough to be worth distilling. Its latents are coarse pictures: 8x8 RGB and their grey."""
    folder = tmp_path_factory.mktemp("teacher")
    captions, pictures = drawn()
    pipe = untrained_pipeline(folder, captions, channels=(16, 32))
    small = F.avg_pool2d(to_float(pictures), 4)
    latents = torch.cat([small, small.mean(1, keepdim=True)], 1) * 1.5
    encoders, tokenizers = (
        [pipe.text_encoder, pipe.text_encoder_2],
        [pipe.tokenizer, pipe.tokenizer_2],
    )
    settings = Training(300, 32, lr=3e-3, warmup=20, save_every=10**6)
    train_unet(
        pipe.unet,
        encoders,
        tokenizers,
        pipe.scheduler,
        captions,
        latents,
        32,
        settings,
        folder,
        False,
    )
    return pipe, captions, latents


def sdxl_of(teacher):
    pipe, captions, latents = teacher
    parts = {k: copy.deepcopy(v) if k == "unet" else v for k, v in pipe.components.items()}
    sdxl = SDXL(type(pipe)(**parts), rank=16)
    return sdxl, Captioned(captions, sdxl.encode(captions), latents)


def reward(images, prompts):
    """Prefers bright pictures where the caption says white, and dark ones elsewhere."""
    return (
        10
        * torch.tanh(images).mean((1, 2, 3))
        * torch.tensor([1.0 if "white" in p else -1.0 for p in prompts])
    )


def run(sdxl, data, recipe, out, iterations=60, **changes):
    settings = Training(
        iterations,
        16,
        lr=1e-3,
        warmup=5,
        ema=0.9,
        save_every=changes.pop("save_every", 10**6),
        log_every=5,
    )
    return distil(
        sdxl,
        RECIPES[recipe](1),
        data,
        settings,
        changes.pop("guidance", W),
        out,
        recipe,
        reward=(reward, 1.0),
        **changes,
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_student_ends_closer_to_the_teachers_many_step_pictures_than_the_undistilled_teacher(
    teacher, recipe, tmp_path
):
    """In one step, from fixed noise. (This teacher is a crude one, whose second step already brings it close to its many-step pictures.)"""
    sdxl, data = sdxl_of(teacher)
    z, cond = (
        torch.randn(48, 4, 8, 8, generator=torch.Generator().manual_seed(9)),
        rows(data.cond, slice(0, 48)),
    )
    run(sdxl, data, recipe, tmp_path, iterations=100)
    with torch.no_grad():
        many = mcm.sample(mcm.guided(sdxl.denoiser(), W, unconditional), z, 25, cond)
        apart = {
            name: (mcm.sample(model, z, 1, cond) - many).square().mean().sqrt().item()
            for name, model in (
                ("student", sdxl.denoiser("average")),
                ("undistilled", sdxl.denoiser()),
                ("undistilled, guided", mcm.guided(sdxl.denoiser(), W, unconditional)),
            )
        }
    assert apart["student"] < 0.99 * min(apart["undistilled"], apart["undistilled, guided"]), apart


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    "recipe, phase, step",
    [("mlcm", 3, 4), ("tlcm", 1, 2), ("tlcm", 2, 1), ("tlcm", 3, 2), ("scott", 0, 2)],
)
def test_resuming_in_the_middle_of_any_phase_changes_nothing(
    teacher, recipe, phase, step, tmp_path
):
    """Bit for bit: student, target, critics and their optimisers; also at the end of a phase (TLCM's phases have 31, 5, 1 and 3 steps)."""
    iterations = {"mlcm": 15, "tlcm": 40, "scott": 4}[recipe]

    def saved(*at):
        if at == (phase, step):
            raise Stopped

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, data = sdxl_of(teacher)
    run(whole, data, recipe, tmp_path / "whole", iterations, save_every=2)
    cut, data = sdxl_of(teacher)
    with pytest.raises(Stopped):
        run(cut, data, recipe, tmp_path / "cut", iterations, save_every=2, saved=saved)
    again, data = sdxl_of(teacher)
    run(again, data, recipe, tmp_path / "cut", iterations, save_every=2, resume=True)
    for which in ("average", "student"):
        for key, value in whole.weights(which).items():
            assert torch.equal(value, again.weights(which)[key]), (which, key)


def test_full_fine_tuning_with_a_range_of_guidance(teacher, tmp_path):
    sdxl, data = sdxl_of(teacher)
    before = {k: v.clone() for k, v in sdxl.unet.state_dict().items()}
    run(sdxl, data, "lcm", tmp_path, iterations=8, full=True, guidance=(1.0, 4.0))
    assert all(
        torch.equal(v, before[k]) for k, v in sdxl.unet.state_dict().items()
    )  # the teacher is as it was
    cond = rows(data.cond, slice(0, 2))
    z, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.7, dtype=torch.float64)
    low, high = (
        sdxl.denoiser("average")(z, t, cond._replace(omega=torch.full((2,), w))) for w in (0.0, 3.0)
    )
    assert not torch.equal(low, high)
    sdxl.save(tmp_path, "average")
    sdxl.load("again", tmp_path, full=True)
    assert torch.equal(
        sdxl.denoiser("again")(z, t, cond._replace(omega=torch.full((2,), 3.0))), high
    )


@pytest.mark.parametrize("share_run", [False, True])
def test_the_teacher_is_guided_as_the_student_is_told_wherever_z_t_comes_from(
    teacher, share_run, tmp_path
):
    sdxl, data = sdxl_of(teacher)
    recipe = RECIPES["mlcm"](4)
    stage = dataclasses.replace(recipe.phases[0].stage, share_run=share_run)
    one = dataclasses.replace(recipe, phases=(dataclasses.replace(recipe.phases[0], stage=stage),))
    distil(
        sdxl,
        one,
        data,
        Training(2, 16, lr=1e-3, save_every=10**6),
        (1.0, 4.0),
        tmp_path,
        "x",
        full=True,
    )


def test_data_free_recipes_never_touch_a_picture(teacher, tmp_path):
    sdxl, data = sdxl_of(teacher)
    for part in (sdxl.pipe.vae.encoder, sdxl.pipe.vae.quant_conv):
        part.register_forward_hook(lambda *_: pytest.fail("a picture was encoded"))
    for recipe in ("mlcm", "tlcm"):
        assert not RECIPES[recipe](4).needs_images
        here, _ = sdxl_of(teacher)
        run(here, dataclasses.replace(data, latents=None), recipe, tmp_path, iterations=12)
    for recipe in ("cm", "lcm", "mcm", "scott"):
        with pytest.raises(mcm.InputError, match="learns from images"):
            run(sdxl, dataclasses.replace(data, latents=None), recipe, tmp_path)


def test_the_target_and_the_average_are_two_things(teacher, tmp_path):
    """LCM's target follows the student at 0.95; the average that is saved has a decay of its own."""
    sdxl, data = sdxl_of(teacher)
    run(sdxl, data, "lcm", tmp_path, iterations=6)
    student, target, average = (sdxl.weights(n) for n in ("student", "target", "average"))
    key = next(k for k in student if "lora_B" in k)
    assert not torch.equal(student[key], target[key]) and not torch.equal(average[key], target[key])
    assert target[key].abs().max() > 0  # where it started


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_number_of_network_evaluations_is_as_counted(teacher, recipe, tmp_path):
    """What makes recipes comparable: `Recipe.evaluations` for each sample of each step, phase by phase."""
    sdxl, data = sdxl_of(teacher)
    counted = []
    sdxl.unet.register_forward_pre_hook(lambda m, args: counted.append(len(args[0])))
    for share in (False, True):
        for phase in RECIPES[recipe](4).phases:
            stage = dataclasses.replace(
                phase.stage, share_run=share and phase.stage.z_from == "teacher"
            )
            one = dataclasses.replace(
                RECIPES[recipe](4), phases=(dataclasses.replace(phase, stage=stage),)
            )
            counted.clear()
            distil(
                sdxl,
                one,
                data,
                Training(3, 16, lr=1e-4, save_every=10**6),
                W,
                tmp_path,
                "x",
                reward=(reward, 1.0),
            )
            for which in [w for w in sdxl.unets if w]:
                sdxl.remove(which)
            # a denoiser is not asked at t = 0, and a run of the teacher is shorter or longer by where t falls: both by one sample in eight or so
            assert sum(counted) / (3 * 16) == pytest.approx(one.evaluations(), rel=0.1)


def test_bad_input(teacher, tmp_path):
    sdxl, data = sdxl_of(teacher)
    with pytest.raises(mcm.InputError, match="range of guidance"):
        run(sdxl, data, "lcm", tmp_path, guidance=(1.0, 3.0))
    with pytest.raises(mcm.InputError, match="give it a reward"):
        distil(sdxl, RECIPES["mlcm"](4), data, Training(4, 16, lr=1e-3), W, tmp_path, "x")
