"""sample.py and the priors that decode differently, end to end: prompts that stream, masked priors, captioners, larger pictures."""

import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train_prior
from minit2i import metrics, train
from minit2i.checkpoint import load_tensors, read_config, save_model
from minit2i.data import Folder
from minit2i.flags import pick
from minit2i.sample import Painter, SampleConfig
from minit2i.vq import VQ, VQConfig
from test_train import PRIOR_FLAGS, call, losses, pictures, prior, stop_at, vq  # noqa: F401


@pytest.fixture(scope="module")
def trained(vq, prior, pictures):  # noqa: F811
    """A function: name, flags -> the folder of a prior trained two steps with them."""

    def make(name, *flags):
        out = prior.parent / name
        if not out.exists():
            cache = prior.parent / "cache"
            common = ("--data", pictures, "--vq", vq, "--out", out, "--cache", cache, "--steps", 2, "--eval_every", 1)
            call(train_prior, *common, *PRIOR_FLAGS, *flags)
        return out

    return make


@pytest.fixture(scope="module")
def captioner(trained, prior):  # noqa: F811
    return trained("captioner", "--init", prior, "--order", "image", "--mask", "full")


@pytest.fixture(scope="module")
def larger(trained, prior):  # noqa: F811
    return trained("larger", "--init", prior, "--size", 64, "--low", 2)


@pytest.fixture(scope="module")
def masked(trained):
    return trained("masked", "--objective", "masked", "--mask", "none")


@pytest.fixture(scope="module")
def twice(prior):  # noqa: F811
    """The prior's tokenizer, whose decoder draws twice as large."""
    config, out = read_config(prior / "vq"), prior.parent / "twice"
    config["model"] |= {"upscale": 2, "sr_ch": 4, "sr_blocks": 1}
    new, old = VQ(pick(VQConfig, config["model"])).state_dict(), load_tensors(prior / "vq" / "model.safetensors")[0]
    save_model(out, new | old, config)
    return out


def draw(*argv):
    call(sample, "--device", "cpu", *argv)


# --- many prompts ---


def test_prompts_stream_resume_and_survive_one_that_fails(prior, tmp_path, monkeypatch, capsys):  # noqa: F811
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\n\na bad one\na blue star\na red circle\n")
    flags = ("--model", prior, "--prompts", prompts, "--out", out, "--n", 2, "--batch", 6)
    ids = Painter.ids
    with monkeypatch.context() as m:
        m.setattr(Painter, "ids", lambda self, ps: ids(self, [1 / 0 if "bad" in p else p for p in ps]))
        with pytest.raises(ZeroDivisionError):  # a mistake in the program is not hidden
            draw(*flags)

        def failing(self, ps):
            if any("bad" in p for p in ps):
                raise RuntimeError("out of memory")
            return ids(self, ps)

        m.setattr(Painter, "ids", failing)
        with pytest.raises(ValueError, match="1 of 4 prompts could not be drawn: 'a bad one': out of memory"):
            draw(*flags)
    assert "2 x 3 pictures" in capsys.readouterr().out
    names = ["00000-a-red-circle", "00002-a-blue-star", "00003-a-red-circle"]
    assert sorted(f.name for f in out.iterdir()) == [f"{n}-{i}.png" for n in names for i in range(2)]
    last = Image.open(out / f"{names[2]}-1.png")
    assert (seed := json.loads(last.text["settings"])["seed"]) == 3 * 2 + 1
    draw("--model", prior, "--prompt", "a red circle", "--n", 1, "--seed", seed, "--out", tmp_path / "alone")
    alone = Image.open(tmp_path / "alone" / "00000-a-red-circle-0.png")
    assert np.array_equal(last, alone) and not np.array_equal(last, Image.open(out / f"{names[0]}-1.png"))

    times = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    (out / "00002-a-blue-star-0.png").write_bytes(b"cut short")
    Image.new("RGB", (5, 5)).save(out / "00003-a-red-circle-1.png", "JPEG")
    draw(*flags)
    assert {f.name for f in out.iterdir() if times.get(f) != f.stat().st_mtime_ns} == {
        f"{name}-{i}.png" for name in ("00001-a-bad-one", "00002-a-blue-star", "00003-a-red-circle") for i in range(2)
    }
    times = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    draw(*flags, "--seed", 1)
    assert all(times[f] != f.stat().st_mtime_ns for f in out.iterdir()), "other settings, other pictures"


