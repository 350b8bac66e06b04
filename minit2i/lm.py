"""A prior that starts from a language model of the Llama family, and small ones of our own in the same layout.

A folder in the Hugging Face layout: config.json, tokenizer.model (SentencePiece), model.safetensors or its shards.
Such a model is the prior's blocks with RMSNorm, SwiGLU, grouped queries and rotary positions along the sequence;
embedding and output layers are extended by the image codes and the pads.
"Pre-trained Language Models Do Not Help Auto-regressive Text-to-Image Generation", arXiv:2311.16201 sec. 3.

Deviations: text and codes have an output layer each, as everywhere here, so that no probability goes to the other
kind; tied embeddings are copied, and part in training.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as tensors_to_bytes

from minit2i.checkpoint import read_config, read_hf, write_file
from minit2i.gpt import GPTConfig
from minit2i.tokens import Text

LM_SHAPE = dict(pos="sequence", norm="rmsnorm", mlp="swiglu", qk_norm=False, sandwich=False)  # of the family's blocks
PLAIN = {  # what config.json may say that these blocks do not do, with the values under which nothing is to be done
    "model_type": ("llama", "mistral"),
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}


def lm_config(folder):
    """The fields of GPTConfig that a language model's folder fixes.  ValueError if it is none of the Llama family."""
    config = read_config(folder)
    for key, values in PLAIN.items():
        if config.get(key) not in values:
            raise ValueError(
                f"{folder} is no plain Llama: its config.json has {key} {config.get(key)!r}, not {values[-1]!r}"
            )
    rope = config.get("rope_parameters") or {}  # where newer versions of the layout keep the base
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder} stretches its rotary positions ({rope['rope_type']}), which these blocks do not")
    needed = "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "rms_norm_eps"
    if lacking := [key for key in needed if key not in config]:
        raise ValueError(f"{folder} is no plain Llama: its config.json lacks {', '.join(lacking)}")
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
    } | LM_SHAPE


def in_shape(cfg, folder):
    """GPTConfig -> the same in a language model's shape.  ValueError if a flag asks for another than the folder's."""
    shape = lm_config(folder)
    for key, value in shape.items():
        if getattr(cfg, key) not in (value, getattr(GPTConfig, key)):
            raise ValueError(f"--{key} {getattr(cfg, key)} cannot be: {folder} has {value}; leave it out")
    return replace(cfg, **shape)


def places(model):
    """Name in the Hugging Face layout -> the part of the prior's own weights that is the same tensor."""
    cfg, own = model.cfg, model.state_dict()
    if not cfg.text_loss:
        raise ValueError("a language model reads and writes text: it starts causal priors without --n_encoder")
    size, kv = cfg.n_embd // cfg.n_head, model.blocks[0].attn.n_kv
    part = {
        "model.embed_tokens.weight": own["embedding.weight"][: cfg.n_vocab],
        "lm_head.weight": own["text_head.weight"],
        "model.norm.weight": own["norm.weight"],
    }
    for i in range(cfg.n_layer):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        q, k, v = own[f"{ours}.attn.qkv.weight"].split([cfg.n_head * size, kv * size, kv * size])
        gate, up = own[f"{ours}.mlp.up.weight"].chunk(2)
        part |= {f"{theirs}.self_attn.{name}_proj.weight": w for name, w in zip("qkv", (q, k, v))}
        part |= {f"{theirs}.mlp.gate_proj.weight": gate, f"{theirs}.mlp.up_proj.weight": up}
        for name, mine in (
            ("self_attn.o_proj", "attn.out"),
            ("mlp.down_proj", "mlp.down"),
            ("input_layernorm", "norm1"),
            ("post_attention_layernorm", "norm2"),
        ):
            part[f"{theirs}.{name}.weight"] = own[f"{ours}.{mine}.weight"]
    return part


@torch.no_grad()
def load_lm(folder, model):
    """The weights of a language model's folder into a prior of its shape, in place; pads and codes stay as they are."""
    part = places(model)
    missing = set(part)
    for name, tensor in read_hf(folder):
        if name not in part:
            if name.endswith("rotary_emb.inv_freq"):  # old folders keep what follows from the config
                continue
            raise ValueError(f"{folder} holds {name}, which a plain Llama does not have")
        rows = len(part[name])  # a vocabulary may be filled up to a round number
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


def lm_text(folder):
    """The language model's tokenizer.model, as bytes.  ValueError if there is none."""
    path = Path(folder, "tokenizer.model")
    if not path.exists():
        raise ValueError(f"{folder} has no tokenizer.model: --init_lm needs a SentencePiece vocabulary")
    proto = path.read_bytes()
    words = Text(proto, 1).sp
    if words.bos_id() < 0 or words.eos_id() < 0:
        raise ValueError(f"{path} has no marks for beginning and end, between which captions stand")
    return proto


def save_lm(folder, model, text):
    """The text part of a prior (GPT of --pos sequence, rmsnorm, swiglu, without qk_norm) as a language model's folder."""
    cfg = model.cfg
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": cfg.n_vocab,
        "hidden_size": cfg.n_embd,
        "intermediate_size": model.blocks[0].mlp.down.in_features,
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
    tensors = {name: w.detach().float().cpu().contiguous() for name, w in places(model).items()}
    write_file(Path(folder, "model.safetensors"), tensors_to_bytes(tensors, metadata={"format": "pt"}))


# --- a text file as training data ------------------------------------------------------------------------


def read_text(path):
    """A plain text file -> its paragraphs, which blank lines part.  ValueError if it cannot be read or is empty."""
    try:
        raw = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}; a plain text file is needed") from None
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", raw)]
    if not any(paragraphs):
        raise ValueError(f"{path} holds no text")
    return [part for part in paragraphs if part]


class Windows(torch.utils.data.Dataset):
    """Position p -> T tokens in a row of a text, in the form of tokens.Coded: (ids (T,), one code 0 (1,), no shrunk ones, 0).

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
        code = torch.zeros(1, dtype=torch.long)
        return self.tokens[start : start + self.length], code, code[:0], 0


def text_windows(paragraphs, text, val_fraction, seed):
    """Paragraphs, each between its marks, as one row of tokens -> training and validation Windows, the last part apart."""
    marks = [text.sp.bos_id()], [text.sp.eos_id()]
    tokens = torch.tensor([i for part in paragraphs for i in (*marks[0], *text.sp.encode(part), *marks[1])])
    n_val = max(text.length, round(len(tokens) * val_fraction))
    if len(tokens) < n_val + text.length:
        raise ValueError(
            f"{len(tokens)} tokens do not make a training and a validation window of {text.length}; use a longer text, "
            "or a smaller --text_len"
        )
    return Windows(tokens[:-n_val], text.length, seed), Windows(tokens[-n_val:], text.length)
