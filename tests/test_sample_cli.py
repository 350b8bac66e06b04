"""The sampling script with untrained models: prompts, files, metadata, restarts, images to complete and enlarge."""

import json
import runpy
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from untrained import make_prior, make_vq

from minit2i import sample_cli
from minit2i.data import crop
from minit2i.plot import to_pil
from minit2i.sample import NotFinite, Pipeline, score_codes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with priors of 4x4 codes and images of 32x32 pixels, which share a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    make_prior(folder / "prior")
    make_prior(folder / "masked", model="masked")
    make_prior(folder / "larger", condition="text,coarse", shrink=2)
    make_prior(folder / "captioner", model="captioner")
    make_prior(folder / "towers", model="towers", n_encoder=1)
    make_prior(folder / "language", model="language_model", condition="text")
    make_vq(folder / "twice", upsampler="wdsr", upscale=2, sr_ch=4, sr_blocks=1)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(folder / "given.png")
    return folder


def sample(flags):
    sample_cli.main(["--device", "cpu", *flags.split()])


def pixels(path):
    with Image.open(path) as im:
        return np.asarray(im.convert("RGB"))


def expected(pipeline, codes):
    return np.concatenate([np.asarray(to_pil(x)) for x in pipeline.decode(codes)])


# --- prompts and files ---------------------------------------------------------------------------------


def test_each_png_says_how_it_was_made(models, tmp_path):
    (tmp_path / "p.txt").write_text("a_red_circle\na_blue_star\n")
    sample(f"--model {models}/prior --prompts {tmp_path}/p.txt --n 2 --seed 3 --top_k 9 --out {tmp_path}/out")
    names = ["00000-a_red_circle-0", "00000-a_red_circle-1", "00001-a_blue_star-0", "00001-a_blue_star-1"]
    assert sorted(f.stem for f in (tmp_path / "out").iterdir()) == names
    last = Image.open(tmp_path / f"out/{names[3]}.png")
    settings = json.loads(last.text["settings"])
    assert last.text["prompt"] == "a_blue_star" and last.text["model"] == Pipeline(models / "prior").hash
    assert settings["seed"] == 3 + 1 * 2 + 1 and settings["top_k"] == 9
    sample(
        f"--model {models}/prior --prompt a_blue_star --n 1 --top_k 9 --seed {settings['seed']} --out {tmp_path}/x.png"
    )
    difference = pixels(tmp_path / "x.png").astype(int) - np.asarray(last)
    assert abs(difference).max() <= 1, "the seed alone makes it again, but for rounding in batches of other sizes"