def test_prompts_with_long_names_are_drawn_again_by_another_decoder_and_not_from_a_pipe(prior, twice, tmp_path):  # noqa: F811
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\U0001d41a" * 70)  # four bytes a letter, of the 255 that a name may have
    for flags, side in (((), 32), (("--vq", twice), 64)):
        draw("--model", prior, "--prompts", prompts, "--out", out, "--n", 1, "--every", 8, *flags)
        sizes = {Image.open(f).size for f in out.glob("*-0.png")}
        assert sizes == {(side, side)} and len(list(out.glob("*-growing.png"))) == 1
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe, and it is read twice"):
        draw("--model", prior, "--prompts", tmp_path / "pipe", "--out", out)


def test_a_prompt_whose_pictures_cannot_be_enlarged_does_not_lose_the_rest(prior, larger, tmp_path, monkeypatch):  # noqa: F811
    prompts, out, codes = tmp_path / "prompts.txt", tmp_path / "out", Painter.codes
    prompts.write_text("a bad one\na blue star\n")

    def failing(self, prompts, *args, **how):
        if "a bad one" in prompts and "low" in how and how["low"] is not None:
            raise RuntimeError("out of memory")
        return codes(self, prompts, *args, **how)

    monkeypatch.setattr(Painter, "codes", failing)
    with pytest.raises(ValueError, match="1 of 2 prompts could not be drawn: 'a bad one': out of memory"):
        draw("--model", prior, "--prompts", prompts, "--out", out, "--n", 1, "--enlarge", larger)
    assert [f.name for f in out.iterdir()] == ["00001-a-blue-star-0.png"]


def test_every_k_codes_a_frame_and_the_last_is_the_picture(prior, masked, tmp_path):  # noqa: F811
    for model, flags, n in ((prior, ("--every", 4), 5), (masked, ("--every", 1, "--steps", 3), 3)):
        out = tmp_path / "grown.png"
        draw("--model", model, "--prompt", "a red circle", "--n", 2, "--out", out, *flags)
        with Image.open(tmp_path / "grown-growing.png") as growing:
            assert growing.n_frames == n
            growing.seek(n - 1)
            assert np.array_equal(np.asarray(growing.convert("RGB")), np.asarray(Image.open(out)))
            growing.seek(0)
            assert (np.asarray(growing.convert("RGB")) == 128).mean() > 0.5, "gray where nothing is drawn"


def test_another_picture_to_finish_and_frames_that_are_not_there_are_drawn(prior, pictures, tmp_path):  # noqa: F811
    given, out = tmp_path / "given.png", tmp_path / "out"
    flags = "--model", prior, "--prompt", "a red circle", "--n", 1, "--keep_rows", 2, "--image", given, "--out", out
    drawn = []
    for name, every in (("0.png", ()), ("1.png", ()), ("1.png", ("--every", 8))):
        given.write_bytes((pictures / name).read_bytes())
        draw(*flags, *every)
        drawn.append((out / "00000-a-red-circle-0.png").read_bytes())
    assert drawn[0] != drawn[1] == drawn[2] and (out / "00000-a-red-circle-growing.png").exists()


# --- masked ---


def test_a_masked_run_resumes_with_equal_losses_near_a_uniform_guess(masked, trained, monkeypatch):
    records = train.read_log(masked / "log.jsonl")
    assert all(abs(r["image_loss"] - math.log(32)) < 0.3 for r in records if "image_loss" in r)
    assert all(r["text_loss"] == 0 for r in records if "text_loss" in r)
    flags = "--objective", "masked", "--mask", "none", "--steps", 3
    whole = trained("masked-whole", *flags)
    with monkeypatch.context() as m:
        stop_at(m, 2)
        part = trained("masked-part", *flags)
    call(train_prior, "--resume", "--out", part)
    assert len(losses(part)) == 3 and losses(part) == losses(whole)


