"""Saving and resuming a run: the checkpoint folder, and state/ with all that only training needs.

state/resume.safetensors holds raw weights, optimizer moments, averaged weights and loss scales.  If the model is
sharded, each process writes its shards to a folder beside it, which resume.safetensors names.
"""

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

from minit2i.checkpoint import first_save, has_state, load_tensors, misfit, save_model, save_tensors, write_file
from minit2i.collectives import barrier, rank_and_world
from minit2i.parallel import is_sharded, unshard


@dataclass
class Learner:
    """A module that is trained, with its optimizer (or None) and its gradient scaler."""

    module: torch.nn.Module
    optimizer: Any
    scaler: Any


def save_run(folder, config, step, learners, ema, **meta):
    """Write the checkpoint with averaged weights, then the state.  Every process calls it.

    learners: {name: Learner}; "model" is what the checkpoint holds and `ema` averages.  meta: the script's own values,
    JSON-able.
    """
    state, main = Path(folder, "state"), rank_and_world()[0] == 0
    weights = unshard(ema.state_dict(learners["model"].module))
    if main:
        if not has_state(folder):
            write_file(first_save(folder), "")
        save_model(folder, weights, config | {"step": step})
    tensors = {f"ema.{k}": v for k, v in ema.weights.items()}
    for name, learner in learners.items():
        names = {w: k for k, w in learner.module.named_parameters()}
        tensors |= {f"{name}/weights.{k}": v for k, v in learner.module.state_dict().items()}
        for w, moments in learner.optimizer.state.items():
            tensors |= {f"{name}/optimizer.{names[w]}.{k}": v for k, v in moments.items()}
    meta |= dict(step=step, scalers={name: learner.scaler.state_dict() for name, learner in learners.items()})
    write_state(state, tensors, meta)
    if main:
        first_save(folder).unlink(missing_ok=True)
    barrier()


def load_state(folder, learners, ema):
    """Restore a run that save_run wrote, in place -> its metadata (step and the script's own).

    A learner that the run did not have yet keeps its fresh state.  ValueError if the weights do not fit.
    """
    model = learners["model"].module
    tensors, meta = read_state(Path(folder, "state"), model)
    for name, learner in learners.items():
        if name not in meta["scalers"]:
            continue
        weights = with_prefix(tensors, f"{name}/weights.")
        try:
            learner.module.load_state_dict(weights)
        except RuntimeError:
            why = misfit(folder, model, weights) if name == "model" else f"another {name}"
            raise ValueError(f"the run in {folder} does not fit these flags: {why}") from None
        moments = with_prefix(tensors, f"{name}/optimizer.")
        for key, w in learner.module.named_parameters():
            if state := with_prefix(moments, f"{key}."):
                state = {k: v.to(w.device) if k != "step" or w.is_cuda else v for k, v in state.items()}
                state = {k: torch.empty_like(w).copy_(v) if v.dim() == 4 else v for k, v in state.items()}  # its format
                learner.optimizer.state[w] = state
        if meta["scalers"][name]:
            learner.scaler.load_state_dict(meta["scalers"][name])
    averaged = with_prefix(tensors, "ema.")
    for k, v in model.named_parameters():
        if k in ema.weights:
            ema.weights[k].copy_(averaged.get(k, v.detach()))
    return meta


def with_prefix(tensors, prefix):
    """The tensors whose names start with the prefix, which is removed."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# --- the files of state/ -------------------------------------------------------------------------------


def write_state(folder, tensors, meta):
    """Write the shards, if there are any, then resume.safetensors, atomically: until then the previous state counts."""
    main = rank_and_world()[0] == 0
    if is_sharded(tensors):
        shards = f"step-{meta['step']:06d}"
        if main:
            shutil.rmtree(folder / shards, ignore_errors=True)  # left by a run that was killed here
        barrier()
        save_shards(folder / shards, tensors)
        tensors, meta = {}, meta | {"shards": shards, "files": len(os.listdir(folder / shards))}
    if main:
        save_tensors(folder / "resume.safetensors", tensors, **meta)
        for old in folder.glob("step-*"):
            if old.name != meta.get("shards"):
                shutil.rmtree(old)


def read_state(folder, model):
    """-> (tensors, sharded as the model is now; metadata)."""
    tensors, meta = load_tensors(folder / "resume.safetensors")
    sharded = {k: v for k, v in model.state_dict().items() if is_sharded({k: v})}
    if not sharded and "shards" not in meta:
        return tensors, meta
    folder, files = folder / meta.get("shards", ""), meta.get("files", 1)
    if len(list(folder.glob("*.safetensors"))) != files:
        raise ValueError(f"{folder} is damaged: it should hold {files} safetensors files")
    return load_shards(folder, sharded), meta


def save_shards(folder, tensors):
    """Every process writes its shards of the tensors into a folder of safetensors files."""
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as e:
        raise OSError(f"cannot write {folder}: {e}") from e


def load_shards(folder, sharded):
    """A folder of safetensors files -> {name: tensor}, DTensors where `sharded` has one of that name.

    sharded: {name: DTensor}; a saved name has a prefix (ema., model/weights.) and may have a suffix (.exp_avg).
    """
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
            warnings.simplefilter("ignore")  # that no_dist means one process: here each process reads its own shards
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        return tensors
    except (dcp.CheckpointException, SafetensorError, OSError) as e:
        raise ValueError(f"{folder} cannot be read as safetensors: {e}") from e
