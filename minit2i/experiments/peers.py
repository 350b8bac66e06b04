"""Tokenizers and sampling beside libraries that do the same work.

    pip install vector-quantize-pytorch && pip install --no-deps dalle-pytorch axial_positional_embedding
    OMP_NUM_THREADS=1 python -m minit2i.experiments.peers tokenizer --rounds 5
    pip install transformers accelerate ema-pytorch beartype
    pip install --no-deps muse-maskgit-pytorch memory-efficient-attention-pytorch rotary-embedding-torch
    OMP_NUM_THREADS=1 python -m minit2i.experiments.peers sampling --batch 16 --grid 32 --rounds 1 --only static

Ours and theirs take turns; medians, and the range of the ratio (above 1: ours is faster).  Times are CPU seconds of the
process, which other programs disturb less than the clock's: use one thread.  Peak memory is that of a separate process,
beyond what it held before.  dalle-pytorch's text tokenizers need not be installed.
"""

import copy
import importlib
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

from minit2i.config import Settings, at_least, merge, pick
from minit2i.experiments.bench import PRIOR, weights_alone
from minit2i.flags import add_flags, new_parser
from minit2i.gpt import MODELS, build_prior
from minit2i.sample import SampleConfig, Sampler
from minit2i.train import keep_memory, n_params, run
from minit2i.vq import build_vq

UNUSED = "youtokentome tokenizers transformers taming taming.models taming.models.vqgan pkg_resources omegaconf "
UNUSED += "yaml requests"


@dataclass(frozen=True)
class PeersConfig(Settings):
    """What to compare."""

    rounds: Annotated[int, "timed rounds", at_least(1)] = 5
    memory: Annotated[str, "only the peak memory of 8,192 codes, of one side", ("", "ours", "theirs")] = ""
    batch: Annotated[int, "sampling: images at once", at_least(1)] = 1
    grid: Annotated[int, "sampling: rows and columns of codes", at_least(1)] = 16
    only: Annotated[str, "sampling: only peers with this in their names"] = ""


