r"""Pre-trained Language Models Do Not Help Auto-regressive Text-to-Image Generation, Zhang et al., 2023-11,
arXiv:2311.16201.

An experiment on a prior more than an architecture: one network starts from a language model's weights, or at random.

What it adds
    tokenizer   MoVQ's decoder, whose norms are modulated by the latents       SpatialNorm, MoVQDecoder
    prior       a language model's blocks, extended by the image codes         Llama, load_llama
                the same network from random weights, to compare               --no-llama_weights
                what of its language a prior forgets                           experiments/probes.py

What differs here
    MoVQ's norms start as plain GroupNorm; the release starts their convolutions at random.  Its weights load (vqmodel.py).
    The tokenizer is ours, trained on the same images (the paper: SBER-MoVQGAN); MoVQ's multichannel codes are left out.
    Text and codes have an output layer each: no probability goes to the other kind.  Tied embeddings are copied.
    A small language model of one's own (LanguageModel) stands in where none can be had.
    A tenth of the captions is dropped, which lets sampling use guidance.

Commands
    python -m minit2i.papers.lm                                        both stages on generated scenes, in minutes
    python train_vq.py --recipe lm --data path/to/images --out out/lm-vq
    python train_prior.py --model language_model --data path/to/book.txt --out out/book
    python train_prior.py --recipe lm --model llama --llama out/book/lm --data path/to/images \
        --vq out/lm-vq --out out/lm
    python sample.py --model out/lm --prompt "a red circle" --out lm.png

results: minit2i/experiments/README.md, "priors", "six-tokenizers", "six-systems", "language-model"
"""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save as tensors_to_bytes

from minit2i.checkpoint import check_free, load_model, read_config, read_hf, write_file
from minit2i.collectives import barrier
from minit2i.config import Settings
from minit2i.demo import VQGAN, demo
from minit2i.gpt import GPT, MODELS, GPTConfig, Prior
from minit2i.papers.taming import RECIPE as TAMING
from minit2i.papers.taming import Norm, VQGANConfig, VQGANDecoder, VQGANEncoder
from minit2i.sources import read_text_file
from minit2i.tokens import Text, new_vocabulary, read_pieces
from minit2i.vq import BACKBONES, Backbone

# --- STAGE 1: tokenizer ----------------------------------------------------------------------------------
# Shapes: B batch, h w a layer's grid, C latent channels.


class SpatialNorm(Norm):
    """GroupNorm scaled and shifted by the latents: x (B, ch, h, w), z (B, C, ...) -> the same shape as x.

    MoVQ, arXiv:2209.09002: y = phi(z) * norm(x) + psi(z), phi and psi 1x1 convolutions of the latents, repeated up to
    x's size; z is the latent that post_quant_conv has not seen yet.  It starts as plain GroupNorm: phi 1, psi 0.
    """

    def __init__(self, ch, groups, code_dim):
        super().__init__(ch, groups)
        self.conv_y, self.conv_b = nn.Conv2d(code_dim, ch, 1), nn.Conv2d(code_dim, ch, 1)
        for conv, start in ((self.conv_y, 1.0), (self.conv_b, 0.0)):
            nn.init.zeros_(conv.weight), nn.init.constant_(conv.bias, start)

    def forward(self, x, z):
        scale, shift = (F.interpolate(conv(z), x.shape[-2:]) for conv in (self.conv_y, self.conv_b))
        return super().forward(x, z) * scale + shift  # 1x1 commutes with repeating, and is cheaper before it


class MoVQDecoder(VQGANDecoder):
    """VQGAN's decoder with every norm modulated by the latents: (B, width, h, w) -> (B, maps, H, W)."""

    def __init__(self, cfg, width):
        super().__init__(cfg, width, norm=partial(SpatialNorm, groups=cfg.groups, code_dim=width))


BACKBONES["movq"] = Backbone(VQGANEncoder, MoVQDecoder, VQGANConfig)


# --- STAGE 2: prior --------------------------------------------------------------------------------------
# Shapes: B batch, T text length, n tokens of a text.


# A folder in the Hugging Face layout: config.json, tokenizer.model (SentencePiece), model.safetensors or its shards.

