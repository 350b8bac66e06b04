"""Tokens: the text model, the cache of codes, the samples of stage 2."""

import os
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data import damaged_folder

from minit2i.data import DataConfig, Folder
from minit2i.tokens import Coded, Crops, Text, code_cache, collate
from minit2i.train import Processes

CAPTIONS = [
    "a red circle above a blue square",
    "Two Green triangles",
    "three pink stars on white",
    "a cat \u2014 caf\u00e9",
] * 5


@pytest.fixture(scope="module")
def text():
    return Text(Text.train(CAPTIONS, 400), 24)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "RED \uff23ircle",
        "\U0001f469\u200d\U0001f680 \u0645\u0631\u062d\u0628\u0627",
        "zebra & 42",
        "\n",
    ],
)
def test_any_prompt_has_ids_and_comes_back(text, prompt):
    ids = text.encode(prompt)
    assert ids.shape == (24,) and ids[0] == text.sp.bos_id()
    assert text.sp.unk_id() not in ids.tolist()
    expected = text.sp.normalize(prompt).replace("\u2581", " ").strip()
    assert text.decode(ids) == expected or len(text.pieces(prompt)) > 22


def test_a_damaged_text_model_is_a_clear_error(text):
    for proto in (b"", text.proto[:99]):
        with pytest.raises(ValueError, match="no SentencePiece model"):
            Text(proto, 8)


def test_case_and_width_do_not_matter(text):
    assert text.encode("A RED \uff43ircle").equal(text.encode("a red circle"))


def test_each_text_position_has_its_own_pad(text):
    ids = text.encode("red")
    end = ids.tolist().index(text.sp.eos_id())
    assert ids[end + 1 :].tolist() == [text.n_vocab + t for t in range(end + 1, 24)]


def test_long_captions_are_cut_and_counted(text):
    before = text.n_cut
    ids = text.encode("square " * 100)
    assert len(ids) == 24 and ids[-1] == text.sp.eos_id() and text.n_cut == before + 1
    text.encode("square")
    assert text.n_cut == before + 1


def test_bpe_dropout_encodes_the_same_text_in_other_pieces(text):
    caption = "a red circle above a blue square \u2014 caf\u00e9 \U0001f600"
    plain = text.pieces(caption)
    own = text.pieces(caption, 1e-12, np.random.default_rng(0))
    assert own == plain, "without dropout the merges are SentencePiece's"
    sampled = [text.pieces(caption, 0.3, np.random.default_rng(k)) for k in range(10)]
    assert all(text.sp.decode(ids) == text.sp.decode(plain) for ids in sampled)
    assert len({tuple(ids) for ids in sampled}) > 5 and all(len(ids) >= len(plain) for ids in sampled)
    letters = text.pieces("red", 1.0, np.random.default_rng(0))
    assert text.sp.id_to_piece(letters) == ["\u2581", "r", "e", "d"]


# --- code cache ---


