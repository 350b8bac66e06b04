"""Published tokenizers: folders as diffusers' VQModel.save_pretrained writes them, read and written.

    python train_prior.py --vq FOLDER --vq_range 0,1 ...                            the run keeps a copy in our layout
    python -m minit2i.export --model FOLDER --vq_range 0,1 --out out/published      the same by hand
    python -m minit2i.export --model out/vqgan --layout diffusers --out FOLDER      the other way

A folder holds config.json with "_class_name": "VQModel" and diffusion_pytorch_model.safetensors: a VQGAN
(papers/taming.py), or with "norm_type": "spatial" a MoVQ (papers/lm.py).  aMUSEd's tokenizer is one (licence OpenRAIL++,
pixels 0,1), VQ-Diffusion's (MIT, pixels -1,1) and Kandinsky 2.2's (Apache 2.0).  Codes equal diffusers'.

The config does not say the range of the pixels, and a wrong one gives wrong codes without an error: it must be given.
"""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import save as tensors_to_bytes

from minit2i.checkpoint import check_free, has_state, load_vq, read_config, read_hf, save_model, write_file
from minit2i.vq import Codebook, build_vq

WEIGHTS = "diffusion_pytorch_model"
DEFAULTS = {  # what a missing key means; other keys say nothing about codes and images
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,  # latent_channels
    "norm_type": "group",
    "mid_block_add_attention": True,
    "force_upcast": False,  # whether half precision overflows
}
DOWN, UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
KNOWN = {  # what the key's value, or each entry of its list, must be
    "in_channels": (3,),
    "out_channels": (3,),
    "down_block_types": DOWN,
    "up_block_types": UP,
    "act_fn": ("silu", "swish"),
    "norm_type": ("group", "spatial"),
}


# --- names -----------------------------------------------------------------------------------------------

RENAMED = [(r"\.skip\.", ".conv_shortcut."), (r"(attentions\.\d+)\.norm\.", r"\1.group_norm.")]
RENAMED += [(r"\.([qkv])\.", r".to_\1."), (r"(attentions\.\d+)\.out\.", r"\1.to_out.0.")]
SPATIAL = [("group_norm", "spatial_norm"), (r"(norm\w*)\.(weight|bias)$", r"\1.norm_layer.\2")]
OLDER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def level_names(side, kinds, n_blocks):
    """Yield the names of modules with weights at each resolution, in order of use; side: down or up."""
    for i, kind in enumerate(kinds):
        for j in range(n_blocks):
            yield f"{side}_blocks.{i}.resnets.{j}"
            if kind.startswith("Attn"):
                yield f"{side}_blocks.{i}.attentions.{j}"
        if i < len(kinds) - 1:
            yield f"{side}_blocks.{i}.{side}samplers.0.conv"


def their_keys(own, theirs):
    """Our keys of a tokenizer's weights, and diffusers' config -> {our key: diffusers' key}; counts have none.

    Our layers are a list in order of use, theirs are nested by resolution; what is inside a block has nearly one name.
    """
    n, attention = theirs["layers_per_block"], theirs["mid_block_add_attention"]
    middle = ["mid_block.resnets.0", *(["mid_block.attentions.0"] if attention else []), "mid_block.resnets.1"]
    down, up = level_names("down", theirs["down_block_types"], n), level_names("up", theirs["up_block_types"], n + 1)
    names = {
        "encoder": ["conv_in", *down, *middle, "conv_norm_out", "conv_out", "quant_conv"],
        "decoder": ["post_quant_conv", "conv_in", *middle, *up, "conv_norm_out", "conv_out"],
    }
    keys = {"quantizer.codebook": "quantize.embedding.weight"}
    for side in names:
        mine = [k.split(".", 3) for k in own if k.startswith(f"{side}.layers.")]  # side, "layers", place, inside
        name = dict(zip(dict.fromkeys(place for _, _, place, _ in mine), names[side], strict=True))
        for _, _, place, inside in mine:
            key = f"{name[place]}.{inside}" if "quant_conv" in name[place] else f"{side}.{name[place]}.{inside}"
            for old, new in RENAMED + (SPATIAL if side == "decoder" and theirs["norm_type"] == "spatial" else []):
                key = re.sub(old, new, key)
            keys[f"{side}.layers.{place}.{inside}"] = key
    return keys


# --- reading ---------------------------------------------------------------------------------------------


