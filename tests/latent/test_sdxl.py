import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from pipelines import CHINESE, ENGLISH, untrained_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import mcm
from mcm.latent.recipes import Phase, milestones
from mcm.latent.scheduler import MCMScheduler
from mcm.latent.sdxl import (
    LORA_FILE,
    MODULES,
    SDXL,
    active,
    check_vocabulary,
    load_pipeline,
    noise_schedule,
    unconditional,
)
from mcm.latent.states import draw_states

SDXL_BASE = dict(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=2,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline on disk."""
    folder = tmp_path_factory.mktemp("pipeline")
    untrained_pipeline(folder / "words").save_pretrained(folder / "pipe")
    return folder / "pipe"


@pytest.fixture
def sdxl(saved):
    return SDXL(load_pipeline(str(saved), torch.float32, torch.device("cpu")), rank=4)


def perturb(weights, std=0.1):
    """A LoRA starts as nothing: its B is 0. Fill it in."""
    with torch.no_grad():
        for value in weights.values():
            value.normal_(std=std)


def ask(sdxl, name=None, prompts=ENGLISH[:3]):
    z = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)[: len(prompts)]
    return sdxl.denoiser(name)(z, t, sdxl.encode(prompts))


def test_lora_parameter_counts_at_the_size_of_sdxl():
    with torch.device("meta"):
        pipe = type("Pipe", (), {})()
        pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2 = (
            UNet2DConditionModel(**SDXL_BASE),
            None,
            None,
            None,
        )
    pipe.scheduler = diffusers.DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    pipe.config = SimpleNamespace(force_zeros_for_empty_prompt=True)
    assert sum(p.numel() for p in pipe.unet.parameters()) == 2_567_463_684
    weights = SDXL(pipe, rank=64).add_lora("student")
    assert sum(p.numel() for p in weights.values()) == 196_751_360
    assert len(weights) == 2 * 788


def test_the_denoiser_is_the_pipelines_own_unet(sdxl):
    """x_hat from diffusers' prediction at the index that t means."""
    cond, z = sdxl.encode(ENGLISH[:1]), torch.randn(1, 4, 8, 8)
    for t, index in ((1.0, 999), (0.25, 249), (0.001, 0)):
        with torch.no_grad():
            eps = sdxl.unet(
                z,
                index,
                cond.states,
                added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids},
            ).sample
            theirs = (
                sdxl.pipe.scheduler.step(eps, index, z).pred_original_sample
                if sdxl.pipe.scheduler.set_timesteps(1000) is None
                else None
            )
        ours = sdxl.denoiser()(z, torch.tensor([t], dtype=torch.float64), cond)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_guided_sampling_is_the_stock_pipeline(sdxl):
    """mcm.guided's w is diffusers' guidance_scale; the unconditional branch is zeros with the same
    time ids.
    """
    z = torch.randn(2, 4, 8, 8)
    theirs = sdxl.pipe(
        ENGLISH[:2], num_inference_steps=5, guidance_scale=3.0, latents=z, output_type="latent"
    ).images
    model = mcm.guided(sdxl.denoiser(), 3.0, unconditional)
    ours = mcm.sample(model, z, 5, sdxl.encode(ENGLISH[:2]))
    # diffusers' last step stops at index 0, whose noise level is not quite 0
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert (
        ours - mcm.sample(sdxl.denoiser(), z, 5, sdxl.encode(ENGLISH[:2]))
    ).abs().max() > 0.01 * theirs.abs().max()
    one = mcm.guided(sdxl.denoiser(), 1.0, unconditional)
    t = torch.full((2,), 0.6, dtype=torch.float64)
    guided, plain = (
        one(z, t, sdxl.encode(ENGLISH[:2])),
        sdxl.denoiser()(z, t, sdxl.encode(ENGLISH[:2])),
    )
    assert (
        guided - plain
    ).abs().max() < 1e-5 * plain.abs().max()  # a batch twice as large rounds differently


