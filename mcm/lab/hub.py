"""A model as a folder, or a repository of the Hugging Face Hub: its weights and a card."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from ..denoiser import Denoiser
from ..errors import InputError
from . import evaluation
from .checkpoint import load, make_folder, save, write

FILE = "model.safetensors"


def save_pretrained(
    denoiser: Denoiser, folder: str | Path, results: str | Path = "", name: str | Path = ""
) -> None:
    """Write the folder that `push_to_hub` uploads.

    results: the results.json of the run that made it, or the run's folder; the card takes data,
        command, hardware and the table from it.
    name: what the card's code loads it by (default: the folder).
    Raises InputError if there are no results there, or those of a run on other data, or the folder
    cannot be written to.
    """
    folder = Path(folder)
    make_folder(folder, "the folder")
    text = card(denoiser, str(name or folder), results_of(denoiser, results))
    save(folder / FILE, denoiser, **getattr(denoiser, "metadata", {}))
    write(folder / "README.md", text)


def results_of(denoiser: Denoiser, given: str | Path) -> dict | None:
    """Those of the model's run, as `save_pretrained` is given them."""
    if not given:
        return None
    path = Path(given) / "results.json" if Path(given).is_dir() else Path(given)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results = {key: results[key] for key in (*KEYS, "rows", "metric", "seconds", "processes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the results.json of a run ({error!r})") from None
    trained_on = getattr(denoiser, "metadata", {}).get("trained_on", results["data"])
    if trained_on != results["data"]:
        other = f"on {results['data']}, and the model was trained on {trained_on}"
        raise InputError(f"{path} is of a run {other}")
    return results


KEYS = ("data", "seed", "command", "hardware")
"""What a card says of a run."""


def card(denoiser: Denoiser, name: str, results: dict | None) -> str:
    """The model card, in markdown. (What licence the weights have is for their owner to say.)"""
    K = denoiser.student_steps
    what = f"A student that samples in {K} steps" if K else "A diffusion model"
    about = denoiser.network.arguments
    classes = about["classes"]
    cond = f", cond=torch.arange(16) % {classes}" if classes else ""
    shape = f"16, {about['in_channels']}, {about['image_size']}, {about['image_size']}"
    text = f"""---
library_name: mcm
tags: [multistep-consistency, diffusion]
---

# {what}

Multistep Consistency Models (arXiv 2403.06807), by the Python package `multistep-consistency`
(`pip install .` in its repository), which is imported as `mcm`:

```python
import torch, mcm

model = mcm.Denoiser.from_pretrained("{name}")
images = mcm.sample(model, torch.randn({shape}){"" if K else ", steps=64"}{cond})  # in [-1, 1]
```
"""
    if not results:
        return text
    metric = results["metric"]
    where = f"Fréchet distance in {metric['dim']} features of {metric['features']} (not FID)"
    name = "FID" if metric["name"] == "fid" else where
    head = [f"- {key}: {results[key]}" for key in KEYS]
    head += ["", f"{name}, {metric['n_generated']:,} samples, of all models of that run:"]
    return f"{text}\n{evaluation.table(results, head)}"


def push_to_hub(
    denoiser: Denoiser,
    repo_id: str,
    results: str | Path = "",
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload what `save_pretrained` writes to "OWNER/NAME" (or your own NAME), made if need be;
    -> its address.

    Raises InputError without the package huggingface_hub, and if the Hub refuses.
    """
    hub = package()
    api = hub.HfApi(token=token)
    results_of(denoiser, results)  # what is wrong with them, before there is a repository
    with TemporaryDirectory() as folder:
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            save_pretrained(denoiser, folder, results, repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        except Exception as error:  # which kinds there are differs between its versions
            raise InputError(f"{repo_id} could not be uploaded ({error})") from None
    return f"{hub.constants.ENDPOINT}/{repo_id}"


def from_pretrained(name: str | Path, device: str = "cpu", **options) -> Denoiser:
    """The model in a folder that `save_pretrained` wrote, or of a repository "OWNER/NAME" on the
    Hub.

    options: revision, token, cache_dir, local_files_only: those of `hf_hub_download`.
    Raises InputError if it is not there or cannot be fetched, and as mcm.load does.
    """
    if Path(name).is_dir():
        return load(Path(name) / FILE, device)
    hub = package()
    try:
        path = hub.hf_hub_download(str(name), FILE, **options)
    except Exception as error:  # which kinds there are differs between its versions
        raise InputError(
            f"{name}: no such folder, and not fetched from the Hub ({error})"
        ) from None
    return load(path, device)


def package():
    try:
        import huggingface_hub
    except ImportError:
        raise InputError("the Hub needs a package: pip install huggingface_hub") from None
    return huggingface_hub