class MeanRed:
    """A tokenizer with 4x4 patches: each code is the patch's mean red, in 15 steps."""

    hash, cfg = "0123", SimpleNamespace(n_codes=16)

    def __init__(self):
        self.calls = 0

    def grid(self, height, width):
        return height // 4, width // 4

    def encode(self, images):
        self.calls += 1
        return ((F.avg_pool2d(images[:, 0], 4) + 1) * 7).long()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder with damaged entries -> (source, {bad key: why}, good keys, crops, cache, the cache's folder)."""
    folder = tmp_path_factory.mktemp("tokens")
    bad, good = damaged_folder(folder / "images")
    source = Folder(folder / "images")
    crops = Crops(source, np.arange(len(source)), DataConfig(image_size="16", resize=24, workers=0), 3)
    return source, bad, good, crops, code_cache(folder / "cache", crops, MeanRed(), Processes("cpu")), folder / "cache"


def test_the_cache_skips_bad_entries_and_is_made_once(damaged):
    source, bad, good, crops, cache, folder = damaged
    assert cache.codes.shape == (len(source), 3, 4, 4) and dict(cache.skipped) == bad
    keys = [source.key(i) for i in range(len(source))]
    assert cache.ok.tolist() == [key in good for key in keys]
    row = keys.index("long_caption.png")
    assert not cache[row, 0].equal(cache[row, 1]) and cache[row, 0].shape == (16,) and cache[row, 0].dtype == torch.long
    _, image = crops[row * 3 + 1]
    assert cache[row, 1].equal(MeanRed().encode(image[None]).flatten())
    vq = MeanRed()
    again = code_cache(folder, crops, vq, Processes("cpu"))
    assert not vq.calls and (again.codes == cache.codes).all()
    assert (pickle.loads(pickle.dumps(cache)).codes == cache.codes).all(), "a spawned worker maps the same file"


def test_the_caches_name_depends_on_all_its_inputs(damaged):
    source, _, _, crops, _, _ = damaged
    cfg, indices = crops.images.cfg, np.arange(len(source))

    def digest(cfg=cfg, **kw):
        return Crops(source, indices, cfg, **{"crops": 3} | kw).digest()

    before = digest()
    others = [digest(crops=2), digest(seed=1), digest(captions=False), digest(cfg=replace(cfg, image_size="32"))]
    others += [digest(cfg=replace(cfg, resize=0)), Crops(source, indices[1:], cfg, 3).digest()]
    assert len({before, *others}) == 7 and before == crops.digest()
    assert digest(crops=1) == digest(crops=1, seed=1), "a second seed need not encode central crops again"
    os.utime(source.paths[[source.key(i) for i in indices].index("upper.PNG")], (1, 1))
    assert digest() != before


def test_a_view_changes_the_image_before_encoding(damaged, tmp_path):
    _, _, _, crops, cache, _ = damaged
    small = code_cache(tmp_path, crops, MeanRed(), Processes("cpu"), lambda images: F.avg_pool2d(images, 2), "shrink2")
    assert small.codes.shape[2:] == (2, 2) and "shrink2" in os.listdir(tmp_path)[0]
    code_cache(tmp_path, crops, MeanRed(), Processes("cpu", "bf16"))
    assert len(os.listdir(tmp_path)) == 2, "another view and another precision have caches of their own"


class Noisy(MeanRed):
    """A tokenizer whose codes are random: sample k of an image with seed s is 8 * (s % 2) + k everywhere."""

    def sample_codes(self, images, n, temperature, seeds):
        each = torch.tensor([[8 * (s % 2) + k for k in range(n)] for s in seeds])
        return each[:, :, None, None].expand(-1, -1, 4, 4)


def test_the_cache_holds_several_samples_of_each_crop(damaged, tmp_path, text):
    """The training takes one of them at random, and the same crop's in all views."""
    source, _, _, crops, _, _ = damaged
    sampled = Crops(source, crops.images.indices, crops.images.cfg, 3, samples=4, temperature=0.5)
    hotter = Crops(source, crops.images.indices, crops.images.cfg, 3, samples=4)
    assert len({c.digest() for c in (crops, sampled, hotter)}) == 3
    cache = code_cache(tmp_path, sampled, Noisy(), Processes("cpu"))
    assert cache.codes.shape == (len(source), 12, 4, 4)
    rows = np.flatnonzero(cache.ok)[:, None]
    expected = 8 * ((rows * 3 + np.arange(12) // 4) % 2) + np.arange(12) % 4
    assert (cache.codes[cache.ok] == expected[..., None, None]).all()
    coded = Coded(source, crops.images.indices, {"codes": cache}, text, seed=0)
    assert {int(coded[p]["codes"][0]) % 8 for p in range(60)} == {0, 1, 2, 3}
    assert cache.differing() == 1
    alike = np.array(cache.codes)
    alike[:, 1, :2] = alike[:, 0, :2]  # two of four rows of codes
    cache.codes = alike
    assert cache.differing() == 0.5


def test_samples_are_a_pure_function_of_seed_and_position(damaged, text):
    source, _, _, crops, cache, _ = damaged
    caches = {"codes": cache, "coarse": cache}
    coded = Coded(source, crops.images.indices, caches, text, seed=0, bpe_dropout=0.1, cond_drop=0.5)
    samples = [coded[p] for p in range(60)]
    empty = text.encode("")
    dropped = sum(s["text"].equal(empty) for s in samples)
    assert 15 < dropped < 45 and sum(s["n_cut"] for s in samples) >= 1
    assert all(s["codes"].equal(s["coarse"]) for s in samples), "both views are of the same crop"
    again = Coded(source, crops.images.indices, caches, text, seed=0, bpe_dropout=0.1, cond_drop=0.5)
    for p in (41, 7):
        assert all(again[p][k].equal(samples[p][k]) for k in ("text", "codes"))
    batch = collate(samples[:5])
    assert batch["text"].shape == (5, 24) and batch["codes"].shape == (5, 16) and isinstance(batch["n_cut"], int)
    plain = Coded(source, crops.images.indices, {"codes": cache}, text)
    assert plain[0]["codes"].equal(cache[int(plain.rows[0]), 0]) and "coarse" not in plain[0]


def test_a_set_without_usable_entries_is_a_clear_error(damaged, text):
    source, bad, _, crops, cache, _ = damaged
    nothing = SimpleNamespace(ok=np.zeros(3, bool), skipped=[*bad.items()])
    with pytest.raises(ValueError, match="none of the 3 entries can be used .*damaged image"):
        Coded(source, crops.images.indices[:3], {"codes": nothing}, text)


def test_long_lines_are_learned():
    """SentencePiece leaves out lines over 4,192 bytes unless told otherwise."""
    text = Text(Text.train([" ".join(["zebra crossing"] * 600), "a cat"], 300), 16)
    assert text.n_vocab > 259 + 6 and text.decode(text.encode("zebra")) == "zebra"
    assert len(text.pieces("zebra")) <= 2