SHAPE = dict(
    pos="sequence", norm="rmsnorm", mlp="swiglu", qk_norm=False, sandwich=False
)  # of the Llama family's blocks
PLAIN = {  # config.json keys that must have one of these values: what they switch on is not implemented
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}


def llama_shape(folder):
    """The fields of GPTConfig that a language model's folder fixes; ValueError if it is not a plain Llama."""
    config = read_config(folder, ["model_type"])
    for key, values in PLAIN.items():
        if config.get(key) not in values:
            raise ValueError(
                f"{folder} is not a plain Llama: its config.json has {key} {config.get(key)!r}, not {values[-1]!r}"
            )
    rope = config.get("rope_parameters") or {}  # where newer versions of the layout keep the base
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder} scales its rotary positions ({rope['rope_type']}), which is not implemented")
    needed = "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "rms_norm_eps"
    if missing := [key for key in needed if key not in config]:
        raise ValueError(f"{folder} is not a plain Llama: its config.json lacks {', '.join(missing)}")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if (config.get("head_dim") or width // heads) * heads != width:  # null: as usual
        raise ValueError(f"{folder} has heads of {config['head_dim']}, not of hidden_size / num_attention_heads")
    return {
        "n_layer": config["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": config.get("num_key_value_heads") or heads,
        "n_embd": width,
        "mlp_inner": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    } | SHAPE


def llama_tensors(model):
    """Name in the Hugging Face layout -> the part of the prior's own weights that is the same tensor."""
    cfg, own = model.cfg, model.state_dict()
    part = {
        "model.embed_tokens.weight": own["embedding.weight"][: cfg.n_vocab],
        "model.norm.weight": own["norm.weight"],
        "lm_head.weight": own["text_head.weight"],
    }
    size = cfg.n_embd // cfg.n_head
    kv = (cfg.n_kv_head or cfg.n_head) * size
    for i in range(cfg.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        q, k, v = own[f"{ours}.attn.f.qkv.weight"].split([cfg.n_embd, kv, kv])
        gate, up = own[f"{ours}.mlp.f.up.weight"].chunk(2)
        part |= {f"{theirs}.self_attn.{name}_proj.weight": w for name, w in zip("qkv", (q, k, v))}
        part |= {f"{theirs}.mlp.gate_proj.weight": gate, f"{theirs}.mlp.up_proj.weight": up}
        for name, mine in (
            ("self_attn.o_proj", "attn.f.out"),
            ("mlp.down_proj", "mlp.f.down"),
            ("input_layernorm", "attn.norm"),
            ("post_attention_layernorm", "mlp.norm"),
        ):
            part[f"{theirs}.{name}.weight"] = own[f"{ours}.{mine}.weight"]
    return part


@torch.no_grad()
def load_llama(folder, model):
    """Copy a language model's weights into a prior of its shape; pads and codes keep their initialisation."""
    part = llama_tensors(model)
    missing = set(part)
    for name, tensor in read_hf(folder):
        if name not in part:
            if name.endswith("rotary_emb.inv_freq"):  # old folders keep what follows from the config
                continue
            raise ValueError(f"{folder} holds {name}, which a plain Llama does not have")
        rows = len(part[name])  # a vocabulary may be padded to a round number
        if tensor.shape[1:] != part[name].shape[1:] or len(tensor) < rows:
            raise ValueError(
                f"{name} in {folder} is {tuple(tensor.shape)}, its config.json says {tuple(part[name].shape)}"
            )
        part[name].copy_(tensor[:rows])
        missing.discard(name)
    if missing == {"lm_head.weight"}:  # tied
        part["lm_head.weight"].copy_(part["model.embed_tokens.weight"])
    elif missing:
        raise ValueError(f"{folder} lacks {sorted(missing)[0]}")


def llama_vocabulary(folder):
    """The language model's tokenizer.model (bytes); ValueError if there is none, or none with begin and end tokens."""
    path = Path(folder, "tokenizer.model")
    if not path.exists():
        raise ValueError(f"{folder} has no tokenizer.model: --llama needs a SentencePiece vocabulary")
    proto = path.read_bytes()
    pieces = read_pieces(proto)
    if pieces.bos_id() < 0 or pieces.eos_id() < 0:
        raise ValueError(f"{path} has no begin and end tokens, which captions need")
    return proto


def save_llama(folder, model, text):
    """Write the text part of a prior (pos sequence, rmsnorm, swiglu, no qk_norm) as a language model's folder.

    Read tokenizer.model with transformers' AutoTokenizer: its ids are ours, but for some rare letters (checked with 5.24).
    LlamaTokenizer leaves out the NFKC casefold that the words were learned with, and gives capitals other ids.  Words of
    --grow_vocab are ours alone: other programs spell them.
    """
    cfg = model.cfg
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": cfg.n_vocab,
        "hidden_size": cfg.n_embd,
        "intermediate_size": model.blocks[0].mlp.f.down.in_features,
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head or cfg.n_head,
        "max_position_embeddings": cfg.text_len,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_base,
        "tie_word_embeddings": False,
        "bos_token_id": text.sp.bos_id(),
        "eos_token_id": text.sp.eos_id(),
    }
    write_file(Path(folder, "config.json"), json.dumps(config, indent=1) + "\n")
    write_file(Path(folder, "tokenizer.model"), text.proto)
    tensors = {name: w.detach().float().cpu().contiguous() for name, w in llama_tensors(model).items()}
    write_file(Path(folder, "model.safetensors"), tensors_to_bytes(tensors, metadata={"format": "pt"}))


@dataclass(frozen=True)
class LlamaConfig(Settings):
    """Settings of --model llama."""

    group = "--model llama, --model language_model"
    llama: Annotated[str, "folder of the language model to start from; empty: its blocks, randomly initialised"] = ""
    llama_weights: Annotated[bool, "start from its weights, too, not only its shape and words (sec. 3)"] = True


class Llama(GPT):
    """A prior in the shape of a language model, starting from its weights (sec. 3).

    Embedding and output layers are extended by the image codes and the pads.  Deviations: text and codes have an output
    layer each, so no probability goes to the other kind; tied embeddings are copied, and part in training.
    """

    Config = LlamaConfig

    @classmethod
    def settle(cls, cfg):
        if cfg.condition != "text":
            raise ValueError(f"--model {cfg.model} reads text with its own words: leave out --condition")
        if cfg.n_vocab and not Path(cfg.llama, "config.json").exists():  # a checkpoint, which has the shape
            return cfg
        shape = llama_shape(cfg.llama) if cfg.llama else SHAPE
        for key, value in shape.items() if cfg.llama else ():
            if getattr(cfg, key) not in (value, getattr(GPTConfig, key)):
                raise ValueError(
                    f"--{key} {getattr(cfg, key)} conflicts with {cfg.llama}, which has {value}; leave it out"
                )
        return replace(cfg, **shape)

    @staticmethod
    def vocabulary(cfg):
        return llama_vocabulary(cfg.llama) if cfg.llama else None

    def check(self, text_weight):
        super().check(text_weight)
        path = Path(self.cfg.llama, "config.json")
        window = read_config(path.parent, ()).get("sliding_window") if self.cfg.llama and path.exists() else None
        if window and window < self.layout.length:  # Mistral's; in a shorter sequence it hides nothing
            raise ValueError(
                f"{path.parent} attends to the last {window} positions (sliding_window), which is not implemented, and "
                f"this sequence has {self.layout.length}; use a smaller --text_len or --image_size"
            )

    def load_start(self):
        if self.cfg.llama and self.cfg.llama_weights:
            load_llama(self.cfg.llama, self)


MODELS["llama"] = Llama


# --- a small language model of our own


def read_paragraphs(path):
    """A text file -> its paragraphs, separated by blank lines; ValueError if it cannot be read or is empty."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", read_text_file(path))]
    if not any(paragraphs):
        raise ValueError(f"{path} holds no text")
    return [part for part in paragraphs if part]


class Windows(torch.utils.data.Dataset):
    """Position p -> {"text": T consecutive tokens of a text, "codes": none (0,), "n_cut": 0}.

    tokens (n,); seed None: window after window (validation), else anywhere, a pure function of (seed, p).
    """

    def __init__(self, tokens, length, seed=None):
        self.tokens, self.length, self.seed = tokens, length, seed

    def __len__(self):
        return len(self.tokens) // self.length

    def __getitem__(self, p):
        if self.seed is None:
            start = p % len(self) * self.length
        else:
            start = int(np.random.default_rng((self.seed, p)).integers(len(self.tokens) - self.length + 1))
        return {"text": self.tokens[start : start + self.length], "codes": self.tokens[:0], "n_cut": 0}


def text_windows(paragraphs, text, val_fraction, seed):
    """Paragraphs, each between begin and end tokens, as one row of tokens -> training Windows, validation Windows
    (the end)."""
    begin, end = text.sp.bos_id(), text.sp.eos_id()
    tokens = torch.tensor([i for part in paragraphs for i in (begin, *text.sp.encode(part), end)])
    n_val = max(text.length, round(len(tokens) * val_fraction))
    if len(tokens) < n_val + text.length:
        raise ValueError(
            f"{len(tokens)} tokens do not make a training and a validation window of {text.length}; use a longer text, "
            "or a smaller --text_len"
        )
    return Windows(tokens[:-n_val], text.length, seed), Windows(tokens[-n_val:], text.length)


@dataclass
class TextData:
    """What a language model's run learns from; it has no images and shows no samples."""

    text: Text
    train_set: Windows
    val_set: Windows
    vq = None
    shown = None
    skipped = "no images"


def load_text_file(model, model_cfg, data_cfg, cfg, procs):
    """The plain text file --data -> TextData.  The text model is trained now, or the resumed run's own."""
    if Path(data_cfg.data).is_dir() or data_cfg.data.startswith("scenes"):
        raise ValueError(
            f"a language model learns from a text file, not from --data {data_cfg.data}; a prior starts from one with "
            "--model llama --llama FOLDER/lm"
        )
    paragraphs, path = read_paragraphs(data_cfg.data), Path(cfg.out, "text.model")
    try:
        fraction = float(data_cfg.val_data)
    except ValueError:
        raise ValueError(f"val_data {data_cfg.val_data} is not a fraction of the text file; use 0.02") from None
    if procs.main and not cfg.resume:
        check_free(Path(cfg.out, "lm"))
        write_file(path, new_vocabulary(cfg, model.vocabulary(model_cfg), paragraphs))
    barrier()
    text = Text(path.read_bytes(), model_cfg.text_len)
    return TextData(text, *text_windows(paragraphs, text, fraction, cfg.seed))


class LanguageModel(Llama):
    """Text alone, from a text file as --data; each checkpoint is also written as OUT/lm for --llama."""

    data = staticmethod(load_text_file)

    @classmethod
    def settle(cls, cfg):
        if cfg.mask != "causal":
            raise ValueError("a language model reads text causally: leave out --mask")
        return replace(super().settle(cfg), n_codes=0, grid_h=0, grid_w=0)

    @staticmethod
    def tensors_for(tensors, model):
        if isinstance(model, LanguageModel):
            return tensors
        raise ValueError("a language model starts a prior with --model llama --llama OUT/lm, not with --init")

    def states(self, batch):
        prefix, _ = self.condition(batch)
        return self.trunk(prefix)[:, :-1], None

    def loss(self, batch, train=False):
        states, target = self.states(batch)[0], self.text_targets(batch["text"])
        return {"text": self.head_loss(states, self.text_head.weight, target, self.cfg.fp32_logits)}

    def n_targets(self, batch):
        return {"text": (self.text_targets(batch["text"]) >= 0).sum()}

    def after_save(self, folder, text):
        averaged = load_model(folder, LanguageModel(self.cfg))
        save_llama(Path(folder, "lm"), averaged, text)

    def score(self, batch):
        return Prior.score(self, batch)

    def generate(self, *args, **how):
        return Prior.generate(self, *args, **how)

    def sample(self, *args, **how):
        return None


MODELS["language_model"] = LanguageModel


# --- RECIPE ----------------------------------------------------------------------------------------------

RECIPE = {  # sec. 3; sizes, codebook and steps are a laptop's, for images of 64 pixels
    "vq": TAMING["vq"] | dict(backbone="movq"),
    "prior": dict(norm="rmsnorm", mlp="swiglu", qk_norm=False, pos="sequence", mask="causal")
    | dict(loss_mean="tokens", bpe_dropout=0.0, ema=0.999),
}


if __name__ == "__main__":
    demo(
        "lm",
        __doc__,
        expect="red circles, cyan outlines, blue squares; green on black is lost",
        vq=VQGAN + " --gan_start 600 --steps 750",
    )