def test_a_grid_of_all_prompts_in_one_png(models, tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    sample(f"--model {models}/prior --prompts {tmp_path}/p.txt --n 2 --batch 3 --out {tmp_path}/grid.png")
    with Image.open(tmp_path / "grid.png") as im:
        assert im.size == (2 * 32 + 2, 3 * 32 + 4) and im.text["prompt"] == "a\nb\nc"


def test_a_restart_samples_what_is_missing(models, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\na blue star\na red circle\n")
    flags, out = f"--model {models}/prior --prompts {tmp_path}/p.txt --n 2 --out {tmp_path}/out", tmp_path / "out"
    sample(flags)

    def written():
        before = {f: f.stat().st_mtime_ns for f in out.iterdir()}
        yield
        yield {f.name for f in out.iterdir() if before.get(f) != f.stat().st_mtime_ns}

    changes = written()
    next(changes)
    (out / "00001-a-blue-star-0.png").write_bytes(b"cut short")
    (out / "00002-a-red-circle-1.png").unlink()
    sample(flags)
    assert next(changes) == {f"{name}-{i}.png" for name in ("00001-a-blue-star", "00002-a-red-circle") for i in (0, 1)}
    for more in ("", "--seed 1", f"--vq {models}/twice"):
        changes = written()
        next(changes)
        sample(f"{flags} {more}")
        assert len(next(changes)) == (6 if more else 0), "other settings are other images"


def test_a_prompt_that_fails_does_not_lose_the_others(models, tmp_path, monkeypatch):
    """Too little memory, or logits that are NaN: the group is halved until only that prompt is left out."""
    (tmp_path / "p.txt").write_text("a red circle\na green cross\na blue star\na pair\n")
    encode, wrong = Pipeline.encode_prompts, torch.OutOfMemoryError("tried to allocate 20 GiB")

    def failing(self, prompts):
        if "a green cross" in prompts:
            raise wrong
        return encode(self, prompts)

    monkeypatch.setattr(Pipeline, "encode_prompts", failing)
    flags = f"--model {models}/prior --prompts {tmp_path}/p.txt --n 2 --batch 8"
    message = (
        "1 of 4 prompts failed, the others are in .*: 'a green cross': not enough memory for --batch 8; use a smaller"
    )
    with pytest.raises(ValueError, match=message + " one .*20 GiB"):
        sample(f"{flags} --out {tmp_path}/out")
    done = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    assert sorted({f.name[:5] for f in done}) == ["00000", "00002", "00003"]
    wrong = NotFinite("logits are NaN or Inf")
    with pytest.raises(ValueError, match="1 of 4 prompts failed, .*: 'a green cross': logits are NaN"):
        sample(f"{flags} --out {tmp_path}/grid.png")
    with Image.open(tmp_path / "grid.png") as im:
        assert im.text["prompt"] == "a red circle\na blue star\na pair" and im.size == (2 * 32 + 2, 3 * 32 + 4)
    wrong = RuntimeError("a bug of ours")
    with pytest.raises(RuntimeError, match="a bug of ours"):
        sample(f"{flags} --out {tmp_path}/more")
    monkeypatch.setattr(Pipeline, "encode_prompts", encode)
    sample(f"{flags} --out {tmp_path}/out")
    assert len(list((tmp_path / "out").iterdir())) == 8
    assert {f: f.stat().st_mtime_ns for f in done} == done, "what was there is not sampled again"


def test_prompts_are_the_nonempty_lines_of_a_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("ein gr\u00fcner Kreis\r\n\r\n  \u2606\u2028star \r\n".encode("utf-16"))
    assert sample_cli.read_prompts(path) == ["ein gr\u00fcner Kreis", "\u2606\u2028star"]
    path.write_text(" \n\n")
    with pytest.raises(ValueError, match="has no prompts; write one per line"):
        sample_cli.read_prompts(path)


def test_long_prompts_are_file_names_too(models, tmp_path):
    (tmp_path / "p.txt").write_text("\U0001d41a" * 300 + "\n///\n")
    sample(f"--model {models}/prior --prompts {tmp_path}/p.txt --n 1 --every 8 --out {tmp_path}/out")
    assert len(list((tmp_path / "out").iterdir())) == 4


@pytest.mark.parametrize("model, flags, n", [("prior", "--every 4", 5), ("masked", "--every 1 --steps 3", 3)])
def test_an_animation_ends_with_the_images(models, tmp_path, model, flags, n):
    sample(f"--model {models}/{model} --prompt x --n 2 --out {tmp_path}/grown.png {flags}")
    with Image.open(tmp_path / "grown-growing.png") as growing:
        assert growing.n_frames == n
        growing.seek(n - 1)
        assert np.array_equal(np.asarray(growing.convert("RGB")), pixels(tmp_path / "grown.png"))
        growing.seek(0)
        assert (np.asarray(growing.convert("RGB")) == 128).mean() > 0.5, "gray where nothing is sampled yet"


def test_the_installed_package_samples_without_the_script(models, tmp_path, monkeypatch):
    """python -m minit2i.sample"""
    flags = f"--device cpu --model {models}/prior --prompt x --n 1 --out {tmp_path}/x.png"
    monkeypatch.setattr("sys.argv", ["sample", *flags.split()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module is imported already
        runpy.run_module("minit2i.sample", run_name="__main__")
    sample(flags.replace("x.png", "y.png"))
    assert np.array_equal(pixels(tmp_path / "x.png"), pixels(tmp_path / "y.png"))


# --- images to complete and to enlarge -------------------------------------------------------------------


@pytest.fixture
def given(models):
    """The pipeline of the prior, the codes of given.png, and a function: known codes -> what sampling makes of them."""
    pipeline = Pipeline(models / "prior")
    codes = pipeline.vq.encode(crop(Image.open(models / "given.png"), (32, 32))[None])

    def completed(known, model="prior"):
        other = Pipeline(models / model)
        return expected(other, other.sample_codes([""], other.sampling.__class__(n=1), known))

    return pipeline, codes, completed


def test_the_upper_half_is_kept(models, given, tmp_path):
    _, codes, completed = given
    sample(f"--model {models}/prior --prompt= --image {models}/given.png --n 1 --out {tmp_path}/x.png")
    known = codes.clone()
    known[:, 2:] = -1
    assert np.array_equal(pixels(tmp_path / "x.png"), completed(known))


def masks(kind):
    """32x32 masks that mark the codes of rows 0-1 and column 1."""
    where = np.zeros((32, 32), bool)
    where[:16, 8:16] = True
    alpha = np.dstack([np.full((32, 32, 3), 255), where * 200]).astype(np.uint8)  # white strokes on transparent white
    return {
        "white": Image.fromarray(where.astype(np.uint8) * 255),
        "zero and one": Image.fromarray(where.astype(np.uint8)),
        "gray": Image.fromarray(np.where(where, 180, 60).astype(np.uint8)),
        "16 bits": Image.fromarray(np.where(where, 60000, 300).astype(np.uint16)),
        "one bit": Image.fromarray(where),
        "alpha": Image.fromarray(alpha),
        "opaque": Image.fromarray(np.dstack([where * 255] * 3 + [np.full((32, 32), 255)]).astype(np.uint8)),
        "larger": Image.fromarray(where.astype(np.uint8) * 255).resize((96, 96), Image.NEAREST),
    }[kind]


@pytest.mark.parametrize("kind", ["white", "zero and one", "gray", "16 bits", "one bit", "alpha", "opaque", "larger"])
def test_masks_of_all_kinds_mark_the_same_codes(models, given, tmp_path, kind):
    pipeline, codes, _ = given
    masks(kind).save(tmp_path / "mask.png")
    flags = f"--prompt= --image {models}/given.png --inpaint_mask {tmp_path}/mask.png"
    args, _ = sample_cli.parse(f"--model {models}/prior {flags}".split())
    known = codes.clone()
    known[:, :2, 1] = -1
    assert sample_cli.known_codes(pipeline, args).equal(known)


def test_of_an_erased_copy_of_the_image_what_is_transparent_is_painted(models, given, tmp_path):
    """As DALL-E 2's edits are given, of a JPEG too; white strokes on a white image still mean themselves."""
    pipeline, _, _ = given
    smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    alpha = np.asarray(masks("white"))
    for name, image, mask in (
        ("erased.jpg", smooth, np.dstack([smooth, 255 - alpha])),
        ("white.png", smooth * 0 + 255, np.dstack([smooth * 0 + 255, alpha])),
    ):
        Image.fromarray(image).save(tmp_path / name)
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "mask.png")
        flags = f"--prompt= --image {tmp_path}/{name} --inpaint_mask {tmp_path}/mask.png"
        args, _ = sample_cli.parse(f"--model {models}/prior {flags}".split())
        painted = torch.zeros(1, 4, 4, dtype=torch.bool)
        painted[:, :2, 1] = True
        assert (sample_cli.known_codes(pipeline, args) < 0).equal(painted), name


@pytest.mark.parametrize("model", ["prior", "masked"])
def test_inpainting(models, given, tmp_path, model):
    _, codes, completed = given
    masks("white").save(tmp_path / "mask.png")
    flags = f"--image {models}/given.png --inpaint_mask {tmp_path}/mask.png --n 1 --out {tmp_path}/x.png"
    sample(f"--model {models}/{model} --prompt= {flags}")
    known = codes.clone()
    known[:, :2, 1] = -1
    assert np.array_equal(pixels(tmp_path / "x.png"), completed(known, model))


@pytest.mark.parametrize(
    "mask, message",
    [
        (Image.new("L", (32, 32)), "marks 0 of 16 codes"),
        (
            Image.fromarray(np.eye(32, dtype=bool) | np.ones((32, 32), bool) & (np.arange(32) % 8 == 0)),
            "marks 16 of 16",
        ),
        (Image.new("L", (64, 32)), "is 32x64, another aspect ratio than --image, 32x32"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(models, given, tmp_path, mask, message):
    mask.save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=message):
        sample(f"--model {models}/prior --prompt x --image {models}/given.png --inpaint_mask {tmp_path}/mask.png")


def test_outpainting_puts_the_image_in_the_middle(models, given, tmp_path):
    _, codes, completed = given
    sample(
        f"--model {models}/prior --prompt= --image {models}/given.png --image_size 48x64 --n 1 --out {tmp_path}/x.png"
    )
    known = torch.full((1, 6, 8), -1)
    known[:, 1:5, 2:6] = codes
    assert np.array_equal(pixels(tmp_path / "x.png"), completed(known))


def test_enlarging_once_and_again(models, given, tmp_path):
    flags = f"--model {models}/prior --prompt x --n 2 --out {tmp_path}/x.png"
    for times, side in ((1, 64), (2, 128)):
        sample(f"{flags} --batch 1 {f'--enlarge {models}/larger ' * times}")
        assert Image.open(tmp_path / "x.png").size == (2 * side + 2, side)
    sample(f"{flags} --enlarge {models}/larger --vq {models}/twice")
    assert Image.open(tmp_path / "x.png").size == (2 * 128 + 2, 128), "--vq decodes what comes last"
    _, codes, _ = given
    larger = Pipeline(models / "larger")
    sample(
        f"--model {models}/prior --prompt= --image {models}/given.png --enlarge {models}/larger --n 1 --out {tmp_path}/y.png"
    )
    enlarged = larger.sample_codes([""], larger.sampling.__class__(n=1), coarse=codes)
    assert np.array_equal(pixels(tmp_path / "y.png"), expected(larger, enlarged))


# --- captions and scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", ["captioner", "towers", None])
def test_the_best_of_several_images(models, tmp_path, judge):
    flags = f"--model {models}/prior --prompt red --n 2 --best_of 5 --batch 2 --out {tmp_path}/out"
    sample(flags + (f" --judge {models}/{judge}" if judge else ""))
    pipeline, other = Pipeline(models / "prior"), judge and Pipeline(models / judge)
    codes = pipeline.sample_codes(["red"], pipeline.sampling.__class__(n=5))
    loss, best = score_codes(pipeline, other, "red", codes).sort()
    for i in range(2):
        with Image.open(tmp_path / f"out/00000-red-{i}.png") as im:
            assert float(im.text["score"]) == pytest.approx(float(loss[i]), abs=1e-4)
            assert np.array_equal(np.asarray(im), expected(pipeline, codes[best[i]][None]))


def test_captions_are_printed(models, capsys):
    sample(f"--model {models}/captioner --image {models}/given.png --n 3")
    assert len(capsys.readouterr().out.splitlines()) == 3


# --- flags ---------------------------------------------------------------------------------------------


def test_help_has_at_most_24_flags_and_names_the_models(capsys):
    with pytest.raises(SystemExit):
        sample("--help")
    text = capsys.readouterr().out
    assert sum(line.startswith("  --") for line in text.splitlines()) <= 24
    assert "scenes" in text


def test_settings_of_the_checkpoint_are_defaults_that_flags_override(tmp_path, capsys):
    folder = make_prior(tmp_path / "tuned", sampling={"cfg_scale": 1.25, "top_k": 7})
    _, cfg = sample_cli.parse(f"--model {folder} --prompt x --top_k 5".split())
    assert (cfg.cfg_scale, cfg.top_k, cfg.n) == (1.25, 5, 4)
    with pytest.raises(SystemExit):
        sample(f"--model {folder} --help")
    assert "[1.25]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "give one of --prompt and --prompts"),
        ("--prompt x --prompts y", "give one of --prompt and --prompts"),
        ("--prompt x --inpaint_mask m.png", "--inpaint_mask needs --image"),
        ("--prompt x --image none.png", "--image none.png: missing file"),
        ("--prompt x --out x.jpg", "x.jpg: images are written as PNG"),
        ("--prompt x --best_of 2", "--best_of 2 is less than --n 4"),
        ("--prompt x --judge CAPTIONER", "--judge needs --best_of"),
        ("--prompt x --every 2 --n 9 --batch 4", "--every shows all --n images"),
        ("--prompt x --enlarge PRIOR", "does not enlarge images"),
        ("--prompt x --image_size 24x64", "--image_size 24x64 is smaller than the images of this prior, 32x32"),
        ("--prompt x --image_size 33", "33 is not a multiple of the tokenizer's stride 8"),
        ("--prompt x --image_size 64 --best_of 4 --judge CAPTIONER", "scores images of"),
        ("--image GIVEN --best_of 8", "--best_of needs a prompt"),
        ("--image GIVEN", "writes no captions"),
        ("--prompt x --model CAPTIONER", "samples no images"),
        ("--prompt x --model nowhere", "--model nowhere is not a checkpoint folder"),
        ("--prompt x --best_of 4 --judge nowhere", "--judge nowhere is not a checkpoint folder"),
        ("--prompt x --model TWICE", "--model .*twice holds a tokenizer, not a prior"),
        ("--prompt x --enlarge TWICE", "--enlarge .*twice holds a tokenizer, not a prior"),
        ("--prompt x --best_of 4 --judge TWICE", "--judge .*twice holds a tokenizer, not a prior"),
        ("--prompt x --vq PRIOR", "prior is not a tokenizer, as --vq needs"),
        (
            "--prompt x --model LANGUAGE",
            "--model .*language holds a language model, which knows no images; train a prior",
        ),
        ("--prompt x --out GIVEN", "given.png is an image that was not sampled here; use another name"),
        ("--prompt x --out PRIOR/config.json/x.png", "cannot write .*/config.json/"),
        ("--prompt x --out PRIOR/config.json", "cannot write .*/config.json/"),
        ("--prompt x --seed 99999999999999999999", "seed 99999999999999999999 is not in"),
        ("--prompt x --cfg_scale 1e38 --cfg_schedule constant", "logits are NaN or Inf"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, models, tmp_path, monkeypatch):
    for name in ("prior", "captioner", "twice", "language"):
        flags = flags.replace(name.upper(), str(models / name))
    flags = flags.replace("GIVEN", str(models / "given.png"))
    if "--out" in flags:
        monkeypatch.setattr(Pipeline, "sample_prompts", lambda *args: pytest.fail("sampled before --out was checked"))
    with pytest.raises((ValueError, OSError), match=message):
        sample(f"--model {models}/prior --out {tmp_path}/x.png {flags}")  # of equal flags the last counts
