"""Both training scripts end to end: what a run leaves, resuming, several processes, and errors."""

import json
import os
import pickle
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import COMMON_FLAGS, PRIOR_FLAGS, VQ_FLAGS
from PIL import Image
from processes import Evil, call, fork, losses
from safetensors.torch import load_file

import train_prior
import train_vq
from minit2i import resume, tokens, train
from minit2i.checkpoint import load_tensors, read_config
from minit2i.export import export
from minit2i.plot import read_log


@pytest.fixture
def runs(vq_run, prior_run, images):
    """{name: (script, flags of another run like the fixture's, the fixture's folder)}."""
    prior_flags = f"--data {images} --vq {vq_run} --cache {prior_run.parent / 'cache'} {PRIOR_FLAGS}"
    return {"vq": (train_vq, f"--data {images} {VQ_FLAGS}", vq_run), "prior": (train_prior, prior_flags, prior_run)}


def equal(a, b):
    """Whether two safetensors files hold the same tensors, up to their dtypes."""
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(v.equal(b[k].to(v.dtype)) for k, v in a.items())


def stop_at(monkeypatch, step):
    """Stop at a step as if SIGTERM had come, in forked processes too."""

    class Stop:
        def __init__(self, procs, every):
            pass

        def asked(self, now):
            return now == step

    monkeypatch.setattr(train, "Stop", Stop)


both = pytest.mark.parametrize("which", ["vq", "prior"])

# --- what a run leaves ---


def test_a_run_leaves_checkpoint_log_and_images(vq_run, prior_run):
    files = {"config.json", "model.safetensors", "log.jsonl", "loss.png", "state"}
    assert files | {"reconstructions-000004.png", "reconstructions-000008.png"} <= set(os.listdir(vq_run))
    assert files | {"samples-000004.png", "samples-000008.png", "text.model", "vq"} <= set(os.listdir(prior_run))
    assert Image.open(vq_run / "loss.png").size[0] > 400
    assert [s for s, _, _ in losses(prior_run)] == list(range(1, 9))
    keys = set().union(*(r.keys() for r in read_log(prior_run / "log.jsonl")))
    assert {"text_loss", "image_loss", "grad_norm", "tokens_per_s", "val_text_loss", "val_image_loss", "lr"} <= keys
    keys = set().union(*(r.keys() for r in read_log(vq_run / "log.jsonl")))
    assert {"psnr", "perplexity", "images_per_s", "val_psnr", "code_use"} <= keys
    for folder, kind in ((vq_run, "vq"), (prior_run, "prior")):
        config = read_config(folder)
        assert list(config)[:5] == ["kind", "model", "data", "train", "step"]
        assert (config["kind"], config["step"]) == (kind, 8)


@both
def test_a_dry_run_prints_the_settings_and_writes_nothing(which, runs, tmp_path, capsys):
    script, flags, _ = runs[which]
    call(script, f"{flags} --out {tmp_path / 'run'} --dry_run")
    text = capsys.readouterr().out
    assert "--batch_size 8" in text and " M parameters" in text and not (tmp_path / "run").exists()


def test_the_second_run_reads_the_code_cache(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "encode", lambda *a, **k: pytest.fail("encoded again"))
    script, flags, _ = runs["prior"]
    call(script, f"{flags} --out {tmp_path / 'run'} --steps 1")


@pytest.mark.slow
def test_oblong_images_train_both_stages(images, tmp_path):
    oblong = f"--image_size 32x16 --steps 2 --data {images}"
    call(train_vq, f"{VQ_FLAGS} {oblong} --out {tmp_path / 'vq'}")
    flags = f"--vq {tmp_path / 'vq'} --cache {tmp_path / 'cache'} --crops 2 --resize 40"
    call(train_prior, f"{PRIOR_FLAGS} {oblong} {flags} --out {tmp_path / 'prior'}")
    model = read_config(tmp_path / "prior")["model"]
    assert (model["grid_h"], model["grid_w"]) == (4, 2)


# --- resuming ---


