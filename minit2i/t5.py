"""A frozen T5 encoder reads the captions: Muse (arXiv:2301.00704 sec. 2.1) conditions its priors so.

T5 v1.1 (arXiv:1910.10683; gated GELU, arXiv:2002.05202) from a local folder in the Hugging Face layout: config.json,
spiece.model, model.safetensors or its shards.  The residual stream, the attention scores, the softmax and the last
feed-forward product are in float32 whatever the weights are, as they overflow in float16.

Shapes: B batch, T text length, W width of the states, H heads, K head size, n captions.
"""

import hashlib
import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from minit2i.checkpoint import read_config, read_hf
from minit2i.flags import pick
from minit2i.tokens import read_pieces


@dataclass(frozen=True)
class T5Config:
    """The fields of config.json that matter here, under their names there."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


def bucket(distance, n, far):
    """Number of the bucket of a key's distance from the query: half of the n buckets for each direction, single
    distances first, then logarithmically wider ones up to `far`, beyond which all are one.  T5 sec. 2.1.
    """
    n //= 2
    d, single = distance.abs(), n // 2
    wide = single + ((d.clamp_min(1) / single).log() / np.log(far / single) * (n - single)).long()
    return (distance > 0) * n + torch.where(d < single, d, wide.clamp_max(n - 1))


class Norm(nn.Module):
    """x / rms(x) * gain in float32."""

    def __init__(self, cfg):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(cfg.d_model)), cfg.layer_norm_epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()


class Block(nn.Module):
    """x (B, T, W) float32, bias (B, H, T, T) -> (B, T, W).  T5 does not divide the scores by sqrt K."""

    def __init__(self, cfg):
        super().__init__()
        width, inner = cfg.d_model, cfg.num_heads * cfg.d_kv
        self.norm1, self.norm2, self.n_head = Norm(cfg), Norm(cfg), cfg.num_heads
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=False)
        self.wi_0, self.wi_1 = (nn.Linear(width, cfg.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(cfg.d_ff, width, bias=False)

    def forward(self, x, bias):
        h = self.norm1(x).to(self.q.weight.dtype)
        q, k, v = (f(h).unflatten(2, (self.n_head, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        share = (q.float() @ k.float().transpose(2, 3) + bias).softmax(-1)  # (B, H, T, T)
        x = x + self.o((share.to(v.dtype) @ v).transpose(1, 2).flatten(2)).float()
        h = self.norm2(x).to(self.q.weight.dtype)
        gate = F.gelu(self.wi_0(h), approximate="tanh").float()
        return x + F.linear(gate * self.wi_1(h).float(), self.wo.weight.float())


class T5(nn.Module):
    """The encoder: ids (B, T), seen (B, T) False at pads -> states (B, T, W) float32."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.distances = nn.Embedding(cfg.relative_attention_num_buckets, cfg.num_heads)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.norm = Norm(cfg)

    def forward(self, ids, seen):
        at, cfg = torch.arange(ids.shape[1], device=ids.device), self.cfg
        buckets = bucket(at - at[:, None], cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance)
        bias = self.distances(buckets).float().permute(2, 0, 1)  # (H, T, T), query by key
        bias = bias[None].masked_fill(~seen[:, None, None], -torch.inf)  # (B, H, T, T)
        x = self.embedding(ids).float()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


NAMES = (  # of the Hugging Face layout -> ours
    ("encoder.block.", "blocks."),
    ("layer.0.SelfAttention.", ""),
    ("layer.1.DenseReluDense.", ""),
    ("layer.0.layer_norm", "norm1"),
    ("layer.1.layer_norm", "norm2"),
    ("encoder.final_layer_norm", "norm"),
    ("encoder.embed_tokens", "embedding"),
    ("shared", "embedding"),
    ("blocks.0.relative_attention_bias", "distances"),
)


