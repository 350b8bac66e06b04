"""Fixtures: a folder of captioned images, a tiny tokenizer's run and a tiny prior's run, each made once."""

import numpy as np
import pytest
import torch
from processes import call

import train_prior
import train_vq
from minit2i.scenes import caption, render, scene_at

# torch.compile registers a GPU even where there is none; if autograd's first pass comes after that, it starts a thread for
# it, and then no forked process can do a pass
if not torch.cuda.is_available():
    torch.ones((), requires_grad=True).backward()

COMMON_FLAGS = "--image_size 32 --batch_size 8 --workers 0 --device cpu --precision fp32 --log_every 1 --warmup 2"
VQ_FLAGS = f"{COMMON_FLAGS} --stride 8 --ch 8 --n_res 1 --n_codes 32 --code_dim 8"
PRIOR_FLAGS = (
    f"{COMMON_FLAGS} --n_layer 2 --n_head 2 --n_embd 32 --text_len 16 --vocab_size 320 --dropout 0.1 --mask dalle "
    "--block_scale --fp32_logits"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 24 images of 40x40 pixels with captions."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        scene = scene_at(0, i)
        render(scene, 40).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption(scene, np.random.default_rng(i))[0])
    return folder


@pytest.fixture(scope="session")
def vq_run(images, tmp_path_factory):
    """A tokenizer after 8 steps; 4x4 codes of 32x32 pixels."""
    out = tmp_path_factory.mktemp("runs") / "vq"
    call(train_vq, f"--data {images} --out {out} --steps 8 --eval_every 4 {VQ_FLAGS}")
    return out


@pytest.fixture(scope="session")
def prior_run(images, vq_run):
    """A prior after 8 steps; its cache of codes lies beside it."""
    out = vq_run.parent / "prior"
    flags = f"--data {images} --vq {vq_run} --out {out} --cache {out.parent / 'cache'} {PRIOR_FLAGS}"
    call(train_prior, f"{flags} --steps 8 --eval_every 4")
    return out
