"""Checkpoints: a folder with a model that is ready to use.

config.json says what the model is and how it was trained: {"kind": "vq" or "prior", "model": {...}, "data": {...},
"train": {...}, "step": n}, and in a prior's, if somebody adds it, "sampling": {...}, its defaults of sample.py.
model.safetensors holds the weights.  What only resuming needs stands in state/ (resume.py).
Files are written atomically, and reading one cannot run code: no pickle is loaded.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minit2i.vq import build_vq

# safetensors' names of types
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}

# --- files ---------------------------------------------------------------------------------------------


def write_file(path, data):
    """Write bytes, str or an iterator of buffers atomically.  OSError names the path."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            data = data.encode() if isinstance(data, str) else data
            f.writelines([data] if isinstance(data, bytes) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"cannot write {path}: {e.strerror or e}; what was there before is intact") from e


def save_tensors(path, tensors, **meta):
    """Named tensors and JSON-able metadata -> one safetensors file, written atomically.

    Tensor by tensor: main memory need not hold the state once more.
    """
    tensors = dict(sorted(tensors.items(), key=lambda pair: -pair[1].element_size()))  # each is aligned in the file
    header, end = {"__metadata__": {k: json.dumps(v) for k, v in meta.items()}}, 0
    for k, v in tensors.items():
        start, end = end, end + v.numel() * v.element_size()
        header[k] = {"dtype": DTYPES[v.dtype], "shape": [*v.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = (v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for v in tensors.values())
    write_file(path, chain([struct.pack("<Q", len(text)), text], data))


def load_tensors(path):
    """A safetensors file -> ({name: tensor}, metadata).  ValueError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as f:
            meta = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
            return {k: f.get_tensor(k) for k in f.keys()}, meta
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} cannot be read as safetensors: {e}") from e


def read_hf(folder, stem="model"):
    """Yield (name, tensor) of a Hugging Face folder: {stem}.safetensors, or the shards that its index lists."""
    index = Path(folder, f"{stem}.safetensors.index.json")
    pickled = next((p.name for p in Path(folder).glob("*.bin")), None)
    if pickled and not any(Path(folder).glob(f"{stem}*.safetensors")):
        raise ValueError(
            f"{folder} holds {pickled}, a pickle, which can run code; convert it to safetensors: transformers' "
            "from_pretrained(FOLDER).save_pretrained(NEW) does"
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
        for name in names or [f"{stem}.safetensors"]:
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
        parts = "model", "data", "train"  # dicts themselves
        if missing := [k for k in keys if k not in config or k in parts and not isinstance(config[k], dict)]:
            if "_class_name" in config:
                raise ValueError(
                    f"{folder} holds diffusers' {config['_class_name']}; python -m minit2i.export --model {folder} "
                    "--out X makes a tokenizer's folder of ours from a VQModel"
                )
            raise ValueError(f"{path} is not the config of a model: it lacks {', '.join(missing)}")
        return config
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint folder: no config.json in it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e


def has_state(folder):
    """Whether a folder holds a run that can be resumed."""
    return Path(folder, "state", "resume.safetensors").exists()


def saved_step(folder):
    """The step that a run would resume from."""
    path = Path(folder, "state", "resume.safetensors")
    try:
        with safe_open(path, "pt") as f:
            return json.loads(f.metadata()["step"])
    except (SafetensorError, OSError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read as a run's state: {e}") from e


def first_save(folder):
    """The file that exists from the beginning to the end of a run's first save: killed there, a run starts again."""
    return Path(folder, "state", "first_save")


def check_free(folder):
    """ValueError if a folder holds files of a model (ours, or another program's) or a run, which writing would lose."""
    names = ("config.json", "*.safetensors", "*.bin", "*.pt", "*.ckpt", "state/*.safetensors")
    if found := next((path for name in names for path in Path(folder).glob(name)), None):
        raise ValueError(f"{folder} holds a model already ({found.name}); use another folder, or remove it first")


def check_writable(path):
    """OSError unless `path` can be written, before any work is done for it."""
    path = Path(path)
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder; use another name")
    probe = path.with_name(f".{path.name}.probe")
    write_file(probe, "")
    probe.unlink()


def misfit(folder, model, tensors):
    """Why a checkpoint's tensors do not fit a model, in one line: the settings that differ, and the first tensor."""
    saved, own = read_config(folder, ()).get("model", {}), vars(getattr(model, "cfg", object))
    changed = [f"{k} is {own[k]}, there {saved[k]}" for k in own if k in saved and own[k] != saved[k]][:5]
    shapes, asked = ({k: tuple(v.shape) for k, v in some.items()} for some in (tensors, model.state_dict()))
    wrong = [k for k in {**asked, **shapes} if shapes.get(k) != asked.get(k)]
    first = f"{wrong[0]} is {asked.get(wrong[0], 'unknown')}, there {shapes.get(wrong[0], 'missing')}" if wrong else ""
    return "; ".join([*changed, f"{len(wrong)} of {len(asked)} tensors differ: {first}"])


def save_model(folder, tensors, config, dtype=None, **meta):
    """Write config.json and model.safetensors; dtype: convert floating-point weights; meta: kept beside them."""
    if dtype:
        most = torch.finfo(dtype).max  # usage counts of a codebook can exceed float16
        tensors = {k: v.clamp(-most, most).to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    write_file(Path(folder, "config.json"), json.dumps(config, indent=1) + "\n")
    save_tensors(Path(folder, "model.safetensors"), tensors, **meta)


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
    except RuntimeError:
        why = misfit(folder, model, tensors)
        raise ValueError(f"{folder}/model.safetensors does not fit its config.json, or these flags: {why}") from None
    return model.eval()


def load_vq(folder, device="cpu"):
    """A tokenizer's folder -> VQ, frozen, with the hash of its weights' file as `hash`.  ValueError if it is none."""
    config = read_config(folder)
    if config.get("kind") != "vq":
        raise ValueError(f"{folder} is not a tokenizer, as --vq needs; train_vq.py makes one")
    vq = load_model(folder, build_vq(config["model"])).to(device).requires_grad_(False)
    vq.hash = file_hash(Path(folder, "model.safetensors"))
    return vq
