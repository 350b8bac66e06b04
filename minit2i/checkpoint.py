"""Checkpoints: a folder that holds a model, ready to use, and what only resuming needs.

`config.json` and `model.safetensors` are the model; `state/resume.safetensors` is the rest, or names a folder beside it with
each process's part of it.  Every file appears whole or not at all, and none of them can run code when read.
"""

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes

from minit2i.parallel import gather, is_sharded, processes


def write_file(path, data):
    """Write bytes or str so that the file is whole or not there.  OSError names the path."""
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
    """Named tensors and JSON-able meta -> one safetensors file, written atomically."""
    tensors = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    write_file(path, tensors_to_bytes(tensors, metadata={k: json.dumps(v) for k, v in meta.items()}))


def load_tensors(path, tensors=True):
    """-> (dict of tensors, or {} if only meta is wanted, meta).  ValueError if the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as f:
            meta = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
            return {k: f.get_tensor(k) for k in (f.keys() if tensors else ())}, meta
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} cannot be read as safetensors: {e}") from e


def read_hf(folder):
    """Yields (name, tensor) of a folder in the Hugging Face layout: model.safetensors, or its shards and their index."""
    index = Path(folder, "model.safetensors.index.json")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else None
        for name in names or ["model.safetensors"]:
            with safe_open(Path(folder, name), "pt") as f:
                for k in f.keys():
                    yield k, f.get_tensor(k)
    except (SafetensorError, OSError, json.JSONDecodeError, KeyError) as e:
        raise ValueError(f"the weights in {folder} cannot be read as safetensors, whole or in shards: {e}") from e


def read_config(folder):
    """config.json of a checkpoint folder.  ValueError if there is none."""
    path = Path(folder, "config.json")
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint folder: no config.json in it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e


def has_state(folder):
    return Path(folder, "state", "resume.safetensors").exists()


def save_model(folder, tensors, config, dtype=None):
    """The model of a checkpoint folder: config.json and model.safetensors."""
    if dtype:
        most = torch.finfo(dtype).max  # a much used code may have a larger count
        tensors = {k: v.clamp(-most, most).to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    write_file(Path(folder, "config.json"), json.dumps(config, indent=1) + "\n")
    save_tensors(Path(folder, "model.safetensors"), tensors)


def load_model(folder, model, fit=lambda tensors, model: tensors):
    """Weights of a checkpoint folder, changed by fit, into a model, for use; ValueError if they do not fit."""
    tensors = fit(load_tensors(Path(folder, "model.safetensors"))[0], model)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        raise ValueError(f"{folder}/model.safetensors does not fit its config.json, or these flags: {e}") from e
    return model.eval()


def save_run(p, folder, config, step, learners, ema, **meta):
    """Every process calls it: the model with averaged weights, whole, and then all that resuming needs.

    learners: name -> (module, optimizer, scaler) of all that is trained; "" is the model, a discriminator may be beside it.
    """
    whole = gather(ema.state_dict(learners[""][0]), p)
    if p.main:
        save_model(folder, whole, config | {"step": step})
    tensors, scalers = {f"ema.{k}": v for k, v in ema.weights.items()}, {}
    for name, (module, optimizer, scaler) in learners.items():
        prefix, names = f"{name}." if name else "", {w: k for k, w in module.named_parameters()}
        tensors |= {f"{prefix}model.{k}": v for k, v in module.state_dict().items()}
        for w, state in optimizer.state.items():
            tensors |= {f"{prefix}optimizer.{names[w]}.{k}": v for k, v in state.items()}
        scalers[name] = scaler.state_dict()
    meta |= dict(step=step, scaler=scalers.pop(""), scalers=scalers)
    write_state(Path(folder, "state"), tensors, meta)
    p.barrier()


def write_state(folder, tensors, meta):
    """state/: one file; if something is sharded, the tensors in a folder beside it, which the file names.

    The file comes last and appears at once: until then the state is the one before.
    """
    main = processes()[0] == 0
    if is_sharded(tensors):
        shards = f"step-{meta['step']:06d}"
        if main:
            shutil.rmtree(folder / shards, ignore_errors=True)  # of a run that was killed here
        dist.barrier()
        save_shards(folder / shards, tensors)
        tensors, meta = {}, meta | {"shards": shards, "files": len(os.listdir(folder / shards))}
    if main:
        save_tensors(folder / "resume.safetensors", tensors, **meta)
        for old in folder.glob("step-*"):
            if old.name != meta.get("shards"):
                shutil.rmtree(old)


def read_state(folder, model):
    """What write_state wrote, sharded as the model is now -> tensors, meta."""
    _, meta = load_tensors(folder / "resume.safetensors", tensors=False)
    sharded = {k: v for k, v in model.state_dict().items() if is_sharded({k: v})}
    if not sharded and "shards" not in meta:
        return load_tensors(folder / "resume.safetensors")
    folder, files = folder / meta.get("shards", ""), meta.get("files", 1)
    if len(list(folder.glob("*.safetensors"))) != files:
        raise ValueError(f"{folder} is damaged: it should hold {files} safetensors files")
    return load_shards(folder, sharded), meta


def load_state(folder, learners, ema):
    """All that resuming needs, as save_run left it, in place -> its meta (step and what the script added)."""
    model = learners[""][0]
    tensors, meta = read_state(Path(folder, "state"), model)
    scalers = {"": meta["scaler"]} | meta.get("scalers", {})
    for name, (module, optimizer, scaler) in learners.items():
        if name not in scalers:  # new in this run
            continue
        prefix = f"{name}." if name else ""
        try:
            module.load_state_dict(with_prefix(tensors, f"{prefix}model."))
        except RuntimeError as e:
            raise ValueError(f"the run in {folder} does not fit these flags: {e}") from e
        moments = with_prefix(tensors, f"{prefix}optimizer.")
        for key, w in module.named_parameters():
            if state := with_prefix(moments, f"{key}."):
                optimizer.state[w] = {k: v.to(w.device) if k != "step" or w.is_cuda else v for k, v in state.items()}
        if scalers[name]:
            scaler.load_state_dict(scalers[name])
    averaged = with_prefix(tensors, "ema.")
    for k, v in model.named_parameters():
        if k in ema.weights:
            ema.weights[k].copy_(averaged.get(k, v.detach()))
    return meta


def with_prefix(tensors, prefix):
    """The tensors whose name starts so, without that start."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# --- sharded tensors ------------------------------------------------------------------------------------


def save_shards(folder, tensors):
    """Every process writes its parts of the tensors into a folder of safetensors files."""
    import torch.distributed.checkpoint as dcp  # here, as it takes 0.2 s and most commands do without it (measured)

    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as e:
        raise OSError(f"cannot write {folder}: {e}") from e


def load_shards(folder, sharded):
    """A folder of safetensors files, whoever wrote them -> the tensors, as DTensors where `sharded` has one of that name.

    sharded: name -> DTensor; a tensor may have a prefix (model., ema., optimizer.) and a suffix to the name.
    """
    import torch.distributed.checkpoint as dcp

    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        tensors = {}
        for key, saved in reader.read_metadata().state_dict_metadata.items():
            name = key.partition(".")[2]
            like = sharded.get(name, sharded.get(name.rpartition(".")[0]))
            if like is not None and like.shape == saved.size:
                tensors[key] = torch.zeros_like(like, dtype=saved.properties.dtype)
            else:
                tensors[key] = torch.empty(saved.size, dtype=saved.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that no_dist is one process: here each reads for itself
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors
    except (dcp.CheckpointException, SafetensorError, OSError) as e:
        raise ValueError(f"{folder} cannot be read as safetensors: {e}") from e
