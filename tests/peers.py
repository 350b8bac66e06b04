"""The tokenizer beside two libraries that do the same work; not a test, and nothing else here needs them.

    pip install vector-quantize-pytorch && pip install --no-deps dalle-pytorch axial_positional_embedding
    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/peers.py --rounds 5

Ours and theirs take turns; medians, and the range of the ratio (above 1: ours is faster).  Peak memory is that of a
process of its own, beyond what it held before.  dalle-pytorch's text tokenizers need not be installed.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

from minit2i.train import keep_memory
from minit2i.vq import QUANTIZERS, VQ, VQConfig

TEXT = "youtokentome tokenizers transformers taming taming.models taming.models.vqgan pkg_resources omegaconf yaml requests"


def report(work, name, n, works, rounds):
    """Rounds of all works, theirs last: prints pictures of each per second, n pictures a call."""
    seconds = {k: [] for k in works}
    for _ in range(rounds + 1):
        for k, f in works.items():
            t = time.time()
            f()
            seconds[k].append(time.time() - t)
    theirs = seconds["theirs"][1:]  # the first round warms up
    for k, own in list(seconds.items())[:-1]:
        ratio = [b / a for a, b in zip(own[1:], theirs)]
        print(
            f"{work}, {name}, {k}: {n / statistics.median(own[1:]):.1f} pictures/s, theirs "
            f"{n / statistics.median(theirs):.1f}; {statistics.median(ratio):.2f} times ({min(ratio):.2f} to {max(ratio):.2f})"
        )


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
    sys.modules |= {name: MagicMock() for name in TEXT.split() if name not in sys.modules}
    from dalle_pytorch.dalle_pytorch import DiscreteVAE

    theirs = DiscreteVAE(size, n_codes, 64, num_layers=2, num_resnet_blocks=1, hidden_dim=128, kl_div_loss_weight=1e-6)
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

    report("dVAE", "training step", n, {k: lambda k=k, net=net: train(k, net) for k, net in nets.items()}, rounds)
    report("dVAE", "encode", n, {k: lambda net=net: encode(net) for k, net in nets.items()}, rounds)
    report("dVAE", "decode", n, {k: lambda net=net: decode(net) for k, net in nets.items()}, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds [5]")
    parser.add_argument("--memory", default="", help="ours or theirs: only the peak memory of 8,192 codes")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.memory:
        return memory(args.memory)
    keep_memory()
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
