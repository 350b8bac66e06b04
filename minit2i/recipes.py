"""The papers as named sets of flags: `--recipe parti` in both scripts.

A recipe holds defaults: flags given by hand win, and `--help` shows what each sets.  Sizes, codebooks and steps are a
laptop's, for pictures of 64 pixels; train_prior.py's --model_size, which wins over a recipe, has the papers' priors.

Deviations: captions are dropped in a tenth of the cases in all of them, so that all can be drawn with guidance, which
DALL-E, CogView and Taming do without.  CogView's marks between text and codes are left out.  Adafactor (Parti, Muse) is
AdamW here, with the same betas and decay.  Every learning rate falls along a cosine, and weights are averaged at every
update (DALL-E's prior, app. B: at plateaus, and every 25 updates).
"""

from dataclasses import fields

VQGAN = dict(
    VQConfig=dict(backbone="vqgan", quantizer="st", stride=8, ch=32, n_res=1),
    VQTrainConfig=dict(recon="l1", perceptual=1.0, gan=0.8, beta1=0.5, beta2=0.9, weight_decay=0.0),
)
GPT2 = dict(norm="layernorm", mlp="gelu", qk_norm=False, pos="learned")
ADAFACTOR = dict(beta2=0.96, weight_decay=0.045)
IMAGES = dict(text_weight=0.0, image_weight=1.0, bpe_dropout=0.0)  # captions are read, not learned
BOTH = dict(text_weight=0.5, image_weight=0.5, bpe_dropout=0.0)

RECIPES = {
    "dalle": dict(  # 2102.12092 sec. 2, app. A.2, B
        VQConfig=dict(backbone="dvae", quantizer="gumbel", stride=8, ch=32, kl_steps=500, tau_steps=2500),
        VQTrainConfig=dict(recon="logit_laplace", beta2=0.999, weight_decay=1e-4, ema=0.999, min_lr=0.0125),
        GPTConfig=GPT2 | dict(mask="dalle", fp32_logits=True),
        PriorTrainConfig=ADAFACTOR
        | dict(text_weight=1 / 8, image_weight=7 / 8, bpe_dropout=0.1, clip=4.0, block_scale=True),
    ),
    "cogview": dict(  # 2105.13290 sec. 2, app.
        VQConfig=dict(backbone="vqvae", quantizer="ema", stride=8),
        GPTConfig=GPT2 | dict(mask="full", norm="pb_layernorm", pb_relax=True, sandwich=True, embed_grad=0.1),
        PriorTrainConfig=BOTH | dict(weight_decay=0.04),
    ),
    "taming": VQGAN
    | dict(  # 2012.09841 sec. 3, 4; its condition stands before the codes and is not learned
        GPTConfig=GPT2 | dict(mask="full"), PriorTrainConfig=IMAGES | dict(weight_decay=0.01)
    ),
    "parti": dict(  # 2206.10789 sec. 2, 4.1; 2110.04627 sec. 3
        VQConfig=dict(backbone="vit", quantizer="st", stride=8, code_dim=32, l2_norm=True, n_res=4),
        VQTrainConfig=dict(recon="l2", perceptual=0.1, gan=0.1, gan_adaptive=False),
        GPTConfig=GPT2 | dict(mask="conv", n_encoder=2, n_layer=4, dropout=0.1),
        PriorTrainConfig=IMAGES | ADAFACTOR | dict(clip=4.0),
    ),
    "muse": VQGAN
    | dict(  # 2301.00704 sec. 2; --text_encoder names its T5
        GPTConfig=GPT2 | dict(objective="masked", mask="auto"),
        PriorTrainConfig=IMAGES | ADAFACTOR | dict(label_smoothing=0.1),
    ),
    "lm": dict(  # 2311.16201 sec. 3; --init_lm names the language model, or gives way to a random start of this shape
        VQConfig=dict(backbone="movq", quantizer="st", stride=8, ch=32, n_res=1),
        VQTrainConfig=VQGAN["VQTrainConfig"],
        GPTConfig=dict(norm="rmsnorm", mlp="swiglu", qk_norm=False, pos="sequence", mask="full"),
        PriorTrainConfig=BOTH | dict(ema=0.999),
    ),
}


def defaults(name, configs):
    """What a recipe ('': none) says of the fields of some config dataclasses -> {field: value}.  ValueError if it is none."""
    if name not in ("", *RECIPES):
        raise ValueError(f"recipe {name!r} is not known; use one of {', '.join(RECIPES)}")
    parts = RECIPES.get(name, {})
    return {k: v for config in configs for k, v in parts.get(config.__name__, {}).items()}


def as_flag(name, value):
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:.4g}" if isinstance(value, float) else f"--{name} {value}"


def explain(configs):
    """The end of --help: what each recipe sets of the fields of some config dataclasses."""
    lines = ["recipes:"]
    for name in RECIPES:
        known = {f.name: f.default for config in configs for f in fields(config)}
        flags = (as_flag(k, v) for k, v in defaults(name, configs).items() if v != known[k])
        lines.append(f"  {name}: {' '.join(flags)}")
    return "\n".join(lines)
