import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from filelock import FileLock, Timeout
from pipelines import ENGLISH, untrained_pipeline
from safetensors.torch import load_file
from torchvision.utils import save_image

import mcm
import run_latent
from mcm.lab.run import Training
from mcm.latent import shapes
from mcm.latent.distil import Distillation
from mcm.latent.recipes import RECIPES
from mcm.latent.sdxl import LORA_FILE, SDXL

QUICK = [
    "--preset",
    "tiny",
    "--vae-iterations",
    "20",
    "--teacher-iterations",
    "12",
    "--scorer-iterations",
    "10",
    "--iterations",
    "8",
    "--pictures",
    "300",
    "--steps",
    "1",
    "4",
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A quick run of two recipes: one model for all step counts, and one per K."""
    folder = tmp_path_factory.mktemp("runs")
    assert run_latent.run([*QUICK, "--recipe", "mlcm", "mcm", "--out", str(folder / "out")]) == 0
    return folder


def refused(argv, capsys, *words):
    assert run_latent.run(argv) == 2
    message = capsys.readouterr().err
    assert "run_latent.py: error: " in message  # perhaps after a progress bar
    for word in words:
        assert re.search(word, message), (word, message)


@pytest.mark.slow
def test_what_a_run_leaves(done):
    out = done / "out"
    results = json.loads((out / "results.json").read_text())
    for key in (
        "data",
        "seed",
        "device",
        "hardware",
        "command",
        "versions",
        "metric",
        "rows",
        "seconds",
        "settings",
    ):
        assert key in results, key
    assert results["settings"]["precision"] == "fp32"
    for key in (
        "steps",
        "nfe",
        "frechet",
        "precision",
        "recall",
        "coverage",
        "alignment",
        "reward",
        "rmse_to_teacher",
        "seconds_per_image",
        "model",
        "sampler",
    ):
        assert all(key in row for row in results["rows"]), key
    rows = {
        (row.get("recipe") or row["model"], row["sampler"], row["steps"]): row
        for row in results["rows"]
    }
    assert rows["teacher", "ddim", 25]["nfe"] == 50  # a guided step asks the network twice
    assert (
        rows["undistilled", "renoise", 4]["nfe"] == 4
        and rows["undistilled, guided", "renoise", 4]["nfe"] == 8
    )
    assert rows["teacher", "ddim", 25]["rmse_to_teacher"] == 0
    assert {k for k in rows if k[0].startswith("m")} == {
        ("mlcm", "renoise", 1),
        ("mlcm", "renoise", 4),
        ("mcm-1", "ddim", 1),
        ("mcm-4", "ddim", 4),
    }
    for name in (
        "results.md",
        "mlcm.png",
        "mcm-4.png",
        "quality_vs_steps.png",
        "explorer.html",
        "training.png",
        "mlcm/pytorch_lora_weights.safetensors",
        "mlcm/scheduler_config.json",
        "mlcm/README.md",
    ):
        assert (out / name).stat().st_size > 100, name
    assert str(done) not in (out / "results.json").read_text() + (out / "results.md").read_text()
    assert json.loads((out / "mcm-4" / "scheduler_config.json").read_text())["timesteps"] == {
        "4": [999, 749, 499, 249]
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlcm", "mcm-4"])
def test_the_model_cards_code_works_when_pasted(done, name, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", (done / "out" / name / "README.md").read_text(), re.S)[
        1
    ]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "image.png").stat().st_size > 100


@pytest.mark.slow
def test_resuming_a_finished_run_repeats_nothing(done, monkeypatch):
    before = json.loads((done / "out" / "results.json").read_text())["rows"]
    for name in ("distil", "train_tiny_sdxl"):
        monkeypatch.setattr(run_latent, name, lambda *a, **k: pytest.fail("done again"))
    sample = run_latent.Evaluator.sample

    def only_ten(self, model, n, *how):
        """The images of each student's grid are drawn again, no others."""
        assert n <= 10, "done again"
        return sample(self, model, n, *how)

    monkeypatch.setattr(run_latent.Evaluator, "sample", only_ten)
    out = ["--recipe", "mlcm", "mcm", "--out", str(done / "out"), "--resume"]
    assert run_latent.run([*QUICK, *out]) == 0
    after = json.loads((done / "out" / "results.json").read_text())["rows"]
    assert [row["frechet"] for row in before] == [row["frechet"] for row in after]


@pytest.mark.slow
def test_another_runs_folder_is_not_overwritten(done, capsys):
    out = ["--out", str(done / "out")]
    refused([*QUICK, *out], capsys, "another run's results", "--resume")
    refused([*QUICK, *out, "--resume", "--seed", "3"], capsys, "seed 0, but now it is seed 3")


@pytest.mark.slow
def test_a_pretrained_pipeline_from_prompts_alone(tmp_path, capsys):
    """No picture is read: mlcm and tlcm learn from the prompts, on any SDXL pipeline."""
    untrained_pipeline(tmp_path / "words").save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(ENGLISH * 10))
    argv = [
        "--pretrained",
        str(tmp_path / "pipe"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "out"),
        "--rank",
        "4",
    ]
    assert (
        run_latent.run(
            [
                *argv,
                "--recipe",
                "mlcm",
                "tlcm",
                "--iterations",
                "8",
                "--samples",
                "6",
                "--steps",
                "2",
                "--save-every",
                "3",
            ]
        )
        == 0
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row.get("recipe") for row in results["rows"]} == {None, "mlcm", "tlcm"}
    assert all(
        row.get("frechet") is None and row["rmse_to_teacher"] is not None for row in results["rows"]
    )
    assert results["metric"]["n_generated"] == len(set(ENGLISH))  # of 40, a tenth; none twice
    said = capsys.readouterr().out
    assert "mlcm: trying one step of each phase" in said and "each row has 4 images" in said
    assert "preference phases are left out" in said
    card = (tmp_path / "out" / "mlcm" / "README.md").read_text(encoding="utf-8")
    assert "here without its preference" in card
    teacher = results["rows"][0]
    assert teacher["nfe"] == 50 and results["metric"]["n_generated"] == 4
    assert results["seconds"]["evaluation"] > 0.9 * 4 * teacher["seconds_per_image"]
    # the same folder, another pipeline
    untrained_pipeline(tmp_path / "other", channels=(32, 48)).save_pretrained(
        tmp_path / "2" / "pipe"
    )
    argv[1] = str(tmp_path / "2" / "pipe")
    again = "--recipe mlcm tlcm --iterations 8 --samples 4 --steps 2 --save-every 3 --resume"
    refused([*argv, *again.split()], capsys, "holds a run with weights .*, but now it is weights")