def test_inpainting_and_outpainting_keep_what_is_given(masked, prior, pictures, tmp_path):  # noqa: F811
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 15, 16))  # one code of 4x4
    mask.save(tmp_path / "mask.png")
    picture = Image.open(pictures / "0.png")
    for model in (masked, prior):
        painter = Painter(model)
        out = tmp_path / "out.png"
        flags = ("--model", model, "--prompt", "a red circle", "--image", pictures / "0.png", "--out", out)
        draw(*flags, "--mask", tmp_path / "mask.png", "--n", 3)
        assert Image.open(out).size == (3 * 32 + 4, 32)
        codes = painter.vq.encode(sample.crop(picture.convert("RGB"), (32, 32))[None])
        known = codes.clone()
        known[:, 1, 1] = -1
        drawn = painter.codes(["a red circle"], SampleConfig(n=1), known)
        assert drawn.ne(codes).sum() <= 1 and drawn[0, 1, 1] >= 0
        sheet = sample.to_pil(painter.images(drawn)[0])
        assert np.array_equal(np.asarray(sheet), np.asarray(Image.open(out).crop((0, 0, 32, 32))))
        draw(*flags, "--size", "48x64", "--n", 1, "--steps", 3)
        assert Image.open(out).size == (64, 48)


def test_nothing_to_draw_gives_the_picture_and_no_animation(prior, pictures, tmp_path):  # noqa: F811
    flags = ("--model", prior, "--prompt", "x", "--image", pictures / "0.png", "--n", 1)
    draw(*flags, "--keep_rows", 4, "--every", 1, "--out", tmp_path / "all.png")
    assert [f.name for f in tmp_path.iterdir()] == ["all.png"]


# --- larger ---


def test_larger_pictures_in_windows(prior, larger, tmp_path):  # noqa: F811
    draw("--model", prior, "--prompt", "a red circle", "--size", "40x48", "--n", 2, "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (2 * 48 + 2, 40)
    flags = ("--model", prior, "--prompt", "a red circle", "--n", 2, "--enlarge", larger)
    for times, side in ((1, 64), (2, 128)):
        draw(*flags, "--times", times, "--out", tmp_path / "b.png")
        assert Image.open(tmp_path / "b.png").size == (2 * side + 2, side)
    painter, up = Painter(prior), Painter(larger)
    cfg = SampleConfig(n=2)
    low = painter.codes(["a red circle"], cfg)
    assert up.codes(["a red circle"], cfg, low=low).shape == (2, 8, 8)
    with pytest.raises(ValueError, match="this prior enlarges pictures: give it one"):
        up.codes(["a red circle"], cfg)
    with pytest.raises(ValueError, match="2x2 codes are fewer than the 4x4"):
        painter.codes(["a red circle"], cfg, torch.full((2, 2, 2), -1))


def test_another_decoder_draws_what_comes_last_and_judges_look_past_it(prior, larger, captioner, twice, tmp_path):  # noqa: F811
    flags = ("--model", prior, "--vq", twice, "--prompt", "a red circle", "--n", 1, "--out", tmp_path / "a.png")
    draw(*flags, "--enlarge", larger)
    assert Image.open(tmp_path / "a.png").size == (128, 128)  # 32, enlarged by codes, and by the decoder
    judge = Painter(captioner)
    judge.vq_hash = "of another tokenizer"
    painter, codes = Painter(prior, vq=twice), torch.zeros(1, 4, 4, dtype=torch.long)
    assert sample.code_losses(painter, judge, "x", codes).shape == (1,)


# --- captions and scores ---


def test_captions_and_the_best_of_many(captioner, prior, pictures, tmp_path, capsys):  # noqa: F811
    draw("--model", captioner, "--caption", pictures / "3.png", "--n", 3)
    assert len(capsys.readouterr().out.splitlines()) == 3
    painter, judge = Painter(prior), Painter(captioner)
    prompt = "a red circle"
    with pytest.raises(ValueError, match="is a captioner"):
        judge.codes([prompt], SampleConfig(n=1))
    codes = next(iter(painter.draw([(0, prompt)], SampleConfig(n=5))))[2]
    with pytest.raises(ValueError, match="needs a captioner"):
        sample.code_losses(painter, Painter(prior), prompt, codes)
    for rerank, flags, other in (("caploss", ("--captioner", captioner), judge), ("likelihood", (), None)):
        loss = sample.code_losses(painter, other, prompt, codes, 2)
        out = tmp_path / rerank
        draw("--model", prior, "--prompt", prompt, "--n", 2, "--best_of", 5, "--rerank", rerank, "--out", out, *flags)
        for i in range(2):
            with Image.open(out / f"00000-a-red-circle-{i}.png") as im:
                assert abs(float(im.text[rerank]) - sorted(loss.tolist())[i]) < 1e-4
                best = painter.images(codes[loss.argsort()[i]][None])[0]
                assert np.array_equal(np.asarray(sample.to_pil(best)), np.asarray(im))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--prompt", "x", "--caption", "y"), "give one of --prompt, --prompts, --caption"),
        (("--prompt", "x", "--mask", "m.png"), "--mask needs --image"),
        (("--prompt", "x", "--times", 2), "--times 2 needs --enlarge"),
        (("--prompt", "x", "--out", "x.jpg"), "x.jpg: pictures are PNGs"),
        (("--prompt", "x", "--best_of", 8, "--rerank", "likelihood", "--captioner", "c"), "--rerank caploss"),
        (("--caption", "y", "--best_of", 8, "--rerank", "likelihood"), "has no use for --best_of"),
        (("--prompt", "x", "--best_of", 8), "--best_of needs --captioner"),
        (("--prompt", "x", "--best_of", 2, "--rerank", "likelihood"), "--best_of 2 is less than --n 4"),
        (("--prompt", "x", "--every", 2, "--n", 9, "--batch", 4), "--every shows all --n pictures"),
        (("--prompt", "x", "--rerank", "likelihood"), "--rerank likelihood needs --best_of"),
        (("--caption", "y", "--compile"), "has no use for --compile"),
        (("--caption", "PRIOR"), "--caption needs a prior of --order image"),
        (("--prompt", "x", "--enlarge", "PRIOR"), "does not enlarge pictures"),
        (("--prompt", "x", "--best_of", 4, "--captioner", "PRIOR"), "is no captioner"),
        (("--prompt", "x", "--size", "24x64"), "--size 24x64 is smaller than the pictures of this prior, 32x32"),
        (("--prompt", "x", "--size", "64x24", "--image", "PICTURE"), "--size 64x24 is smaller"),
    ],
)
def test_what_sample_refuses(flags, message, prior, pictures, tmp_path):  # noqa: F811
    flags = [{"PRIOR": prior, "PICTURE": pictures / "0.png"}.get(f, f) for f in flags]
    with pytest.raises(ValueError, match=message):
        draw("--model", prior, "--out", tmp_path / "x.png", *flags)  # the last --out counts


