"""A model on the Hub, with a stand-in for the Hub: what is uploaded can be loaded again."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mcm
from mcm.lab import hub

huggingface_hub = pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "results" / "cifar10" / "small-h100"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Repositories as folders; `calls` of the client."""
    calls = []

    class Client:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, private=False, exist_ok=False):
            if "/" not in repo_id:
                repo_id = f"someone/{repo_id}"
            calls.append(("create", repo_id, private))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, revision=None):
        calls.append(("download", repo_id, revision))
        path = tmp_path / "hub" / repo_id / filename
        if not path.is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline, and not in the cache")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(calls=calls, folder=tmp_path / "hub")


class Unreachable(Exception):
    """Some versions let their HTTP library's own errors through, which are nobody's OSError."""


def student():
    network = mcm.UNet(8, 1, 32, (1,), 1, (), 10)
    return mcm.Denoiser(network, mcm.CosineSchedule(), student_steps=4)


def same(a, b):
    assert a.student_steps == b.student_steps
    assert json.dumps(a.network.arguments) == json.dumps(b.network.arguments)
    for x, y in zip(a.network.state_dict().values(), b.network.state_dict().values(), strict=True):
        assert torch.equal(x, y)


def test_there_and_back(server):
    model = student()
    address = model.push_to_hub("digits-4", results=RUN, private=True, token="secret")
    assert address == "https://huggingface.co/someone/digits-4"
    assert server.calls == [("token", "secret"), ("create", "someone/digits-4", True)]
    folder = server.folder / "someone" / "digits-4"
    assert sorted(p.name for p in folder.iterdir() if p.name[0] != ".") == [
        "README.md",
        "model.safetensors",
    ]
    same(mcm.Denoiser.from_pretrained("someone/digits-4", revision="v1"), model)
    assert server.calls[-1] == ("download", "someone/digits-4", "v1")
    same(mcm.Denoiser.from_pretrained(str(folder)), model)  # the folder itself, no Hub
    assert len(server.calls) == 3
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained("someone/digits-4")' in card and "pip install ." in card


def test_what_is_known_of_a_model_is_kept(tmp_path):
    model = mcm.load("pretrained:cifar10-small-4")
    hub.save_pretrained(model, tmp_path / "folder")
    again = mcm.Denoiser.from_pretrained(tmp_path / "folder")
    same(model, again)
    assert again.metadata == model.metadata


def test_the_card_is_made_from_the_results(tmp_path):
    hub.save_pretrained(student(), tmp_path, RUN / "results.json")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    header, body = card.split("---\n")[1:3]
    assert "license" not in header and "library_name: mcm" in header
    assert "# A student that samples in 4 steps" in body
    assert "python run_cifar.py --data-dir data --preset small" in body and "H100" in body
    assert "not FID" in body and "| mcm-cd | ddim | 4 | 4 | 91.398" in body
    # its code runs as it stands there
    code = body.split("```python")[1].split("```")[0]
    scope = {}
    exec(code, scope)
    assert scope["images"].shape == (16, 1, 8, 8)


def test_the_card_of_a_teacher_says_in_how_many_steps(tmp_path):
    teacher = mcm.Denoiser(mcm.UNet(8, 3, 32, (1,), 1, ()), mcm.CosineSchedule())
    hub.save_pretrained(teacher, tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    code = card.split("```python")[1].split("```")[0]
    scope = {}
    exec(code.replace("steps=64", "steps=2"), scope)
    assert "steps=64" in code and scope["images"].shape == (16, 3, 8, 8)


def test_bad_input(server, tmp_path, monkeypatch):
    with pytest.raises(mcm.InputError, match="someone/none: no such folder, .*offline"):
        mcm.Denoiser.from_pretrained("someone/none")
    with pytest.raises(mcm.InputError, match="is not the results.json of a run"):
        student().push_to_hub("x/y", results=tmp_path)
    assert not (server.folder / "x").exists()
    with pytest.raises(mcm.InputError, match="run on cifar10, and the model was trained on digits"):
        mcm.load("pretrained:digits-4").push_to_hub("x/y", results=RUN)
    assert not any(call[0] == "create" for call in server.calls)
    (tmp_path / "empty").mkdir()
    with pytest.raises(mcm.InputError, match="no such checkpoint"):
        mcm.Denoiser.from_pretrained(tmp_path / "empty")

    def refuse(*_, **__):
        raise Unreachable("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(mcm.InputError, match="could not be uploaded .*no network"):
        student().push_to_hub("a/b")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(mcm.InputError, match="no such folder, .*no network"):
        mcm.Denoiser.from_pretrained("a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(mcm.InputError, match="pip install huggingface_hub"):
        student().push_to_hub("a/b")