def is_vqmodel(folder):
    """Whether a folder holds diffusers' VQModel; ValueError if it holds another of its models, which has no codes."""
    path = Path(folder, "config.json")
    kind = read_config(folder, ()).get("_class_name") if path.exists() else None
    if kind not in (None, "VQModel"):
        raise ValueError(f"{folder} holds diffusers' {kind}, which is no tokenizer with codes; a VQModel is one")
    return bool(kind)


def read_theirs(folder):
    """config.json of a VQModel with all keys of DEFAULTS -> dict.  ValueError names what we do not have."""
    theirs = DEFAULTS | read_config(folder, ["_class_name"])
    for key, values in KNOWN.items():
        for value in theirs[key] if isinstance(theirs[key], list) else [theirs[key]]:
            if value not in values:
                raise ValueError(f"{folder} has {key} {value!r}, which is not implemented; known: {values}")
    if theirs["norm_type"] == "spatial" and theirs["norm_num_groups"] != 32:
        raise ValueError(f"{folder} has norm_num_groups {theirs['norm_num_groups']} and spatial norms, which have 32")
    n_levels = {len(theirs[key]) for key in ("block_out_channels", "down_block_types", "up_block_types")}
    if len(n_levels) > 1:
        raise ValueError(f"{folder}/config.json: block_out_channels, down_ and up_block_types differ in length")
    return theirs


def check_range(folder, pixels):
    """ValueError unless pixels is 'low,high'."""
    if not pixels:
        raise ValueError(
            f"{folder} does not say the range of its pixels, and a wrong one gives wrong codes: give --vq_range 0,1 "
            "(aMUSEd's tokenizer) or --vq_range -1,1 (VQ-Diffusion's)"
        )
    number = r"-?\d+(?:\.\d+)?"
    if not (found := re.fullmatch(f"({number}),({number})", pixels)) or float(found[1]) >= float(found[2]):
        raise ValueError(f"vq_range {pixels!r} is not two rising numbers; use 0,1 or -1,1")


