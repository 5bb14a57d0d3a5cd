#!/usr/bin/env python3
"""Text-to-image, from top to bottom: an SDXL pipeline, few-step students of it, a table, pictures.

python run_latent.py                                        a tiny SDXL, trained here on drawn
                                                            shapes, then MLCM; no download
python run_latent.py --recipe all                           every recipe from the same teacher
python run_latent.py --data DIR                             the tiny pipeline on your captioned
                                                            images (metadata.jsonl: file_name,
                                                            text)
python run_latent.py --pretrained DIR_OR_ID --prompts FILE  a full SDXL checkpoint, from prompts
"""

import dataclasses
import json
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.functional import interpolate

import mcm
from mcm.denoiser import select
from mcm.lab import checkpoint, evaluation, explorer, metrics, options, plots
from mcm.lab.board import check_board
from mcm.lab.data import captioned_folder, fingerprint, permutation, read_lines, to_float
from mcm.lab.run import Training

try:
    from mcm.latent import shapes
    from mcm.latent.distil import Distillation, distil, dry_run
    from mcm.latent.recipes import MILESTONES, RECIPES, Recipe, milestones
    from mcm.latent.scheduler import MCMScheduler, re_noising_timesteps, uniform_timesteps
    from mcm.latent.scorer import CLIPReward, Scorer, train_scorer
    from mcm.latent.sdxl import LORA_FILE, SDXL, load_pipeline
    from mcm.latent.tiny_sdxl import train_tiny_sdxl
except ModuleNotFoundError as missing:
    sys.exit(f"run_latent.py: error: {missing}: pip install -e '.[latent]'")


@dataclass(frozen=True)
class Config:
    """What a run is made of: an option each."""

    # what to run
    recipe: tuple[str, ...] = ("mlcm",)
    """cm, lcm, mcm, mlcm, tlcm, scott, several of them, or all"""
    pretrained: str | None = None
    """an SDXL pipeline: a folder, or an id on the hub (default: a tiny one, trained here)"""
    prompts: Path | None = None
    """a file with one prompt per line, for the recipes that need no images"""
    data: Path | None = None
    """captioned images: a folder with metadata.jsonl, which has file_name and text (default: drawn
    shapes)"""
    preset: Literal["default", "long", "tiny"] = "default"
    """listed below"""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """sampling steps to measure; mcm trains a model for each"""
    resume: bool = False
    """continue the run in --out: what is finished is not repeated"""

    # where and how
    out: Path = Path("runs/latent")
    """results, pictures, and a folder for each student"""
    pipeline: Path | None = None
    """where the tiny pipeline is kept and found again (default: runs/tiny-sdxl-...)"""
    device: str | None = None
    """cpu, cuda, cuda:1 or mps (default: cuda where there is one, else cpu)"""
    precision: Literal["fp32", "bf16"] | None = None
    """of the networks; losses are float32 (default: bf16 for --pretrained on a GPU, else fp32)"""
    full: bool = False
    """fine-tune the whole UNet instead of a LoRA"""
    guidance_range: tuple[float, float] | None = None
    """with --full: draw the teacher's guidance from this range and tell the student"""
    checkpointing: bool | None = None
    """recompute activations in the backward pass: less memory, more time (default: with
    --pretrained)"""
    accumulate: int = 1
    """put the batch through the network in this many parts"""
    clip: str | None = None
    """a CLIP model (a folder, or an id on the hub) as the reward, in place of a small scorer"""
    seed: int = 0
    """of the students; the teacher's is always 0"""
    save_every: int = 200
    """training steps between checkpoints"""
    tensorboard: bool = False
    """losses and rates to OUT/tensorboard too (package tensorboard)"""

    # preset values
    pictures: int = 16_000
    """drawn shapes to train on"""
    image_size: int | None = 32
    """images of --data are resized and cropped to this; with --pretrained it is the pipeline's own
    """
    vae_iterations: int = 3000
    """training steps of the tiny autoencoder"""
    teacher_iterations: int = 3200
    """training steps of the tiny UNet and its text encoders"""
    teacher_batch: int = 24
    """samples per training step of these"""
    teacher_lr: float = 1e-3
    """peak learning rate of these"""
    scorer_iterations: int = 200
    """training steps of the two small scorers: the reward and the evaluator"""
    evaluations: float | None = 60
    """train each student for so many thousand network evaluations, the teacher's included: equal
    for all recipes"""
    iterations: int | None = None
    """training steps of a student, over all phases of its recipe, in place of --evaluations"""
    batch: int = 64
    """samples per training step of a student"""
    lr: float = 1e-3
    """peak learning rate of a student"""
    rank: int = 32
    """of the LoRA; its alpha is the same"""
    guidance: float = 2.0
    """of the teacher: x(null) + W (x(prompt) - x(null)); diffusers' guidance_scale"""
    share_run: bool = True
    """let one run of the teacher serve 8 training states, in place of a run for each (mlcm, tlcm)
    """
    ema: float = 0.95
    """decay of the averaged weights that are saved and measured, per step"""
    samples: int = 500
    """images per row of the table"""

    def __post_init__(self):
        check(self)


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    config = parse(argv)
    device = options.pick_device(config.device)
    asked = config.precision or (None if config.pretrained else "fp32")
    config = replace(config, precision=options.pick_precision(asked, device))
    preset = preset_of(config)
    print(f"{', '.join(config.recipe)}; preset {preset}: {PRESETS[preset][0]}")
    data = None if config.pretrained and config.data else load_data(config, config.image_size)
    if config.pretrained:  # before --out is claimed: it may not be there, or be something else
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        pipe = load_pipeline(config.pretrained, dtype, device)
        data = data or load_data(config, pipe.unet.config.sample_size * pipe.vae_scale_factor)
    checkpoint.open_out(config.out, must_match(config, data), config.resume)
    source = Path(config.pretrained) if config.pretrained else tiny_pipeline(config, data, device)
    if not config.pretrained:
        pipe = load_pipeline(str(source), torch.float32, device)
    reward, judge = make_scorers(config, data, source, device)
    seconds = {"teacher": round(time.perf_counter() - started, 1), "students": {}}

    sdxl = SDXL(pipe, config.rank, checkpointing=bool(config.checkpointing))
    checkpoint.must_be(config.out, weights=sdxl.fingerprint())
    job = prepare(config, data, sdxl)
    evaluator = Evaluator(config, data, sdxl, reward, judge, source.name)
    for part in (pipe.text_encoder, pipe.text_encoder_2):
        part.to("cpu")  # all texts are encoded now
    job.reward = reward
    students = students_of(config, sdxl, reward is not None)
    if config.pretrained:
        try_out(config, job, students)
    measure_teacher(config, evaluator)
    if reward:  # the level to reach is that of the teacher's own images
        job.reward_level = evaluator.score(evaluator.teacher_images()[:100]).mean().item()

    views = []
    for student in students:
        seconds["students"][student.name] = train_student(config, job, student, source)
        measure_student(config, evaluator, student)
        views += draw_student(config, evaluator, student)
        forget(config, sdxl, student)
    if len(seconds["students"]) > 1:
        # every student in 4 steps, 2 and 1, the same captions and noise
        chosen = [view for wanted in (4, 2, 1) for view in views if view.steps == wanted] or views
        drawn = {(view.row["recipe"], view.steps): view.images for view in chosen}
        draw_rows(evaluator, drawn, config.out / "students.png")
    draw_page(config, evaluator, views)
    seconds["evaluation"] = round(evaluator.rows.seconds, 1)
    seconds["total"] = round(time.perf_counter() - started, 1)
    report(config, options.provenance("run_latent.py", argv, device, PACKAGES), evaluator, seconds)


