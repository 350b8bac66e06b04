"""The pipeline from a folder to images, with untrained models: seeds, given codes, windows, scores, captions."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from untrained import make_prior, make_vq

from minit2i import sample_cli
from minit2i.export import export
from minit2i.plot import to_pil
from minit2i.sample import Pipeline, SampleConfig, Sampler, sample_settings, score_codes

PROMPTS = ["a red circle", "", "a blue star"]
PRIORS = {
    "gpt": {},
    "masked": {"model": "masked"},
    "encoder": {"condition": "encoder", "n_encoder": 1},
    "coarse": {"condition": "text,coarse", "shrink": 2},
    "masked-encoder": {"model": "masked", "condition": "encoder", "n_encoder": 1, "pads": "hidden"},
    "rotary": {"pos": "rotary", "mask": "row,column"},
    "cogview": {"model": "cogview"},
    "captioner": {"model": "captioner"},
    "towers": {"model": "towers", "n_encoder": 1},
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """name of PRIORS -> Pipeline, made when asked for."""
    made, folder = {}, tmp_path_factory.mktemp("priors")

    def pipeline(name):
        if name not in made:
            made[name] = Pipeline(make_prior(folder / name, **PRIORS[name]), dtype=torch.float64)
            if name in ("captioner", "towers"):  # the others sample codes, which rounding must not decide
                made[name].model.float()
        return made[name]

    return pipeline


def config(pipeline, **settings):
    return replace(pipeline.sampling, **{"n": 2, "cfg_scale": 1.5} | settings)


def naive(pipeline, prompts, cfg, known=None, coarse=None):
    """Codes of a causal prior, one image at a time, all logits computed anew for each code."""
    model, n_image = pipeline.model, pipeline.model.cfg.n_image
    empty, out = pipeline.encode_prompts([cfg.negative]), []
    for prompt in prompts:
        text = pipeline.encode_prompts([prompt])
        for _ in range(cfg.n):
            codes, b = torch.zeros(1, n_image, dtype=torch.long), len(out)
            sampler, batch = Sampler(cfg, [cfg.seed + b]), {"codes": codes}
            noise = sampler.uniform(n_image)
            if coarse is not None:
                batch["coarse"] = coarse[b : b + 1].flatten(1)
            for k in range(n_image):
                texts = [text, empty] if sampler.guided else [text]
                logits = torch.cat([model.logits(batch | {"text": t})[1][:, k] for t in texts])
                code = sampler.pick(
                    sampler.filter(sampler.guide(logits, sampler.scale((k + 1) / n_image))), noise[:, k]
                )
                codes[:, k] = code if known is None or known[b].flatten()[k] < 0 else known[b].flatten()[k]
            out.append(codes.view(pipeline.grid))
    return torch.stack(out)


# --- codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"cfg_scale": 1.0}, {"cfg_schedule": "falling", "temperature": 2.0}, {"cfg_scale": 0.0, "temperature": 0.0}]
    + [{"top_k": 4, "top_p": 0.8, "temperature": 0.7, "min_p": 0.1}, {"cfg_scale": 3.0, "negative": "a blue star"}],
    ids=str,
)
def test_cached_sampling_equals_the_naive_loop(pipelines, settings):
    pipeline = pipelines("gpt")
    cfg = config(pipeline, **settings)
    codes = pipeline.sample_codes(PROMPTS, cfg)
    assert codes.equal(naive(pipeline, PROMPTS, cfg))
    if cfg.negative:
        assert not codes.equal(pipeline.sample_codes(PROMPTS, replace(cfg, negative="")))


@pytest.mark.parametrize("name", ["encoder", "rotary"])
def test_other_causal_priors_equal_the_naive_loop(pipelines, name):
    pipeline = pipelines(name)
    assert pipeline.sample_codes(PROMPTS, config(pipeline)).equal(naive(pipeline, PROMPTS, config(pipeline)))


def test_given_codes_are_kept_and_seen_by_what_follows(pipelines):
    pipeline = pipelines("gpt")
    cfg, prompts = config(pipeline), ["a red circle"]
    for places in ([], [0, 1, 9], [3], [15], range(16)):
        known = torch.full((2, 16), -1)
        known[:, list(places)] = torch.arange(2)[:, None]
        known = known.view(2, 4, 4)
        codes = pipeline.sample_codes(prompts, cfg, known)
        assert codes.equal(naive(pipeline, prompts, cfg, known)) and codes[known >= 0].equal(known[known >= 0])
    known[1, 2] = -1  # in one image only
    before = known.clone()
    assert pipeline.sample_codes(prompts, cfg, known).equal(naive(pipeline, prompts, cfg, known))
    assert known.equal(before), "the caller's tensors never change"


def test_a_super_resolution_prior_reads_each_image_of_its_own(pipelines):
    pipeline = pipelines("coarse")
    cfg, coarse = config(pipeline), torch.randint(0, 32, (6, 2, 2))
    assert pipeline.sample_codes(PROMPTS, cfg, coarse=coarse).equal(naive(pipeline, PROMPTS, cfg, coarse=coarse))
    large = torch.randint(0, 32, (6, 3, 4))
    assert pipeline.sample_codes(PROMPTS, cfg, coarse=large).shape == (6, 6, 8)


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """Folders of Muse's two priors: 4x4 codes of stride 8, and 8x8 of stride 4 with the others as a memory."""
    folder = tmp_path_factory.mktemp("cascade")
    base = make_prior(folder / "base", model="masked", condition="encoder", n_encoder=1, pads="hidden")
    fine = dict(condition="text,coarse_codes", coarse_vq=str(base / "vq"), coarse_ratio=2, grid_h=8, grid_w=8)
    larger = make_prior(folder / "larger", model="masked", vq=dict(stride=4, n_codes=16), n_codes=16, **fine)
    shutil.copytree(base / "vq", larger / "coarse_vq")
    return base, larger


