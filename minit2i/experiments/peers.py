"""Tokenizers, training and sampling beside libraries that do the same work.

    pip install vector-quantize-pytorch && pip install --no-deps dalle-pytorch axial_positional_embedding
    OMP_NUM_THREADS=1 python -m minit2i.experiments.peers tokenizer --rounds 5
    pip install transformers accelerate ema-pytorch beartype
    pip install --no-deps muse-maskgit-pytorch memory-efficient-attention-pytorch rotary-embedding-torch
    OMP_NUM_THREADS=1 python -m minit2i.experiments.peers sampling --batch 16 --grid 32 --rounds 1 --only static
    mkdir repos && git -C repos clone https://github.com/karpathy/nanoGPT
    git -C repos clone https://github.com/meta-pytorch/gpt-fast
    git -C repos clone https://github.com/FoundationVision/LlamaGen
    OMP_NUM_THREADS=1 python -m minit2i.experiments.peers training --batch 4 --repos repos --compile

Training needs transformers and dalle-pytorch with rotary-embedding-torch.  The three repositories are no packages;
without --repos they are left out.  Ours and theirs take turns; medians, and the range of the ratio (above 1: ours is
faster).  With one thread times are CPU seconds of the process, which other programs disturb less than the clock's; with
several they are the clock's, and nothing else may run.  Peak memory is that of a separate process, beyond what it held
before.  dalle-pytorch's text tokenizers need not be installed.
"""

import copy
import importlib
import importlib.util
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

from minit2i.config import Settings, at_least, merge, pick
from minit2i.experiments.bench import PRIOR, peak_memory, prior_step, random_batch, weights_alone
from minit2i.experiments.plan import training_flops
from minit2i.flags import add_flags, new_parser
from minit2i.gpt import MODELS, build_prior, swiglu_inner
from minit2i.sample import SampleConfig, Sampler
from minit2i.train import DTYPES, autocast, keep_memory, n_params, run
from minit2i.vq import build_vq

UNUSED = "youtokentome tokenizers transformers taming taming.models taming.models.vqgan pkg_resources omegaconf "
UNUSED += "yaml requests"
REPOS = {"nanoGPT": "model.py", "gpt-fast": "model.py", "LlamaGen": "autoregressive/models/gpt.py"}
BOUNDS = ("matrix product", "weights alone")  # ours cannot be faster than these


@dataclass(frozen=True)
class PeersConfig(Settings):
    """What to compare."""

    rounds: Annotated[int, "timed rounds", at_least(1)] = 5
    memory: Annotated[str, "only the peak memory of 8,192 codes, of one side", ("", "ours", "theirs")] = ""
    batch: Annotated[int, "training, sampling: images at once", at_least(1)] = 1
    grid: Annotated[int, "training, sampling: rows and columns of codes", at_least(1)] = 16
    text_len: Annotated[int, "training: text positions", at_least(3)] = 32
    precision: Annotated[str, "of training", ("fp32", "bf16")] = "fp32"
    compile: Annotated[bool, "training: all compiled"] = False
    repos: Annotated[str, "folder with clones of nanoGPT, gpt-fast and LlamaGen (empty: without them)"] = ""
    only: Annotated[str, "training, sampling: only peers whose names contain this (a regular expression)"] = ""


def peer(name):
    """A library that only this file needs."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ValueError(f"{name} is not installed ({e}); see the head of {Path(__file__).name}") from None


def checkout(repos, name):
    """The model's module of a repository that the user cloned into the folder `repos`."""
    root = Path(repos) / name
    file = root / REPOS[name]
    if not file.is_file():
        raise ValueError(f"{file} is missing: clone {name} into {repos}; see the head of {Path(__file__).name}")
    sys.path.append(str(root))  # LlamaGen imports from there
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen(works, only):
    """Ours, what bounds it, and the works whose names contain `only`, a regular expression."""
    return {k: f for k, f in works.items() if k == "ours" or k in BOUNDS or re.search(only, k)}