@both
def test_a_stopped_run_resumes_with_bit_equal_losses(which, runs, tmp_path, monkeypatch):
    script, flags, whole = runs[which]
    out = tmp_path / which
    with monkeypatch.context() as m:
        stop_at(m, 5)
        call(script, f"{flags} --out {out} --steps 8 --eval_every 4")
    assert [s for s, _, _ in losses(out)] == [1, 2, 3, 4, 5]
    with open(out / "log.jsonl", "a") as f:  # a run that was killed later leaves lines past its checkpoint
        f.write('{"step": 6, "loss": 99.0, "grad_norm": 0.0}\n{"step": 7, "lo')
    call(script, f"--resume --out {out}")
    assert losses(out) == losses(whole)
    assert equal(out / "model.safetensors", whole / "model.safetensors")
    assert equal(out / "state" / "resume.safetensors", whole / "state" / "resume.safetensors")


@pytest.mark.slow
def test_a_run_with_muon_resumes_with_bit_equal_losses(runs, tmp_path, monkeypatch):
    script, flags, _ = runs["prior"]
    flags = f"{flags} --optimizer muon --steps 6"
    call(script, f"{flags} --out {tmp_path / 'whole'}")
    with monkeypatch.context() as m:
        stop_at(m, 3)
        call(script, f"{flags} --out {tmp_path / 'run'}")
    with pytest.raises(ValueError, match="--resume cannot change --optimizer"):
        call(script, f"--resume --out {tmp_path / 'run'} --optimizer adamw")
    call(script, f"--resume --out {tmp_path / 'run'}")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    state = load_tensors(tmp_path / "run" / "state" / "resume.safetensors")[0]
    kept = {k for k in state if k.startswith("model/optimizer.") and k.endswith(".momentum_buffer")}
    assert kept and all("blocks." in k for k in kept)
    assert equal(tmp_path / "run" / "model.safetensors", tmp_path / "whole" / "model.safetensors")


def test_sigterm_saves_before_leaving(runs, tmp_path, monkeypatch):
    script, flags, whole = runs["vq"]
    seed_step = script.seed_step

    def kill_in_step_3(seed, step, rank):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        seed_step(seed, step, rank)

    monkeypatch.setattr(script, "seed_step", kill_in_step_3)
    call(script, f"{flags} --out {tmp_path / 'run'} --steps 8")
    _, meta = load_tensors(tmp_path / "run" / "state" / "resume.safetensors")
    assert meta["step"] == 4 and [s for s, _, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]


@both
def test_resuming_a_finished_run_changes_nothing(which, runs):
    script, _, folder = runs[which]
    before = (folder / "model.safetensors").read_bytes()
    call(script, f"--resume --out {folder}")
    assert (folder / "model.safetensors").read_bytes() == before
    other = {"vq": train_prior, "prior": train_vq}[which]
    with pytest.raises(ValueError, match="holds a run of the other stage"):
        call(other, f"--resume --out {folder}")


@both
def test_evaluating_more_often_changes_no_training_loss(which, runs, tmp_path):
    script, flags, whole = runs[which]
    call(script, f"{flags} --out {tmp_path / 'run'} --steps 4 --eval_every 1")
    call(script, f"{flags} --out {tmp_path / 'rare'} --steps 4 --eval_every 9")
    assert losses(tmp_path / "run") == losses(tmp_path / "rare")


@pytest.mark.slow
def test_workers_change_nothing(runs, tmp_path):
    for which, (script, flags, whole) in runs.items():
        call(script, f"{flags} --out {tmp_path / which} --steps 8 --eval_every 4 --workers 2")
        assert losses(tmp_path / which) == losses(whole)


