"""Tokenizer and decoding beside libraries that do the same work; not a test, and nothing else here needs them.

    pip install vector-quantize-pytorch && pip install --no-deps dalle-pytorch axial_positional_embedding
    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/peers.py tokenizer --rounds 5
    pip install transformers accelerate ema-pytorch beartype
    pip install --no-deps muse-maskgit-pytorch memory-efficient-attention-pytorch rotary-embedding-torch
    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/peers.py decoding --batch 16 --grid 32 --rounds 1 --only static

Ours and theirs take turns; medians, and the range of the ratio (above 1: ours is faster).  Times are CPU seconds of the
process, which other programs on the machine disturb less than the clock's, so use one thread.  Peak memory is that
of a process of its own, beyond what it held before.  dalle-pytorch's text tokenizers need not be installed.
"""

import argparse
import copy
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

from minit2i.bench import PRIOR, weights_alone
from minit2i.gpt import GPT
from minit2i.masked import unmask
from minit2i.sample import SampleConfig, generate
from minit2i.train import keep_memory
from minit2i.vq import QUANTIZERS, VQ, VQConfig

TEXT = "youtokentome tokenizers transformers taming taming.models taming.models.vqgan pkg_resources omegaconf yaml requests"


def report(work, name, n, works, rounds, own=1, unit="pictures", warm=1):
    """Rounds of all works, of which the first `own` are ours: prints units of each per second, n units a call."""
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
            print(
                f"{work}, {name}, {k}: {n / statistics.median(ours):.3g} {unit}/s, {other} {n / statistics.median(theirs):.3g}; "
                f"{statistics.median(ratio):.2f} times ({min(ratio):.2f} to {max(ratio):.2f})",
                flush=True,
            )


def dalle_pytorch():
    """The module of DALLE and DiscreteVAE, without what only its text and its other tokenizers need."""
    sys.modules |= {name: MagicMock() for name in TEXT.split() if name not in sys.modules}
    from dalle_pytorch import dalle_pytorch

    return dalle_pytorch


def quantizers(n_codes, n):
    """A moving-average codebook of either library with n latents about its codes -> {name: f(train)}."""
    from vector_quantize_pytorch import VectorQuantize

    codebook = torch.randn(n_codes, 32)
    z = codebook[torch.randint(n_codes, (n,))] + 0.3 * torch.randn(n, 32)
    weight, ours = torch.randn_like(z), QUANTIZERS["ema"](VQConfig(n_codes=n_codes))
    theirs = VectorQuantize(
        32, n_codes, decay=0.99, commitment_weight=0.25, threshold_ema_dead_code=2, rotation_trick=False
    )
    for codes, total, count in (
        (ours.codebook, ours.ema_sum, ours.ema_count),
        (theirs._codebook.embed, theirs._codebook.embed_avg, theirs._codebook.cluster_size),
    ):  # both know the codes
        codes.data.copy_(codebook.view_as(codes)), total.data.copy_(4 * codebook.view_as(total)), count.data.fill_(4)

    def work(quantizer, update, train):
        quantizer.train(train)
        x = z.clone().requires_grad_(train)
        with torch.set_grad_enabled(train):
            z_q, codes, loss = quantizer(x) if update else quantizer(x[None])
        if train:
            ((z_q.view_as(z) * weight).sum() + loss.sum()).backward()
            if update:
                update(z, codes, 0)

    return {"ours": lambda train: work(ours, ours.update, train), "theirs": lambda train: work(theirs, None, train)}