def test_a_prior_of_finer_codes_reads_those_of_a_coarser_tokenizer(cascade):
    base, larger = (Pipeline(folder, dtype=torch.float64) for folder in cascade)
    assert larger.view_vq.hash == base.vq_hash != larger.vq_hash and larger.size == base.size == (32, 32)
    cfg, coarse = config(larger, cfg_scale=1.0), torch.randint(0, 32, (6, 4, 4))
    codes = larger.sample_codes(PROMPTS, cfg, coarse=coarse)
    for k, prompt in enumerate(PROMPTS):
        own = replace(cfg, seed=cfg.seed + 2 * k)
        assert larger.sample_codes([prompt], own, coarse=coarse[2 * k : 2 * k + 2]).equal(codes[2 * k : 2 * k + 2])
    other = (coarse + 1) % 32
    assert not larger.sample_codes(PROMPTS, cfg, coarse=other).equal(codes)
    seen, wide = [], torch.cat([coarse, other[:, :, :2]], 2)  # 8x12 codes: windows
    found = larger.sample_codes(PROMPTS, cfg, coarse=wide, watch=lambda c: seen.append(c.clone()))
    assert found.shape == (6, 8, 12) and (found >= 0).all() and len(seen) == 2
    with pytest.raises(ValueError, match="enlarges images"):
        larger.sample_codes(["x"], cfg)


def test_the_cascade_samples_restarts_and_refuses_other_codes(cascade, tmp_path):
    """8 steps for the second prior whatever --steps says; the same from float16 copies; no codes of another tokenizer."""
    base, larger = cascade
    flags = f"--device cpu --model {base} --prompt red --n 3 --steps 5 --cfg_scale 1.5 --batch 2 --enlarge"
    sample_cli.main([*flags.split(), str(larger), "--out", str(tmp_path / "images")])
    first, second = (Pipeline(folder) for folder in cascade)
    cfg = replace(second.sampling, n=3, cfg_scale=1.5, steps=5)
    codes = first.sample_codes(["red"], cfg)
    steps = []
    fine = second.sample_codes(["red"], cfg, coarse=codes, watch=lambda c: steps.append(1))
    assert len(steps) == 8
    paths = sorted((tmp_path / "images").iterdir())
    for path, image in zip(paths, second.decode(fine), strict=True):
        with Image.open(path) as im:
            assert abs(np.asarray(im).astype(int) - np.asarray(to_pil(image))).max() <= 1, (
                "batches of other sizes round"
            )
            assert im.text["model"] == f"{first.hash}+{second.hash}"
    paths[1].unlink()
    before = paths[0].stat().st_mtime_ns
    sample_cli.main([*flags.split(), str(larger), "--out", str(tmp_path / "images")])
    assert paths[1].exists() and paths[0].stat().st_mtime_ns != before  # all images of a prompt anew
    before = paths[0].stat().st_mtime_ns
    sample_cli.main([*flags.split(), str(larger), "--out", str(tmp_path / "images")])
    assert paths[0].stat().st_mtime_ns == before
    export(base, tmp_path / "half"), export(larger, tmp_path / "half-larger")
    assert (tmp_path / "half-larger" / "coarse_vq" / "model.safetensors").exists()
    for a, b in ((base, tmp_path / "half-larger"), (tmp_path / "half", larger)):
        flags = f"--device cpu --model {a} --prompt red --n 1 --steps 2 --enlarge {b} --out {tmp_path / 'x.png'}"
        sample_cli.main(flags.split())
    other = make_prior(tmp_path / "other", model="masked", vq={"seed": 3})
    message = f"{larger} has learned the codes of another tokenizer than {other} samples; .*--coarse_vq {other}/vq"
    with pytest.raises(ValueError, match=message):
        sample_cli.main([*flags.replace(str(tmp_path / "half "), f"{other} ").split()])