def load_t5(folder, dtype=torch.float32):
    """The encoder of a folder, frozen, weights in dtype; ValueError if it is no T5 v1.1."""
    config, weights = read_config(folder), {}
    if config.get("model_type") != "t5" or config.get("feed_forward_proj") != "gated-gelu":
        raise ValueError(
            f"{folder} is no T5 v1.1: its config.json has no gated-gelu t5; give google/t5-v1_1-* or alike"
        )
    if lacking := [f.name for f in fields(T5Config) if f.default is MISSING and f.name not in config]:
        raise ValueError(f"the config.json of {folder} lacks {', '.join(lacking)}")
    for name, tensor in read_hf(folder):
        if not name.startswith(("decoder.", "lm_head.")):
            for theirs, ours in NAMES:
                name = name.replace(theirs, ours)
            weights[name] = tensor.to(dtype)
    with torch.device("meta"):
        model = T5(pick(T5Config, config))
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise ValueError(f"the weights in {folder} do not fit its config.json: {e}") from e
    return model.eval().requires_grad_(False)


def folder_hash(folder):
    """16 digits that tell one text encoder from another: small files, and sizes and last MiB of the weights."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".json", ".model", ".safetensors")):
        with open(path, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size} ".encode() + f.read())
    return digest.hexdigest()[:16]


class T5Text:
    """Captions as states of the frozen encoder: in the place of tokens.Text, and of its ids (T,) states (T, W).

    Pads are rows of zeros.  States of known captions are read from the cache that `remember` makes.
    """

    n_vocab = 0  # no text tokens, thus no text loss
    fixed = True  # as they are read once; generated scenes keep one wording each

    def __init__(self, folder, length, device="cpu", dtype=torch.float32):
        self.model, self.length, self.device = load_t5(folder, dtype).to(device), length, device
        self.sp = read_pieces(Path(folder, "spiece.model").read_bytes())
        self.width, self.hash, self.n_cut, self.rows = self.model.cfg.d_model, folder_hash(folder), 0, {}

    @torch.inference_mode()
    def states(self, captions):
        """captions -> states (B, T, W) float32; one too long is cut, and counted."""
        pieces = self.sp.encode(list(captions))
        self.n_cut += sum(len(p) > self.length - 1 for p in pieces)
        pieces = [[*p[: self.length - 1], self.sp.eos_id()] for p in pieces]
        ids = torch.tensor([p + [self.sp.pad_id()] * (self.length - len(p)) for p in pieces])
        seen = torch.tensor([[t < len(p) for t in range(self.length)] for p in pieces])
        states = self.model(ids.to(self.device), seen.to(self.device))
        return states * seen[..., None].to(self.device)

    def encode(self, caption, dropout=0.0, rng=None):
        """caption -> states (T, W); dropout and rng are for tokens.Text."""
        if caption in self.rows:
            self.n_cut += len(self.sp.encode(caption)) > self.length - 1
            return torch.from_numpy(self.memory[self.rows[caption]].astype(np.float32))
        return self.states([caption])[0].cpu()

    def remember(self, captions, folder, p, batch=64):
        """Read all captions once, each process a share, into a float16 file (n, T, W) that later runs find."""
        captions = sorted({"", *captions})
        key = hashlib.sha256("\0".join([self.hash, str(self.length), *captions]).encode("utf-8", "replace")).hexdigest()
        path, n = Path(folder, f"states-{key[:16]}.npy"), len(captions)
        if any(p.gather(not path.exists())):
            part = path.with_name(f"{path.name}.{p.gather(os.getpid())[0]}.part")  # two runs may share the cache
            if p.main:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(part, "w+", np.float16, (n, self.length, self.width))
            p.barrier()
            memory = np.load(part, mmap_mode="r+")
            mine = range(n * p.rank // p.world, n * (p.rank + 1) // p.world)
            for k in tqdm(range(mine.start, mine.stop, batch), desc="reading the captions once", disable=not p.main):
                some = slice(k, min(k + batch, mine.stop))
                memory[some] = self.states(captions[some]).cpu().numpy()
            memory.flush()
            p.barrier()
            if p.main:
                os.replace(part, path)
            p.barrier()
        self.memory, self.rows = np.load(path, mmap_mode="r"), {caption: k for k, caption in enumerate(captions)}
