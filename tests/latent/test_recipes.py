"""Each recipe is what the table in mcm/latent/README.md says, number for number."""

from pathlib import Path

import pytest

from mcm.latent.recipes import RECIPES

README = Path(__file__).resolve().parents[2] / "mcm" / "latent" / "README.md"
STATES = {"data": "data", "teacher": "teacher's run of {}", "student": "own sample of {}"}
STEPS = {0.0: "DDIM", "er5": "ER-SDE 5"}
TITLES = (
    "recipe, phase | share | rate | segments | grid, skip, sub-steps | z_t from | teacher's step "
    "| target | weight, distance | besides (weight) | critics' rate"
)


def row(name, recipe, number):
    phase = recipe.phases[number]
    method = phase.method
    first, last = method.teacher_steps
    grid = f"{first} to {last}" if first < last else first
    order = f", order {method.solver_order}" if method.solver_order > 1 else ""
    huber = "" if method.distance == "squared" else f" {method.huber_c}"
    further = ", ".join(f"{kind} {weight}" for kind, weight in phase.objectives)
    cells = [
        name if not number else f"... {number + 1}",
        phase.share if len(recipe.phases) > 1 else "",
        phase.lr,
        method.student_steps,
        f"{grid}, {method.skip}, {method.sub_steps}",
        STATES[phase.states].format(phase.rollout_steps),
        STEPS[method.teacher_eta] + order,
        "student" if phase.target_ema is None else f"average, {phase.target_ema}",
        f"{method.weight}, {method.distance}" + huber,
        further.replace("_", " "),
        phase.critic_lr if "adversarial" in further else "",
    ]
    assert method.x_var is None  # DDIM, not aDDIM
    return f"| {' | '.join(map(str, cells))} |".replace("|  |", "| |").replace("|  |", "| |")


def table():
    lines = [f"| {TITLES} |", "|---" * len(TITLES.split("|")) + "|"]
    for name, make in RECIPES.items():
        for K in (1, 4) if name == "mcm" else (4,):
            shown = f"`mcm`, K = {K}" if name == "mcm" else f"`{name}`"
            lines += [row(shown, make(K), n) for n in range(len(make(K).phases))]
    return "\n".join(lines)


def test_the_table_in_the_readme():
    assert table() in README.read_text(encoding="utf-8"), table()


@pytest.mark.parametrize("name", RECIPES)
def test_how_a_recipe_is_sampled(name):
    """One model for each K walks on along DDIM; one for all is noised afresh."""
    assert RECIPES[name](4).renoise == (name != "mcm")
