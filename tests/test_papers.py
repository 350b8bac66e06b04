"""The papers' files: recipes that work, sizes as published, one order of sections (test_imports.py: who imports whom)."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PRIOR_FLAGS, VQ_FLAGS
from processes import call

import train_prior
import train_vq
from minit2i import papers, tokenizer_losses, vq
from minit2i.checkpoint import read_config
from minit2i.config import annotations
from minit2i.data import DataConfig
from minit2i.flags import parse_flags
from minit2i.fp16 import BlockScaler, PBLayerNorm, make_scaler
from minit2i.gpt import CONDITIONS, MODELS, NORMS, GPTConfig, build_prior, prior_config
from minit2i.papers import PAPERS, RECIPES, SIZES
from minit2i.tokenizer_losses import output_of
from minit2i.vq import VQConfig, build_vq

FOLDER = Path(papers.__file__).parent
VQ_PARTS = vq.PARTS | tokenizer_losses.PARTS


def vq_configs(flags):
    configs = (VQConfig, train_vq.VQDataConfig, train_vq.VQTrainConfig)
    recipes = {name: recipe["vq"] for name, recipe in RECIPES.items()}
    return parse_flags("", configs, VQ_PARTS, recipes, argv=f"--out nowhere {flags}".split())


def prior_configs(flags):
    configs, parts = (GPTConfig, DataConfig, train_prior.PriorTrainConfig), {"model": MODELS, "condition": CONDITIONS}
    recipes = {name: recipe["prior"] for name, recipe in RECIPES.items()}
    return parse_flags("", configs, parts, recipes, SIZES, f"--out nowhere {flags}".split())


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_tokenizer_recipe_takes_effect(name):
    """Each is a field of the configs with the chosen parts, has its type, and the network can be built."""
    fields = {
        field: (value, config) for config in vq_configs(f"--recipe {name}") for field, value in vars(config).items()
    }
    for key, value in RECIPES[name]["vq"].items():
        found, config = fields[key]
        assert found == value and type(value) is annotations(type(config))[key].type, key
    settings = RECIPES[name]["vq"]
    with torch.device("meta"):
        model = build_vq(settings | {"output": output_of(settings.get("recon", "l2"))})
    assert model.grid(64, 64) == (8, 8)


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_prior_recipe_takes_effect(name):
    """Each is a field of the configs with the chosen parts, has its type, and the prior can be built and scaled."""
    model_cfg, data_cfg, cfg = prior_configs(f"--recipe {name} --dry_run")
    fields = {key: (value, config) for config in (model_cfg, data_cfg, cfg) for key, value in vars(config).items()}
    for key, value in RECIPES[name]["prior"].items():
        found, config = fields[key]
        assert found == value and type(value) is annotations(type(config))[key].type, key
    kind, model_cfg = prior_config(vars(model_cfg))
    with torch.device("meta"):
        model = kind(replace(model_cfg, n_vocab=cfg.vocab_size, n_codes=1024, grid_h=8, grid_w=8))
    model.check(cfg.text_weight)
    half = SimpleNamespace(world=1, device=torch.device("meta"), precision="fp16")
    assert isinstance(make_scaler(model, cfg, half), BlockScaler) == cfg.block_scale
    assert model.layout == (model.layout.n_prefix, 8, 8)


def test_priors_of_the_recipes():
    """What their papers are known for."""
    plain = dict(n_vocab=50, n_codes=20, grid_h=4, grid_w=4)
    with torch.device("meta"):
        dalle, taming, cogview, parti, muse, lm = (
            build_prior(RECIPES[name]["prior"] | plain)
            for name in ("dalle", "taming", "cogview", "parti", "muse", "lm")
        )
    assert {*dalle.masks} == {"row", "column", "conv"} and dalle.image_head.fp32 and dalle.predicts_text
    assert {*taming.masks} == {"causal"} and taming.window_plan == "every_place"
    assert isinstance(cogview.norm, PBLayerNorm) and isinstance(cogview.blocks[0].attn.after, PBLayerNorm)
    assert cogview.blocks[0].attn.f.alpha == 32 and cogview.cfg.embed_grad == 0.1
    assert [*parti.conditions] == ["encoder"] and {*parti.masks} == {"conv"} and not parti.predicts_text
    assert isinstance(muse, MODELS["masked"]) and {*muse.masks} == {"bidirectional"} and not muse.predicts_text
    assert muse.blocks[0].cross is not None and [*muse.conditions] == ["encoder"] and muse.cfg.pads == "hidden"
    assert lm.cfg.pos == "sequence" and isinstance(lm.norm, NORMS["rmsnorm"])


SIZES_OF_PAPERS = {  # billions of parameters, heads and embeddings included
    "dalle-12b": 12.2905,
    "cogview-4b": 3.9278,
    "parti-350m": 0.3858,
    "parti-3b": 3.0872,
    "parti-20b": 20.5364,
}


@pytest.mark.parametrize("name", SIZES_OF_PAPERS)
def test_sizes_of_the_papers(name):
    settings = {k: v for k, v in SIZES[name].items() if k not in ("n_vocab", "n_codes", "grid_h", "grid_w")}
    chosen = prior_configs(f"--model_size {name}")[0]
    assert {k: getattr(chosen, k) for k in settings} == settings
    with torch.device("meta"):
        model = build_prior(SIZES[name])
    assert abs(sum(w.numel() for w in model.parameters()) / 1e9 - SIZES_OF_PAPERS[name]) < 1e-4


def test_a_given_flag_wins_over_a_recipe():
    assert vq_configs("--recipe dalle")[0].quantizer == "gumbel" and vq_configs("--recipe dalle")[2].beta2 == 0.999
    assert vq_configs("--recipe dalle --quantizer ema")[0].quantizer == "ema"
    plain = vq_configs("--recipe taming --discriminator none --perceptual none")[2]
    assert not hasattr(plain, "gan") and plain.recon == "l1"
    assert prior_configs("--recipe parti")[0].mask == "conv" and prior_configs("--recipe dalle")[2].beta2 == 0.96
    assert prior_configs("--recipe parti --mask causal")[0].mask == "causal"
    large = prior_configs("--recipe parti --model_size parti-3b")[0]
    assert (large.n_encoder, large.n_layer, large.n_embd, large.dropout) == (12, 36, 2048, 0.1)


def test_unknown_recipes_are_refused_and_help_shows_what_they_set(capsys):
    with pytest.raises(ValueError, match="recipe 'dali' is not known; use one of taming, dalle"):
        vq_configs("--recipe dali")
    with pytest.raises(ValueError, match="recipe 'dali' is not known; use one of taming, dalle"):
        prior_configs("--recipe dali")
    with pytest.raises(SystemExit):
        vq_configs("--help")
    assert "dalle: --backbone dvae" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        prior_configs("--help")
    assert re.search("dalle: .*--beta2 0.96 --weight_decay", " ".join(capsys.readouterr().out.split()))


def test_help_shows_at_most_50_flags(capsys):
    """And a part's own ones once it is chosen."""
    with pytest.raises(SystemExit):
        vq_configs("--help")
    text = capsys.readouterr().out
    assert len(re.findall(r"^  (?:-h, )?--\w+", text, re.M)) <= 50 and "--gan_start" not in text
    with pytest.raises(SystemExit):
        vq_configs("--discriminator patch --help")
    assert "--gan_start" in capsys.readouterr().out


