"""Checkpoints: atomic, safe to read, and clear about what is wrong with them."""

import errno
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from processes import Evil

from minit2i.checkpoint import load_tensors, load_vq, read_config, read_hf, save_model, save_tensors, write_file
from minit2i.collectives import all_gather, all_reduce_sum, gather_objects, rank_and_world
from minit2i.resume import Learner, load_state, save_run
from minit2i.train import EMA, TrainConfig, make_optimizer

ROOT = Path(__file__).parent.parent


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, step=3)

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = "cannot write .*model.safetensors: No space left on device; what was there before is intact"
    with pytest.raises(OSError, match=message):
        save_tensors(path, {"a": torch.zeros(3)})
    tensors, meta = load_tensors(path)
    assert tensors["a"].eq(1).all() and meta == {"step": 3} and os.listdir(tmp_path) == ["model.safetensors"]


def test_float16_weights_stay_finite(tmp_path):
    save_model(tmp_path / "x", {"ema_count": torch.tensor([1e5]), "n": torch.tensor(3)}, {"kind": "vq"}, torch.float16)
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    assert tensors["ema_count"].isfinite().all() and tensors["ema_count"].dtype == torch.float16
    assert tensors["n"].dtype == torch.int64 and read_config(tmp_path / "x", ["kind"]) == {"kind": "vq"}


def test_a_tokenizer_loads_frozen_with_its_hash(vq_run):
    vq = load_vq(vq_run)
    assert re.fullmatch("[0-9a-f]{16}", vq.hash) and not vq.training
    assert not any(w.requires_grad for w in vq.parameters()) and vq.cfg.stride == 8


@pytest.mark.parametrize("wrong", ["a prior", "nothing", "damaged", "cut", "a pickle", "another shape"])
def test_wrong_checkpoints_are_clear_errors(wrong, vq_run, prior_run, tmp_path):
    config, weights = (vq_run / "config.json").read_bytes(), (vq_run / "model.safetensors").read_bytes()
    other = config.replace(b'"n_codes": 32', b'"n_codes": 64')
    files = {"damaged": (b"{", weights), "cut": (config, weights[:5000]), "another shape": (other, weights)}
    files["a pickle"] = config, pickle.dumps(Evil(tmp_path))
    for name, data in zip(("config.json", "model.safetensors"), files.get(wrong, ())):
        (tmp_path / name).write_bytes(data)
    message = {
        "a prior": "is not a tokenizer.*train_vq.py makes one",
        "nothing": "is not a checkpoint folder: no config.json in it",
        "damaged": "config.json is damaged",
        "another shape": "does not fit its config.json",
    }.get(wrong, "cannot be read as safetensors")
    with pytest.raises(ValueError, match=message):
        load_vq(prior_run if wrong == "a prior" else tmp_path)
    assert not (tmp_path / "ran").exists(), "nothing that is read from a checkpoint may run code"


def test_no_source_loads_pickles():
    for source in (*ROOT.glob("*.py"), *ROOT.glob("minit2i/**/*.py")):
        unsafe = r"torch\.load\((?!.*weights_only=True)|\bimport pickle\b|allow_pickle=True"
        assert not re.search(unsafe, source.read_text()), source


def test_hugging_face_shards_are_read_through_their_index(tmp_path):
    save_tensors(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    save_tensors(tmp_path / "two.safetensors", {"b": torch.zeros(2)})
    index = '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    write_file(tmp_path / "model.safetensors.index.json", index)
    assert [name for name, _ in read_hf(tmp_path)] == ["a", "b"]
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read as safetensors, whole or in shards"):
        list(read_hf(tmp_path))


def learner(seed):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = make_optimizer(module, TrainConfig(out=""))
    return Learner(module, optimizer, torch.amp.GradScaler("cpu", enabled=True))


def train_step(learner):
    learner.scaler.scale(learner.module(torch.randn(8, 3)).square().sum()).backward()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad()


def test_pickled_weights_of_others_are_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds pytorch_model.bin, a pickle, .*; convert it to safetensors"):
        list(read_hf(tmp_path))


@pytest.mark.parametrize("text", ["[1, 2]", '{"kind": "vq"}', '{"kind": "vq", "model": []}'])
def test_a_config_of_another_shape_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not the config of a model: it lacks .*model"):
        read_config(tmp_path)


def test_the_state_restores_all_learners(tmp_path):
    """Weights, buffers, moments, scales and averages of a model and a discriminator; a new learner stays fresh."""
    learners, ema = {"model": learner(0), "discriminator": learner(1)}, None
    ema = EMA(learners["model"].module, 0.9)
    for step in range(3):
        for one in learners.values():
            train_step(one)
        ema.update(learners["model"].module, step)
    save_run(tmp_path, {"kind": "vq"}, 3, learners, ema, skipped=[["a", "b"]])
    assert read_config(tmp_path, ["kind"]) == {"kind": "vq", "step": 3}
    assert load_file(tmp_path / "model.safetensors")["0.weight"].equal(ema.weights["0.weight"])

    again = {"model": learner(2), "discriminator": learner(3), "new": learner(4)}
    averages, fresh = EMA(again["model"].module, 0.9), again["new"].module[0].weight.clone()
    meta = load_state(tmp_path, again, averages)
    assert meta["step"] == 3 and meta["skipped"] == [["a", "b"]]
    for step in range(2):  # both continue alike, to the bit
        for one, two in zip(learners.values(), again.values()):
            for x in (one, two):
                torch.manual_seed(step)
                train_step(x)
            assert all(a.equal(b) for a, b in zip(one.module.state_dict().values(), two.module.state_dict().values()))
            assert one.scaler.state_dict() == two.scaler.state_dict()
    assert all(averages.weights[k].equal(v) for k, v in ema.weights.items())
    assert again["new"].module[0].weight.equal(fresh)
    with pytest.raises(ValueError, match="does not fit these flags"):
        wrong = Learner(torch.nn.Linear(2, 2), None, None)
        load_state(tmp_path, {"model": wrong}, EMA(wrong.module, 0))


def test_collectives_without_torch_distributed():
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    assert rank_and_world() == (0, 1) and all_reduce_sum(x) is x and all_gather(x) is x and gather_objects("a") == ["a"]


@pytest.mark.parametrize("text", ["[]", "{}", '{"kind": "vq"}'])
def test_json_that_is_not_the_config_of_a_model_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not the config of a model: it lacks .*model"):
        read_config(tmp_path)