def test_a_run_is_not_overwritten_nor_its_model_changed(vq_run, runs):
    before = (vq_run / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        call(train_vq, f"{runs['vq'][1]} --out {vq_run}")
    with pytest.raises(ValueError, match=r"cannot change the model: --n_codes 64 \(the run has 32\)"):
        call(train_vq, f"--resume --out {vq_run} --n_codes 64")
    assert (vq_run / "model.safetensors").read_bytes() == before


# --- finetuning ---


def test_finetuning_starts_from_another_folders_model(vq_run, prior_run, images, tmp_path):
    """No model flag is retyped; tokenizer and text model are the other's; the optimizer is fresh."""
    small, flags = tmp_path / "small", f"{COMMON_FLAGS} --steps 2 --lr 1e-30 --data {images}"
    export(prior_run, small)
    with pytest.raises(ValueError, match="holds a model that cannot be resumed; use --init"):
        call(train_prior, f"--out {small} --resume --vq {small / 'vq'} {flags}")
    prior_flags = f"{flags} --cache {tmp_path / 'cache'}"
    call(train_prior, f"--init {small} --vq {small / 'vq'} --out {tmp_path / 'fine'} {prior_flags}")
    assert equal(tmp_path / "fine" / "model.safetensors", small / "model.safetensors")
    assert (tmp_path / "fine" / "text.model").read_bytes() == (prior_run / "text.model").read_bytes()
    with pytest.raises(ValueError, match="another tokenizer than .*; use --vq .*small/vq"):
        call(train_prior, f"--init {small} --vq {vq_run} --out {tmp_path / 'x'} {prior_flags}")
    with pytest.raises(ValueError, match="does not fit its config.json, or these flags"):
        call(train_prior, f"--init {prior_run} --vq {vq_run} --out {tmp_path / 'y'} --n_layer 3 {prior_flags}")
    with pytest.raises(ValueError, match="other stage"):
        call(train_prior, f"--init {vq_run} --vq {vq_run} --out {tmp_path / 'z'} {prior_flags}")
    call(train_vq, f"--init {vq_run} --out {tmp_path / 'vq'} --decay 1 --restart 0 {flags}")
    assert equal(tmp_path / "vq" / "model.safetensors", vq_run / "model.safetensors")


# --- several processes ---


def test_two_processes_match_one(runs, tmp_path):
    """DDP, all-reduced codebook statistics, and accumulation on top."""
    script, flags, one = runs["vq"]
    fork(2, call, script, f"{flags} --out {tmp_path / 'two'} --steps 8 --eval_every 4 --accum 2")
    assert np.allclose(losses(tmp_path / "two"), losses(one), rtol=2e-3)
    a, b = load_file(tmp_path / "two" / "model.safetensors"), load_file(one / "model.safetensors")
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


@pytest.mark.slow
def test_a_fixed_codebook_is_set_after_its_free_steps(images, tmp_path, monkeypatch):
    """Bit-equal if a run is stopped just before or after, and the same on two processes; then it stays."""
    flags = f"--data {images} {VQ_FLAGS} --quantizer fixed --free_steps 3 --steps 6"
    call(train_vq, f"{flags} --out {tmp_path / 'one'}")
    fork(2, call, train_vq, f"{flags} --out {tmp_path / 'two'}")
    codebooks = []
    for step in (3, 4, -1):
        stop_at(monkeypatch, step)
        call(train_vq, f"--resume {flags} --out {tmp_path / 'cut'}")
        codebooks.append(load_file(tmp_path / "cut" / "model.safetensors")["quantizer.codebook"])
    assert not codebooks[0].equal(codebooks[1]) and codebooks[1].equal(codebooks[2])
    assert losses(tmp_path / "cut") == losses(tmp_path / "one")
    assert equal(tmp_path / "cut" / "model.safetensors", tmp_path / "one" / "model.safetensors")
    assert np.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-3)
    call(train_vq, f"{flags} --init {tmp_path / 'one'} --out {tmp_path / 'fine'}")
    assert load_file(tmp_path / "fine" / "model.safetensors")["quantizer.codebook"].equal(codebooks[2])