def peer(name):
    """A library that only this file needs."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ValueError(f"{name} is not installed ({e}); see the head of {Path(__file__).name}") from None


def report(work, name, n, works, rounds, own=1, unit="images", warm=1):
    """Time all works in turn, the first `own` of them ours; print units per second of each pair, n units per call."""
    seconds = {k: [] for k in works}
    for _ in range(warm + rounds):
        for k, f in works.items():
            t = time.process_time()
            f()
            seconds[k].append(time.process_time() - t)
    seconds = [(k, v[warm:]) for k, v in seconds.items()]
    for k, ours in seconds[:own]:
        for other, theirs in seconds[own:]:
            ratio = [b / a for a, b in zip(ours, theirs)]
            rates = f"{n / statistics.median(ours):.3g} {unit}/s, {other} {n / statistics.median(theirs):.3g}"
            spread = f"{statistics.median(ratio):.2f} times ({min(ratio):.2f} to {max(ratio):.2f})"
            print(f"{work}, {name}, {k}: {rates}; {spread}", flush=True)


# --- tokenizers ------------------------------------------------------------------------------------------


def dalle_pytorch():
    """The module of DALLE and DiscreteVAE, with mocks for what only its text and other tokenizers need."""
    sys.modules |= {name: MagicMock() for name in UNUSED.split() if name not in sys.modules}
    return peer("dalle_pytorch.dalle_pytorch")


def quantizers(n_codes, n):
    """A moving-average codebook of either library, with n latents near its codes -> {name: f(train)}."""
    codebook = torch.randn(n_codes, 32)
    z = codebook[torch.randint(n_codes, (n,))] + 0.3 * torch.randn(n, 32)
    weight, ours = torch.randn_like(z), build_vq({"n_codes": n_codes}).quantizer
    theirs = peer("vector_quantize_pytorch").VectorQuantize(
        32, n_codes, decay=0.99, commitment_weight=0.25, threshold_ema_dead_code=2, rotation_trick=False
    )
    for codes, total, count in (
        (ours.codebook, ours.ema_sum, ours.ema_count),
        (theirs._codebook.embed, theirs._codebook.embed_avg, theirs._codebook.cluster_size),
    ):  # both start with the same codes
        codes.data.copy_(codebook.view_as(codes)), total.data.copy_(4 * codebook.view_as(total)), count.data.fill_(4)

    def work(quantizer, train):
        quantizer.train(train)
        x, own = z.clone().requires_grad_(train), quantizer is ours
        with torch.set_grad_enabled(train):
            z_q, codes, loss = quantizer(x, train=train) if own else quantizer(x[None])
        if train:
            ((z_q.view_as(z) * weight).sum() + loss.sum()).backward()
            if own:
                ours.update(z, codes, 0)

    return {"ours": lambda train: work(ours, train), "theirs": lambda train: work(theirs, train)}


def memory(name, n_codes=8192, n=16 * 1024):
    """Print the peak memory of one training step of a quantizer in MB (Linux)."""

    def status(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    if name == "ours":
        keep_memory()  # as our scripts
    f = quantizers(n_codes, n)[name]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    f(True)
    print(f"{n_codes} codes, training step, {name}: {status('VmHWM') - before:.0f} MB at the peak", flush=True)


def dvaes(rounds, n=16, size=64, n_codes=1024):
    """dalle-pytorch's DiscreteVAE, and two of our backbones with about as many parameters."""
    theirs = dalle_pytorch().DiscreteVAE(
        size, n_codes, 64, num_layers=2, num_resnet_blocks=1, hidden_dim=128, kl_div_loss_weight=1e-6
    )
    shape = dict(stride=4, quantizer="gumbel", n_codes=n_codes, code_dim=64, ch=88, n_res=1)
    nets = {name: build_vq({"backbone": name} | shape) for name in ("vqvae", "dvae")} | {"theirs": theirs}
    for name, net in nets.items():
        print(f"{name}: {n_params(net) / 1e6:.2f} M parameters")
    optimizers = {k: torch.optim.AdamW(net.parameters(), fused=True) for k, net in nets.items()}
    images, codes = torch.rand(n, 3, size, size) * 2 - 1, torch.randint(n_codes, (n, size // 4, size // 4))

    def train(name, net):
        if name == "theirs":
            net(images, return_loss=True).backward()
        else:
            maps, z, found, loss = net(images, train=True)
            (F.mse_loss(maps, images) + loss).backward()
        optimizers[name].step(), optimizers[name].zero_grad()
        if name != "theirs":
            net.quantizer.update(z, found, 0)

    @torch.no_grad()
    def encode(name, net):
        net.get_codebook_indices(images) if name == "theirs" else net.encode(images)

    @torch.no_grad()
    def decode(name, net):
        net.decode(codes.flatten(1) if name == "theirs" else codes)

    for work, f in (("training step", train), ("encode", encode), ("decode", decode)):
        report("dVAE", work, n, {k: lambda k=k, f=f: f(k, nets[k]) for k in nets}, rounds, 2)


def tokenizers(cfg):
    """Print times and memory of our quantizers beside those of other packages."""
    for n_codes, n, images in ((1024, 32 * 256, 32), (8192, 16 * 1024, 16)):
        works = quantizers(n_codes, n)
        for name, train in (("training step", True), ("encode", False)):
            turns = {k: lambda f=f, train=train: f(train) for k, f in works.items()}
            report(f"{n_codes} codes", name, images, turns, cfg.rounds)
    for name in ("ours", "theirs"):
        subprocess.run([sys.executable, "-m", __spec__.name, "tokenizer", "--memory", name], check=True)
    dvaes(cfg.rounds)


# --- sampling ------------------------------------------------------------------------------------------


SHAPE = dict(dim=PRIOR.n_embd, depth=PRIOR.n_layer, heads=PRIOR.n_head, dim_head=PRIOR.n_embd // PRIOR.n_head)


def sized(name, model):
    """Print the number of parameters -> the model, frozen."""
    print(f"{name}: {n_params(model) / 1e6:.2f} M parameters")
    return model.eval().requires_grad_(False)


def gpt2(batch, n):
    """transformers' GPT-2 of our prior's size, with the codes as its whole vocabulary -> {name: f()}.

    Guidance is the doubled batch without its arithmetic: a code is sampled for both halves.
    """
    hf = peer("transformers")
    shape = dict(n_embd=PRIOR.n_embd, n_layer=PRIOR.n_layer, n_head=PRIOR.n_head, n_positions=PRIOR.text_len + n)
    shape |= dict(vocab_size=PRIOR.n_codes, bos_token_id=None, eos_token_id=None)
    model = sized("GPT-2", hf.GPT2LMHeadModel(hf.GPT2Config(**shape)))
    text, compiled = torch.randint(PRIOR.n_codes, (2 * batch, PRIOR.text_len)), hf.CompileConfig(mode="default")
    compiled._compile_all_devices = True  # otherwise it does not compile on a CPU
    how = dict(attention_mask=torch.ones_like(text), max_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
    static = how | dict(cache_implementation="static")
    return {
        "GPT-2, growing cache": lambda: model.generate(text, **how),
        "GPT-2, static cache": lambda: model.generate(text, **static),
        "GPT-2, static and compiled": lambda: model.generate(text, compile_config=compiled, **static),
    }


def dalle(batch, grid):
    """dalle-pytorch's DALLE with its cache, guided by two passes per code; codes are not decoded -> f()."""
    module = dalle_pytorch()
    vae = module.DiscreteVAE(4 * grid, PRIOR.n_codes, 16, num_layers=2, hidden_dim=8)
    net = module.DALLE(vae=vae, num_text_tokens=PRIOR.n_vocab, text_seq_len=PRIOR.text_len, **SHAPE)
    net, text = sized("dalle-pytorch", net), torch.randint(1, PRIOR.n_vocab, (batch, PRIOR.text_len))
    vae.decode = lambda codes: codes
    return lambda: net.generate_images(text, cond_scale=2.0, use_cache=True)


def muse(batch, grid, steps):
    """muse-maskgit-pytorch's MaskGit, guided by two passes per step, on text states; codes are not decoded -> f()."""
    theirs, hf = peer("muse_maskgit_pytorch"), peer("transformers")
    theirs.muse_maskgit_pytorch.tqdm = lambda steps, **_: steps
    theirs.t5.T5_CONFIGS[theirs.t5.DEFAULT_T5_NAME] = {
        "config": hf.T5Config(d_model=PRIOR.n_embd)
    }  # else it is fetched
    how = dict(num_tokens=PRIOR.n_codes, seq_len=grid**2, flash=False)  # measured: flash is slower here, 1.9 s for 1.3
    net = sized("muse-maskgit-pytorch", theirs.MaskGitTransformer(**SHAPE, **how))
    net.encode_text = lambda texts: torch.randn(len(texts), PRIOR.text_len, PRIOR.n_embd)
    vae = theirs.VQGanVAE(dim=16, codebook_size=PRIOR.n_codes, layers=2, use_vgg_and_gan=False)
    masked = theirs.MaskGit(4 * grid, net, vae=vae)
    masked.vae.decode_from_ids = lambda codes: codes
    return lambda: masked.generate([""] * batch, fmap_size=grid, timesteps=steps, cond_scale=2.0)


def sampling(cfg, steps=12):
    """Guided codes of random weights: code by code beside others and its weights' products alone; in parallel steps."""
    batch, grid, n = cfg.batch, cfg.grid, cfg.grid**2
    shape = asdict(replace(PRIOR, grid_h=grid, grid_w=grid))
    ours, masked = sized("ours", build_prior(shape)), sized("ours, masked", build_prior(shape | {"model": "masked"}))
    text = torch.randint(PRIOR.n_vocab, (1, PRIOR.text_len))
    how = merge(SampleConfig, MODELS["masked"].Sampling)(n=batch, cfg_scale=2.0, top_p=1.0, steps=steps)
    tenth = replace(how, top_k=PRIOR.n_codes // 10)  # as theirs

    def generate(model, how, watch=None):
        return model.generate({"text": text}, text[0], Sampler(how, range(batch)), watch=watch)

    fast = copy.deepcopy(ours)
    fast.compile_step()
    stamps = []  # of every code
    in_turn = {"ours": lambda: generate(ours, how, lambda codes: stamps.append(time.process_time()))}
    in_turn |= {"ours, compiled": lambda: generate(fast, how)} | gpt2(batch, n)
    in_turn |= {"dalle-pytorch": dalle(batch, grid), "weights alone": lambda: weights_alone(ours, 2 * batch)}
    at_once = {"ours": lambda: generate(masked, tenth), "muse-maskgit-pytorch": muse(batch, grid, steps)}
    for kind, works in (("code by code", in_turn), (f"{steps} steps", at_once)):
        works = {k: f for k, f in works.items() if k in ("ours", "weights alone") or cfg.only in k}
        if len(works) > 1:
            for name in works:
                if "compiled" in name:
                    works[name]()  # compiles
            own = sum(name.startswith("ours") for name in works)
            report(kind, f"{n} codes, batch {batch}", batch * n, works, cfg.rounds, own, unit="codes", warm=0)
    spans = [[run[i + n // 4 - 1] - run[i] for i in range(0, n, n // 4)] for run in zip(*[iter(stamps)] * n)]
    print("ours, seconds of each quarter of the codes:", *(f"{statistics.median(s):.3g}" for s in zip(*spans)))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("part", choices=("tokenizer", "sampling"))
    add_flags(parser, PeersConfig)
    args = parser.parse_args()
    cfg = pick(PeersConfig, args)
    torch.manual_seed(0)
    if cfg.memory:
        return memory(cfg.memory)
    keep_memory()
    (sampling if args.part == "sampling" else tokenizers)(cfg)


if __name__ == "__main__":
    run(main)