PACKAGES = ["mcm", "torch", "diffusers", "transformers"]


@dataclass
class Student:
    """One model to train. name: of its folder. K: the steps it is for; None: any."""

    name: str
    recipe_name: str
    recipe: Recipe
    K: int | None

    @property
    def sampler(self) -> str:
        return "renoise" if self.recipe.renoise else "ddim"

    def steps(self, config: Config) -> list[int]:
        return sorted(config.steps if self.K is None else [self.K], reverse=True)

    def weights(self, config: Config) -> Path:
        file = "unet/diffusion_pytorch_model.safetensors" if config.full else LORA_FILE
        return config.out / self.name / file

    def is_finished(self, config: Config) -> bool:
        done = config.out / self.name / "finished.json"
        return config.resume and done.is_file() and self.weights(config).is_file()


def students_of(config: Config, sdxl: SDXL, has_reward: bool) -> list[Student]:
    """Each recipe as this run has it, once, or once for each number of steps."""
    students = []
    train_steps = len(sdxl.schedule.alphas_cumprod)
    for name in config.recipe:
        each = [None] if RECIPES[name](4).renoise else config.steps
        for K in each:
            recipe = adapted(RECIPES[name](K or 4), config, has_reward, train_steps)
            students.append(Student(f"{name}-{K}" if K else name, name, recipe, K))
    return students