@pytest.mark.slow
def test_a_run_continues_on_other_processes_with_another_strategy(runs, tmp_path, monkeypatch):
    """Two replicas, then four shards, then two, then one process: losses and weights as on one process throughout."""
    script, flags, _ = runs["prior"]
    flags = f"{flags} --dropout 0 --steps 10 --ema 0.9"
    call(script, f"{flags} --out {tmp_path / 'one'}")
    out = tmp_path / "many"
    stop_at(monkeypatch, 3)
    fork(2, call, script, f"{flags} --out {out} --accum 2")
    stop_at(monkeypatch, 5)
    (out / "state" / "step-000005").mkdir()
    (out / "state" / "step-000005" / "left-by-a-killed-run.safetensors").write_text("")
    resume = f"--resume --out {out}"
    fork(4, call, script, f"{resume} --strategy fsdp --checkpoint_activations --eval_every 4")
    assert load_tensors(out / "state" / "resume.safetensors")[0] == {}
    assert len(os.listdir(out / "state" / "step-000005")) == 4
    bad = next((shutil.copytree(out, tmp_path / "bad") / "state" / "step-000005").iterdir())
    for path in (bad, bad.with_name(".metadata")):  # where torch keeps pickles
        path.write_bytes(pickle.dumps(Evil(tmp_path)))
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        call(script, f"--resume --out {tmp_path / 'bad'}")
    bad.unlink()
    with pytest.raises(ValueError, match="is damaged: it should hold 4 safetensors files"):
        call(script, f"--resume --out {tmp_path / 'bad'}")
    assert not (tmp_path / "ran").exists()
    stop_at(monkeypatch, 7)
    fork(2, call, script, f"{resume} --accum 1")
    stop_at(monkeypatch, -1)
    call(script, resume)
    assert not list((out / "state").glob("step-*"))
    assert np.allclose(losses(out), losses(tmp_path / "one"), rtol=1e-5)
    for name in ("model.safetensors", "state/resume.safetensors"):
        a, b = load_file(out / name), load_file(tmp_path / "one" / name)
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


# --- errors ---


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image_size 30", "not a multiple of the tokenizer's stride 8; use 24 or 32"),
        ("--data nowhere", "neither a folder nor a tar shard"),
        ("--quantizer magic", "quantizer 'magic' is not known"),
        ("--quantizer fixed --free_steps 1", "free_steps 1 leaves none of 1 steps with a codebook"),
        ("--device tpu", "device 'tpu' is not known or not here"),
    ],
)
def test_bad_flags_are_clear_errors(flags, message, runs, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(train_vq, f"{runs['vq'][1]} --out {tmp_path / 'x'} --steps 1 {flags}")


@both
def test_a_training_that_diverges_ends_and_keeps_the_last_checkpoint(which, runs, tmp_path):
    script, _, whole = runs[which]
    out = shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="the training has diverged before step 11"):
        call(
            script,
            f"--resume --out {out} --lr 1e38 --weight_decay 1e38 --warmup 0 --clip 0 --steps 12 --eval_every 11 --log_every 99",
        )
    assert equal(out / "model.safetensors", whole / "model.safetensors")


@both
def test_a_stopped_run_that_has_diverged_keeps_the_last_checkpoint(which, runs, tmp_path, monkeypatch):
    script, _, whole = runs[which]
    out = shutil.copytree(whole, tmp_path / "run")
    stop_at(monkeypatch, 11)
    with pytest.raises(ValueError, match="the training has diverged before step 11"):
        call(
            script,
            f"--resume --out {out} --lr 1e38 --weight_decay 1e38 --warmup 0 --clip 0 --steps 12 --eval_every 100 --log_every 99",
        )
    assert equal(out / "model.safetensors", whole / "model.safetensors")


WILD = "--lr 1e38 --weight_decay 1e38 --warmup 0 --clip 0 --steps 4"


@pytest.mark.parametrize("log_every", [1, 99])
@pytest.mark.parametrize(
    "flags",
    [
        "--quantizer st",
        "--quantizer st --l2_norm",
        "--quantizer fixed --free_steps 2",
        "--quantizer gumbel --n_codes 32",
        "--quantizer fsq --n_codes 40",
        "--recon logit_laplace",
        "--discriminator patch --gan_start 1 --gan_lr 1e38",
    ],
)
def test_every_tokenizer_that_diverges_says_so_before_its_first_save(flags, log_every, images, tmp_path):
    """NaN reaches a codebook, a k-means and the codes of fsq, which are no codes; none of them is saved."""
    flags = f"--data {images} {VQ_FLAGS} --out {tmp_path / 'run'} {flags} {WILD} --log_every {log_every}"
    with pytest.raises(ValueError, match="diverged before step [1-4]: .*; the last checkpoint stays, if there is one"):
        call(train_vq, flags)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "kind", ["model masked", "model captioner", "model towers", "model llama", "condition encoder"]
)
def test_every_prior_that_diverges_says_so(kind, runs, tmp_path):
    script, flags, _ = runs["prior"]
    for name in ("--mask dalle", "--block_scale", "--fp32_logits"):
        flags = flags.replace(name, "")
    with pytest.raises(ValueError, match="the training has diverged before step [1-4]"):
        call(script, f"{flags} --out {tmp_path / 'run'} --{kind} {WILD} --log_every 99")
    call(script, f"{flags} --out {tmp_path / 'run'} --{kind} --steps 1 --lr 1e-3")  # the same folder starts again


