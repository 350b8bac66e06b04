"""The scripts: end to end, resumed, on two processes, and what users and disks do wrong."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import fork
from safetensors.torch import load_file

import sample
import train_prior
import train_vq
from minit2i import checkpoint, train
from minit2i.data import DataConfig, crop, to_pil
from minit2i.export import export
from minit2i.gpt import GPTConfig
from minit2i.filters import FILTERS
from minit2i.sample import Painter, SampleConfig
from minit2i.scenes import caption, render, scene_at
from minit2i.vq import VQConfig

ROOT = Path(__file__).parent.parent
VQ_FLAGS = (
    "--stride 8 --ch 8 --n_res 1 --n_codes 32 --code_dim 8 --size 32 --batch_size 8 --workers 0 --precision fp32 "
    "--log_every 1 --eval_size 8 --warmup 2".split()
)
PRIOR_FLAGS = (
    "--n_layer 2 --n_head 2 --n_embd 32 --size 32 --batch_size 8 --workers 0 --precision fp32 --log_every 1 "
    "--eval_size 8 --warmup 2 --text_len 16 --vocab_size 320 --dropout 0.1 --mask dalle --block_scale --fp32_logits".split()
)


def call(script, *argv):
    """A script's main in this process."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    old, sys.argv = sys.argv, [script.__name__, *map(str, argv)]
    try:
        script.main()
    finally:
        sys.argv = old
        for s, handler in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(s, handler)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i in range(24):
        scene = scene_at(0, i)
        render(scene, 40).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(caption(scene, np.random.default_rng(i))[0])
    return root