@pytest.mark.slow
def test_a_captioned_folder(tmp_path):
    pool = shapes.choose(shapes.scenes(), 1300, 5)
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "metadata.jsonl").open("w") as listing:
        for i, (scene, picture) in enumerate(zip(pool, shapes.draw(pool, 6))):
            save_image(picture.float() / 255, tmp_path / "data" / f"{i}.png")
            listing.write(json.dumps({"file_name": f"{i}.png", "text": scene.caption()}) + "\n")
    argv = [
        *QUICK,
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
        "--recipe",
        "scott",
        "--full",
        "--guidance-range",
        "1",
        "3",
    ]
    assert run_latent.run(argv) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["metric"]["n_generated"] == 130 and "scorer" in results["metric"]["alignment"]
    assert (tmp_path / "out" / "scott" / "unet" / "config.json").is_file()
    page = (tmp_path / "out" / "explorer.html").read_text(encoding="utf-8")
    assert page.count('"nearest": "data:image') == page.count('"path": "data:image') > 0


def test_help_says_how_many_models_a_recipe_makes(capsys):
    with pytest.raises(SystemExit):
        run_latent.parse(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, make in RECIPES.items():
        assert re.sub(r"\s+", " ", make(4).summary) in text
        assert (
            "one model for all step counts" in make(4).summary
            or "one model per K" in make(4).summary
        ), name


def test_bad_input_is_refused_before_any_work(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    refused(["--recipe", "xlcm", *out], capsys, "--recipe xlcm: choose of .*mlcm")
    refused(["--recipe", "all", "mlcm", *out], capsys, "--recipe all: .* all alone")
    refused(["--recipe", "mlcm", "mlcm", *out], capsys, "--recipe mlcm mlcm: .*each once")
    refused(["--recipe", "mcm", "--steps", "2", "1001", *out], capsys, "1001")
    refused(["--rank", "65", *out], capsys, "--rank up to 64")
    refused(["--image-size", "20", *out], capsys, "--image-size a multiple of 8")
    for low, high in (("3", "6"), ("8", "1")):
        ranges = ["--full", "--guidance-range", low, high, *out]
        refused(ranges, capsys, "must rise, and hold --guidance 2.0")
    refused(["--steps", "0", *out], capsys, "--steps 0")
    refused(["--steps", "9", *out], capsys, "1 to 8")
    refused(
        ["--batch", "64", "--accumulate", "3", *out], capsys, "64 is no multiple of --accumulate"
    )
    refused(["--batch", "12", *out], capsys, "multiples of 8", "--no-share-run")
    refused(["--guidance-range", "1", "3", *out], capsys, "--full")
    refused(["--samples", "20", *out], capsys, "too few")
    refused(["--iterations", "0", *out], capsys, "--iterations must be positive, not 0")
    both = ["--iterations", "5", "--evaluations", "5"]
    refused([*both, *out], capsys, "--iterations and --evaluations", "give one")
    refused(["--device", "cuda:77", *out], capsys, "cuda:77", "cpu")
    refused(["--prompts", "x.txt", *out], capsys, "--pretrained")
    refused(["--pretrained", "some/model", *out], capsys, "--prompts FILE, or --data DIR")
    refused(
        ["--pretrained", "some/model", "--prompts", "x", "--recipe", "mlcm", "scott", *out],
        capsys,
        "scott learn from images",
        "mlcm or tlcm",
    )
    assert not (tmp_path / "out").exists()


def test_bad_files(tmp_path, capsys):
    prompts, data, out = (
        tmp_path / "prompts.txt",
        tmp_path / "data",
        ["--out", str(tmp_path / "out")],
    )
    given = ["--pretrained", "some/model", "--prompts", str(prompts), *out]
    refused(given, capsys, "cannot be read as UTF-8 text .*No such file")
    prompts.write_text("\n \n")
    refused(given, capsys, "has 0 captions; at least 10 are needed")
    prompts.write_bytes(b"caf\xe9")
    refused(given, capsys, "UTF-8", "position 3")
    folder = ["--data", str(data), *out]
    refused(folder, capsys, "no metadata.jsonl or metadata.csv")
    data.mkdir()
    (data / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png"}\n'
    )
    save_image(torch.rand(3, 8, 8), data / "a.png")
    refused(folder, capsys, "line 2", "text")
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": " "}\n')
    refused(folder, capsys, r"line 1: a file_name and a text \(or caption\) are needed")
    (data / "metadata.jsonl").write_text('{"file_name": "missing.png", "text": "a cat"}\n')
    refused(folder, capsys, "none of the 1 images")
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}\n')
    refused(folder, capsys, "at least 1,280")


def test_a_hub_id_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "p.txt").write_text("a cat\n" * 30)
    argv = [
        "--pretrained",
        "nobody/no-such-model",
        "--prompts",
        str(tmp_path / "p.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    refused(argv, capsys, "pass a folder with a pipeline")


PRETRAINED = ["--pretrained", "some/model", "--prompts", "x.txt"]


def test_what_is_given_wins_over_the_preset():
    """How long a student trains is said in iterations or in evaluations: in one of them."""
    for argv in ([], PRETRAINED):
        given = run_latent.parse([*argv, "--evaluations", "7"])
        assert (given.evaluations, given.iterations) == (7, None)
        given = run_latent.parse([*argv, "--iterations", "7"])
        assert (given.evaluations, given.iterations) == (None, 7)
    assert run_latent.parse(PRETRAINED).iterations == 12_000
    assert run_latent.parse(PRETRAINED).checkpointing and not run_latent.parse([]).checkpointing
    assert not run_latent.parse([*PRETRAINED, "--no-checkpointing"]).checkpointing
    assert run_latent.parse([]).evaluations == 60
    sdxl = stand_in()
    config = run_latent.parse([*PRETRAINED, "--evaluations", "7", "--recipe", "mlcm", "tlcm"])
    for student in run_latent.students_of(config, sdxl, True):
        settings = run_latent.settings_of(config, SimpleNamespace(sdxl=sdxl), student)
        used = settings.iterations * settings.batch * student.recipe.evaluations()
        assert used == pytest.approx(7000, rel=0.05), student.name


def stand_in(train_steps=1000, guided=False):
    """Something like an SDXL, whose denoisers are their names."""
    schedule = SimpleNamespace(alphas_cumprod=range(train_steps))
    return SimpleNamespace(
        schedule=schedule, denoiser=lambda name=None: name or "plain", device=torch.device("cpu")
    )


@pytest.mark.parametrize("train_steps", [500, 1000, 4000])
def test_recipes_on_a_schedule_of_another_length(train_steps):
    """Their grid is no finer than it, and has whole segments; a skip is the same share of time."""
    config = run_latent.parse(["--recipe", *RECIPES])
    for student in run_latent.students_of(config, stand_in(train_steps), True):
        plain = RECIPES[student.recipe_name](student.K or 4)
        for phase, before in zip(student.recipe.phases, plain.phases):
            last = phase.method.teacher_steps[1]
            assert last <= train_steps
            share = phase.method.skip / last
            assert share == pytest.approx(
                before.method.skip / before.method.teacher_steps[1], rel=0.1
            )
            if train_steps >= 1000:
                assert phase.method == before.method


def test_each_row_is_made_with_the_model_and_the_sampler_that_it_names(monkeypatch):
    """Undistilled: the plain weights. Teacher, and guided: with guidance, at twice the cost."""
    config = run_latent.parse(["--recipe", "mlcm", "mcm", "--steps", "2", "4"])
    rows = []
    evaluator = SimpleNamespace(
        sdxl=stand_in(),
        teacher=lambda: "guided",
        measure=lambda row, model, weights=None: rows.append((row, model)),
    )
    run_latent.measure_teacher(config, evaluator)
    for student in run_latent.students_of(config, stand_in(), True):
        run_latent.measure_student(config, evaluator, student)
    for row, model in rows:
        expected = {"undistilled": "plain", "student": "average"}.get(row["model"], "guided")
        assert model == expected, row
        assert row["nfe"] == row["steps"] * (2 if model == "guided" else 1)
    made = {(row.get("recipe", row["model"]), row["sampler"]) for row, _ in rows}
    assert made >= {("mlcm", "renoise"), ("mcm-2", "ddim"), ("mcm-4", "ddim")}
    assert made >= {("undistilled", "renoise"), ("undistilled", "ddim"), ("teacher", "ddim")}
    assert ("mlcm", "ddim") not in made and ("mcm-2", "renoise") not in made

    asked = []
    monkeypatch.setattr(run_latent.evaluation, "generate", lambda *a, **how: asked.append(how))
    self = SimpleNamespace(
        config=config,
        sdxl=SimpleNamespace(device=torch.device("cpu")),
        cond=None,
        z=torch.zeros(3, 1),
        at_once=1,
    )
    self.how = partial(run_latent.Evaluator.how, self)
    for sampler in ("renoise", "ddim"):
        run_latent.Evaluator.sample(self, None, 3, sampler, 4)
    renoise, ddim = asked
    assert renoise["solver"] is mcm.renoise and renoise["times"] == [1.0, 0.75, 0.5, 0.125]
    assert "solver" not in ddim and ddim["steps"] == 4


def test_the_average_is_what_a_student_leaves(tmp_path, monkeypatch):
    sdxl = SDXL(untrained_pipeline(tmp_path / "p"), rank=4)

    def trained(job, recipe):
        for name in ("student", "average"):
            for value in sdxl.add_lora(name).values():
                torch.nn.init.normal_(value)
        return 1.0

    monkeypatch.setattr(run_latent, "distil", trained)
    config = run_latent.parse(["--out", str(tmp_path)])
    (student,) = run_latent.students_of(config, sdxl, True)
    job = Distillation(sdxl, [], None, None, Training(1), tmp_path, "", 2.0)
    run_latent.train_student(config, job, student, tmp_path / "p")
    saved = load_file(tmp_path / "mlcm" / LORA_FILE)
    average = sdxl.weights("average")
    assert all(torch.equal(saved[f"unet.{key}"], value) for key, value in average.items())
    card = (tmp_path / "mlcm" / "README.md").read_text()
    assert (
        f'weight_name="{LORA_FILE}"' in card and f"transformers {transformers.__version__}" in card
    )


def test_prompts_are_held_out_at_random_and_asked_once(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("".join(f"prompt {n}\n" for n in range(400)))
    argv = ["--pretrained", "x", "--prompts", str(tmp_path / "p.txt"), "--samples", "100"]
    data = run_latent.load_data(run_latent.parse(argv), 8)
    assert len(data.asked) == 40 and len({*data.asked, *data.prompts}) == 400
    places = [int(prompt.split()[1]) for prompt in data.asked]
    assert min(places) < 100 and max(places) > 300
    assert "each row has 40 images" in capsys.readouterr().out
    assert run_latent.load_data(run_latent.parse(argv), 8).asked == data.asked


def test_a_pretrained_student_is_not_taught_by_a_scorer_of_32_pixels(tmp_path, monkeypatch, capsys):
    """Without --clip there is no reward; who judges has seen other images."""
    pool = shapes.choose(shapes.scenes(), 200, 5)
    captions, images = [scene.caption() for scene in pool], shapes.draw(pool, 6)
    data = run_latent.CaptionedImages("d", captions, images, captions[:20], images[:20])
    trained = []

    def train_scorer(images, captions, settings, path):
        trained.append((path.name.split("-")[-2], captions))
        return path.name

    monkeypatch.setattr(run_latent, "train_scorer", train_scorer)
    cpu = torch.device("cpu")
    argv = ["--out", str(tmp_path / "out")]
    config = run_latent.parse(["--pretrained", "x", "--data", "y", *argv])
    reward, judge = run_latent.make_scorers(config, data, tmp_path, cpu)
    assert reward is None and [name for name, _ in trained] == ["evaluator"] and judge
    assert "without --clip there is no reward" in capsys.readouterr().out
    students = run_latent.students_of(config, stand_in(), False)
    assert not any(p.objectives for student in students for p in student.recipe.phases)
    trained.clear()
    config = run_latent.parse(["--data", "y", *argv])
    reward, judge = run_latent.make_scorers(config, data, tmp_path, cpu)
    assert reward and judge and [name for name, _ in trained] == ["reward", "evaluator"]
    assert trained[0][1] == captions[:100] and trained[1][1] == captions[100:]


def test_one_pipeline_with_other_data_has_other_scorers(tmp_path, monkeypatch):
    """And of two runs begun together one waits until the other has trained what both want."""
    captions, images = ["a"] * 20, torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    paths, cpu = [], torch.device("cpu")

    def alone(*arguments, **_):
        with pytest.raises(Timeout):
            FileLock(f"{tmp_path / 'pipe'}.lock").acquire(timeout=0)
        paths.append(arguments[-1])

    monkeypatch.setattr(run_latent, "train_scorer", alone)
    monkeypatch.setattr(run_latent, "train_tiny_sdxl", alone)
    config = run_latent.parse(["--pipeline", str(tmp_path / "pipe")])
    for pictures in (images, images, images + 1):
        data = run_latent.CaptionedImages("d", captions, pictures, captions, pictures)
        run_latent.make_scorers(config, data, tmp_path / "pipe", cpu)
    assert paths[:2] == paths[2:4] and not set(paths[:2]) & set(paths[4:])
    run_latent.tiny_pipeline(config, data, cpu)
    assert len(paths) == 7


def test_what_does_not_fit_says_so_before_anything_long(tmp_path, capsys, monkeypatch):
    untrained_pipeline(tmp_path / "words").save_pretrained(tmp_path / "pipe")
    (tmp_path / "p.txt").write_text("\n".join(ENGLISH * 3))

    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(run_latent, "measure_teacher", lambda *a: pytest.fail("it took an hour"))
    monkeypatch.setattr("mcm.latent.distil.consistency_loss", full)
    files = ["--pretrained", str(tmp_path / "pipe"), "--prompts", str(tmp_path / "p.txt")]
    argv = [*files, "--out", str(tmp_path / "out"), "--rank", "4", "--samples", "2"]
    refused(
        argv, capsys, "not enough memory", "--accumulate 2", "--checkpointing", "--batch", "--rank"
    )
