"""The pipeline from a folder to images, with untrained models: seeds, given codes, windows, scores, captions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from untrained import make_prior, make_vq

from minit2i.sample import Pipeline, SampleConfig, Sampler, sample_settings, score_codes

PROMPTS = ["a red circle", "", "a blue star"]
PRIORS = {
    "gpt": {},
    "masked": {"model": "masked"},
    "encoder": {"condition": "encoder", "n_encoder": 1},
    "coarse": {"condition": "text,coarse", "shrink": 2},
    "rotary": {"pos": "rotary", "mask": "row,column"},
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
                code = sampler.pick(sampler.filter(sampler.guide(logits, (k + 1) / n_image)), noise[:, k])
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


@pytest.mark.parametrize("name", ["gpt", "masked"])
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
    with pytest.raises(ValueError, match="holds a vq, not a prior"):
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