def test_enlarging_is_measured_beside_bicubic(larger, pictures, tmp_path):  # noqa: F811
    flags = "--images", pictures, "--pictures", 3, "--device", "cpu", "--show", tmp_path / "e.png"
    call(metrics, "enlarge", "--model", larger, *flags, "--out", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())["figures"]
    painter = Painter(larger)
    images = torch.stack(metrics.captioned(Folder(pictures), range(3), painter)[0])
    again = painter.images(painter.vq.encode(images))
    small = painter.images(painter.vq.encode(metrics.shrink(images, 2)))
    up = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic").clamp(-1, 1)
    for way, its in (("tokenizer", again), ("bicubic", up)):
        steps = [sum(float(x.diff(dim=d).abs().mean((1, 2, 3)).sum()) for d in (2, 3)) for x in (its, images)]
        assert found[way]["psnr"] == pytest.approx(float(metrics.psnr(its, images).mean()), abs=0.01)
        assert found[way]["sharpness"] == pytest.approx(steps[0] / steps[1], rel=1e-3)
    assert 0 < found["drawn"]["psnr"] < 60 and found["n"] == 3
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "e.png"))).permute(2, 0, 1) / 127.5 - 1
    assert sheet.shape == (3, 4 * 64 + 6, 3 * 64 + 4)  # 4 rows, 3 columns, gaps of 2
    assert torch.allclose(sheet[:, :64, :64], up[0], atol=0.02)  # the first row's first
    assert torch.allclose(sheet[:, 198:, 132:], images[2], atol=0.02)  # the last row's last


def test_a_masked_priors_scenes_are_reranked_by_their_captions_alone(masked, captioner, tmp_path):
    flags = "--n", 2, "--steps", 2, "--prompts_per_category", 1, "--device", "cpu", "--out", tmp_path / "r.json"
    call(metrics, "rerank", "--model", masked, "--captioner", captioner, *flags)
    assert set(json.loads((tmp_path / "r.json").read_text())["figures"]) == {"any", "caploss"}