def test_a_lora_that_is_off_leaves_the_teacher_exactly_as_it_was(sdxl):
    with torch.no_grad():
        before = ask(sdxl)
        perturb(sdxl.add_lora("student"))
        assert torch.equal(ask(sdxl), before)
        assert (ask(sdxl, "student") - before).abs().max() > 1e-3
        sdxl.add_lora("average", "student")
        assert torch.equal(ask(sdxl, "average"), ask(sdxl, "student"))
        sdxl.remove("average"), sdxl.remove("student")
        assert torch.equal(ask(sdxl), before)


def test_a_lora_switches_in_one_place(sdxl):
    """Also after others came and went: layers that kept a switch of their own would miss it."""
    for name in ("student", "critic", "average"):
        perturb(sdxl.add_lora(name))
    sdxl.remove("critic")
    with active(sdxl.unet, ["student"]):
        layers = [m for m in sdxl.unet.modules() if isinstance(m, BaseTunerLayer)]
        assert len(layers) > 20
        assert all(layer.active_adapters == ["student"] for layer in layers)
        assert len({id(layer.active_adapters) for layer in layers}) == 1
    assert all(layer.active_adapters == [] for layer in layers)
    assert not torch.equal(ask(sdxl, "student"), ask(sdxl, "average"))


def test_a_unet_in_bfloat16_never_sees_images_in_float32(saved):
    """LoRAs are float32, and peft would widen every activation for them. Autocast makes room for
    both, also where nobody opened it.
    """
    pipe = StableDiffusionXLPipeline.from_pretrained(saved).to(torch.bfloat16)
    sdxl = SDXL(pipe, rank=4)
    perturb(sdxl.add_lora("student"))
    seen = set()

    def note(module, inputs):
        seen.add(inputs[0].dtype)

    for name, module in sdxl.unet.named_modules():
        if name.endswith("lora_A.student"):
            module.register_forward_pre_hook(note)
    bare = ask(sdxl, "student")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(ask(sdxl, "student"), bare)
    assert seen == {torch.bfloat16}
    assert not torch.equal(bare, ask(sdxl))


def test_a_unet_in_float32_computes_in_what_the_run_asks_for(saved):
    """Also a student that is fine-tuned as a whole."""
    sdxl = SDXL(StableDiffusionXLPipeline.from_pretrained(saved), rank=4)
    sdxl.add_copy("student")
    for name in (None, "student"):
        seen = []
        sdxl.unets[name].mid_block.register_forward_hook(lambda *a, s=seen: s.append(a[2].dtype))
        exact = ask(sdxl, name)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            rounded = ask(sdxl, name)
        assert seen == [torch.float32, torch.bfloat16]
        assert (rounded - exact).norm() < 0.1 * exact.norm()


def gradients(sdxl, order):
    """The student's gradients when the teacher is asked before or after it, before the backward
    pass.
    """
    if order == "teacher first":
        with torch.no_grad():
            target = ask(sdxl)
        x_hat = ask(sdxl, "student")
    else:
        x_hat = ask(sdxl, "student")
        with torch.no_grad(), active(sdxl.unet, []):
            target = ask(sdxl)
    ((x_hat - 2 * target) ** 2).mean().backward()
    result = {k: v.grad.clone() for k, v in sdxl.weights("student").items()}
    sdxl.unet.zero_grad()
    return result


def test_checkpointing_gives_the_same_gradients_whatever_lora_is_on_in_the_backward_pass(saved):
    found = []
    for checkpointing in (False, True):
        here = SDXL(
            load_pipeline(str(saved), torch.float32, torch.device("cpu")),
            rank=4,
            checkpointing=checkpointing,
        )
        here.unet.train()
        torch.manual_seed(1)
        perturb(here.add_lora("student"))
        assert here.unet.is_gradient_checkpointing == checkpointing
        found += [gradients(here, "teacher first"), gradients(here, "teacher last")]
    for other in found[1:]:
        for key, value in found[0].items():
            assert torch.allclose(value, other[key], rtol=1e-4, atol=1e-6), key
    assert all(v.abs().max() > 0 for k, v in found[0].items())
    assert all(p.grad is None for k, p in here.unet.named_parameters() if "lora_" not in k)