def test_a_discriminator_that_diverges_is_not_saved(images, tmp_path, monkeypatch):
    """The tokenizer alone would still be finite in the step in which its discriminator is lost."""
    update = train_vq.update

    def spoiled(learners, objective, step):
        norm = update(learners, objective, step)
        with torch.no_grad():
            next(learners["discriminator"].module.parameters()).fill_(float("nan"))
        return norm

    monkeypatch.setattr(train_vq, "update", spoiled)
    flags = f"--data {images} {VQ_FLAGS} --out {tmp_path / 'run'} --discriminator patch --gan_start 0 --steps 1"
    with pytest.raises(ValueError, match="the training has diverged before step 1"):
        call(train_vq, flags)


def test_an_unwritable_folder_is_a_clear_error(runs, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        call(train_vq, f"{runs['vq'][1]} --out {tmp_path / 'file' / 'run'} --steps 1")


def test_an_export_has_half_the_bytes_and_no_paths(prior_run, tmp_path):
    export(prior_run, tmp_path / "small")
    assert not (tmp_path / "small" / "state").exists()
    sizes = [(f / "model.safetensors").stat().st_size for f in (tmp_path / "small", prior_run)]
    assert sizes[0] < 0.6 * sizes[1]
    for folder in ("small", "small/vq"):
        text = (tmp_path / folder / "config.json").read_text()
        assert str(tmp_path.parent) not in text and json.loads(text)["step"] == 8
    with pytest.raises(ValueError, match="holds a model already"):
        export(prior_run, prior_run)
    export(prior_run / "vq", tmp_path / "other" / "vq")
    with pytest.raises(ValueError, match="other/vq holds a model already"):
        export(prior_run, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["vq"], "refused before anything is written"


def test_a_tokenizer_in_the_place_of_a_priors_copy_is_kept(runs, vq_run, tmp_path):
    """Another one, or one that is still trained there, which would change the prior's codes."""
    script, flags, _ = runs["prior"]
    shutil.copytree(vq_run, tmp_path / "run" / "vq")
    for vq in (vq_run, tmp_path / "run" / "vq"):
        with pytest.raises(ValueError, match="run/vq holds a model already"):
            call(script, f"{flags} --out {tmp_path / 'run'} --vq {vq} --steps 1")
    shutil.rmtree(tmp_path / "run" / "vq" / "state")
    config = tmp_path / "run" / "vq" / "config.json"
    config.write_text(config.read_text().replace('"beta": 0.25', '"beta": 0.5'))
    with pytest.raises(ValueError, match="run/vq holds a model already"):
        call(script, f"{flags} --out {tmp_path / 'run'} --steps 1")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["vq"] and '"beta": 0.5' in config.read_text()


@both
def test_a_run_that_was_killed_in_its_first_save_starts_again(which, runs, tmp_path, monkeypatch):
    script, flags, _ = runs[which]
    out = tmp_path / "run"
    with monkeypatch.context() as m:
        m.setattr(resume, "write_state", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call(script, f"{flags} --out {out} --steps 1")
    assert (out / "model.safetensors").exists() and [p.name for p in (out / "state").iterdir()] == ["first_save"]
    call(script, f"{flags} --out {out} --steps 1 --resume")
    assert [p.name for p in (out / "state").iterdir()] == ["resume.safetensors"]
    (out / "state" / "resume.safetensors").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(
        ValueError, match="holds a model that cannot be resumed; use --init .*no state/resume.safetensors"
    ):
        call(script, f"{flags} --out {out} --steps 1 --resume")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