def memory(name, n_codes=8192, n=16 * 1024):
    """Peak of one training step of a quantizer, printed in MB (Linux)."""

    def status(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    if name == "ours":
        keep_memory()  # as our scripts
    f = quantizers(n_codes, n)[name]
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    f(True)
    print(f"{n_codes} codes, training step, {name}: {status('VmHWM') - before:.0f} MB at the peak", flush=True)


def dvaes(rounds, n=16, size=64, n_codes=1024):
    """dalle-pytorch's DiscreteVAE, and our two backbones of about as many parameters."""
    theirs = dalle_pytorch().DiscreteVAE(
        size, n_codes, 64, num_layers=2, num_resnet_blocks=1, hidden_dim=128, kl_div_loss_weight=1e-6
    )
    nets, images = {}, torch.rand(n, 3, size, size) * 2 - 1
    for name in ("vqvae", "dvae"):
        cfg = VQConfig(stride=4, backbone=name, quantizer="gumbel", n_codes=n_codes, code_dim=64, ch=88, n_res=1)
        nets[name] = VQ(cfg)
    nets["theirs"] = theirs
    for name, net in nets.items():
        print(f"{name}: {sum(w.numel() for w in net.parameters()) / 1e6:.2f} M parameters")
    optimizers = {k: torch.optim.AdamW(net.parameters(), fused=True) for k, net in nets.items()}

    def train(name, net):
        if name == "theirs":
            net(images, return_loss=True).backward()
        else:
            maps, z, codes, loss = net(images, 0)
            (F.mse_loss(maps, images) + loss).backward()
        optimizers[name].step(), optimizers[name].zero_grad()
        if name != "theirs":
            net.quantizer.update(z, codes, 0)

    codes = torch.randint(n_codes, (n, size // 4, size // 4))

    @torch.no_grad()
    def encode(net):
        net.get_codebook_indices(images) if net is theirs else net.encode(images)

    @torch.no_grad()
    def decode(net):
        net.decode(codes.flatten(1) if net is theirs else codes)

    report("dVAE", "training step", n, {k: lambda k=k, net=net: train(k, net) for k, net in nets.items()}, rounds, 2)
    report("dVAE", "encode", n, {k: lambda net=net: encode(net) for k, net in nets.items()}, rounds, 2)
    report("dVAE", "decode", n, {k: lambda net=net: decode(net) for k, net in nets.items()}, rounds, 2)


# --- decoding ------------------------------------------------------------------------------------------


SHAPE = dict(dim=PRIOR.n_embd, depth=PRIOR.n_layer, heads=PRIOR.n_head, dim_head=PRIOR.n_embd // PRIOR.n_head)


def sized(name, model):
    print(f"{name}: {sum(w.numel() for w in model.parameters()) / 1e6:.2f} M parameters")
    return model.eval().requires_grad_(False)


def gpt2(batch, n):
    """transformers' GPT-2 of our prior's size, but with the codes as its whole vocabulary -> {name: f()}.

    Guidance is the doubled batch and nothing else: each row is drawn for itself.
    """
    from transformers import CompileConfig, GPT2Config, GPT2LMHeadModel

    shape = dict(n_embd=PRIOR.n_embd, n_layer=PRIOR.n_layer, n_head=PRIOR.n_head, n_positions=PRIOR.text_len + n)
    shape |= dict(vocab_size=PRIOR.n_codes, bos_token_id=None, eos_token_id=None)
    model = sized("GPT-2", GPT2LMHeadModel(GPT2Config(**shape)))
    text, compiled = torch.randint(PRIOR.n_codes, (2 * batch, PRIOR.text_len)), CompileConfig(mode="default")
    compiled._compile_all_devices = True  # else it does not compile on a CPU
    how = dict(attention_mask=torch.ones_like(text), max_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
    static = how | dict(cache_implementation="static")
    return {
        "GPT-2, growing cache": lambda: model.generate(text, **how),
        "GPT-2, static cache": lambda: model.generate(text, **static),
        "GPT-2, static and compiled": lambda: model.generate(text, compile_config=compiled, **static),
    }


def dalle(batch, grid):
    """dalle-pytorch's DALLE with its cache, guided by two passes a code; codes are not decoded -> f()."""
    module = dalle_pytorch()
    vae = module.DiscreteVAE(4 * grid, PRIOR.n_codes, 16, num_layers=2, hidden_dim=8)
    net = module.DALLE(vae=vae, num_text_tokens=PRIOR.n_vocab, text_seq_len=PRIOR.text_len, **SHAPE)
    net, text = sized("dalle-pytorch", net), torch.randint(1, PRIOR.n_vocab, (batch, PRIOR.text_len))
    vae.decode = lambda codes: codes
    return lambda: net.generate_images(text, cond_scale=2.0, use_cache=True)


def muse(batch, grid, steps):
    """muse-maskgit-pytorch's MaskGit, guided by two passes a step, on text states; codes are not decoded -> f()."""
    from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, VQGanVAE, muse_maskgit_pytorch, t5
    from transformers import T5Config

    muse_maskgit_pytorch.tqdm = lambda steps, **_: steps
    t5.T5_CONFIGS[t5.DEFAULT_T5_NAME] = {"config": T5Config(d_model=PRIOR.n_embd)}  # else it is fetched
    how = dict(num_tokens=PRIOR.n_codes, seq_len=grid**2, flash=False)  # measured: flash is slower here, 1.9 s for 1.3
    net = sized("muse-maskgit-pytorch", MaskGitTransformer(**SHAPE, **how))
    net.encode_text = lambda texts: torch.randn(len(texts), PRIOR.text_len, PRIOR.n_embd)
    masked = MaskGit(4 * grid, net, vae=VQGanVAE(dim=16, codebook_size=PRIOR.n_codes, layers=2, use_vgg_and_gan=False))
    masked.vae.decode_from_ids = lambda codes: codes
    return lambda: masked.generate([""] * batch, fmap_size=grid, timesteps=steps, cond_scale=2.0)


def decoding(batch, grid, rounds, only, steps=12):
    """Guided codes of random weights: our prior code by code beside others and its weights' products alone, and in steps."""
    cfg, n = replace(PRIOR, grid_h=grid, grid_w=grid), grid**2
    ours, masked = sized("ours", GPT(cfg)), sized("ours, masked", GPT(replace(cfg, objective="masked")))
    text = torch.randint(cfg.n_vocab, (1, cfg.text_len))
    how = SampleConfig(batch, cfg_scale=2.0, top_p=1.0, steps=steps)
    tenth = replace(how, top_k=cfg.n_codes // 10)  # as theirs
    at_once = {"ours": lambda: unmask(masked, text, text[0], tenth), "muse-maskgit-pytorch": muse(batch, grid, steps)}
    fast = copy.deepcopy(ours)
    fast.compile_step()
    stamps = []  # of every code
    watch = lambda codes: stamps.append(time.process_time())
    in_turn = {"ours": lambda: generate(ours, text, text[0], how, watch=watch)}
    in_turn |= {"ours, compiled": lambda: generate(fast, text, text[0], how)} | gpt2(batch, n)
    in_turn |= {"dalle-pytorch": dalle(batch, grid), "weights alone": lambda: weights_alone(ours, 2 * batch)}
    for kind, works in (("code by code", in_turn), (f"{steps} steps", at_once)):
        works = {k: f for k, f in works.items() if k in ("ours", "weights alone") or only in k}
        if len(works) > 1:
            for name in works:
                if "compiled" in name:
                    works[name]()  # compiles
            own = sum(name.startswith("ours") for name in works)
            report(kind, f"{n} codes, batch {batch}", batch * n, works, rounds, own, unit="codes", warm=0)
    spans = [[run[i + n // 4 - 1] - run[i] for i in range(0, n, n // 4)] for run in zip(*[iter(stamps)] * n)]
    print("ours, seconds of each quarter of the codes:", *(f"{statistics.median(s):.3g}" for s in zip(*spans)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tokenizer", "decoding"), nargs="?", default="tokenizer")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds [5]")
    parser.add_argument("--memory", default="", help="ours or theirs: only the peak memory of 8,192 codes")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once in decoding [1]")
    parser.add_argument("--grid", type=int, default=16, help="rows and columns of codes in decoding [16]")
    parser.add_argument("--only", default="", help="decoding: only peers with this in their names")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.memory:
        return memory(args.memory)
    keep_memory()
    if args.part == "decoding":
        return decoding(args.batch, args.grid, args.rounds, args.only)
    for n_codes, n, pictures in ((1024, 32 * 256, 32), (8192, 16 * 1024, 16)):
        works = quantizers(n_codes, n)
        for name, train in (("training step", True), ("encode", False)):
            turns = {k: lambda f=f, train=train: f(train) for k, f in works.items()}
            report(f"{n_codes} codes", name, pictures, turns, args.rounds)
    for name in ("ours", "theirs"):
        subprocess.run([sys.executable, __file__, "--memory", name], check=True)
    dvaes(args.rounds)


if __name__ == "__main__":
    main()