def seconds():
    """CPU seconds of this process with one thread, else the clock's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def report(work, name, n, works, rounds, own=1, unit="images", warm=1):
    """Time all works in turn, the first `own` of them ours; print units per second of each pair, n units per call."""
    times = {k: [] for k in works}
    for _ in range(warm + rounds):
        for k, f in works.items():
            t = seconds()
            f()
            times[k].append(seconds() - t)
    times = [(k, v[warm:]) for k, v in times.items()]
    for k, ours in times[:own]:
        for other, theirs in times[own:]:
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
    if name == "ours":
        keep_memory()  # as our scripts
    f = quantizers(n_codes, n)[name]
    peak = peak_memory(lambda: f(True), torch.device("cpu"))
    print(f"{n_codes} codes, training step, {name}: {peak / 2**20:.0f} MB at the peak", flush=True)


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


# --- priors of one size ----------------------------------------------------------------------------------

# The blocks of all have as many weights as ours.  GPT-2's, nanoGPT's and gpt-fast's whole vocabulary are the codes, so
# that their logits cost as much as ours.

SHAPE = dict(dim=PRIOR.n_embd, depth=PRIOR.n_layer, heads=PRIOR.n_head, dim_head=PRIOR.n_embd // PRIOR.n_head)
NAMES = dict(n_layer=PRIOR.n_layer, n_head=PRIOR.n_head, vocab_size=PRIOR.n_codes)


def sized(name, model):
    """Print the number of parameters -> the model."""
    print(f"{name}: {n_params(model) / 1e6:.2f} M parameters")
    return model


def frozen(name, model):
    """The model as sampling needs it."""
    return sized(name, model).eval().requires_grad_(False)


def gpt2(length):
    """transformers' GPT-2."""
    hf = peer("transformers")
    how = dict(n_positions=length, bos_token_id=None, eos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=PRIOR.n_embd, **NAMES, **how))


def nanogpt(repos, length):
    """nanoGPT's model with as many parameters."""
    module = checkout(repos, "nanoGPT")
    return module.GPT(module.GPTConfig(block_size=length, n_embd=PRIOR.n_embd, bias=False, **NAMES))


