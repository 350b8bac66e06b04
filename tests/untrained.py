"""Checkpoint folders of tiny tokenizers and priors with random weights, for tests that need no training."""

from dataclasses import asdict
from pathlib import Path

import torch

from minit2i.checkpoint import save_model, write_file
from minit2i.gpt import build_prior
from minit2i.tokens import Text
from minit2i.vq import build_vq

CAPTIONS = ["a red circle", "a blue star", "three green triangles above a red square", "a bad one"]
VQ = {"stride": 8, "ch": 8, "n_res": 1, "n_codes": 32, "code_dim": 4}
PRIOR = {"n_layer": 2, "n_head": 2, "n_embd": 32, "text_len": 16, "n_codes": 32, "grid_h": 4, "grid_w": 4}


def random_model(build, settings, seed, std):
    """A model that is a function of the seed; matrices have this standard deviation, or 0: their own initialisation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(settings).requires_grad_(False)
        torch.manual_seed(seed)  # equal encoders whatever stands behind them
        for p in model.parameters():
            if std and p.dim() > 1:
                torch.nn.init.normal_(p, std=std)
    return model


def make_vq(folder, seed=0, std=0.3, image_size="24x32", **settings):
    """A tokenizer of stride 8 with 32 codes."""
    vq = random_model(build_vq, VQ | settings, seed, std)
    config = {"kind": "vq", "model": asdict(vq.cfg), "data": {"image_size": image_size}, "train": {}, "step": 0}
    save_model(folder, vq.state_dict(), config)
    return Path(folder)


def make_prior(folder, seed=1, std=0.3, vq={}, sampling=None, **settings):
    """A prior with its tokenizer and text model.

    std 0.3: logits differ from code to code; 0: they are nearly uniform.  vq: settings of the tokenizer; sampling: the
    "sampling" of config.json; settings: of the prior.
    """
    proto, settings = Text.train(CAPTIONS, 300), PRIOR | settings
    model = random_model(build_prior, settings | {"n_vocab": Text(proto, settings["text_len"]).n_vocab}, seed, std)
    size = f"{8 * settings['grid_h']}x{8 * settings['grid_w']}"
    data = {"data": "scenes:40", "image_size": size, "resize": 0, "workers": 0}
    config = {"kind": "prior", "model": asdict(model.cfg), "data": data, "train": {}, "step": 0}
    save_model(folder, model.state_dict(), config | ({"sampling": sampling} if sampling else {}))
    write_file(Path(folder, "text.model"), proto)
    make_vq(Path(folder, "vq"), **{"std": std, "image_size": size} | vq)
    return Path(folder)
