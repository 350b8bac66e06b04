"""Recipes: every flag is one that exists and works, flags given by hand win."""

from dataclasses import replace

import pytest
import torch
from test_train import PRIOR_FLAGS, VQ_FLAGS, call, pictures  # noqa: F401 (fixture)

import train_prior
import train_vq
from minit2i.checkpoint import read_config
from minit2i.data import DataConfig
from minit2i.flags import parse_flags
from minit2i.gpt import GPT, GPTConfig
from minit2i.recipes import RECIPES
from minit2i.train import TrainConfig
from minit2i.vq import VQ, VQConfig
from train_prior import PriorTrainConfig
from train_vq import VQTrainConfig

CONFIGS = {c.__name__: c for c in (VQConfig, VQTrainConfig, GPTConfig, PriorTrainConfig, DataConfig, TrainConfig)}


def flags(name, stage, *more):
    configs = (VQConfig, DataConfig, VQTrainConfig) if stage == "vq" else (GPTConfig, DataConfig, PriorTrainConfig)
    return parse_flags("", *configs, ["--out", "nowhere", "--recipe", name, *more])


@pytest.mark.parametrize("name", RECIPES)
def test_both_scripts_take_it_and_their_models_can_be_built(name):
    for config, values in RECIPES[name].items():
        assert set(values) <= set(CONFIGS[config].__dataclass_fields__), config
        assert all(type(v) is type(getattr(CONFIGS[config], k)) for k, v in values.items())
    vq_cfg, data_cfg, _ = flags(name, "vq")
    cfg, _, train = flags(name, "prior")
    with torch.device("meta"):
        grid = VQ(vq_cfg).grid(*[int(data_cfg.size or 64)] * 2)
        GPT(replace(cfg, n_vocab=train.vocab_size, n_codes=vq_cfg.n_codes, grid_h=grid[0], grid_w=grid[1]))
    for key, value in RECIPES[name]["GPTConfig"].items():
        assert getattr(cfg, key) == value


def test_a_flag_given_by_hand_wins():
    assert flags("parti", "prior")[0].mask == "conv" and flags("parti", "prior")[0].n_encoder == 2
    assert flags("parti", "prior", "--mask", "full")[0].mask == "full"
    assert flags("dalle", "vq")[0].quantizer == "gumbel" and flags("dalle", "prior")[2].beta2 == 0.96
    assert flags("dalle", "vq")[2].beta2 == 0.999
    big = flags("parti", "prior", "--model_size", "parti-3b")[0]
    assert (big.n_encoder, big.n_layer, big.n_embd, big.dropout) == (12, 36, 2048, 0.1)


def test_unknown_recipes_are_refused_and_help_shows_what_they_set(capsys):
    with pytest.raises(ValueError, match="recipe 'dali' is not known; use one of dalle"):
        flags("dali", "vq")
    with pytest.raises(SystemExit):
        flags("dalle", "prior", "--help")
    assert "dalle: --beta2 0.96 --clip 4" in capsys.readouterr().out


def test_a_run_remembers_its_recipe(pictures, tmp_path):  # noqa: F811
    common = ["--recipe", "parti", "--data", pictures, "--steps", 1]
    call(train_vq, *common, *VQ_FLAGS, "--perceptual", 0, "--gan", 0, "--out", tmp_path / "vq")
    more = ["--vq", tmp_path / "vq", "--cache", tmp_path / "cache", "--out", tmp_path / "prior"]
    call(train_prior, *common, *more, *PRIOR_FLAGS)
    call(train_prior, "--out", tmp_path / "prior", "--resume", "--steps", 2)
    config = read_config(tmp_path / "prior")
    assert config["train"]["recipe"] == "parti" and config["model"]["n_encoder"] == 2 and config["step"] == 2
    assert read_config(tmp_path / "vq")["model"]["backbone"] == "vit"
    with pytest.raises(ValueError, match="cannot change --recipe dalle .the run has 'parti'"):
        call(train_prior, "--out", tmp_path / "prior", "--resume", "--recipe", "dalle")
    with pytest.raises(ValueError, match="does not fit"):  # not --model_size left without effect
        call(train_prior, *common, *more[:-1], tmp_path / "b", "--init", tmp_path / "prior", "--model_size", "tiny")
