"""The README's code runs, and its links lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_library_example_runs():
    code = re.search(r"```python\n(import torch, mcm\n.*?)```", TEXT, re.S).group(1)
    assert "600" in code
    names = {}
    exec(code.replace("600", "3"), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["images"].isfinite().all()


def test_links_lead_somewhere():
    for document in [ROOT / "README.md", *ROOT.glob("results/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