def adapted(recipe: Recipe, config: Config, has_reward: bool, train_steps: int) -> Recipe:
    """With what this run decides: whether runs of the teacher are shared; a preference or none.

    train_steps: of the pipeline's schedule. A grid is at most as fine.
    """
    phases = []
    for phase in recipe.phases:
        kept = [o for o in phase.objectives if o[0] != "preference" or has_reward]
        shared = config.share_run and phase.states == "teacher"
        K, grid = phase.method.student_steps, phase.method.teacher_steps
        coarser = min(1, train_steps // K * K / max(grid))
        skip = max(1, round(phase.method.skip * coarser))
        grid = tuple(max(1, int(n * coarser)) for n in grid)
        method = replace(phase.method, teacher_steps=grid, skip=skip)
        changes = {"method": method, "objectives": tuple(kept), "share_rollout": shared}
        phases.append(replace(phase, **changes))
    summary = recipe.summary
    if [phase.objectives for phase in phases] != [phase.objectives for phase in recipe.phases]:
        summary += "; here without its preference"
    return replace(recipe, phases=tuple(phases), summary=summary)


def try_out(config: Config, job: Distillation, students: list[Student]) -> None:
    """A step of every phase that is still to be trained, before anything long."""
    for student in students:
        if not student.is_finished(config):
            print(f"{student.name}: trying one step of each phase")
            settings = settings_of(config, job, student)
            dry_run(replace(job, settings=settings, name=student.name), student.recipe)
    if job.sdxl.device.type == "cuda":
        used, there = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        print(f"it fits: at most {used / 2**30:.1f} of {there / 2**30:.1f} GiB in use")


def train_student(config: Config, job: Distillation, student: Student, source: Path) -> float:
    """Train and save a student, or load a finished one. -> the seconds that training took."""
    out = config.out / student.name
    finished = out / "finished.json"
    if student.is_finished(config):
        job.sdxl.load("average", out, config.full)
        return json.loads(finished.read_text(encoding="utf-8"))["seconds"]
    out.mkdir(exist_ok=True)
    settings = settings_of(config, job, student)
    seconds = distil(replace(job, settings=settings, name=student.name), student.recipe)
    job.sdxl.save(out)
    train_steps = len(job.sdxl.schedule.alphas_cumprod)
    table = uniform_timesteps([student.K or 1], train_steps)
    if student.recipe.renoise:
        table = re_noising_timesteps(train_steps)
    scheduler = MCMScheduler.like(job.sdxl.pipe.scheduler, table)
    scheduler.save_pretrained(out)
    card = model_card(config, student, source, settings.iterations)
    checkpoint.write(out / "README.md", card)
    checkpoint.write(finished, json.dumps({"seconds": round(seconds, 1)}))
    return seconds


def settings_of(config: Config, job: Distillation, student: Student) -> Training:
    iterations = config.iterations
    if iterations is None:
        whole = 1000 * config.evaluations / (config.batch * student.recipe.evaluations())
        iterations = max(len(student.recipe.phases), round(whole))
    more = options.values(config, "seed", "ema", "accumulate", "precision", "tensorboard")
    return training(config, iterations, config.batch, config.lr, **more)


def forget(config: Config, sdxl: SDXL, student: Student) -> None:
    """Make room for the next student."""
    sdxl.remove_all()
    for state in config.out.glob(f"{student.name}-[0-9].state.*safetensors"):
        state.unlink()


def training(config: Config, iterations: int, batch: int, lr: float, **more) -> Training:
    return Training(
        iterations=iterations,
        batch=batch,
        lr=lr,
        warmup=min(100, iterations // 10 + 1),
        log_every=min(100, max(5, iterations // 40)),
        save_every=config.save_every,
        **more,
    )


# --- what to learn from, and what to be measured against ------------------------------------------


@dataclass
class CaptionedImages:
    """prompts and images (n, 3, S, S uint8, or None) to train on.

    asked: the held-out prompts of the table; real: held-out images (uint8, or None).
    scenes: of the asked prompts, where an exact reader can judge images of them.
    """

    name: str
    prompts: list[str]
    images: Tensor | None
    asked: list[str]
    real: Tensor | None
    scenes: list[shapes.Scene] = field(default_factory=list)

    def fingerprint(self, *about) -> str:
        """8 hex digits that change with the captions, or with every fiftieth image."""
        return fingerprint(self.images, self.name, self.prompts, *about)


def load_data(config: Config, image_size: int) -> CaptionedImages:
    if not config.data and not config.prompts:
        return drawn_shapes(config)
    if config.data:
        # what does not fit into memory is kept beside the results
        folder = config.out.parent if config.pretrained else None
        prompts, images = captioned_folder(config.data, image_size, folder)
        least = 128  # to measure a distribution
    else:
        lines = [line for _, line in read_lines(config.prompts)]
        prompts = [lines[i] for i in permutation(len(lines), 0, 0)]  # files have an order
        images = None
        least = 1
    n = len(prompts) // 10
    if n < least:
        raise mcm.InputError(
            f"{config.data or config.prompts} has {len(prompts)} captions; at least {10 * least:,} "
            "are needed, to hold a tenth out for measuring"
        )
    asked = prompts[:n][: config.samples]
    if len(asked) < config.samples:
        print(f"{n} captions, a tenth, are held out: each row has {n} images")
    if images is None:
        return CaptionedImages(config.prompts.stem, prompts[n:], None, asked, None)
    name = config.data.resolve().name
    return CaptionedImages(name, prompts[n:], images[n:], asked, images[:n])


def drawn_shapes(config: Config) -> CaptionedImages:
    train, held = shapes.split_scenes()
    pool = shapes.choose(train, config.pictures, 0)
    scenes = shapes.choose(held, config.samples, 1)
    real = shapes.draw(shapes.choose(held, 4 * config.samples, 2), 3)
    captions = [scene.caption() for scene in pool]
    asked = [scene.caption() for scene in scenes]
    return CaptionedImages("shapes", captions, shapes.draw(pool, 0), asked, real, scenes)


def tiny_pipeline(config: Config, data: CaptionedImages, device: torch.device) -> Path:
    """-> where the pipeline is that was trained on this data, now or earlier."""
    long = ("vae_iterations", "teacher_iterations", "teacher_batch", "teacher_lr")
    mark = data.fingerprint(*options.values(config, *long).values())
    folder = config.pipeline or config.out.parent / f"tiny-sdxl-{data.name}-{mark}"
    if (folder / "model_index.json").is_file():
        print(f"the tiny pipeline is there already: {folder}")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        vae = training(config, config.vae_iterations, 4, 1e-3, clip=0.1)
        how = (config.teacher_iterations, config.teacher_batch, config.teacher_lr)
        unet = training(config, *how)
        with FileLock(f"{folder}.lock"):  # two runs begun together want one pipeline
            train_tiny_sdxl(data.prompts, data.images, folder, vae, unet, device=device)
    return folder


def make_scorers(
    config: Config, data: CaptionedImages, source: Path, device: torch.device
) -> tuple[nn.Module | None, Scorer | None]:
    """-> the reward that students may be trained against, and the judge that measures them.

    The judge, for where no exact reader can: another seed, other images.
    """
    clip = CLIPReward(config.clip, device) if config.clip else None
    if config.pretrained and not clip:
        # a scorer of 32x32 pixels would be a poor guide for an SDXL
        print("without --clip there is no reward here: preference phases are left out")
    if data.images is None:
        return clip, None
    folder = config.out / "pretrained" if config.pretrained else source
    half = len(data.prompts) // 2
    small = torch.cat([shrunk(part) for part in data.images.split(16)])
    parts = {"reward": slice(0, half), "evaluator": slice(half, None)}
    needed = {"reward": not config.pretrained, "evaluator": not data.scenes}
    scorers = {}
    for seed, (name, part) in enumerate(parts.items(), 1):
        if needed[name]:
            settings = training(config, config.scorer_iterations, 96, 2e-3, seed=seed)
            mark = data.fingerprint(config.scorer_iterations)
            path = folder.with_name(f"{folder.name}-{name}-{mark}.safetensors")
            with FileLock(f"{folder}.lock"):
                images = small[part].to(device)
                scorers[name] = train_scorer(images, data.prompts[part], settings, path)
    return clip or scorers.get("reward"), scorers.get("evaluator")


def shrunk(images: Tensor) -> Tensor:
    """(n, 3, S, S) uint8 -> (n, 3, 32, 32) uint8, which is all that the scorers look at."""
    small = interpolate(images.float(), size=(32, 32), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def prepare(config: Config, data: CaptionedImages, sdxl: SDXL) -> Distillation:
    """Encode what students learn from. Settings, name and reward are filled in later."""
    scratch = config.out if config.pretrained else None  # what does not fit into memory
    needed = any(RECIPES[name](4).needs_images for name in config.recipe)
    cond = sdxl.encode(data.prompts, folder=scratch)
    latents = None
    if needed and data.images is not None:
        latents = sdxl.to_latents(data.images, scratch)
    w = config.guidance_range or config.guidance
    same = options.values(config, "out", "full", "resume")
    return Distillation(sdxl, data.prompts, cond, latents, Training(1), name="", guidance=w, **same)


# --- what is drawn and measured -------------------------------------------------------------------


@dataclass
class Evaluator:
    """Draws and measures images of the held-out prompts, and keeps the rows of the table."""

    config: Config
    data: CaptionedImages
    sdxl: SDXL
    reward: nn.Module | None
    judge: Scorer | None
    pipeline: str
    reference: tuple[Tensor, float] | None = None
    """The teacher's images in 25 steps, and the seconds for one."""
    real: Tensor | None = None
    """Features of the held-out images."""

    def __post_init__(self):
        config, sdxl = self.config, self.sdxl
        self.cond = sdxl.encode(self.data.asked)
        if config.guidance_range:  # a student that takes the guidance is told it
            omega = torch.full((len(self.data.asked),), config.guidance - 1.0)
            self.cond = self.cond._replace(omega=omega)
        shape = (len(self.data.asked), sdxl.channels, sdxl.size, sdxl.size)
        generator = torch.Generator().manual_seed(config.seed + 1_000_000)
        self.z = torch.randn(shape, generator=generator)
        self.about = options.values(config, "samples", "seed", "guidance")
        self.about["pipeline"] = self.pipeline
        self.rows = evaluation.Rows(config.out, self.about, config.resume)
        self.at_once = 64 if sdxl.size <= 16 else 1  # images through the networks together
        if self.data.real is not None:
            latents = sdxl.to_latents(self.data.real)
            self.components = metrics.principal_components(latents)
            self.real = self.components(latents)

    def sample(self, model: nn.Module, n: int, sampler: str, steps: int, label: str = "") -> Tensor:
        """-> n latents, on the CPU. The same noise and random numbers for all rows."""
        how = self.how(sampler, steps)
        cond = select(self.cond, slice(0, n))
        where = (self.sdxl.device, self.at_once)
        return evaluation.generate(model, self.z[:n], cond, *where, label=label, **how)

    def how(self, sampler: str, steps: int) -> dict:
        """Options of mcm.sample."""
        how = {"steps": steps}
        if sampler == "renoise":
            how = {"times": milestones(steps), "solver": mcm.renoise}
        how["generator"] = torch.Generator(self.sdxl.device).manual_seed(self.config.seed)
        return how

    def watch(self, row: dict, model: nn.Module) -> explorer.View:
        """The first few prompts, drawn by this row's model and sampler, with the way there."""
        n = min(10 if self.sdxl.size <= 16 else 4, len(self.data.asked))
        how = self.how(row["sampler"], row["steps"])
        parts = []
        for chosen in torch.arange(n).split(self.at_once):
            cond = evaluation.on_device(select(self.cond, chosen), self.sdxl.device)
            parts.append(explorer.walk(model, self.z[chosen].to(self.sdxl.device), cond, **how))
        latents, times, paths = zip(*parts)
        path = torch.cat(paths, 2)
        seen = plots.thumbnails(self.decode(path.flatten(0, 2)), 64).unflatten(0, path.shape[:3])
        name = re.sub(r"-\d+$", "", row.get("recipe", row["model"]))
        images = self.decode(torch.cat(latents))
        known, nearest = self.data.images, None
        if known is not None and known.shape[-1] <= 64:  # larger ones lie on the disk
            nearest = to_float(known[metrics.nearest(images, known)])
        return explorer.View(name, row["steps"], images, row, times[0], seen, nearest)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """-> images (n, 3, H, W) in [-1, 1], on the CPU."""
        parts = (part.to(self.sdxl.device) for part in latents.split(self.at_once))
        return torch.cat([self.sdxl.to_images(part).clamp(-1, 1).cpu() for part in parts])

    def teacher(self) -> nn.Module:
        return mcm.guided(self.sdxl.denoiser(), self.config.guidance, self.sdxl.unconditional)

    def teacher_images(self) -> Tensor:
        """Its 25 steps. The latents are kept in teacher.safetensors: on SDXL that saves minutes."""
        if self.reference is None:
            file = self.config.out / "teacher.safetensors"
            kept = {}
            if self.config.resume and file.is_file():
                tensors, kept = checkpoint.read_safetensors(file)
            began = time.perf_counter()
            if kept.get("about") == self.about:
                self.reference = self.decode(tensors["latents"]), kept["seconds"]
            else:
                latents = self.sample(self.teacher(), len(self.z), "ddim", 25, "teacher, 25 steps")
                images = self.decode(latents)
                seconds = (time.perf_counter() - began) / len(self.z)
                self.reference = images, seconds
                metadata = {"about": self.about, "seconds": seconds}
                checkpoint.write_safetensors(file, {"latents": latents}, metadata)
        return self.reference[0]

    def measure(self, row: dict, model: nn.Module, weights: Path | None = None) -> None:
        """The figures of one row, unless they are there for the same weights."""
        sampler, steps = row["sampler"], row["steps"]
        key = f"{row.get('recipe', row['model'])} {sampler} {steps}"
        if self.rows.holds(key):
            return
        began = time.perf_counter()
        target = self.teacher_images()
        images, seconds = self.reference
        if key != "teacher ddim 25":
            drawing = time.perf_counter()
            images = self.decode(self.sample(model, len(self.z), sampler, steps, key))
            seconds = (time.perf_counter() - drawing) / len(self.z)
        row = row | self.figures(images, target) | {"seconds_per_image": seconds}
        self.rows.add(key, weights, row, time.perf_counter() - began)
        print(evaluation.row_line(row))

    @torch.no_grad()
    def score(self, images: Tensor) -> Tensor:
        """The reward of images of the first prompts, (n,)."""
        scores = []
        for i in range(0, len(images), 100):
            part = images[i : i + 100].to(self.sdxl.device)
            scores.append(self.reward(part, self.data.asked[i : i + len(part)]).cpu())
        return torch.cat(scores)

    def figures(self, images: Tensor, target: Tensor) -> dict:
        # one by one: at 1024 pixels a copy of all of them takes gigabytes
        errors = [(a - b).square().mean() for a, b in zip(images, target)]
        row = {"rmse_to_teacher": torch.stack(errors).mean().sqrt().item()}
        if self.reward:
            row["reward"] = self.score(images).mean().item()
        if self.real is not None:
            features = self.components(self.sdxl.to_latents(images))
            near = self.real[: len(features)]
            row["frechet"] = metrics.frechet(self.real, features)
            row["kernel_distance"] = metrics.kernel_distance(self.real, features)
            row["precision"], row["recall"] = metrics.precision_recall(near, features)
            row["coverage"] = metrics.coverage(near, features)
        if self.data.scenes:
            row["alignment"] = shapes.alignment(images, self.data.scenes).double().mean().item()
        elif self.judge:
            row["alignment"] = retrieval(self.judge, images, self.data.asked)
        return row


@torch.no_grad()
def retrieval(judge: Scorer, images: Tensor, prompts: list[str], among: int = 32) -> float:
    """The share of images whose own prompt scores highest among 32."""
    right = []
    for start in range(0, len(prompts), among):
        part = prompts[start : start + among]
        features = judge.features(images[start : start + among].to(judge.places.device))
        best = judge.logits(features, part).argmax(1).tolist()
        right += [part[i] == part[j] for i, j in enumerate(best)]
    return sum(right) / len(right)


def row_of(model: str, sampler: str, steps: int, cost: int = 1, **more) -> dict:
    """What a row of the table is about. cost: network evaluations per step."""
    return {"model": model, **more, "sampler": sampler, "steps": steps, "nfe": cost * steps}


def measure_teacher(config: Config, evaluator: Evaluator) -> None:
    """The teacher in 25 and fewer steps, and the rows that every student must beat.

    Those are the teacher's weights in the students' samplers, "undistilled"; along DDIM and without
    guidance they are the strongest of them.
    """
    plain = evaluator.sdxl.denoiser()
    teacher = evaluator.teacher()
    for steps in sorted({25, *config.steps}, reverse=True):
        evaluator.measure(row_of("teacher", "ddim", steps, 2), teacher)
    renoised = any(RECIPES[name](1).renoise for name in config.recipe)
    for steps in sorted(config.steps, reverse=True):
        # with guidance it is the teacher's own row
        evaluator.measure(row_of("undistilled", "ddim", steps), plain)
        if renoised:
            evaluator.measure(row_of("undistilled", "renoise", steps), plain)
            evaluator.measure(row_of("undistilled, guided", "renoise", steps, 2), teacher)


def measure_student(config: Config, evaluator: Evaluator, student: Student) -> None:
    model = evaluator.sdxl.denoiser("average")
    for steps in student.steps(config):
        row = row_of("student", student.sampler, steps, recipe=student.name)
        evaluator.measure(row, model, student.weights(config))


Drawn = dict[tuple[str, int], Tensor]  # (name, steps) -> images


def draw_student(config: Config, evaluator: Evaluator, student: Student) -> list[explorer.View]:
    """NAME.png: the teacher's 25 steps, then the student's, the same captions and noise."""
    model = evaluator.sdxl.denoiser("average")
    rows = [row for row in evaluator.rows.all() if row.get("recipe") == student.name]
    rows = [row for row in rows if row["steps"] in student.steps(config)]
    views = [evaluator.watch(row, model) for row in rows]
    drawn = {(student.name, view.steps): view.images for view in views}
    draw_rows(evaluator, drawn, config.out / f"{student.name}.png")
    return views


def draw_page(config: Config, evaluator: Evaluator, views: list[explorer.View]) -> None:
    """explorer.html: the students beside the teacher."""
    rows = [row for row in evaluator.rows.all() if row["model"] == "teacher"]
    views = views + [evaluator.watch(row, evaluator.teacher()) for row in rows]
    captions = evaluator.data.asked[: len(views[0].images)]
    metric = ("frechet", "Fréchet distance")
    if evaluator.real is None:
        metric = ("rmse_to_teacher", "RMSE to the teacher")
    note = f"Measured in {len(evaluator.data.asked):,} images, as results.md says."
    title = f"{evaluator.data.name}: {', '.join(config.recipe)}"
    about = (captions, "caption", title, note, metric)
    explorer.save_page(config.out / "explorer.html", views, *about)


def draw_rows(evaluator: Evaluator, drawn: Drawn, path: Path) -> None:
    n = len(next(iter(drawn.values())))
    rows = {"teacher, 25 steps": evaluator.teacher_images()[:n]}
    for (name, steps), images in drawn.items():
        rows[f"{name}, {steps} step{'s' * (steps > 1)}"] = images
    plots.sample_rows(rows, path, columns=evaluator.data.asked[:n])


def model_card(config: Config, student: Student, source: Path, iterations: int) -> str:
    """mcm/latent/card.md, filled in."""
    out = config.out / student.name
    recipe = student.recipe
    imports = "from diffusers import StableDiffusionXLPipeline"
    load = f'pipe.load_lora_weights("{out}", weight_name="{LORA_FILE}")'
    trained = f"Rank {config.rank}, alpha {config.rank}"
    if config.full:
        imports += ", UNet2DConditionModel"
        load = f'pipe.unet = UNet2DConditionModel.from_pretrained("{out}/unet").to(pipe.device)'
        trained = "All weights of the UNet"
    card = Path(mcm.__file__).with_name("latent") / "card.md"
    return card.read_text(encoding="utf-8").format(
        **locals(),
        summary=recipe.summary[0].upper() + recipe.summary[1:],
        source_name=config.pretrained or source,
        K=student.K or 4,
        guidance=config.guidance if config.guidance_range else 0,
        eta=1.0 if recipe.renoise else 0.0,
        steps=", ".join(map(str, [student.K] if student.K else sorted(MILESTONES))),
        w=config.guidance_range or config.guidance,
        versions=", ".join(f"{name} {sys.modules[name].__version__}" for name in PACKAGES),
    )


def head(results: dict) -> list[str]:
    """What stands above the table."""
    metric = results["metric"]
    asked = f"{metric['n_generated']:,} held-out prompts"
    lines = [f"{results['data']}, seed {results['seed']}: {asked}."]
    if metric["n_reference"]:
        lines += [
            f"Fréchet distance, coverage, precision and recall in {metric['dim']} features: "
            f"{metric['features']};",
            f"against {metric['n_reference']:,} held-out images (not FID; two halves of those: "
            f"{metric['floor']:.3f}). Kernel distance: the same features, unbiased with few "
            f"samples too. Alignment: {metric['alignment']}.",
        ]
    undistilled = "Undistilled: the teacher's own weights in the students' sampler."
    return [*lines, f"{undistilled} NFE: network evaluations per image."]


def report(config: Config, where: dict, evaluator: Evaluator, seconds: dict) -> None:
    """Write and print what was found."""
    data = evaluator.data
    real = evaluator.real
    alignment = "own caption ranked first among 32 by a scorer that no student saw"
    if data.scenes:
        alignment = "images that an exact reader finds to show all that the caption says"
    recipes = {}
    for student in students_of(config, evaluator.sdxl, evaluator.reward is not None):
        recipes[student.name] = dataclasses.asdict(student.recipe)
        recipes[student.name]["evaluations_per_sample"] = student.recipe.evaluations()
    results = {
        "data": data.name,
        "pipeline": evaluator.pipeline,
        "seed": config.seed,
        **where,
        "metric": {
            "name": "frechet",
            "features": "leading principal components of the held-out images' latents, each of "
            "variance 1",
            "dim": 16,
            "n_generated": len(data.asked),
            "n_reference": 0 if data.real is None else len(data.real),
            "reference": "held-out",
            "alignment": alignment,
            "floor": None if real is None else metrics.frechet(real[::2], real[1::2]),
        },
        "rows": evaluator.rows.all(),
        "seconds": seconds,
        "settings": options.values(config, *PRESET_VALUES, "guidance_range", "full", "precision"),
        "recipes": recipes,
    }
    evaluation.report(config.out, results, head(results))
    print(f"{config.out}: results.json, results.md, explorer.html, pictures, each student's folder")


# --- the configuration ----------------------------------------------------------------------------

PRESET_VALUES = options.fields_of(Config, options.PRESET_VALUES)


def check(config: Config) -> None:
    """Everything that can be seen to be wrong before any work is done. Raises InputError."""
    unknown = [name for name in config.recipe if name not in RECIPES]
    if unknown or not config.recipe or len(set(config.recipe)) < len(config.recipe):
        shown = " ".join(unknown or config.recipe)
        raise mcm.InputError(
            f"--recipe {shown}: choose of {', '.join(RECIPES)}, each once, or all alone"
        )
    check_sources(config)
    if not config.steps or min(config.steps) < 1 or len(set(config.steps)) < len(config.steps):
        shown = " ".join(map(str, config.steps))
        raise mcm.InputError(f"--steps {shown} must be positive and each named once")
    recipes = {name: RECIPES[name](K) for name in config.recipe for K in config.steps}
    if max(config.steps) > 8 and any(recipe.renoise for recipe in recipes.values()):
        raise mcm.InputError("--steps: the timesteps of re-noising are those for 1 to 8 steps")
    positive = ("pictures", "vae_iterations", "teacher_iterations", "teacher_batch", "teacher_lr")
    positive += ("scorer_iterations", "batch", "lr", "rank", "samples", "accumulate", "save_every")
    check_board(config.tensorboard)
    options.check_positive(config, (*positive, "image_size", "iterations", "evaluations"))
    options.check_range(config, ema=(0, 1), seed=(0, 2**31))
    if config.batch % config.accumulate:
        raise mcm.InputError(f"--batch {config.batch} is no multiple of --accumulate")
    part = config.batch // config.accumulate
    runs = any(p.states == "teacher" for recipe in recipes.values() for p in recipe.phases)
    if config.share_run and runs and part % 8:
        raise mcm.InputError(
            f"--share-run needs multiples of 8 samples, not {part}: see --batch, --no-share-run"
        )
    if not config.pretrained and (config.rank > 64 or config.image_size % 8):
        raise mcm.InputError("a tiny pipeline: --rank up to 64, --image-size a multiple of 8")
    if config.samples < 128 and not config.prompts:  # without images nothing is compared
        raise mcm.InputError(f"--samples {config.samples} is too few: use at least 128")
    if config.guidance_range and not config.full:
        raise mcm.InputError("--guidance-range needs --full: a LoRA has no input for the guidance")
    low, high = config.guidance_range or (config.guidance, config.guidance)
    if not low <= config.guidance <= high:
        measured = f"--guidance {config.guidance}, which images are measured with"
        raise mcm.InputError(f"--guidance-range must rise, and hold {measured}")


def check_sources(config: Config) -> None:
    """Whether there is something to learn from."""
    if config.prompts and not config.pretrained:
        raise mcm.InputError(
            "--prompts goes with --pretrained: a tiny pipeline knows its own captions' words only"
        )
    if config.prompts and config.data:
        raise mcm.InputError("--prompts and --data: images have captions, so give one of the two")
    imageless = config.pretrained and not config.data
    needing = [name for name in config.recipe if RECIPES[name](4).needs_images]
    if imageless and needing:
        raise mcm.InputError(
            f"{', '.join(needing)} learn from images: give --data, or choose mlcm or tlcm"
        )
    if imageless and not config.prompts:
        raise mcm.InputError(
            "--pretrained needs something to learn from: --prompts FILE, or --data DIR"
        )


# The pretrained preset is what --pretrained has for the preset values; the rest is what is given.
PRETRAINED = {
    "iterations": 12_000,
    "evaluations": None,
    "batch": 4,
    "lr": 1e-4,
    "rank": 64,
    "guidance": 8.0,
    "ema": 0.99,
    "samples": 200,
    "image_size": None,
    "share_run": False,
    "checkpointing": True,
}
PRESETS: dict[str, tuple[str, dict]] = {
    "default": ("15 to 25 minutes on 2 CPU cores", {}),
    "long": (
        "a few hours on 2 CPU cores",
        {"vae_iterations": 6000, "teacher_iterations": 24_000, "evaluations": 900, "ema": 0.99},
    ),
    "tiny": (
        "a minute or two on 2 CPU cores, for trying things out; the images are not good",
        {
            "pictures": 500,
            "vae_iterations": 60,
            "teacher_iterations": 60,
            "evaluations": 2,
            "batch": 16,
            "samples": 130,
            "scorer_iterations": 30,
        },
    ),
    "pretrained": ("one GPU; see mcm/latent/README.md for memory", PRETRAINED),
}


def preset_of(config: Config) -> str:
    return "pretrained" if config.pretrained else config.preset


def parse(argv: list[str]) -> Config:
    """The command line: a preset, with what was given in its place. Raises InputError."""
    epilog = "recipes:\n"
    epilog += "".join(f"  {name:7}{make(4).summary}\n" for name, make in RECIPES.items())
    epilog += "\npresets (pretrained is the one used with --pretrained):\n"
    for name, (cost, changes) in PRESETS.items():
        values = {key: changes.get(key, getattr(Config, key)) for key in PRESET_VALUES}
        epilog += f"  {name}: {cost}\n    {', '.join(f'{k} {v}' for k, v in values.items())}\n"
    given = vars(options.parser(Config, "run_latent.py", __doc__, epilog).parse_args(argv))
    if given.get("recipe") == ("all",):
        given["recipe"] = tuple(RECIPES)
    preset = "pretrained" if "pretrained" in given else given.get("preset", Config.preset)
    length = {"iterations", "evaluations"} & given.keys()
    if len(length) == 2:
        raise mcm.InputError("--iterations and --evaluations: each says how long, so give one")
    dropped = {"iterations": None, "evaluations": None} if length else {}
    return Config(**PRESETS[preset][1] | dropped | given)


def must_match(config: Config, data: CaptionedImages) -> dict:
    """What a run that is resumed must have been begun with."""
    names = [name for name in PRESET_VALUES if name != "samples"]
    same = options.values(config, "seed", "full", "clip", "guidance_range", *names)
    same["pretrained"] = config.pretrained and Path(config.pretrained).name
    same["data"] = config.data and config.data.name
    same["prompts"] = config.prompts and checkpoint.digest(config.prompts)
    same["pipeline"] = config.pipeline and config.pipeline.name
    return same | {"images": data.fingerprint()}


def run(argv: list[str]) -> int:
    return options.run("run_latent.py", main, argv, "--checkpointing, a smaller --batch or --rank")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