@pytest.mark.parametrize("name", ["gpt", "masked", "masked-encoder"])
def test_an_image_depends_on_its_seed_alone(pipelines, name):
    pipeline = pipelines(name)
    cfg = config(pipeline, n=3, seed=5)
    together = pipeline.sample_codes(PROMPTS, cfg)
    alone = [pipeline.sample_codes([p], replace(cfg, seed=5 + 3 * k)) for k, p in enumerate(PROMPTS)]
    assert together.equal(torch.cat(alone))
    assert pipeline.sample_codes(PROMPTS[:1], cfg, seeds=[9, 2, 6])[2].equal(together[1])
    for batch in (1, 2, 64):
        parts = pipeline.sample_prompts(list(enumerate(PROMPTS)), cfg, batch=batch)
        assert parts.flatten(0, 1).equal(together)
    images = [x for _, x in pipeline(PROMPTS, cfg, batch=4)]
    assert torch.allclose(torch.cat(images), pipeline.decode(together), atol=1e-4), (
        "float32 convolutions of other batches"
    )
    same = pipeline.sample_codes(["a red circle"] * 2, cfg)
    assert not same[:3].equal(same[3:]), "equal prompts have their own noise"
    assert [p for p, _ in pipeline("a red circle", cfg)] == ["a red circle"]


@pytest.mark.parametrize("name", ["gpt", "masked"])
def test_images_larger_than_the_grid_keep_what_is_given(pipelines, name):
    pipeline, seen = pipelines(name), []
    known = torch.full((2, 5, 7), -1)
    known[:, 2:4, 1:3] = 3
    codes = pipeline.sample_codes(["a red circle"], config(pipeline), known, watch=seen.append)
    assert codes.shape == (2, 5, 7) and (codes >= 0).all() and (codes[:, 2:4, 1:3] == 3).all()
    assert seen[-1].equal(codes) and len(seen) > 1


@pytest.mark.parametrize("name, n", [("gpt", 16), ("masked", 3)])
def test_sampling_is_watched(pipelines, name, n):
    pipeline, seen = pipelines(name), []
    cfg = config(pipeline, **({"steps": 3} if name == "masked" else {}))
    codes = pipeline.sample_codes(PROMPTS, cfg, watch=lambda c: seen.append(c.clone()))
    counts = [int((c >= 0).sum()) for c in seen]
    assert len(seen) == n and counts == sorted(counts) and seen[-1].equal(codes) and seen[0].shape == (6, 4, 4)


def test_nan_logits_are_a_clear_error(pipelines):
    with pytest.raises(ValueError, match="logits are NaN or Inf: cfg_scale 1e\\+38"):
        pipelines("gpt").sample_codes(["x"], config(pipelines("gpt"), cfg_scale=1e38, cfg_schedule="constant"))