@pytest.fixture(scope="module")
def vq(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "vq"
    call(train_vq, "--data", pictures, "--out", out, "--steps", 8, "--eval_every", 4, *VQ_FLAGS)
    return out


@pytest.fixture(scope="module")
def prior(pictures, vq, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "prior"
    call(
        train_prior,
        "--data",
        pictures,
        "--vq",
        vq,
        "--out",
        out,
        "--cache",
        out.parent / "cache",
        "--steps",
        8,
        "--eval_every",
        4,
        *PRIOR_FLAGS,
    )
    return out


def losses(folder):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in train.read_log(folder / "log.jsonl") if "loss" in r]


def equal(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(v.equal(b[k].to(v.dtype)) for k, v in a.items())


# --- end to end ---


def test_a_run_leaves_what_it_should(vq, prior):
    assert {"config.json", "model.safetensors", "log.jsonl", "loss.png", "reconstructions-000008.png"} <= set(
        os.listdir(vq)
    )
    assert {"config.json", "model.safetensors", "text.model", "vq", "samples-000008.png"} <= set(os.listdir(prior))
    assert Image.open(vq / "loss.png").size[0] > 400
    assert [s for s, _, _ in losses(prior)] == list(range(1, 9))
    keys = set().union(*(r.keys() for r in train.read_log(prior / "log.jsonl")))
    assert {"text_loss", "image_loss", "grad_norm", "tokens_per_s", "val_text_loss", "val_image_loss", "lr"} <= keys
    keys = set().union(*(r.keys() for r in train.read_log(vq / "log.jsonl")))
    assert {"psnr", "perplexity", "images_per_s", "val_psnr", "code_use"} <= keys


def test_a_prior_folder_is_all_that_sampling_needs(prior, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("config.json", "model.safetensors", "text.model"):
        (moved / name).write_bytes((prior / name).read_bytes())
    (moved / "vq").symlink_to(prior / "vq")
    call(sample, "--model", moved, "--prompt", "a red circle", "--n", 2, "--out", tmp_path / "a.png", "--device", "cpu")
    im = Image.open(tmp_path / "a.png")
    assert im.size == (66, 32) and im.text["prompt"] == "a red circle"
    assert (
        json.loads(im.text["settings"])["cfg_scale"] == SampleConfig().cfg_scale
        and im.text["model"] == Painter(prior).hash
    )


def test_many_prompts_as_single_pictures_that_can_be_drawn_again(prior, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\n\u0645\u0631\u062d\u0628\u0627 \U0001f600\n" + "long " * 99 + "\n")
    call(
        sample,
        "--model",
        prior,
        "--prompts",
        tmp_path / "p.txt",
        "--n",
        2,
        "--out",
        tmp_path / "many",
        "--batch",
        3,
        "--device",
        "cpu",
    )
    files = sorted((tmp_path / "many").iterdir())
    assert len(files) == 6 and files[1].name == "00000-a-red-circle-1.png"
    seed = json.loads(Image.open(files[1]).text["settings"])["seed"]
    call(
        sample,
        "--model",
        prior,
        "--prompt",
        "a red circle",
        "--n",
        1,
        "--seed",
        seed,
        "--out",
        tmp_path / "again.png",
        "--device",
        "cpu",
    )
    assert np.array_equal(np.asarray(Image.open(files[1])), np.asarray(Image.open(tmp_path / "again.png")))


def test_an_exported_prior_draws_from_half_the_bytes(prior, tmp_path):
    export(prior, tmp_path / "small")
    assert not (tmp_path / "small" / "state").exists()
    sizes = [(f / "model.safetensors").stat().st_size for f in (tmp_path / "small", prior)]
    assert sizes[0] < 0.6 * sizes[1]
    assert str(tmp_path.parent) not in (tmp_path / "small" / "config.json").read_text()
    cfg = SampleConfig(n=2)
    small, whole = (Painter(f).codes(["a red circle"], cfg) for f in (tmp_path / "small", prior))
    assert small.shape == whole.shape and small.eq(whole).float().mean() > 0.5
    with pytest.raises(ValueError, match="whose float32 weights would be lost"):
        export(prior, prior)
    checkpoint.save_model(tmp_path / "x", {"ema_count": torch.tensor([1e5])}, {}, torch.float16)
    assert load_file(tmp_path / "x" / "model.safetensors")["ema_count"].isfinite()


def test_finishing_a_picture_keeps_its_first_rows_of_codes(prior, pictures, tmp_path):
    out = tmp_path / "finished.png"
    call(
        sample,
        "--model",
        prior,
        "--prompt",
        "",
        "--image",
        pictures / "0.png",
        "--keep_rows",
        2,
        "--out",
        out,
        "--n",
        1,
    )
    painter = Painter(prior)
    codes = painter.vq.encode(crop(Image.open(pictures / "0.png").convert("RGB"), (32, 32))[None])
    codes[:, 2:] = -1
    drawn = painter.codes([""], SampleConfig(n=1), codes)
    assert drawn[:, :2].equal(codes[:, :2]) and (drawn >= 0).all()
    assert np.array_equal(np.asarray(to_pil(painter.images(drawn)[0])), np.asarray(Image.open(out)))


def test_oblong_pictures_go_all_the_way(pictures, tmp_path):
    oblong = ["--size", "32x16"]
    call(train_vq, "--data", pictures, "--out", tmp_path / "vq", "--steps", 2, *VQ_FLAGS, *oblong)
    call(
        train_prior,
        "--data",
        pictures,
        "--vq",
        tmp_path / "vq",
        "--out",
        tmp_path / "prior",
        "--cache",
        tmp_path / "c",
        "--steps",
        2,
        *PRIOR_FLAGS,
        *oblong,
        "--crops",
        2,
        "--resize",
        40,
    )
    call(
        sample, "--model", tmp_path / "prior", "--prompt", "", "--n", 1, "--out", tmp_path / "o.png", "--device", "cpu"
    )
    assert Image.open(tmp_path / "o.png").size == (16, 32)


def test_the_second_run_reads_the_code_cache(prior, vq, pictures, monkeypatch):
    monkeypatch.setattr(train_prior.CodeCache, "build", lambda *a, **k: pytest.fail("encoded again"))
    call(
        train_prior,
        "--data",
        pictures,
        "--vq",
        vq,
        "--out",
        prior.parent / "second",
        "--cache",
        prior.parent / "cache",
        "--steps",
        1,
        *PRIOR_FLAGS,
    )


# --- resuming ---


def stop_at(monkeypatch, step):
    """As if SIGTERM came during that step."""

    class Stop:
        def __init__(self, processes, every):
            pass

        def asked(self, now):
            return now == step

    monkeypatch.setattr(train, "Stop", Stop)


@pytest.mark.parametrize("which", ["vq", "prior"])
def test_a_stopped_run_resumes_with_bit_equal_losses(which, vq, prior, pictures, tmp_path, monkeypatch):
    script, whole = (train_vq, vq) if which == "vq" else (train_prior, prior)
    flags = VQ_FLAGS if which == "vq" else [*PRIOR_FLAGS, "--vq", vq, "--cache", prior.parent / "cache"]
    out = tmp_path / which
    with monkeypatch.context() as m:
        stop_at(m, 5)
        call(script, "--data", pictures, "--out", out, "--steps", 8, "--eval_every", 4, *flags)
    assert [s for s, _, _ in losses(out)] == [1, 2, 3, 4, 5]
    with open(out / "log.jsonl", "a") as f:  # what a run killed later would leave
        f.write('{"step": 6, "loss": 99.0, "grad_norm": 0.0}\n{"step": 7, "lo')
    call(script, "--resume", "--out", out)
    assert losses(out) == losses(whole)
    assert equal(out / "model.safetensors", whole / "model.safetensors")
    assert equal(out / "state" / "resume.safetensors", whole / "state" / "resume.safetensors")


def test_a_stopped_run_under_muon_resumes_with_bit_equal_losses(prior, vq, pictures, tmp_path, monkeypatch):
    flags = [*PRIOR_FLAGS, "--data", pictures, "--vq", vq, "--cache", prior.parent / "cache", "--optimizer", "muon"]
    call(train_prior, *flags, "--out", tmp_path / "whole", "--steps", 6)
    with monkeypatch.context() as m:
        stop_at(m, 3)
        call(train_prior, *flags, "--out", tmp_path / "run", "--steps", 6)
    with pytest.raises(ValueError, match="--resume cannot change --optimizer"):
        call(train_prior, "--resume", "--out", tmp_path / "run", "--optimizer", "adamw")
    call(train_prior, "--resume", "--out", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    state = checkpoint.load_tensors(tmp_path / "run" / "state" / "resume.safetensors")[0]
    kept = {k for k in state if k.startswith("optimizer.") and k.endswith(".momentum_buffer")}
    assert kept and all("blocks." in k for k in kept) and "optimizer.embedding.weight.exp_avg" in state
    assert equal(tmp_path / "run" / "model.safetensors", tmp_path / "whole" / "model.safetensors")


@pytest.mark.parametrize("which", ["vq", "prior"])
def test_resuming_a_finished_run_is_no_fault(which, vq, prior):
    folder = {"vq": vq, "prior": prior}[which]
    before = (folder / "model.safetensors").read_bytes()
    call({"vq": train_vq, "prior": train_prior}[which], "--resume", "--out", folder)
    assert (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="holds a run of the other stage"):
        call({"vq": train_prior, "prior": train_vq}[which], "--resume", "--out", folder)


@pytest.mark.parametrize("which", ["vq", "prior"])
def test_evaluating_more_often_changes_no_training_loss(which, vq, prior, pictures, tmp_path):
    script, whole = (train_vq, vq) if which == "vq" else (train_prior, prior)
    flags = VQ_FLAGS if which == "vq" else [*PRIOR_FLAGS, "--vq", vq, "--cache", prior.parent / "cache"]
    call(
        script,
        "--data",
        pictures,
        "--out",
        tmp_path / "run",
        "--steps",
        8,
        "--eval_every",
        1,
        "--save_every",
        3,
        *flags,
    )
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.parametrize("which", ["vq", "prior"])
def test_a_run_of_an_older_version_resumes_with_defaults(which, vq, prior, tmp_path):
    """Its config.json lacks the flags that came since."""
    script, whole = (train_vq, vq) if which == "vq" else (train_prior, prior)
    out = shutil.copytree(whole, tmp_path / which)
    config = checkpoint.read_config(out)
    for part, name in (("model", "l2_norm" if which == "vq" else "qk_norm"), ("train", "clip"), ("data", "flip")):
        del config[part][name]
    (out / "config.json").write_text(json.dumps(config))
    call(script, "--resume", "--out", out, "--steps", 9)
    assert losses(out)[-1][0] == 9 and checkpoint.read_config(out)["model"] == checkpoint.read_config(whole)["model"]
    flag = "--l2_norm" if which == "vq" else "--no-qk_norm"
    with pytest.raises(ValueError, match="cannot change the model"):
        call(script, "--resume", "--out", out, flag)


def test_finetuning_starts_from_another_folders_model(vq, prior, pictures, tmp_path):
    """No model flag is retyped; tokenizer and text model are the other's; the optimizer is fresh."""
    small = tmp_path / "small"
    export(prior, small)
    flags = "--batch_size 8 --workers 0 --precision fp32 --log_every 1 --eval_size 8 --warmup 2 --steps 2".split()
    flags += ["--data", pictures, "--cache", tmp_path / "cache"]
    call(train_prior, "--init", small, "--vq", small / "vq", "--out", tmp_path / "fine", "--lr", 0, *flags)
    assert equal(tmp_path / "fine" / "model.safetensors", small / "model.safetensors")
    assert (tmp_path / "fine" / "text.model").read_bytes() == (prior / "text.model").read_bytes()
    with pytest.raises(ValueError, match="another tokenizer than .*; use --vq .*small/vq"):
        call(train_prior, "--init", small, "--vq", vq, "--out", tmp_path / "x", *flags)
    with pytest.raises(ValueError, match="does not fit its config.json, or these flags"):
        call(train_prior, "--init", prior, "--vq", vq, "--out", tmp_path / "y", "--n_layer", 3, *flags)
    with pytest.raises(ValueError, match="other stage"):
        call(train_prior, "--init", vq, "--vq", vq, "--out", tmp_path / "z", *flags)
    call(train_vq, "--init", vq, "--out", tmp_path / "vq", "--lr", 0, "--decay", 1, "--restart", 0, *flags[:-2])
    assert equal(tmp_path / "vq" / "model.safetensors", vq / "model.safetensors")


def test_workers_change_nothing(vq, pictures, tmp_path):
    call(
        train_vq,
        "--data",
        pictures,
        "--out",
        tmp_path / "run",
        "--steps",
        8,
        "--eval_every",
        4,
        *VQ_FLAGS,
        "--workers",
        2,
    )
    assert losses(tmp_path / "run") == losses(vq)


def test_sigterm_saves_before_leaving(pictures, tmp_path):
    run = subprocess.Popen(
        [
            sys.executable,
            ROOT / "train_vq.py",
            "--data",
            pictures,
            "--out",
            tmp_path / "run",
            "--steps",
            "100000",
            *VQ_FLAGS,
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in run.stdout:
        if "from step 0" in line:
            break
    while not (tmp_path / "run" / "log.jsonl").exists() or len(train.read_log(tmp_path / "run" / "log.jsonl")) < 3:
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=30)
    step = int(re.search(r"holds step (\d+)", out)[1])
    assert run.returncode == 0 and step >= 3
    _, meta = checkpoint.load_tensors(tmp_path / "run" / "state" / "resume.safetensors")
    assert meta["step"] == step == losses(tmp_path / "run")[-1][0]


def test_two_processes_equal_one(vq, pictures, tmp_path):
    """DDP, summed code statistics, and accumulation on top."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train_vq.py", "--data", pictures, "--out", tmp_path / "two", "--steps", "8", "--accum", "2"]
    subprocess.run(
        [*command, *VQ_FLAGS], cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert np.allclose(losses(tmp_path / "two"), losses(vq), rtol=2e-3)
    a, b = load_file(tmp_path / "two" / "model.safetensors"), load_file(vq / "model.safetensors")
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


def test_a_fixed_codebook_is_set_after_its_free_steps(pictures, tmp_path, monkeypatch):
    """The same to the last bit if a run is stopped just before or after, and on two processes; then it stays."""
    flags = ["--data", pictures, *VQ_FLAGS, "--quantizer", "fixed", "--free_steps", 3, "--steps", 6]
    call(train_vq, *flags, "--out", tmp_path / "one")
    fork(2, call, train_vq, *flags, "--out", tmp_path / "two")
    codebooks = []
    for step in (3, 4, -1):
        stop_at(monkeypatch, step)
        call(train_vq, "--resume", *flags, "--out", tmp_path / "cut")
        codebooks.append(load_file(tmp_path / "cut" / "model.safetensors")["quantizer.codebook"])
    assert not codebooks[0].equal(codebooks[1]) and codebooks[1].equal(codebooks[2])
    assert losses(tmp_path / "cut") == losses(tmp_path / "one")
    assert equal(tmp_path / "cut" / "model.safetensors", tmp_path / "one" / "model.safetensors")
    assert np.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-3)
    call(train_vq, *flags, "--init", tmp_path / "one", "--out", tmp_path / "fine")
    assert load_file(tmp_path / "fine" / "model.safetensors")["quantizer.codebook"].equal(codebooks[2])
    config = json.loads((tmp_path / "fine" / "config.json").read_text())
    assert config["model"]["free_steps"] == 0, "its codebook is set already"


def test_a_run_goes_on_with_other_processes_and_another_strategy(vq, prior, pictures, tmp_path, monkeypatch):
    """Two replicas, then four shards, then one process: the losses and weights of one process all the way."""
    flags = ["--data", pictures, "--vq", vq, "--cache", prior.parent / "cache", *PRIOR_FLAGS, "--dropout", 0]
    flags += ["--eval_size", 5, "--steps", 10, "--ema", 0.9]
    call(train_prior, *flags, "--out", tmp_path / "one")
    out = tmp_path / "many"
    stop_at(monkeypatch, 3)
    fork(2, call, train_prior, *flags, "--out", out, "--accum", 2)
    stop_at(monkeypatch, 5)
    (out / "state" / "step-000005").mkdir()
    (out / "state" / "step-000005" / "left-by-a-killed-run.safetensors").write_text("")
    fork(
        4,
        call,
        train_prior,
        "--resume",
        "--out",
        out,
        "--strategy",
        "fsdp",
        "--checkpoint_activations",
        "--eval_every",
        4,
    )
    assert checkpoint.load_tensors(out / "state" / "resume.safetensors")[0] == {}
    assert len(os.listdir(out / "state" / "step-000005")) == 4
    bad = next((shutil.copytree(out, tmp_path / "bad") / "state" / "step-000005").iterdir())
    for path in (bad, bad.with_name(".metadata")):  # where torch keeps pickles
        path.write_bytes(pickle.dumps(Evil(tmp_path)))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        call(train_prior, "--resume", "--out", tmp_path / "bad")
    bad.unlink()
    with pytest.raises(ValueError, match="is damaged: it should hold 4 safetensors files"):
        call(train_prior, "--resume", "--out", tmp_path / "bad")
    assert not (tmp_path / "ran").exists()
    stop_at(monkeypatch, 7)
    fork(2, call, train_prior, "--resume", "--out", out, "--accum", 1)
    stop_at(monkeypatch, -1)
    call(train_prior, "--resume", "--out", out)
    assert not list((out / "state").glob("step-*"))
    assert np.allclose(losses(out), losses(tmp_path / "one"), rtol=1e-5)
    for name in ("model.safetensors", "state/resume.safetensors"):
        a, b = load_file(out / name), load_file(tmp_path / "one" / name)
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


# --- users' faults and the world's ---


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "30"], "not a multiple of the tokenizer's stride 8; use 24 or 32"),
        (["--batch_size", "7", "--accum", "2"], "batch_size 7 does not divide into 2 parts"),
        (["--data", "nowhere"], "neither a folder nor a tar shard"),
        (["--quantizer", "magic"], "quantizer 'magic' is not known"),
        (["--quantizer", "fixed", "--free_steps", "1"], "free_steps 1 leaves none of 1 steps with a codebook"),
        (["--log_every", "0"], "log_every 0 is less than 1"),
        (["--steps", "-1"], "steps -1 is less than 0"),
        (["--clip", "-1"], "clip -1.0 is less than 0"),  # it would turn the gradient round
        (["--val_fraction", "2"], "val_fraction 2.0 is no part in [0, 1)"),
        (["--device", "tpu"], "device 'tpu' is not known or not here"),
    ],
)
def test_bad_flags_are_clear_errors(flags, message, pictures, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(train_vq, "--data", pictures, "--out", tmp_path / "x", "--steps", 1, *VQ_FLAGS, *flags)


def test_a_device_that_is_not_here_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device 'cuda' is not known or not here; use auto, or"):
        train.pick_device("cuda")


@pytest.mark.parametrize("saving", [True, False])
@pytest.mark.parametrize("which", ["vq", "prior"])
def test_a_training_that_diverges_ends_and_keeps_what_was_saved(which, saving, vq, prior, tmp_path):
    out = shutil.copytree({"vq": vq, "prior": prior}[which], tmp_path / "run")
    script, every = {"vq": train_vq, "prior": train_prior}[which], ("--save_every", "--eval_every")
    flags = "--lr", "inf", "--warmup", 0, "--clip", 0, "--steps", 12, every[saving], 100, every[not saving], 11
    with pytest.raises(ValueError, match="the training has diverged before step 11"):
        call(script, "--resume", "--out", out, *flags)
    assert equal(out / "model.safetensors", {"vq": vq, "prior": prior}[which] / "model.safetensors")


def test_a_mask_that_shows_the_targets_is_a_clear_error(pictures, vq, prior, tmp_path):
    flags = ["--data", pictures, "--vq", vq, "--cache", prior.parent / "cache", "--steps", 1, *PRIOR_FLAGS]
    for mask, message in (("prefix", "it needs --text_weight 0"), ("none", "use a causal mask, or train a masked")):
        with pytest.raises(ValueError, match=message):
            call(train_prior, *flags, "--mask", mask, "--out", tmp_path / mask)


def test_a_run_is_not_overwritten_nor_its_model_changed(vq, pictures):
    before = (vq / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        call(train_vq, "--data", pictures, "--out", vq, *VQ_FLAGS)
    with pytest.raises(ValueError, match=r"cannot change the model: --n_codes 64 \(the run has 32\)"):
        call(train_vq, "--resume", "--out", vq, "--n_codes", 64)
    assert (vq / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("wrong", ["vq as prior", "prior as vq", "nothing", "cut"])
def test_wrong_checkpoints_are_clear_errors(wrong, vq, prior, tmp_path):
    if wrong == "vq as prior":
        with pytest.raises(ValueError, match="is not a prior"):
            Painter(vq)
    elif wrong == "prior as vq":
        with pytest.raises(ValueError, match="is not a tokenizer"):
            train_prior.load_vq(prior)
    elif wrong == "nothing":
        with pytest.raises(ValueError, match="no config.json in it"):
            Painter(tmp_path)
    else:
        (tmp_path / "config.json").write_bytes((vq / "config.json").read_bytes())
        (tmp_path / "model.safetensors").write_bytes((vq / "model.safetensors").read_bytes()[:5000])
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            train_prior.load_vq(tmp_path)


class Evil:
    """Runs code when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/ran",)


def test_nothing_read_from_a_checkpoint_can_run_code(vq, tmp_path):
    (tmp_path / "config.json").write_bytes((vq / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Evil(tmp_path)))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        train_prior.load_vq(tmp_path)
    assert not (tmp_path / "ran").exists()
    for source in (*ROOT.glob("*.py"), *ROOT.glob("minit2i/*.py")):
        assert not re.search(
            r"torch\.load\((?!.*weights_only=True)|\bpickle\b|allow_pickle=True", source.read_text()
        ), source


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    checkpoint.save_tensors(path, {"a": torch.ones(3)})

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match="cannot write .*model.safetensors: No space left on device; what was there before is intact"
    ):
        checkpoint.save_tensors(path, {"a": torch.zeros(3)})
    assert checkpoint.load_tensors(path)[0]["a"].eq(1).all() and os.listdir(tmp_path) == ["model.safetensors"]


def test_an_unwritable_folder_is_a_clear_error(pictures, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = subprocess.run(
        [sys.executable, ROOT / "train_vq.py", "--data", pictures, "--out", tmp_path / "file" / "run", *VQ_FLAGS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "error: " in run.stderr and "Traceback" not in run.stderr


# --- configs ---


@pytest.mark.parametrize(
    "config", [VQConfig, GPTConfig, DataConfig, SampleConfig, train_vq.VQTrainConfig, train_prior.PriorTrainConfig]
)
def test_every_config_field_is_read_somewhere(config):
    """A flag without effect is the commonest fault of training scripts."""
    source = "".join(p.read_text() for p in (*ROOT.glob("*.py"), *ROOT.glob("minit2i/*.py")))
    filters = [name for name, _ in FILTERS]
    for f in fields(config):
        assert re.search(rf"\b(\w*cfg|self|painter\.vq\.cfg)\.{f.name}\b", source) or f.name in filters, f.name


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        call(train_prior, "--help")
    text = capsys.readouterr().out
    for config in (GPTConfig, DataConfig, train_prior.PriorTrainConfig):
        for f in fields(config):
            assert f"--{f.name}" in text or f.type in (int, float)  # plain fields follow from other files


def test_learning_rate():
    cfg = train.TrainConfig(out="", lr=1.0, warmup=10, steps=110, min_lr=0.1)
    rates = [train.lr_at(s, cfg) for s in range(111)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and abs(rates[60] - 0.55) < 1e-9 and abs(rates[110] - 0.1) < 1e-9
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_muon_moves_all_directions_of_a_matrix_alike():
    """Its step is lr * 0.2 sqrt(the longer side) along U V^T of the gradient U S V^T; the rest takes AdamW's step."""
    blocks = torch.nn.ModuleDict(
        {"blocks": torch.nn.ModuleList([torch.nn.Linear(6, 9)]), "head": torch.nn.Linear(6, 9)}
    )
    matrix, others = blocks["blocks"][0].weight, [blocks["blocks"][0].bias, *blocks["head"].parameters()]
    before = {w: w.detach().clone() for w in blocks.parameters()}
    u, _, vt = torch.linalg.svd(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    for w in blocks.parameters():
        w.grad = torch.ones_like(w)
    matrix.grad = u @ torch.diag(torch.logspace(0, -1, 6)) @ vt  # tenfold between the first direction and the last
    optimizer = train.make_optimizer(blocks, train.TrainConfig(out="", lr=1e-2, weight_decay=0.5), muon=True)
    optimizer.step()
    moved = (before[matrix] * (1 - 1e-2 * 0.5) - matrix) / (1e-2 * 0.2 * 9**0.5)
    along = u.T @ moved.detach() @ vt.T
    assert ((along.diagonal() > 0.6) & (along.diagonal() < 1.3)).all()  # what five Newton-Schulz steps leave
    assert (along - along.diagonal().diag()).abs().max() < 0.02
    decay = [1 - 1e-2 * 0.5 * (w.dim() == 2) for w in others]
    assert all(torch.allclose(before[w] * d - w, torch.full_like(w, 1e-2), atol=1e-6) for w, d in zip(others, decay))
    assert set(optimizer.state) == set(blocks.parameters()) and len(optimizer.param_groups) == 3


def test_ema_equals_a_loop():
    model = torch.nn.Linear(3, 2)
    ema, expected = train.EMA(model, 0.5), model.weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    assert torch.allclose(ema.weights["weight"], expected)
    raw = model.weight.detach().clone()
    with ema.applied(model):
        assert torch.allclose(model.weight, expected)
    assert model.weight.equal(raw)