def llamagen(repos, text_len, n):
    """LlamaGen's text-to-image Transformer without dropout, on text states of our width."""
    module = checkout(repos, "LlamaGen")
    off = dict(token_dropout_p=0, resid_dropout_p=0, ffn_dropout_p=0, class_dropout_prob=0)
    how = dict(model_type="t2i", caption_dim=PRIOR.n_embd, cls_token_num=text_len, block_size=n)
    inner = swiglu_inner(PRIOR) / (8 * PRIOR.n_embd // 3)  # of its usual width
    how |= dict(ffn_dim_multiplier=inner, multiple_of=32)
    return module.Transformer(module.ModelArgs(dim=PRIOR.n_embd, **NAMES, **how, **off))


def dalle(text_len, grid):
    """dalle-pytorch's DALLE, with GEGLU three times as wide: 8 % more weights than ours, four times as wide 33 %."""
    module = dalle_pytorch()
    vae = module.DiscreteVAE(4 * grid, PRIOR.n_codes, 16, num_layers=2, hidden_dim=8)
    vae.decode = lambda codes: codes
    whole, module.Transformer = module.Transformer, partial(module.Transformer, ff_mult=3)
    net = module.DALLE(vae=vae, num_text_tokens=PRIOR.n_vocab, text_seq_len=text_len, **SHAPE)
    module.Transformer = whole
    return net


# --- training --------------------------------------------------------------------------------------------


def training_step(net, loss, cfg):
    """f(): a step with loss(net), as bench.py's of ours."""
    optimizer, net = torch.optim.AdamW(net.parameters(), fused=True), torch.compile(net) if cfg.compile else net

    def step():
        with autocast(torch.device("cpu"), cfg.precision):
            total = loss(net)
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training(cfg, side=1024):
    """Training steps on random tokens: ours and theirs, and matrix products alone with as many operations."""
    prior = replace(PRIOR, text_len=cfg.text_len, grid_h=cfg.grid, grid_w=cfg.grid)
    device, n = torch.device("cpu"), prior.n_image
    batch = random_batch(prior, cfg.batch, device)
    text, codes = batch["text"], batch["codes"]
    tokens = torch.cat([text % prior.n_codes, codes], 1)  # (B, L)
    targets = tokens[:, 1:].contiguous()  # nanoGPT needs it so
    states = torch.randn(cfg.batch, cfg.text_len, prior.n_embd)
    ours = sized("ours", build_prior(asdict(prior)))
    works = {"ours": prior_step(ours, cfg.batch, device, cfg.precision, cfg.compile)}
    a = torch.randn(side, side, dtype=DTYPES[cfg.precision])
    times = round(cfg.batch * training_flops(prior) / (2 * side**3))
    works["matrix product"] = lambda: [a @ a for _ in range(times)]
    nets = {"GPT-2": gpt2(tokens.shape[1]), "dalle-pytorch": dalle(cfg.text_len, cfg.grid)}
    if cfg.repos:
        nets |= {"nanoGPT": nanogpt(cfg.repos, tokens.shape[1]), "LlamaGen": llamagen(cfg.repos, cfg.text_len, n)}
    losses = {
        "GPT-2": lambda net: net(tokens, labels=tokens, use_cache=False).loss,
        "dalle-pytorch": lambda net: net(text, codes, return_loss=True),
        "nanoGPT": lambda net: net(tokens[:, :-1], targets)[1],
        "LlamaGen": lambda net: net(codes[:, :-1], states, targets=codes)[1],
    }
    works |= {name: training_step(sized(name, net), losses[name], cfg) for name, net in nets.items()}
    name = f"{cfg.text_len}+{n} positions, batch {cfg.batch}, {cfg.precision}" + ", compiled" * cfg.compile
    report("training step", name, cfg.batch, chosen(works, cfg.only), cfg.rounds, warm=1 + cfg.compile)


# --- sampling --------------------------------------------------------------------------------------------


def generate_gpt2(batch, n):
    """{name: f()}.  Guidance is the doubled batch without its arithmetic: a code is sampled for both halves."""
    model, compiled = frozen("GPT-2", gpt2(PRIOR.text_len + n)), peer("transformers").CompileConfig(mode="default")
    text = torch.randint(PRIOR.n_codes, (2 * batch, PRIOR.text_len))
    compiled._compile_all_devices = True  # otherwise it does not compile on a CPU
    how = dict(attention_mask=torch.ones_like(text), max_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0)
    static = how | dict(cache_implementation="static")
    return {
        "GPT-2, growing cache": lambda: model.generate(text, **how),
        "GPT-2, static cache": lambda: model.generate(text, **static),
        "GPT-2, static and compiled": lambda: model.generate(text, compile_config=compiled, **static),
    }


def generate_dalle(batch, grid):
    """dalle-pytorch with its cache, guided by two passes per code; codes are not decoded -> f()."""
    net = frozen("dalle-pytorch", dalle(PRIOR.text_len, grid))
    text = torch.randint(1, PRIOR.n_vocab, (batch, PRIOR.text_len))
    return lambda: net.generate_images(text, cond_scale=2.0, use_cache=True)


def one_by_one(name, first, logits, n):
    """{name: f(), "name, compiled": f()}: the loop of gpt-fast's generate.py, which LlamaGen has taken over.

    first() -> logits after the text; logits(code (R, 1), position (1,)) -> the next; its step is compiled as theirs.
    """

    def sample(logits):  # as their multinomial_sample_one_no_sync
        p = logits[:, -1].float().softmax(-1)
        return (p / torch.empty_like(p).exponential_(1)).argmax(-1, keepdim=True)

    def step(code, at):
        return sample(logits(code, at))

    @torch.inference_mode()
    def generate(step):
        code = sample(first())
        for i in range(PRIOR.text_len, PRIOR.text_len + n - 1):
            code = step(code, torch.tensor([i])).clone()

    fast = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    return {name: lambda: generate(step), f"{name}, compiled": lambda: generate(fast)}


def generate_repos(repos, batch, n):
    """{name: f()} of the three repositories, guided as GPT-2 is.  nanoGPT has no cache."""
    rows, t = 2 * batch, PRIOR.text_len
    text, before = torch.randint(PRIOR.n_codes, (rows, t)), torch.arange(t)
    nano = frozen("nanoGPT", nanogpt(repos, t + n))
    module = checkout(repos, "gpt-fast")
    how = dict(block_size=t + n, dim=PRIOR.n_embd, intermediate_size=swiglu_inner(PRIOR))
    fast = frozen("gpt-fast", module.Transformer(module.ModelArgs(**how, **NAMES)))
    fast.setup_caches(rows, t + n)
    llama = frozen("LlamaGen", llamagen(repos, t, n))
    llama.setup_caches(rows, t + n, torch.float32)
    states = torch.randn(rows, t, PRIOR.n_embd)
    return (
        {"nanoGPT": lambda: nano.generate(text, n)}
        | one_by_one("gpt-fast", lambda: fast(text, before), fast, n)
        | one_by_one("LlamaGen", lambda: llama(None, states, before)[0], lambda code, at: llama(code, None, at)[0], n)
    )


def muse(batch, grid, steps):
    """muse-maskgit-pytorch's MaskGit, guided by two passes per step, on text states; codes are not decoded -> f()."""
    theirs, hf = peer("muse_maskgit_pytorch"), peer("transformers")
    theirs.muse_maskgit_pytorch.tqdm = lambda steps, **_: steps
    theirs.t5.T5_CONFIGS[theirs.t5.DEFAULT_T5_NAME] = {
        "config": hf.T5Config(d_model=PRIOR.n_embd)
    }  # else it is fetched
    how = dict(num_tokens=PRIOR.n_codes, seq_len=grid**2, flash=False)  # measured: flash is slower here, 1.9 s for 1.3
    net = frozen("muse-maskgit-pytorch", theirs.MaskGitTransformer(**SHAPE, **how))
    net.encode_text = lambda texts: torch.randn(len(texts), PRIOR.text_len, PRIOR.n_embd)
    vae = theirs.VQGanVAE(dim=16, codebook_size=PRIOR.n_codes, layers=2, use_vgg_and_gan=False)
    masked = theirs.MaskGit(4 * grid, net, vae=vae)
    masked.vae.decode_from_ids = lambda codes: codes
    return lambda: masked.generate([""] * batch, fmap_size=grid, timesteps=steps, cond_scale=2.0)


def sampling(cfg, steps=12):
    """Guided codes of random weights: code by code beside others and its weights' products alone; in parallel steps."""
    batch, grid, n = cfg.batch, cfg.grid, cfg.grid**2
    shape = asdict(replace(PRIOR, grid_h=grid, grid_w=grid))
    ours, masked = frozen("ours", build_prior(shape)), frozen("ours, masked", build_prior(shape | {"model": "masked"}))
    text = torch.randint(PRIOR.n_vocab, (1, PRIOR.text_len))
    how = merge(SampleConfig, MODELS["masked"].Sampling)(n=batch, cfg_scale=2.0, top_p=1.0, steps=steps)
    tenth = replace(how, top_k=PRIOR.n_codes // 10)  # as theirs

    def generate(model, how, watch=None):
        return model.generate({"text": text}, text[0], Sampler(how, range(batch)), watch=watch)

    fast = copy.deepcopy(ours)
    fast.compile_step()
    stamps = []  # of every code
    in_turn = {"ours": lambda: generate(ours, how, lambda codes: stamps.append(seconds()))}
    in_turn |= {"ours, compiled": lambda: generate(fast, how)} | generate_gpt2(batch, n)
    in_turn |= generate_repos(cfg.repos, batch, n) if cfg.repos else {}
    in_turn |= {"dalle-pytorch": generate_dalle(batch, grid), "weights alone": lambda: weights_alone(ours, 2 * batch)}
    at_once = {"ours": lambda: generate(masked, tenth), "muse-maskgit-pytorch": muse(batch, grid, steps)}
    for kind, works in (("code by code", in_turn), (f"{steps} steps", at_once)):
        works = chosen(works, cfg.only)
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
    parser.add_argument("part", choices=("tokenizer", "training", "sampling"))
    add_flags(parser, PeersConfig)
    args = parser.parse_args()
    cfg = pick(PeersConfig, args)
    torch.manual_seed(0)
    if cfg.memory:
        return memory(cfg.memory)
    keep_memory()
    {"tokenizer": tokenizers, "training": training, "sampling": sampling}[args.part](cfg)


if __name__ == "__main__":
    run(main)