def tokenizer_config(folder, pixels="", image_size=""):
    """config.json of a tokenizer in our layout; a VQModel's is translated, for images whose pixels are low,high."""
    if not is_vqmodel(folder):
        if pixels:
            raise ValueError(f"--vq_range is for folders that diffusers wrote; {folder} knows its own: leave it out")
        return read_config(folder)
    check_range(folder, pixels)
    theirs = read_theirs(folder)
    chs, middle = theirs["block_out_channels"], ["mid"] if theirs["mid_block_add_attention"] else []
    down, up = theirs["down_block_types"], theirs["up_block_types"][::-1]  # both from the highest resolution on
    down, up = ([str(2**i) for i, kind in enumerate(kinds) if kind.startswith("Attn")] for kinds in (down, up))
    settings = {
        "backbone": "movq" if theirs["norm_type"] == "spatial" else "vqgan",
        "stride": 2 ** (len(chs) - 1),
        "ch": math.gcd(*chs),
        "ch_mult": ",".join(str(ch // math.gcd(*chs)) for ch in chs),
        "n_res": theirs["layers_per_block"],
        "attention": ",".join([*down, *middle]) or "none",
        "decoder_attention": "" if up == down else ",".join([*up, *middle]) or "none",
        "norm_groups": theirs["norm_num_groups"],
        "z_channels": theirs["latent_channels"],
        "quantizer": "st",
        "n_codes": theirs["num_vq_embeddings"],
        "code_dim": theirs["vq_embed_dim"] or theirs["latent_channels"],
        "pixels": pixels,
        "float32": theirs["force_upcast"],
    }
    try:
        with torch.device("meta"):
            model = asdict(build_vq(settings).cfg)
    except ValueError as e:
        raise ValueError(f"{folder} cannot be read: {e}") from None
    return {"kind": "vq", "model": model, "data": {"image_size": image_size}, "train": {}, "step": 0}


def read_weights(folder, settings):
    """A VQModel's weights under our names.  ValueError if they are pickled, or not those of config.json."""
    with torch.device("meta"):
        own = build_vq(settings).state_dict()
    if Path(folder, f"{WEIGHTS}.bin").exists() and not any(Path(folder).glob(f"{WEIGHTS}.safetensors*")):
        raise ValueError(
            f"{folder} has its weights in {WEIGHTS}.bin, a pickle, which can run code; save it again with diffusers: "
            "VQModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    found = {}
    for key, tensor in read_hf(folder, WEIGHTS):
        for old, new in OLDER.items():
            key = key.replace(old, new)
        found[key] = tensor
    tensors = {"quantizer.ema_count": torch.ones(own["quantizer.ema_count"].shape)}
    for key, name in their_keys(own, read_theirs(folder)).items():
        if name not in found:
            raise ValueError(f"{folder} lacks {name}, which its config.json asks for")
        tensor, shape = found.pop(name), own[key].shape
        if tensor.shape == (*shape, 1, 1):  # attention as 1x1 convolutions
            tensor = tensor[..., 0, 0]
        if tensor.shape != shape:
            raise ValueError(f"{name} in {folder} is {tuple(tensor.shape)}, its config.json says {tuple(shape)}")
        tensors[key] = tensor.float()
    if found:
        raise ValueError(f"{folder} holds {min(found)}, which the VQModel of its config.json does not have")
    return tensors


def copy_tokenizer(folder, out, pixels="", image_size=""):
    """Copy a tokenizer's folder; a VQModel's is converted to our layout, for images whose pixels are low,high.

    The range is also written beside the weights, whose hash names the cache of codes.
    """
    config, copied = tokenizer_config(folder, pixels, image_size), Path(out, "config.json")
    if has_state(out) or copied.exists() and read_config(out, ()) != config:
        check_free(out)  # the same tokenizer's copy, which a failed start left, is no loss
    if is_vqmodel(folder):
        return save_model(out, read_weights(folder, config["model"]), config, pixels=pixels)
    load_vq(folder)  # what is wrong with it is said before anything is written
    for name in ("config.json", "model.safetensors"):
        write_file(Path(out, name), Path(folder, name).read_bytes())


# --- writing ---------------------------------------------------------------------------------------------


def our_config(vq):
    """diffusers' config of a tokenizer of ours.  ValueError if VQModel cannot be like it."""
    cfg, encoder, decoder = vq.cfg, vq.encoder, vq.decoder
    spatial = (cfg.decoder or cfg.backbone) == "movq"
    if not all(hasattr(net, "levels") for net in (encoder, decoder)):
        raise ValueError("diffusers' VQModel is a vqgan or a movq, in encoder and decoder; this tokenizer is not")
    if cfg.upsampler != "none" or cfg.output != "rgb" or not isinstance(vq.quantizer, Codebook):
        raise ValueError("diffusers' VQModel takes the nearest of its codes and gives plain images; this tokenizer not")
    (chs, down), (again, up) = (zip(*net.levels) for net in (encoder, decoder))
    if chs != again or (cfg.decoder_n_res or cfg.n_res) != cfg.n_res or encoder.mid != decoder.mid:
        raise ValueError("diffusers' VQModel has a decoder of the encoder's size; this one's was changed")
    if spatial and cfg.z_channels not in (0, cfg.code_dim):
        raise ValueError("diffusers' VQModel of spatial norms has as many z_channels as code_dim; this tokenizer not")
    groups = sorted({m.num_groups for m in vq.modules() if isinstance(m, nn.GroupNorm)})
    if len(groups) > 1 or spatial and groups != [32]:
        rule = "32 groups in each norm of a movq" if spatial else "as many groups in each norm"
        has = ", ".join(map(str, groups))
        raise ValueError(f"diffusers' VQModel has {rule}; this tokenizer has {has}: train one with --ch 128")
    return DEFAULTS | {
        "_class_name": "VQModel",
        "down_block_types": [DOWN[attend] for attend in down],
        "up_block_types": [UP[attend] for attend in up[::-1]],
        "block_out_channels": chs,
        "layers_per_block": cfg.n_res,
        "latent_channels": cfg.z_channels or cfg.code_dim,
        "num_vq_embeddings": cfg.n_codes,
        "norm_num_groups": groups[0],
        "vq_embed_dim": cfg.code_dim,
        "norm_type": "spatial" if spatial else "group",
        "mid_block_add_attention": encoder.mid,
        "force_upcast": cfg.float32,
    }


def write_vqmodel(folder, out):
    """Write a vqgan or movq of ours as a VQModel's folder -> the range of its pixels, which that does not say."""
    vq = load_vq(folder)
    check_free(out)
    theirs, own = our_config(vq), vq.state_dict()
    own["quantizer.codebook"] = vq.quantizer.norm(own["quantizer.codebook"])  # l2_norm: the nearest code stays the same
    tensors = {name: own[key].contiguous() for key, name in their_keys(own, theirs).items()}
    write_file(Path(out, "config.json"), json.dumps(theirs, indent=2) + "\n")
    write_file(Path(out, f"{WEIGHTS}.safetensors"), tensors_to_bytes(tensors, metadata={"format": "pt"}))
    return vq.cfg.pixels
