"""The papers as named sets of flags: `--recipe parti` in both scripts.

A recipe holds defaults: flags given by hand win, and `--help` shows what each sets.  Sizes, codebooks and steps are a
laptop's, for pictures of 64 pixels; train_prior.py's --model_size, which wins over a recipe, has the papers' priors.

Deviations: captions are dropped in a tenth of the cases in all of them, so that all can be drawn with guidance, which
DALL-E, CogView and Taming do without.  Adafactor (Parti, Muse) is AdamW here, with the same betas and decay.
"""

from dataclasses import fields

VQGAN = {
    "VQConfig": {"backbone": "vqgan", "quantizer": "st", "stride": 8, "ch": 32, "n_res": 1},
    "VQTrainConfig": {"recon": "l1", "perceptual": 1.0, "gan": 0.8, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.0},
}
GPT2 = {"norm": "layernorm", "mlp": "gelu", "qk_norm": False, "pos": "learned"}

RECIPES = {
    "dalle": {  # 2102.12092 sec. 2, app. A.2, B
        "VQConfig": {
            "backbone": "dvae",
            "quantizer": "gumbel",
            "stride": 8,
            "ch": 32,
            "kl_steps": 500,
            "tau_steps": 2500,
        },
        "VQTrainConfig": {
            "recon": "logit_laplace",
            "beta2": 0.999,
            "weight_decay": 1e-4,
            "ema": 0.999,
            "min_lr": 0.0125,
        },
        "GPTConfig": GPT2 | {"mask": "dalle", "fp32_logits": True},
        "PriorTrainConfig": {
            "text_weight": 1 / 8,
            "image_weight": 7 / 8,
            "bpe_dropout": 0.1,
            "beta2": 0.96,
            "weight_decay": 0.045,
            "clip": 4.0,
            "block_scale": True,
        },
    },
    "cogview": {  # 2105.13290 sec. 2, app.
        "VQConfig": {"backbone": "vqvae", "quantizer": "ema", "stride": 8},
        "GPTConfig": GPT2
        | {"mask": "full", "norm": "pb_layernorm", "pb_relax": True, "sandwich": True, "embed_grad": 0.1},
        "PriorTrainConfig": {"text_weight": 0.5, "image_weight": 0.5, "bpe_dropout": 0.0, "weight_decay": 0.04},
    },
    "taming": VQGAN
    | {  # 2012.09841 sec. 3, 4; its condition stands before the codes and is not learned
        "GPTConfig": GPT2 | {"mask": "full"},
        "PriorTrainConfig": {"text_weight": 0.0, "image_weight": 1.0, "bpe_dropout": 0.0, "weight_decay": 0.01},
    },
    "parti": {  # 2206.10789 sec. 2, 4.1; 2110.04627 sec. 3
        "VQConfig": {"backbone": "vit", "quantizer": "st", "stride": 8, "code_dim": 32, "l2_norm": True, "n_res": 4},
        "VQTrainConfig": {"recon": "l2", "perceptual": 0.1, "gan": 0.1, "gan_adaptive": False},
        "GPTConfig": GPT2 | {"mask": "conv", "n_encoder": 2, "n_layer": 4, "dropout": 0.1},
        "PriorTrainConfig": {
            "text_weight": 0.0,
            "image_weight": 1.0,
            "bpe_dropout": 0.0,
            "beta2": 0.96,
            "weight_decay": 0.045,
            "clip": 4.0,
        },
    },
    "muse": VQGAN
    | {  # 2301.00704 sec. 2; --text_encoder names its T5
        "GPTConfig": GPT2 | {"objective": "masked", "mask": "auto"},
        "PriorTrainConfig": {
            "label_smoothing": 0.1,
            "text_weight": 0.0,
            "image_weight": 1.0,
            "bpe_dropout": 0.0,
            "beta2": 0.96,
            "weight_decay": 0.045,
        },
    },
    "lm": {  # 2311.16201 sec. 3; --init_lm names the language model, or gives way to a random start of this shape
        "VQConfig": {"backbone": "movq", "quantizer": "st", "stride": 8, "ch": 32, "n_res": 1},
        "VQTrainConfig": VQGAN["VQTrainConfig"],
        "GPTConfig": {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": False, "pos": "sequence", "mask": "full"},
        "PriorTrainConfig": {"text_weight": 0.5, "image_weight": 0.5, "bpe_dropout": 0.0, "ema": 0.999},
    },
}


def recipe(name):
    """'parti' -> {name of a config: {field: value}}.  ValueError if there is none of that name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is not known; use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def defaults(name, configs):
    """What a recipe ('': none) says of the fields of some config dataclasses -> {field: value}."""
    parts = recipe(name) if name else {}
    return {k: v for config in configs for k, v in parts.get(config.__name__, {}).items()}


def explain(configs):
    """The end of --help: what each recipe sets of the fields of some config dataclasses."""
    lines = ["recipes:"]
    for name in RECIPES:
        known = {f.name: f.default for config in configs for f in fields(config)}
        flags = " ".join(
            (f"--{k}" if v else f"--no-{k}")
            if isinstance(v, bool)
            else f"--{k} {v:.4g}"
            if isinstance(v, float)
            else f"--{k} {v}"
            for k, v in defaults(name, configs).items()
            if v != known[k]
        )
        lines.append(f"  {name}: {flags}")
    return "\n".join(lines)