def test_a_run_remembers_its_recipe(images, tmp_path):
    common = f"--recipe parti --data {images} --steps 1"
    tokenizer, prior = tmp_path / "vq", tmp_path / "prior"
    call(train_vq, f"{common} {VQ_FLAGS} --perceptual none --discriminator none --out {tokenizer}")
    given = PRIOR_FLAGS.replace("--mask dalle", "")
    call(train_prior, f"{common} {given} --vq {tokenizer} --cache {tmp_path / 'cache'} --out {prior}")
    call(train_prior, f"--out {prior} --resume --steps 2")
    config = read_config(prior)
    assert config["train"]["recipe"] == "parti" and config["model"]["n_encoder"] == 2 and config["step"] == 2
    assert read_config(tokenizer)["model"]["backbone"] == "vit"
    with pytest.raises(ValueError, match="cannot change --recipe dalle .the run has 'parti'"):
        call(train_prior, f"--out {prior} --resume --recipe dalle")


# --- the files ---

SECTIONS = ["STAGE 1: tokenizer", "STAGE 2: prior", "RECIPE"]


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_has_the_same_order_of_sections(name):
    source = (FOLDER / f"{name}.py").read_text()
    rulers = [line for line in source.splitlines() if re.match(r"# -+ .* -+$", line)]
    assert [ruler.strip("#- ") for ruler in rulers] == SECTIONS and {*map(len, rulers)} == {107}
    assert all(
        word in PAPERS[name].__doc__ for word in ("arXiv:", "What it adds", "What differs here", "Commands", "results:")
    )
    assert f"train_vq.py --recipe {name}" in PAPERS[name].__doc__