def test_sizes_and_models_that_do_not_fit_are_refused(pipelines):
    gpt, coarse = pipelines("gpt"), pipelines("coarse")
    for pipeline, how, message in (
        (gpt, {"known": torch.full((2, 2, 2), -1)}, r"\(2, 2\) codes must be at least the prior's \(4, 4\)"),
        (gpt, {"coarse": torch.zeros(2, 2, 2).long()}, "does not enlarge images"),
        (coarse, {}, "enlarges images"),
        (coarse, {"coarse": torch.zeros(2, 2, 2).long(), "known": torch.full((2, 4, 5), -1)}, "multiples of 2"),
        (pipelines("captioner"), {}, "captioner samples no images"),
        (pipelines("towers"), {}, "towers samples no images"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.sample_codes(["x"], config(pipeline), **how)


# --- folders -------------------------------------------------------------------------------------------


def test_settings_come_from_class_and_folder(tmp_path):
    sampling = {"cfg_scale": 1.0, "steps": 7}
    pipeline = Pipeline(make_prior(tmp_path / "masked", model="masked", sampling=sampling))
    assert pipeline.sampling.cfg_scale == 1 and pipeline.sampling.steps == 7 and pipeline.sampling.n == SampleConfig().n
    assert not hasattr(sample_settings({"kind": "prior", "model": {"model": "gpt"}})(), "steps")
    with pytest.raises(ValueError, match="holds a tokenizer, not a prior"):
        Pipeline(make_vq(tmp_path / "vq"))
    with pytest.raises(ValueError, match="nowhere is not a checkpoint folder"):
        Pipeline("nowhere")


def test_hidden_codes_are_gray(pipelines):
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    codes[0, 1, 2] = -1
    image = pipelines("gpt").decode(codes)
    assert image.shape == (1, 3, 32, 32) and (image[:, :, 8:16, 16:24] == 0).all() and (image != 0).sum() > 2000


def test_another_decoder_of_the_same_codes(tmp_path):
    folder = make_prior(tmp_path / "prior")
    twice = make_vq(tmp_path / "twice", upsampler="wdsr", upscale=2, sr_ch=4, sr_blocks=1)
    plain, large = Pipeline(folder), Pipeline(folder, vq=twice)
    assert large.vq_hash == plain.vq_hash and large.vq.hash != plain.vq.hash
    codes = plain.sample_codes(["x"], config(plain))
    assert large.decode(codes).shape == (2, 3, 64, 64) and large.size == plain.size
    with pytest.raises(ValueError, match="has other codes than this prior's tokenizer"):
        Pipeline(folder, vq=make_vq(tmp_path / "other", seed=3))


# --- scores and captions ---------------------------------------------------------------------------------


def test_scores_of_codes(pipelines):
    gpt, prompt = pipelines("gpt"), "a red circle"
    codes = gpt.sample_codes([prompt], config(gpt, n=5))
    batch = {"text": gpt.encode_prompts([prompt] * 5), "codes": codes.flatten(1)}
    by_hand = F.cross_entropy(gpt.model.logits(batch)[1].float().mT, batch["codes"], reduction="none").mean(1)
    assert torch.allclose(score_codes(gpt, None, prompt, codes, batch=2), by_hand, atol=1e-5)
    for name in ("captioner", "towers"):
        judge = pipelines(name)
        text = judge.encode_prompts([prompt] * 5)
        expected = judge.model.score({"text": text, "codes": codes.flatten(1)})
        assert torch.allclose(score_codes(gpt, judge, prompt, codes, batch=2), expected, atol=1e-5)
    for name, message in (("masked", "gives no score"), ("coarse", "the judge is of a prior that enlarges images")):
        with pytest.raises(ValueError, match=message):
            score_codes(gpt, pipelines(name), prompt, codes)
    with pytest.raises(ValueError, match=r"scores images of \(4, 4\) codes, not \(5, 4\)"):
        score_codes(gpt, None, prompt, torch.zeros(1, 5, 4, dtype=torch.long))


def test_a_judge_with_another_tokenizer_reads_the_images(pipelines, tmp_path):
    gpt, judge = pipelines("gpt"), Pipeline(make_prior(tmp_path / "judge", model="captioner", vq={"seed": 9}))
    codes = gpt.sample_codes(["a blue star"], config(gpt))
    theirs = judge.vq.encode(gpt.decode(codes))
    text = judge.encode_prompts(["a blue star"] * 2)
    expected = judge.model.score({"text": text, "codes": theirs.flatten(1)})
    assert torch.allclose(score_codes(gpt, judge, "a blue star", codes), expected, atol=1e-5)


def test_captions(pipelines):
    captioner, images = pipelines("captioner"), torch.rand(2, 3, 32, 32) * 2 - 1
    captions = captioner.captions(images, config(captioner, n=3))
    assert [len(some) for some in captions] == [3, 3] and all(c.isprintable() for some in captions for c in some)
    later = captioner.captions(images[1:], config(captioner, n=3, seed=3))
    assert later[0] == captions[1]
    with pytest.raises(ValueError, match="writes no captions"):
        pipelines("gpt").captions(images, config(pipelines("gpt")))
