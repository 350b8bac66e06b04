"""Checkpoints: a folder with a model that is ready to use.

config.json says what the model is and how it was trained: {"kind": "vq" or "prior", "model": {...}, "data": {...},
"train": {...}, "step": n}; model.safetensors holds its weights.  What only resuming needs stands in state/ (resume.py).
Files are written atomically, and reading one cannot run code: no pickle is loaded.
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes

from minit2i.vq import build_vq

# --- files ---------------------------------------------------------------------------------------------


def write_file(path, data):
    """Write bytes or str atomically.  OSError names the path."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path}: {e.strerror or e}; what was there before is intact") from e


def save_tensors(path, tensors, **meta):
    """Named tensors and JSON-able metadata -> one safetensors file, written atomically."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    write_file(path, tensors_to_bytes(tensors, metadata={k: json.dumps(v) for k, v in meta.items()}))


def load_tensors(path):
    """A safetensors file -> ({name: tensor}, metadata).  ValueError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as f:
            meta = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
            return {k: f.get_tensor(k) for k in f.keys()}, meta
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} cannot be read as safetensors: {e}") from e


def read_hf(folder):
    """Yield (name, tensor) of a Hugging Face folder: model.safetensors, or the shards that its index lists."""
    index = Path(folder, "model.safetensors.index.json")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
        for name in names or ["model.safetensors"]:
            with safe_open(Path(folder, name), "pt") as f:
                for k in f.keys():
                    yield k, f.get_tensor(k)
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as e:
        raise ValueError(f"the weights in {folder} cannot be read as safetensors, whole or in shards: {e}") from e


def file_hash(path):
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# --- models --------------------------------------------------------------------------------------------

CHECKPOINT = ("config.json", "model.safetensors", "text.model")  # files of a prior, beside its tokenizer in vq/


def read_config(folder, keys=("kind", "model")):
    """config.json of a checkpoint folder -> dict.  ValueError if it is missing or damaged, or lacks a key."""
    path = Path(folder, "config.json")
    try:
        config = json.loads(path.read_text())
        if missing := [key for key in keys if key not in config]:
            raise ValueError(f"{path} is not the config of a model: it lacks {', '.join(missing)}")
        return config
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint folder: no config.json in it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e


def has_state(folder):
    """Whether a folder holds a run that can be resumed."""
    return Path(folder, "state", "resume.safetensors").exists()


def check_free(folder):
    """ValueError if a folder holds a model or a run, which writing there would lose."""
    if Path(folder, "model.safetensors").exists() or has_state(folder):
        raise ValueError(f"{folder} holds a model already; use another folder, or remove it first")


def save_model(folder, tensors, config, dtype=None):
    """Write config.json and model.safetensors; dtype: convert floating-point weights."""
    if dtype:
        most = torch.finfo(dtype).max  # usage counts of a codebook can exceed float16
        tensors = {k: v.clamp(-most, most).to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    write_file(Path(folder, "config.json"), json.dumps(config, indent=1) + "\n")
    save_tensors(Path(folder, "model.safetensors"), tensors)


def keep_copy(folder, copy):
    """Copy a prior's checkpoint to another folder, by hard links where it can: later saves replace files, not links."""
    for path in [p for p in Path(folder).glob("*") if p.name in CHECKPOINT] + [*Path(folder).glob("*vq/*")]:
        target = Path(copy, path.relative_to(folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another file system, or one without links
            shutil.copy(path, target)


def load_model(folder, model, fit=lambda tensors, model: tensors):
    """Load a checkpoint folder's weights -> the model in eval mode.  ValueError if they do not fit.

    fit(tensors, model) -> tensors: adapt the weights first, as for a larger grid of codes.
    """
    tensors = fit(load_tensors(Path(folder, "model.safetensors"))[0], model)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise ValueError(f"{folder}/model.safetensors does not fit its config.json, or these flags: {e}") from e
    return model.eval()


def load_vq(folder, device="cpu"):
    """A tokenizer's folder -> VQ, frozen, with the hash of its weights' file as `hash`.  ValueError if it is none."""
    config = read_config(folder)
    if config.get("kind") != "vq":
        raise ValueError(f"{folder} is not a tokenizer; train_vq.py makes one")
    vq = load_model(folder, build_vq(config["model"])).to(device).requires_grad_(False)
    vq.hash = file_hash(Path(folder, "model.safetensors"))
    return vq
