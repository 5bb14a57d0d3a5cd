import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import ablations
import over_seeds


def test_an_ablation_changes_what_it_says_and_no_more():
    """Variants of a group differ, and each only in its phases or in the fields that its group is about."""
    for claim, variants in ablations.GROUPS.values():
        assert "arXiv" in claim or "TLCM (v6)" in claim
        assert len({recipe.phases for recipe in variants.values()}) == len(variants)
    progressive, states = ablations.GROUPS["progressive"][1], ablations.GROUPS["states"][1]
    assert [p.stage.student_steps for p in progressive["8-4-2"].phases] == [8, 4, 2]
    assert [p.stage.student_steps for p in progressive["only-2"].phases] == [2]
    assert states["8-4-2-1"] == progressive["8-4-2-1"]
    assert {p.stage.z_from for p in states["data-states"].phases} == {"data"} and states["data-states"].needs_images
    assert [len(recipe.phases) for recipe in ablations.GROUPS["tlcm"][1].values()] == [1, 2, 3, 4]
    stages = {name: recipe.phases[0].stage for name, recipe in ablations.GROUPS["scott"][1].items()}
    assert {name: stage.noise for name, stage in stages.items() if not stage.extra} == {"eta-0": 0.0, "eta-0.2": 0.2, "eta-0.6": 0.6, "er-sde-5": "er5"}
    assert all(bool(stage.extra) == name.endswith("-adversary") for name, stage in stages.items())


def test_means_and_spreads_over_seeds(tmp_path, capsys):
    """Ratios are taken within a run, to the better undistilled row of equal sampler and cost, before they are averaged."""
    plain = {"sampler": "renoise", "coverage": 0.5, "recall": 0.5, "alignment": None}
    for seed, scale in enumerate((1.0, 3.0)):
        rows = [
            plain | {"model": "undistilled", "steps": 4, "nfe": 4, "frechet": 4 * scale},
            plain | {"model": "undistilled, guided", "steps": 2, "nfe": 4, "frechet": 2 * scale},
            plain | {"model": "undistilled", "steps": 2, "nfe": 2, "frechet": 9.0},
            plain | {"model": "undistilled", "sampler": "ddim", "steps": 4, "nfe": 4, "frechet": 0.5},
            plain | {"model": "student", "recipe": "mlcm", "steps": 4, "nfe": 4, "frechet": 1.0},
        ]
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "results.json").write_text(json.dumps({"rows": rows}))
    assert over_seeds.main([str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "| mlcm | renoise | 4 | 4 | 1.000 ± 0.000 | 0.33 ± 0.24 | 0.500 ± 0.000 | 0.500 ± 0.000 |  |"
    assert lines[2].startswith("| undistilled | renoise | 4 | 4 | 8.000 ± 5.657 |  |")


def test_asking_for_no_such_group_lists_them(capsys, monkeypatch):
    monkeypatch.setattr(ablations, "RECIPES", {})  # the real one would keep the variants
    assert ablations.main(["nothing"]) == 2 and ablations.main([]) == 0
    assert "er-sde-5-adversary" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        ablations.main(["scott", "--no-such-option"])