def test_full_fine_tuning_tells_the_student_its_guidance(sdxl):
    sdxl.add_copy("student", guidance_input=True)
    cond, z, t = (
        sdxl.encode(ENGLISH[:2]),
        torch.randn(2, 4, 8, 8),
        torch.full((2,), 0.5, dtype=torch.float64),
    )
    low, high = (cond._replace(omega=torch.full((2,), w)) for w in (1.0, 7.0))
    student = sdxl.denoiser("student")
    assert torch.equal(
        student(z, t, low), sdxl.denoiser()(z, t, cond)
    )  # the new input starts at zero
    torch.nn.init.normal_(sdxl.unets["student"].time_embedding.cond_proj.weight)
    assert not torch.allclose(student(z, t, low), student(z, t, high))
    theirs = sdxl.pipe.get_guidance_scale_embedding(
        torch.tensor([6.0]), 256
    )  # the pipeline is given w - 1
    seen = []
    sdxl.unets["student"].time_embedding.register_forward_hook(
        lambda m, args, out: seen.append(args[1])
    )
    student(z, t, cond._replace(omega=torch.tensor([6.0, 6.0])))
    assert torch.allclose(seen[0][0], theirs[0], atol=2e-3)  # sines of 6,000 in float32
    with pytest.raises(mcm.InputError, match="omega"):
        student(z, t, cond)


def test_text_is_encoded_as_the_pipeline_does(sdxl):
    cond = sdxl.encode([ENGLISH[1], ENGLISH[0], ENGLISH[1]])
    states, _, pooled, _ = sdxl.pipe.encode_prompt([ENGLISH[1]], do_classifier_free_guidance=False)
    assert torch.allclose(cond.states[2], states[0], atol=1e-5) and torch.allclose(
        cond.pooled[0], pooled[0], atol=1e-5
    )
    assert cond.time_ids[0].tolist() == [32, 32, 0, 0, 32, 32]
    null = unconditional(cond)
    assert (
        not null.states.any()
        and not null.pooled.any()
        and torch.equal(null.time_ids, cond.time_ids)
    )


def test_images_to_latents_and_back_use_the_vaes_scale(sdxl):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    latents = sdxl.to_latents(images)
    theirs = sdxl.pipe.vae.encode(images.float() / 127.5 - 1).latent_dist.mean * 0.5
    assert torch.allclose(latents, theirs, atol=1e-5)
    assert torch.allclose(
        sdxl.to_images(latents), sdxl.pipe.vae.decode(latents / 0.5).sample, atol=1e-5
    )


# --- saving, and loading in stock diffusers -------------------------------------------------------


def test_a_saved_lora_gives_the_same_image_in_stock_diffusers(saved, tmp_path):
    ours = SDXL(load_pipeline(str(saved), torch.float32, torch.device("cpu")), rank=4)
    perturb(ours.add_lora("student"))
    ours.save(tmp_path, "student")
    z = torch.randn(2, 4, 8, 8)
    scheduler = MCMScheduler.like(ours.pipe.scheduler)
    scheduler.save_pretrained(tmp_path)

    stock = StableDiffusionXLPipeline.from_pretrained(saved)
    stock.set_progress_bar_config(disable=True)
    base = stock(
        ENGLISH[:2], num_inference_steps=4, guidance_scale=0, latents=z, output_type="latent"
    ).images
    stock.load_lora_weights(tmp_path)
    stock.scheduler = MCMScheduler.from_pretrained(tmp_path)
    theirs = stock(
        ENGLISH[:2], num_inference_steps=4, guidance_scale=0, latents=z, output_type="latent"
    ).images
    mine = mcm.sample(
        ours.denoiser("student"),
        z,
        cond=ours.encode(ENGLISH[:2]),
        times=milestones(4),
        solver=mcm.ddim,
    )
    assert (theirs - mine).abs().max() < 1e-5 * mine.abs().max().clamp_min(1)
    assert (theirs - base).abs().max() > 1e-2
    stock.unload_lora_weights()
    stock.scheduler = ours.pipe.scheduler
    again = stock(
        ENGLISH[:2], num_inference_steps=4, guidance_scale=0, latents=z, output_type="latent"
    ).images
    assert torch.equal(again, base)


