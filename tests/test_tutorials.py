"""Every notebook and solution runs from top to bottom in a clean kernel, without a warning, and is
committed with light outputs.
"""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent / "tutorials"
NOTEBOOKS = sorted(ROOT.rglob("[0-9]*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_notebook_runs(path, tmp_path):
    shutil.copytree(
        ROOT, tmp_path / "tutorials"
    )  # what a notebook writes stays out of the repository
    notebook = nbformat.read(path, 4)
    folder = tmp_path / "tutorials" / path.relative_to(ROOT).parent
    NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert "Warning" not in output.get("text", ""), output["text"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_notebook_is_committed_as_executed(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert path.stat().st_size < 600_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", path.read_text())


def test_there_is_a_solution_for_every_notebook():
    names = {p.name for p in NOTEBOOKS if p.parent == ROOT}
    assert names == {p.name for p in NOTEBOOKS if p.parent != ROOT}
    for name in names:
        text = (ROOT / name).read_text()
        assert (
            f"solutions/{name}" in text
            and len(re.findall(r"\d\. \*\*\((?:easy|medium|hard)\)", text)) == 3
        )


def test_links_lead_somewhere():
    for path in [*NOTEBOOKS, ROOT / "README.md"]:
        texts = (
            [path.read_text()]
            if path.suffix == ".md"
            else [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
        )
        for target in (t for text in texts for t in re.findall(r"\]\(([^)#:]+)\)", text)):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_weights_are_small():
    files = [p for p in (ROOT / "weights").rglob("*") if p.is_file()]
    assert (
        max(p.stat().st_size for p in files) <= 1_500_000
        and sum(p.stat().st_size for p in files) < 12_000_000
    )
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for p in files:
        assert not re.search(rb"/(home|root|tmp|Users|work)/", p.read_bytes()), p
