import json
import re

import pytest
import torch
from pipelines import ENGLISH, untrained_pipeline
from torchvision.utils import save_image

import run_latent
from mcm.latent import shapes
from mcm.latent.recipes import RECIPES

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
def test_a_pretrained_pipeline_from_prompts_alone(tmp_path):
    """No picture is read: mlcm and tlcm learn from the prompts, on any SDXL pipeline."""
    untrained_pipeline(tmp_path / "words").save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(ENGLISH * 3))
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
                "128",
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
    refused(["--recipe", "xlcm", *out], capsys, "unknown recipe 'xlcm'", "mlcm")
    refused(["--steps", "0", *out], capsys, "--steps 0")
    refused(["--steps", "9", *out], capsys, "1 to 8")
    refused(
        ["--batch", "64", "--accumulate", "3", *out], capsys, "64 is no multiple of --accumulate"
    )
    refused(["--batch", "12", *out], capsys, "multiples of 8", "--no-share-run")
    refused(["--guidance-range", "1", "3", *out], capsys, "--full")
    refused(["--samples", "20", *out], capsys, "too few")
    refused(["--iterations", "0", *out], capsys, "--iterations must be positive, not 0")
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
    refused(folder, capsys, "metadata.jsonl is missing")
    data.mkdir()
    (data / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png"}\n'
    )
    save_image(torch.rand(3, 8, 8), data / "a.png")
    refused(folder, capsys, "line 2", "text")
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": " "}\n')
    refused(folder, capsys, "line 1: a file_name and a text are needed")
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
