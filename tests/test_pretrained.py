"""The models that ship: small, without paths of the machine that made them, and able to follow a prompt."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from minit2i import sample_cli
from minit2i.experiments.evaluate import scene_prompts
from minit2i.experiments.oracle import check_scene
from minit2i.plot import to_pil
from minit2i.sample import SHIPPED, Pipeline
from minit2i.scenes import CATEGORIES


def test_the_files_are_small_and_hold_no_paths():
    files = [f for f in SHIPPED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 20e6
    assert not any(re.search(rb'"/|\.\./', f.read_bytes()) for f in files if f.suffix == ".json")


@pytest.mark.parametrize("held_out, least", [(False, 0.65), (True, 0.35)])
def test_images_show_what_the_prompt_says(held_out, least):
    """Four prompts per category; experiments/README.md has 500.  With captions ignored about 1 % would be right."""
    prompts = [(c, *prompt) for c in CATEGORIES for prompt in scene_prompts(c, held_out, 4, seed=7)]
    pipeline = Pipeline("scenes")
    images = pipeline([caption for _, caption, _, _ in prompts], replace(pipeline.sampling, n=1))
    right = [check_scene(to_pil(x[0]), claim, category) for (_, x), (category, _, claim, _) in zip(images, prompts)]
    assert np.mean(right) > least


def test_emoji_have_the_tone_of_the_prompt():
    """The mean of four concepts gets darker from tone to tone."""
    pipeline, light = Pipeline("emoji"), []
    for tone in ("light", "medium", "dark"):
        prompts = [f"{who} with {tone} skin tone" for who in ("woman astronaut", "thumbs up", "ear", "man judge")]
        images = torch.cat([x for _, x in pipeline(prompts, replace(pipeline.sampling, n=1))])
        assert (images[:, :, :2, :2] > 0.9).all()  # on white
        light.append(images.mean())
    assert light[0] > light[1] + 0.02 > light[2] + 0.04


def test_the_first_command_of_the_readme(tmp_path):
    prompt = ["--model", "emoji", "--prompt", "woman pilot with dark skin tone"]
    sample_cli.main([*prompt, "--out", f"{tmp_path}/sample.png"])
    assert Image.open(tmp_path / "sample.png").size == (4 * 64 + 3 * 2, 64)