def test_eta_1_in_the_stock_pipeline_is_our_re_noised_sampling(saved):
    """With the fresh noise of both replaced by one and the same."""
    ours = SDXL(load_pipeline(str(saved), torch.float32, torch.device("cpu")), rank=4)
    pipe = StableDiffusionXLPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MCMScheduler.like(pipe.scheduler)
    z, noise = torch.randn(2, 2, 4, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mcm.latent.scheduler.randn_tensor", lambda *a, **k: noise)
        theirs = pipe(
            ENGLISH[:2],
            num_inference_steps=3,
            guidance_scale=0,
            eta=1.0,
            latents=z,
            output_type="latent",
        ).images
        patch.setattr(torch, "randn", lambda *a, **k: noise)
        mine = mcm.sample(
            ours.denoiser(),
            z,
            cond=ours.encode(ENGLISH[:2]),
            times=milestones(3),
            solver=mcm.renoise,
        )
    assert (theirs - mine).abs().max() < 1e-4 * mine.abs().max().clamp_min(1)


def test_a_full_copy_after_a_critic_is_a_clean_unet(sdxl, tmp_path):
    """Removing a LoRA leaves peft's wrappers on the shared UNet; a copy must not carry them into
    its file.
    """
    sdxl.add_lora("critic"), sdxl.remove("critic"), sdxl.add_lora("fake")
    sdxl.add_copy("student")
    sdxl.save(tmp_path, "student")
    again, missing = UNet2DConditionModel.from_pretrained(
        tmp_path / "unet", output_loading_info=True
    )
    assert not missing["missing_keys"] and not missing["unexpected_keys"]
    sdxl.remove("fake")
    for a, b in zip(again.parameters(), sdxl.unets["student"].parameters()):
        assert torch.equal(a, b)
    assert torch.equal(ask(sdxl, "student"), ask(sdxl))


def test_a_saved_lora_comes_back(sdxl, saved, tmp_path):
    perturb(sdxl.add_lora("student"))
    sdxl.save(tmp_path, "student")
    sdxl.load("average", tmp_path)
    for key, value in sdxl.weights("student").items():
        assert torch.equal(value, sdxl.weights("average")[key])
    other = SDXL(load_pipeline(str(saved), torch.float32, torch.device("cpu")), rank=2)
    with pytest.raises(mcm.InputError, match="rank"):
        other.load("average", tmp_path)


def test_files_that_stock_diffusers_would_load_in_part_are_refused(sdxl, tmp_path):
    perturb(sdxl.add_lora("student"))
    sdxl.save(tmp_path, "student")
    raw = {
        f"base_model.model.{k}": v.contiguous()
        for k, v in get_peft_model_state_dict(sdxl.unet, adapter_name="student").items()
    }
    save_file(raw, tmp_path / LORA_FILE)
    with pytest.raises(mcm.InputError, match="158 of 158 have other names, .*base_model.model"):
        sdxl.load("average", tmp_path)
    mixed = diffusers.utils.convert_state_dict_to_diffusers(
        get_peft_model_state_dict(sdxl.unet, adapter_name="student")
    )
    save_file({f"unet.{k}": v.contiguous() for k, v in mixed.items()}, tmp_path / LORA_FILE)
    with pytest.raises(mcm.InputError, match="have other names, .*lora.down"):
        sdxl.load("average", tmp_path)
    (tmp_path / LORA_FILE).write_bytes(b"nonsense")
    with pytest.raises(mcm.InputError, match="not readable"):
        sdxl.load("average", tmp_path)
    with pytest.raises(mcm.InputError, match="missing"):
        sdxl.load("average", tmp_path / "nowhere")


def test_every_kind_of_module_carries_a_lora(sdxl, tmp_path):
    perturb(sdxl.add_lora("student"))
    sdxl.save(tmp_path, "student")
    keys = load_file(tmp_path / LORA_FILE)
    for kind in MODULES:
        assert any(f".{kind}.lora_A" in key for key in keys), kind


# --- pipelines that students are used in ----------------------------------------------------------


def student_of(pipe, folder):
    ours = SDXL(pipe, rank=4)
    torch.manual_seed(2)
    perturb(ours.add_lora("student"), 0.05)
    ours.save(folder, "student")
    return ours


def test_image_to_image_starts_from_the_noise_level_that_strength_asks_for(saved, tmp_path):
    student_of(load_pipeline(str(saved), torch.float32, torch.device("cpu")), tmp_path)
    base = StableDiffusionXLPipeline.from_pretrained(saved)
    pipe = StableDiffusionXLImg2ImgPipeline(**base.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MCMScheduler.like(pipe.scheduler)
    seen, image = [], torch.rand(1, 3, 32, 32)
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, timestep, sample, **k: (
        seen.append(int(timestep)) or step(output, timestep, sample, **k)
    )
    run = dict(
        image=image, num_inference_steps=4, guidance_scale=0, output_type="pt", prompt=ENGLISH[0]
    )
    plain = pipe(**run, strength=0.5, generator=torch.manual_seed(0)).images
    assert seen == [499, 124]
    pipe.load_lora_weights(tmp_path)
    assert not torch.equal(pipe(**run, strength=0.5, generator=torch.manual_seed(0)).images, plain)
    seen.clear()
    pipe(**run, strength=1.0)
    assert seen == [999, 749, 499, 124]


def test_controlnet(saved, tmp_path):
    student_of(load_pipeline(str(saved), torch.float32, torch.device("cpu")), tmp_path)
    base = StableDiffusionXLPipeline.from_pretrained(saved)
    control = ControlNetModel.from_unet(base.unet, conditioning_channels=3)
    for layer in control.controlnet_down_blocks:
        torch.nn.init.normal_(layer.weight)
    control.controlnet_cond_embedding = torch.nn.Conv2d(
        3, base.unet.config.block_out_channels[0], 4, stride=4
    )  # diffusers' own halves three times, for VAEs of factor 8
    pipe = StableDiffusionXLControlNetPipeline(**base.components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MCMScheduler.like(pipe.scheduler)
    pipe.load_lora_weights(tmp_path)
    run = dict(
        prompt=ENGLISH[0],
        num_inference_steps=4,
        guidance_scale=0.0,
        output_type="latent",
        height=32,
        width=32,
    )
    one, two = (
        pipe(**run, image=torch.full((1, 3, 32, 32), v), generator=torch.manual_seed(0)).images
        for v in (0.0, 1.0)
    )
    assert one.isfinite().all() and not torch.allclose(one, two)
    pipe.unload_lora_weights()
    assert not torch.allclose(
        one, pipe(**run, image=torch.zeros(1, 3, 32, 32), generator=torch.manual_seed(0)).images
    )


def test_a_pipeline_of_another_language_and_other_widths(tmp_path):
    pipe = untrained_pipeline(tmp_path / "words", CHINESE, width=48)
    pipe.save_pretrained(tmp_path / "pipe")
    ours = student_of(
        load_pipeline(str(tmp_path / "pipe"), torch.float32, torch.device("cpu")), tmp_path
    )
    cond = ours.encode(CHINESE)
    assert cond.states.shape[-1] == 96 and not torch.allclose(cond.pooled[0], cond.pooled[1])
    method = mcm.Method(8, (1000, 1000), skip=20, x_var=None)
    phase = Phase(method, states="teacher")
    student = ours.denoiser("student")
    teacher = mcm.guided(ours.denoiser(), 2.0, unconditional)
    x, z_t, t = draw_states(phase, None, torch.randn(4, 4, 8, 8), cond, student, teacher)
    loss = mcm.consistency_loss(student, x, cond, method, teacher=teacher, t=t, z_t=z_t).loss
    loss.backward()
    assert loss.isfinite() and any(p.grad.abs().max() > 0 for p in ours.weights("student").values())
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path)
    pipe.scheduler = MCMScheduler.like(pipe.scheduler)
    assert pipe(CHINESE[0], num_inference_steps=2, guidance_scale=0).images[0].size == (32, 32)


# --- what cannot work -----------------------------------------------------------------------------


def test_other_schedules_and_prediction_types(saved):
    v = diffusers.DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", prediction_type="v_prediction"
    )
    schedule, prediction = noise_schedule(v)
    assert prediction == "v" and torch.allclose(schedule.alphas_cumprod.float(), v.alphas_cumprod)
    with pytest.raises(
        mcm.InputError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"
    ):
        noise_schedule(diffusers.FlowMatchEulerDiscreteScheduler())


def test_rank_larger_than_a_layer(saved):
    with pytest.raises(mcm.InputError, match=r"rank 64 is more than .* can use: at most"):
        SDXL(load_pipeline(str(saved), torch.float32, torch.device("cpu")), rank=64)


def test_files_of_half_precision_load_in_the_precision_asked_for(saved, tmp_path):
    load_pipeline(str(saved), torch.float16, torch.device("cpu")).save_pretrained(tmp_path)
    pipe = load_pipeline(str(tmp_path), torch.float32, torch.device("cpu"))
    assert {
        part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    } == {torch.float32}


def test_not_an_sdxl_pipeline(saved, tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(mcm.InputError, match="no model_index.json"):
        load_pipeline(str(tmp_path), torch.float32, cpu)
    (tmp_path / "sdxl.safetensors").touch()
    with pytest.raises(mcm.InputError, match="one file; .*from_single_file"):
        load_pipeline(str(tmp_path / "sdxl.safetensors"), torch.float32, cpu)
    shutil.copytree(saved, tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(mcm.InputError, match="damaged"):
        load_pipeline(str(tmp_path / "broken"), torch.float32, cpu)


def test_a_hub_id_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(mcm.InputError, match="pass a folder with a pipeline"):
        load_pipeline("nobody/no-such-model", torch.float32, torch.device("cpu"))


def altered(saved, folder, file="model_index.json", **changes):
    """The pipeline with other entries in one of its JSON files; None removes one."""
    shutil.copytree(saved, folder)
    path = folder / file
    kept = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))
    return folder


NOTHING = [None, None]


@pytest.mark.parametrize(
    "file, changes, says",
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": NOTHING}
            | {"tokenizer": NOTHING},
            "StableDiffusionXLImg2ImgPipeline, and no SDXL pipeline: no text_encoder, tokenizer.*"
            "refiner",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline", "text_encoder_2": None, "tokenizer_2": None},
            "StableDiffusionPipeline, and no SDXL pipeline: no text_encoder_2, tokenizer_2$",
        ),
        (
            "model_index.json",
            {"_class_name": "KolorsPipeline", "text_encoder_2": None, "tokenizer_2": None},
            "KolorsPipeline, and no SDXL pipeline: no text_encoder_2, tokenizer_2$",
        ),
        (
            "model_index.json",
            {"_class_name": "FluxPipeline", "unet": None, "transformer": ["diffusers", "Flux"]},
            "FluxPipeline, and no SDXL pipeline: no unet$",
        ),
        ("vae/config.json", {"latents_mean": [0.1]}, "a VAE with latents_mean"),
        ("unet/config.json", {"in_channels": 9}, "reads 9 channels .for inpainting"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "epsilon", "rescale_betas_zero_snr": True},
            "'epsilon' with rescale_betas_zero_snr",
        ),
    ],
)
def test_other_pipelines_are_named_before_their_weights_are_read(
    saved, tmp_path, monkeypatch, file, changes, says
):
    folder = altered(saved, tmp_path / "other", file, **changes)
    monkeypatch.setattr(
        StableDiffusionXLPipeline, "from_pretrained", lambda *a, **k: pytest.fail("read")
    )
    with pytest.raises(mcm.InputError, match=says):
        load_pipeline(str(folder), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes",
    [
        {"timestep_type": "continuous"},
        {"sigma_min": 0.002},
        {"sigma_max": 120.0},
        {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    ],
)
def test_noise_levels_that_alphas_cumprod_does_not_tell(changes):
    kept = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noise_schedule(diffusers.EulerDiscreteScheduler(**kept))
    with pytest.raises(mcm.InputError, match=f"EulerDiscreteScheduler with {next(iter(changes))}"):
        noise_schedule(diffusers.EulerDiscreteScheduler(**kept, **changes))
    flow = diffusers.DPMSolverMultistepScheduler(**kept, use_flow_sigmas=True)
    with pytest.raises(mcm.InputError, match="with use_flow_sigmas True"):
        noise_schedule(flow)


def test_a_folder_with_fp16_files_only(saved, tmp_path, capsys):
    pipe = load_pipeline(str(saved), torch.float16, torch.device("cpu"))
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = load_pipeline(str(tmp_path), torch.float32, torch.device("cpu"))
    assert "fp16 files only: those are used" in capsys.readouterr().out
    for a, b in zip(pipe.unet.parameters(), again.unet.parameters()):
        assert torch.equal(a.float(), b)


def test_a_tokenizer_that_lost_its_files(saved, tmp_path):
    """transformers loads it all the same, and all prompts are then encoded alike."""
    for name in ("tokenizer", "tokenizer_2"):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        (folder / name / "tokenizer.json").unlink()
        with pytest.raises(mcm.InputError, match="tokenizer of 2 entries.*tokenizer files are"):
            load_pipeline(str(folder), torch.float32, torch.device("cpu"))


def test_a_tokenizer_that_lost_its_merges(saved):
    """Every word would fall into letters."""
    pipe = load_pipeline(str(saved), torch.float32, torch.device("cpu"))
    check_vocabulary("pipe", pipe.tokenizer, pipe.text_encoder)
    broken = CLIPTokenizer(pipe.tokenizer.get_vocab(), [])
    with pytest.raises(mcm.InputError, match="without merges"):
        check_vocabulary("pipe", broken, pipe.text_encoder)


def test_the_empty_prompt_where_it_is_not_zeros(saved, tmp_path):
    """force_zeros_for_empty_prompt false: guidance starts from the encoded ""; as in stock."""
    folder = altered(saved, tmp_path / "p", force_zeros_for_empty_prompt=False)
    sdxl = SDXL(load_pipeline(str(folder), torch.float32, torch.device("cpu")), rank=4)
    z = torch.randn(2, 4, 8, 8)
    t = torch.full((2,), 0.7, dtype=torch.float64)
    cond = sdxl.encode(ENGLISH[:2])
    ours = mcm.guided(sdxl.denoiser(), 4.0, sdxl.unconditional)(z, t, cond)
    states, null, pooled, null_pooled = sdxl.pipe.encode_prompt(ENGLISH[:2])
    null = cond._replace(states=null, pooled=null_pooled)
    x_cond, x_null = (sdxl.denoiser()(z, t, c) for c in (cond, null))
    assert torch.allclose(ours, x_null + 4 * (x_cond - x_null), rtol=1e-3, atol=1e-3)
    zeros = mcm.guided(sdxl.denoiser(), 4.0, unconditional)(z, t, cond)
    assert (ours - zeros).abs().max() > 0.01 * ours.abs().max()
    theirs = sdxl.pipe(
        ENGLISH[:2], num_inference_steps=5, guidance_scale=4.0, latents=z, output_type="latent"
    ).images
    model = mcm.guided(sdxl.denoiser(), 4.0, sdxl.unconditional)
    ours = mcm.sample(model, z, 5, cond)
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_a_fingerprint_is_of_the_pipelines_own_weights(sdxl):
    before = sdxl.fingerprint()
    perturb(sdxl.add_lora("student"))
    assert sdxl.fingerprint() == before
    with torch.no_grad():
        sdxl.unet.conv_in.weight[0, 0, 0, 0] += 0.01
    assert sdxl.fingerprint() != before


def test_what_is_saved_is_the_average(sdxl, tmp_path):
    for name in ("student", "average"):
        perturb(sdxl.add_lora(name))
    sdxl.save(tmp_path)
    saved = load_file(tmp_path / LORA_FILE)
    for key, value in sdxl.weights("average").items():
        assert torch.equal(saved[f"unet.{key}"], value)


def test_loras_of_every_version_of_diffusers_have_their_patterns(sdxl, tmp_path):
    """Versions 0.34 to 0.39 look for them without asking whether they are there."""
    sdxl.add_lora("average")
    sdxl.save(tmp_path)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert about["unet.rank_pattern"] == {} and about["unet.alpha_pattern"] == {}
