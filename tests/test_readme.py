"""The documents' code runs, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("mcm/**/*.md"), *ROOT.glob("results/**/*.md")]


def example(path):
    """The document's first block of Python that imports mcm."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    return next(block for block in blocks if "import torch, mcm" in block)


def test_the_library_example_runs():
    code = example(ROOT / "README.md")
    assert "600" in code
    names = {}
    exec(code.replace("600", "3"), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["images"].isfinite().all()


def test_the_example_of_another_unet_runs():
    names = {}
    exec(example(ROOT / "mcm" / "FAQ.md"), names)
    assert names["images"].isfinite().all()
    assert any(p.grad is not None and p.grad.any() for p in names["unet"].parameters())


def test_the_worked_example_of_a_new_method_runs():
    names = {}
    exec(example(ROOT / "mcm" / "README.md"), names)
    assert names["loss"].isfinite() and names["lcm"].student_steps == 1
    moved = [
        not a.equal(b)
        for a, b in zip(names["target"].parameters(), names["teacher"].parameters(), strict=True)
    ]
    assert any(moved)  # the averaged student has left where it started


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text):
        page = path.parent / target if target else path
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
            known = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in known, f"{target}#{anchor}"
