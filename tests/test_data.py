"""Data: every kind of image file and of damage, sources and their formats, crops, order, arrays computed once."""

import csv
import io
import json
import os
import subprocess
import tarfile
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from processes import fork

import train_prior
import train_vq
from minit2i import data
from minit2i.collectives import rank_and_world
from minit2i.data import CROPS, DataConfig, Images, Order, Skipped, cached_array, collate, crop, expand_braces
from minit2i.data import open_source, parse_size, positions, read_spec, split, step_batches, without_captions
from minit2i.gpt import GPTConfig
from minit2i.papers.dalle import Filtered
from minit2i.sources import EXTENSIONS, BadEntry, CaptionFormat, Folder, Joined, Scenes, Shards, open_rgb
from minit2i.sources import read_table, read_text_file, text_lines
from minit2i.tokens import Coded, Crops
from minit2i.train import Processes, TrainConfig

GREEN = (0, 128, 0)


def png(im, **kw):
    buffer = io.BytesIO()
    im.save(buffer, kw.pop("format", "PNG"), **kw)
    return buffer.getvalue()


# --- images ---


def rgba():
    im = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    im.paste((0, 128, 0, 255), (0, 0, 4, 8))
    return png(im)


def palette_with_transparency():
    im = Image.new("P", (8, 8), 0)
    im.putpalette([10, 20, 30, 0, 128, 0])
    im.paste(1, (0, 0, 4, 8))
    return png(im, transparency=0)


@pytest.mark.parametrize("make", [rgba, palette_with_transparency])
def test_transparency_is_laid_on_white(make):
    im = open_rgb(make())
    assert im.mode == "RGB" and im.getpixel((1, 1)) == GREEN and im.getpixel((6, 6)) == (255, 255, 255)


def test_sixteen_bit_gray_keeps_its_middle():
    """Pillow's own convert('RGB') clips at 255, which makes any 16-bit image white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    grays = np.asarray(open_rgb(png(Image.fromarray(ramp))))[..., 0]
    assert np.abs(grays - ramp / 257.0).max() <= 1


@pytest.mark.parametrize(
    "values, end",
    [
        (np.arange(64, dtype=np.uint16) * 4, 255),  # 8 bits in a file of 16
        (np.arange(64, dtype=np.uint16) * 65, 4095),  # 12 bits
        (np.arange(64, dtype=np.uint16) * 1000, 65535),
        (np.arange(64, dtype=np.int32) * 10**6, 63 * 10**6),  # 32 bits
        (np.arange(64, dtype=np.float32) / 60, 1),  # floats with some overshoot
        (np.arange(64, dtype=np.float32) * 4, 255),
        (np.arange(64, dtype=np.float32) * 1000, 65535),
    ],
)
def test_the_largest_value_decides_the_range_of_deep_grays(values, end):
    grays = np.asarray(open_rgb(png(Image.fromarray(values.reshape(8, 8)), format="TIFF")))[..., 0].flatten()
    assert np.abs(grays - (values.astype(float) / end * 255).clip(0, 255)).max() <= 0.51


def test_deep_grays_that_are_not_finite_or_all_zero():
    values = np.array([[np.nan, np.inf], [-np.inf, 0.5]], dtype=np.float32)
    assert np.asarray(open_rgb(png(Image.fromarray(values), format="TIFF")))[..., 0].tolist() == [[0, 255], [0, 128]]
    black = Image.fromarray(np.zeros((4, 4), np.uint16))
    assert open_rgb(png(black)).getextrema() == ((0, 0),) * 3


def test_large_text_and_profiles_in_a_png_do_no_harm():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    profile = np.random.default_rng(0).bytes(2_000_000)
    for more in (dict(pnginfo=info), dict(icc_profile=profile)):
        assert open_rgb(png(Image.new("RGB", (8, 8), GREEN), **more)).getpixel((3, 3)) == GREEN


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr", "F"])
def test_every_mode_becomes_rgb(mode):
    im = Image.new("RGB", (8, 6), (200, 200, 200)).convert(mode)
    out = open_rgb(png(im, format="TIFF" if mode in ("CMYK", "YCbCr", "F") else "PNG"))
    assert out.mode == "RGB" and out.size == (8, 6)
    assert mode in ("1", "P") or all(abs(c - 200) <= 3 for c in out.getpixel((4, 3)))


def test_exif_orientation_is_applied():
    im = Image.new("RGB", (8, 4), "white")
    im.paste("black", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by 90 degrees clockwise
    out = open_rgb(png(im, format="JPEG", exif=exif, quality=95))
    assert out.size == (4, 8) and out.getpixel((2, 1))[0] < 40 and out.getpixel((2, 6))[0] > 215


@pytest.mark.parametrize("size", [(8, 8), (6, 12), (12, 6)])
def test_crop_sizes_and_range(size):
    for im in (Image.new("RGB", (1, 1), "red"), Image.new("RGB", (300, 7), "red"), Image.new("RGB", (7, 300), "red")):
        for rng in (None, np.random.default_rng(0)):
            x = crop(im, size, rng=rng)
            assert (
                x.shape == (3, *size)
                and torch.allclose(x[0], torch.ones(size))
                and torch.allclose(x[1], -torch.ones(size))
            )


def test_crop_is_central_without_rng_and_never_mirrors_unasked():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (16, 1, 3))
    im = Image.fromarray(ramp)
    x = crop(im, (16, 16))
    assert abs(float(x.mean()) - (4 * 31.5 / 127.5 - 1)) < 0.02
    lefts = set()
    for k in range(30):
        row = crop(im, (16, 16), rng=np.random.default_rng(k))[0, 0]
        assert (row.diff() > 0).all()
        lefts.add(float(row[0]))
    assert len(lefts) > 10
    mirrored = [
        bool((crop(im, (16, 16), flip=True, rng=np.random.default_rng(k))[0, 0].diff() < 0).all()) for k in range(30)
    ]
    assert any(mirrored) and not all(mirrored)


# --- damage ---


def damaged_folder(root):
    """A folder with every kind of damage -> expected {key: reason}, keys that are good."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    bad, good = {}, []

    def add(name, data, caption="an image", reason=None):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
        if reason:
            bad[name] = reason
        else:
            good.append(name)

    jpeg, whole = png(noise, format="JPEG"), png(noise)
    add("truncated.jpg", jpeg[: len(jpeg) // 2], reason="damaged image")
    add("truncated.png", whole[: len(whole) // 2], reason="damaged image")
    add("header_only.png", whole[:20], reason="damaged image")
    add("zero.png", b"", reason="empty file")
    add("zero.jpg", b"", reason="empty file")
    add("text.png", b"this is not an image", reason="not an image")
    add("html.jpg", b"<html>404</html>", reason="not an image")
    bomb = bytearray(png(Image.new("1", (64, 64))))
    bomb[16:24] = (40000).to_bytes(4, "big") * 2  # 40,000 x 40,000 in the header
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    add("bomb.png", bytes(bomb), reason="more than 100 megapixels")
    add("no_caption.png", whole, caption=None, reason="no caption file")
    add("empty_caption.png", whole, caption="", reason="empty caption")
    add("latin1_caption.png", whole, caption="caf\u00e9".encode("latin-1"), reason="caption is not UTF-8")
    add("blank_caption.png", whole, caption=" \n\t\n", reason="empty caption")
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 255
    add("bit_flip.png", bytes(flipped), reason="damaged image")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "dangling.txt").write_text("a link to nothing")
    bad["dangling.png"] = "missing file"

    add("long_caption.png", whole, caption="very " * 2000 + "long")
    add("emoji_caption.png", whole, caption="\U0001f600 smile \U0001f469\u200d\U0001f680")
    add("rtl_caption.png", whole, caption="\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627")
    add("bom_caption.png", whole, caption=b"\xef\xbb\xbfa byte order mark")
    add("utf16_caption.png", whole, caption="caf\u00e9".encode("utf-16"))
    add("nul_caption.png", whole, caption="zero \0 byte")
    add("crlf_caption.png", whole, caption="one\r\ntwo\r\n")
    add("one_pixel.png", png(Image.new("RGB", (1, 1), "blue")))
    add("thin.png", png(Image.new("RGB", (2000, 1), "blue")))
    add("animated.gif", png(noise, format="GIF", save_all=True, append_images=[Image.new("RGB", (40, 40))]))
    add("gray16.png", png(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)))
    add("palette.png", png(noise.convert("P")))
    add("gray_alpha.png", png(noise.convert("LA")))
    add("cmyk.jpg", png(noise.convert("CMYK"), format="JPEG"))
    add("upper.PNG", whole)
    add("jpeg_named.png", jpeg)
    add("sub/deep/er.webp", png(noise, format="WEBP"))
    add("sp ace \u00fc.png", whole)
    add(".hidden.png", whole)
    os.symlink(root, root / "sub" / "loop")  # a folder that contains itself
    (root / "orphan.txt").write_text("no image beside me")
    (root / "notes.md").write_text("not an entry")
    (root / "folder.png").mkdir()
    return bad, good


def test_thirty_kinds_of_damage(tmp_path):
    """Each bad entry is skipped once with its reason, each good one is used, nothing stops the run."""
    bad, good = damaged_folder(tmp_path)
    source = Folder(tmp_path)
    assert sorted(source.key(i) for i in range(len(source))) == sorted([*bad, *good])
    images = Images(source, np.arange(len(source)), DataConfig(data=str(tmp_path), image_size="16"), seed=0)
    said = []
    skipped = Skipped(said.append)
    for first in range(0, 2 * len(source), 7):
        batch, captions, skips = collate([images[p] for p in range(first, first + 7)])
        assert batch.shape == (7, 3, 16, 16) and batch.isfinite().all() and all(captions)
        skipped.add(skips)
    assert skipped.why == bad and len(said) == len(bad)
    n = sum(reason == "damaged image" for reason in bad.values())
    assert str(skipped).startswith(f"skipped {len(bad)} entries (1 caption is not UTF-8, {n} damaged image, ")


def test_none_usable_is_a_clear_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_text("a")
    images = Images(Folder(tmp_path), np.arange(1), DataConfig(image_size="16"), seed=0)
    with pytest.raises(ValueError, match="none of the 1 entries can be used .*not an image"):
        images[0]


def test_text_in_any_common_encoding(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes("ein gr\u00fcner Kreis\n\u2606".encode(encoding))
        assert read_text_file(path) == "ein gr\u00fcner Kreis\n\u2606"
    path.write_bytes("plain\ngr\u00fcner\n".encode("latin-1"))
    for bad, message in (
        (path, "is not UTF-8 .line 2.; save it as UTF-8"),
        (tmp_path, "cannot be read"),
        (tmp_path / "none", "cannot be read: No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_text_file(bad)


def test_lines_end_at_line_feeds_alone():
    odd = "a\u2028b\x0bc\x0cd\x1ce\x85f\rg"
    assert text_lines(f"{odd}\r\n\n  two \n") == [odd, "two"]
    assert CaptionFormat().parse(f"{odd}\r\ntwo".encode()) == [odd, "two"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_text_in_other_encodings_is_not_guessed(encoding, tmp_path):
    raw = "ein gr\u00fcner Kreis".encode(encoding)
    with pytest.raises(BadEntry, match="caption is not UTF-8"):
        CaptionFormat().parse(raw)
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(ValueError, match="is not UTF-8 .line 1."):
        read_text_file(tmp_path / "a.txt")


# --- names in folders and shards ---

FORMATS = {
    "avif": "AVIF", "jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "j2k": "JPEG2000", "ppm": "PPM", "pnm": "PPM",
    "tga": "TGA", "pcx": "PCX", "sgi": "SGI", "rgb": "SGI", "dds": "DDS", "apng": "PNG", "dib": "DIB",
    "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "gif": "GIF", "mpo": "JPEG", "ico": "ICO", "qoi": "QOI",
}  # fmt: skip
FORMATS = {ending: name for ending, name in FORMATS.items() if name != "AVIF" or features.check("avif")}
WHOLE = png(Image.new("RGB", (16, 16), GREEN))
ONLY = "no image, only"


def many_kinds():
    """{name: bytes} of files, {name or stem: reason} of those that are skipped in a folder.

    The same files in a tar: see `in_a_tar`.
    """
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    whole, jpeg, files, bad = png(noise), png(noise, format="JPEG"), {}, {}

    def add(name, image, caption=b"two words", reason=None, ending=".txt"):
        files[name] = image
        if caption is not None:
            files[os.path.splitext(name)[0] + ending] = caption
        if reason:
            bad[name if image and name.lower().endswith((".png", ".jpg")) else os.path.splitext(name)[0]] = reason

    for ending, kind in FORMATS.items():
        add(f"of_{ending}.{ending}", png(noise.resize((64, 64)), format=kind))
    for ending in ("heic", "heif", "svg", "eps", "pdf", "mp4", "jxl", "cr2", "dng", "psb", "emf", "h5"):
        add(f"in_{ending}.{ending}", b"data", reason=f"{ONLY} .{ending} .txt")
    add("upper.JPG", jpeg, ending=".TXT")
    add("sub/deep.png", whole)
    add("rgba.png", rgba())
    add("palette.png", palette_with_transparency())
    add("gray16.png", png(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 2)))
    add("cmyk.jpg", png(noise.convert("CMYK"), format="JPEG"))
    add("named_otherwise.jpg", whole)
    add("long.png", whole, b"very " * 2000)
    add("one_pixel.png", png(Image.new("RGB", (1, 1))))
    add("space \u00fc.png", whole)
    add("lines.png", whole, b"one\r\ntwo\xe2\x80\xa8three")
    add("bom.png", whole, b"\xef\xbb\xbfa mark")
    add("utf16.png", whole, "caf\u00e9".encode("utf-16"))
    add("utf16_bare.png", whole, "two words".encode("utf-16-le"), "caption is not UTF-8")
    add("latin1.png", whole, b"caf\xe9", "caption is not UTF-8")
    add("blank.png", whole, b" \n", "empty caption")
    add("empty_caption.png", whole, b"", "empty caption")
    add("no_caption.png", whole, None, "no caption file")
    add("truncated.jpg", jpeg[:700], reason="damaged image")
    add("cut_short.png", whole[:700], reason="damaged image")
    add("header.png", whole[:20], reason="damaged image")
    add("text.png", b"no image", reason="not an image")
    add("page.jpg", b"<html>404</html>", reason="not an image")
    add("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", reason="not an image")
    add("zero.png", b"", reason="empty file")
    bad["zero.png"] = bad.pop("zero")
    files |= {"orphan.txt": b"a caption", "notes.md": b"#", "README": b"x", "table.parquet": b"PAR1"}
    bad |= {"orphan": f"{ONLY} .txt", "notes": f"{ONLY} .md", "table": f"{ONLY} .parquet"}
    return files, bad | {"README": f"{ONLY} a file without ending"}


def write_folder(root, files):
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def write_tar(path, files, mode="w", links={}):
    """files: {name: bytes}; links: {name: (type, target)}."""
    with tarfile.open(path, mode) as tar:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
        for name, (kind, target) in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return str(path)


def in_a_tar(path, bad):
    """The same reasons under the names that a shard's entries have: up to the first dot."""
    return {f"{path}:{name.rsplit('.', 1)[0]}": reason for name, reason in bad.items()}


def used_and_skipped(source, cfg=DataConfig(image_size="16")):
    """Keys of the entries that can be used, {name: reason} of all the others."""
    skipped, images = Skipped(lambda text: None), Images(source, np.arange(len(source)), cfg)
    skipped.add(source.skipped)
    used = []
    for i in range(len(source)):
        try:
            images.load(i, None)
            used.append(source.key(i))
        except BadEntry as e:
            skipped.add([(source.name(i), str(e))])
    return used, skipped.why


def test_sixty_kinds_of_files_in_a_folder_and_in_a_tar(tmp_path):
    """All that Pillow opens is used, everything else counted by its reason, in both alike."""
    files, bad = many_kinds()
    root, tar = tmp_path / "folder", tmp_path / "a.tar"
    write_folder(root, files)
    write_tar(tar, files)
    assert len({name.rsplit(".", 1)[0] for name in files}) >= 60
    used, skipped = used_and_skipped(Folder(root))
    assert skipped == bad and len(used) == sum(name.lower().endswith(tuple(EXTENSIONS)) for name in files) - sum(
        not reason.startswith(ONLY) for reason in bad.values()
    )
    again, skipped = used_and_skipped(Shards([str(tar)]))
    assert skipped == in_a_tar(tar, bad) and again == [
        name.rsplit(".", 1)[0] for name in sorted(used, key=[*files].index)
    ]


def test_an_image_is_never_run_as_a_program():
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    assert not {".eps", ".ps", ".mpg", ".h5", ".pdf"} & EXTENSIONS and {".png", ".jpg", ".tga", ".jp2"} <= EXTENSIONS


def test_names_in_a_folder(tmp_path):
    """Dots, capitals, two images of a caption, hidden and linked folders."""
    write_folder(
        tmp_path,
        {
            "photo.1.jpg": WHOLE, "photo.1.txt": b"first", "photo.2.jpg": WHOLE, "photo.2.txt": b"second",
            "two.png": WHOLE, "two.jpg": WHOLE, "two.txt": b"both",
            "b.png": WHOLE, "b.TXT": b"capitals", "c.png": WHOLE, "c.txt": b"small", "c.TXT": b"other",
            ".thumbnails/t.png": WHOLE, "sub/.hidden.png": WHOLE, "sub/.hidden.txt": b"a hidden file",
        },
    )  # fmt: skip
    os.symlink(tmp_path / "sub", tmp_path / "sub" / "loop")
    os.symlink("two.png", tmp_path / "link.png")
    os.symlink("two.txt", tmp_path / "link.txt")
    source = Folder(tmp_path)
    found = {source.key(i): source.captions(i) for i in range(len(source))}
    assert found == {
        "photo.1.jpg": ["first"], "photo.2.jpg": ["second"], "two.png": ["both"], "two.jpg": ["both"],
        "b.png": ["capitals"], "c.png": ["small"], "sub/.hidden.png": ["a hidden file"], "link.png": ["both"],
    }  # fmt: skip
    assert dict(source.skipped) == {
        "c.TXT": "another .txt of its name", ".thumbnails": "hidden folder", "sub/loop": "a folder that is read already"
    }  # fmt: skip


def test_members_of_a_tar(tmp_path):
    """WebDataset's keys, links, members of one name, hidden files, special ones."""
    files = {
        "photo.1.jpg": WHOLE, "photo.1.txt": b"first", "photo.2.jpg": WHOLE,  # one key
        "m.seg.png": b"a map of labels", "m.png": WHOLE, "m.TXT": b"capitals",
        "d.r/a.png": WHOLE, "d.r/a.txt": b"a dot in a folder", "._a.png": b"of a Mac",
        "n.png": WHOLE, "n.txt": b"n", "n.json": b"{}", "n.cls": b"3",
    }  # fmt: skip
    files = {"BZh.txt": b"named like bzip2's first bytes", "BZh.png": WHOLE} | files
    links = {
        "h.png": (tarfile.LNKTYPE, "n.png"), "h.txt": (tarfile.SYMTYPE, "d.r/../n.txt"),
        "x.png": (tarfile.SYMTYPE, "../x.png"), "fifo.png": (tarfile.FIFOTYPE, ""), "d": (tarfile.DIRTYPE, ""),
    }  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", files, links=links)
    write_tar(tar, {"n.txt": b"new"}, "a")
    source = Shards([tar])
    found = {source.key(i): source.captions(i) for i in range(len(source))}
    assert found == {
        "BZh": ["named like bzip2's first bytes"], "photo": ["first"], "m": ["capitals"],
        "d.r/a": ["a dot in a folder"], "n": ["new"], "h": ["new"],
    }  # fmt: skip
    assert all(source.image(i).getpixel((1, 1)) == GREEN for i in range(len(source)))
    assert dict(source.skipped) == {
        f"{tar}:photo.2.jpg": "another image of its key", f"{tar}:m.seg.png": "another image of its key",
        f"{tar}:._a.png": "hidden file", f"{tar}:n.txt": "replaced by a later member of its name",
        f"{tar}:x.png": "a link out of its shard", f"{tar}:fifo.png": "not a plain file",
    }  # fmt: skip


def test_tars_one_after_another_are_read_to_the_end(tmp_path):
    parts = [write_tar(tmp_path / f"{k}.tar", {f"{k}.png": WHOLE, f"{k}.txt": b"a caption"}) for k in range(3)]
    whole = tmp_path / "all.tar"
    whole.write_bytes(b"".join(open(part, "rb").read() for part in parts))
    source = Shards([str(whole)])
    assert [source.key(i) for i in range(len(source))] == ["0", "1", "2"] and not source.skipped
    assert all(source.captions(i) == ["a caption"] and source.image(i).size == (16, 16) for i in range(3))
    with open(whole, "ab") as f:
        f.write(b"garbage" * 300)
    source = Shards([str(whole)])
    assert len(source) == 3 and "no header at byte 30720" in source.skipped[0][1]


def test_equal_keys_in_two_shards_are_counted_apart(tmp_path):
    paths = [write_tar(tmp_path / f"{k}.tar", {"0.png": b"bad", "0.txt": b"x", "1.png": WHOLE}) for k in range(2)]
    used, skipped = used_and_skipped(Shards(paths))
    assert not used and Counter(skipped.values()) == {"not an image": 2, "no caption file": 2}


# --- what --data says ---


@pytest.mark.parametrize(
    "pattern",
    [
        "{00000..00002}.tar",
        "{a,b}/{1..3}.tar",
        "{x,{2..4},y{a,b}z}-{1..2}",
        "a{b}c",
        "{{a,b}}",
        "{3..1}",
        "plain",
        "{a",
    ],
)
def test_braces_expand_as_in_a_shell(pattern):
    shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == shell.stdout.split()


def test_several_sources_with_captions_and_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_spec("scenes:80") == ("scenes:80", "", 1) and read_spec("scenes:80:3") == ("scenes:80", "", 3)
    assert read_spec("x@y") == ("x@y", "", 1), "x is no folder"
    write_folder(tmp_path, {"x/1.png": WHOLE, "y/1.txt": b"in y", "a,b/1.png": WHOLE, "c@x/1.png": WHOLE})
    assert read_spec("x@y:2") == ("x", "y", 2) and read_spec("c@x") == ("c@x", "", 1)
    assert len(open_source("a,b", DataConfig())) == 1, "a path that has such a name"
    source = open_source("x@y:2,scenes:3,c@x", DataConfig())
    assert isinstance(source, Joined) and len(source) == 5 and source.times([0, 4, 2]).tolist() == [2, 1, 1]
    assert [source.key(i) for i in range(5)] == ["1.png", "scene-0-0", "scene-0-1", "scene-0-2", "1.png"]
    assert source.captions(0) == ["in y"] and source.image(2).size == (64, 64)
    assert len({source.name(i) for i in range(5)}) == len({source.stamp(i) for i in (0, 1, 4)}) + 2 == 5
    for name in ("a/1", "b/1", "c/1", "x:2/1"):
        write_folder(tmp_path, {f"{name}.png": WHOLE})
    for spec, other in (("a,b", "a list"), ("c@x", "c with captions"), ("x:2", "x, 2 times")):
        with pytest.raises(ValueError, match=f"{spec} is a path, and also {other}; rename one"):
            open_source(spec, DataConfig())


def test_entries_come_as_often_as_they_should(tmp_path):
    """Both stages: an epoch of a:3,b has each entry of a three times; b's order follows from the seed alone."""
    write_folder(tmp_path, {f"{n}.png": WHOLE for n in ("a/1", "b/1", "b/2")} | {f"{n}.txt": n.encode() for n in ("a/1", "b/1", "b/2")})  # fmt: skip
    source = open_source(f"{tmp_path}/a:3,{tmp_path}/b", DataConfig())
    images = Images(source, np.arange(3), DataConfig(image_size="8"), seed=0)
    for epoch in range(3):
        assert Counter(images[p][1] for p in range(5 * epoch, 5 * epoch + 5)) == {"a/1": 3, "b/1": 1, "b/2": 1}

    class Cache:
        ok, codes = np.ones(3, bool), np.zeros((3, 1, 1, 1))

        def __getitem__(self, place):
            return torch.tensor([place[0]])

    class Words:
        n_cut, fixed = 0, False

        def encode(self, *args):
            return torch.zeros(1)

    coded = Coded(source, np.arange(3), {"codes": Cache()}, Words(), seed=0)
    assert Counter(int(coded[p]["codes"]) for p in range(5)) == {0: 3, 1: 1, 2: 1}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nowhere", "nowhere is neither a folder nor a tar shard"),
        ("empty", "no images in empty: it holds nothing"),
        ("others", "no images in others: it holds 2 .heic, 1 .parquet, 1 without ending; write the images and capt"),
        ("tars", "tars holds 2 .tar and no images; use 'tars/.*.tar'"),
        ("deep", r"deep holds 1 .tar and no images; use 'deep/\*\*/\*.tar'"),
        ("tars/*", "no images in tars/.*; tars/a.tar: is empty; tars/b.tar: is gzipped; unpack it with gunzip"),
        ("page.tar", "page.tar: is an HTML page, not a tar: the download failed"),
        ("words.tar", "no images in words.tar; words.tar: damaged shard"),
        ("x.parquet", "is parquet; write its images and captions to a folder first"),
        ("one.png", "one.png is a single file; --data takes the folder"),
        ("t.jsonl", "t.jsonl is no images; if it is a table of captions, use FOLDER@t.jsonl"),
        ("good@nothing", "nothing holds no captions for good; use a folder, a .csv"),
        ("g*", "takes in the folder good; end it with"),
        ("scenes:0", "scenes:0 is neither"),
        ("good,nowhere", "nowhere is neither"),
    ],
)
def test_what_is_no_source_says_why_and_what_to_do(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    files = {"good/1.png": WHOLE, "others/a.heic": b"", "others/b.heic": b"", "others/c": b"", "others/d.parquet": b""}
    files |= {"tars/a.tar": b"", "tars/b.tar": b"\x1f\x8b\x08" + bytes(600), "deep/er/a.tar": b"", "one.png": WHOLE}
    files |= {"page.tar": b"\n<!DOCTYPE html>", "words.tar": b"words " * 200, "x.parquet": b"PAR1", "t.jsonl": b"{}"}
    write_folder(tmp_path, files)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        open_source(spec, DataConfig())


def test_globs_reach_into_folders(tmp_path):
    for name in ("a/b/0.tar", "a/1.tar", "2.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / name, {f"{name[-5]}.png": WHOLE})
    source = open_source(f"{tmp_path}/**/*.tar", DataConfig())
    assert sorted(source.key(i) for i in range(len(source))) == ["0", "1", "2"]
    assert len(open_source(f"{tmp_path}/{{2,a/{{1,b/0}}}}.tar", DataConfig())) == 3


# --- captions from elsewhere ---

CAPTIONS = {"a.png": ["a circle"], "b.png": ["two, squares", "\u2606 \u201cquoted\u201d"], "sub/c.png": ["a star"]}


def write_captions(root, kind):
    """A folder with the images of CAPTIONS, their captions given in one of the known ways -> --data, its flags."""
    noise = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)
    images = {f"images/{name}": png(Image.fromarray(pixels)) for name, pixels in zip(CAPTIONS, noise)}
    rows = [(name, line) for name, lines in CAPTIONS.items() for line in lines]
    stems, flags, files, spec = [name[:-4] for name in CAPTIONS], {}, {}, root / "images"
    table = io.StringIO()
    csv.writer(table).writerows([("file_name", "text"), *rows])
    jsonl = "\r\n".join(json.dumps({"file_name": name, "text": line}) for name, line in rows)
    coco = {
        "images": [{"id": k, "file_name": name} for k, name in enumerate(CAPTIONS)],
        "annotations": [{"image_id": [*CAPTIONS].index(name), "id": 7, "caption": line} for name, line in rows],
    }
    lines = ["\n".join(some) for some in CAPTIONS.values()]
    sidecars = {f"{stem}.json": json.dumps({"caption": some}) for stem, some in zip(stems, CAPTIONS.values())}
    if kind in ("txt", "ext", "parallel"):
        ending = ".caption" if kind == "ext" else ".txt"
        where = "captions" if kind == "parallel" else "images"
        files = {f"{where}/{stem}{ending}": text for stem, text in zip(stems, lines)}
        flags = {"caption_ext": "caption"} if kind == "ext" else {}
        spec = f"{spec}@{root / where}" if kind == "parallel" else spec
    elif kind == "metadata.csv":
        files = {"images/metadata.csv": table.getvalue()}
    elif kind == "metadata.jsonl":
        files = {"images/metadata.jsonl": jsonl}
    elif kind == "nested":  # a table in a folder of its own
        names = {name: lines for name, lines in CAPTIONS.items() if "/" in name}
        files = {"images/sub/metadata.jsonl": json.dumps({"file_name": "c.png", "text": "a star"})}
        files |= {f"images/{n[:-4]}.txt": "\n".join(some) for n, some in CAPTIONS.items() if n not in names}
    elif kind == "coco":
        files, spec = {"coco.json": json.dumps(coco)}, f"{spec}@{root}/coco.json"
    elif kind == "csv":
        files, spec = {"t.csv": "\ufeff" + table.getvalue()}, f"{spec}@{root}/t.csv"
    elif kind == "json":
        files, flags = {f"images/{name}": text for name, text in sidecars.items()}, {"caption_key": "caption"}
    elif kind == "shards":
        flags, spec = {"caption_key": "caption"}, root / "0.tar"
        members = {name: text.encode() for name, text in sidecars.items()} | {"a.txt": b"wrong"}
        write_tar(spec, {name.partition("/")[2]: image for name, image in images.items()} | members)
    write_folder(root, images | {name: text.encode() for name, text in files.items()})
    return str(spec), flags


@pytest.mark.parametrize(
    "kind", ["txt", "ext", "parallel", "metadata.csv", "metadata.jsonl", "nested", "coco", "csv", "json", "shards"]
)
def test_captions_in_every_format_are_those_of_text_files(tmp_path, kind):
    spec, flags = write_captions(tmp_path, kind)
    cfg = DataConfig(data=spec, image_size="16", **flags)
    source = open_source(spec, cfg)
    found = {source.key(i).removesuffix(".png"): source.captions(i) for i in range(len(source))}
    assert found == {name[:-4]: lines for name, lines in CAPTIONS.items()} and not source.skipped
    other, _ = write_captions(tmp_path / "txt", "txt")
    plain = Images(open_source(other, DataConfig()), np.arange(3), DataConfig(image_size="16"))
    images = Images(source, np.arange(3), cfg)
    assert all(images[i][0].equal(plain[i][0]) and images[i][1] == plain[i][1] for i in range(3))
    assert len(Crops(source, np.arange(3), cfg).digest()) == 16


def test_what_the_validation_set_and_the_text_model_leave_out_is_named_too(tmp_path):
    """A handful of images, of which the one for validation is bad; no captions at all."""
    write_folder(tmp_path, {f"{k}.png": WHOLE for k in range(3)})
    cfg = train_vq.VQDataConfig(data=str(tmp_path), image_size="16", captions=False, val_data="0")
    (source, train), (_, val) = split(cfg)
    name = source.name(int(val[0]))
    (tmp_path / name).write_bytes(b"bad")
    train_set, val_set, skipped = train_vq.load_data(cfg, train_vq.VQTrainConfig(out=""), 1, Processes("cpu"))
    assert skipped.why == {name: "not an image"} and len(val_set) == len(train_set) == 2
    assert without_captions(source, train) == [(source.name(i), "no caption file") for i in train]


@pytest.mark.parametrize("kind", ["json", "shards", "metadata.jsonl"])
def test_the_cache_of_codes_knows_which_captions_were_asked_for(tmp_path, kind):
    """An entry is usable by one field and not by another."""
    spec, _ = write_captions(tmp_path, kind)
    sources = [open_source(spec, DataConfig(caption_key=key)) for key in ("text", "caption", "alt")]
    assert len({Crops(source, np.arange(3), DataConfig(image_size="16")).digest() for source in sources}) == 3


def test_captions_of_any_length_in_a_table(tmp_path):
    (tmp_path / "t.csv").write_text(f'file_name,text\na.png,"{"very " * 100_000}\nlong"')
    ((name, (line,)),) = read_table(tmp_path / "t.csv").items()
    assert name == "a.png" and len(line) > 500_000 and line.endswith("very \nlong")


def test_rows_without_an_image_and_images_without_a_row(tmp_path):
    write_folder(tmp_path, {"a.png": WHOLE, "b.png": WHOLE, "c.png": WHOLE, "c.txt": b"beside", "d.png": WHOLE})
    rows = [{"file_name": n, "text": t} for n, t in (("a.png", "row"), ("gone.png", "x"), ("d.png", None))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    used, skipped = used_and_skipped(Folder(tmp_path))
    assert used == ["a.png", "c.png"]
    assert skipped == {"gone.png": "missing file", "b.png": "no caption in metadata.jsonl", "d.png": "empty caption"}


def test_a_parallel_folder_says_which_captions_have_no_image(tmp_path):
    write_folder(tmp_path, {"i/s/a.png": WHOLE, "i/b.png": WHOLE, "t/s/a.TXT": b"a", "t/c.txt": b"c"})
    used, skipped = used_and_skipped(open_source(f"{tmp_path}/i@{tmp_path}/t", DataConfig()))
    assert used == ["s/a.png"] and skipped == {"../t/c.txt": "caption without an image", "b.png": "no caption file"}


def test_labels_instead_of_captions_are_named(tmp_path):
    write_folder(tmp_path, {"a.png": WHOLE, "b.png": WHOLE, "b.txt": b"b", "metadata.csv": b"file_name,label\na.png,3"})
    used, skipped = used_and_skipped(Folder(tmp_path))
    assert used == ["b.png"] and "has no 'text' (it has file_name, label); name the capt" in skipped["a.png"]
    used, _ = used_and_skipped(Folder(tmp_path, CaptionFormat(".json", "label")))
    assert used == ["a.png"]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("t.jsonl", '{"file_name": "a"}\n{"file', "t.jsonl is no valid jsonl in line 2"),
        ("t.jsonl", "[1]", "no table of captions; each row needs file_name and text"),
        ("t.jsonl", "", "has no 'file_name' .it has no rows."),
        ("t.csv", "image,text\na,b", "has no 'file_name' .it has image, text.; name the images' column so"),
        ("t.csv", "file_name,prompt\na,b", "has no 'text' .it has file_name, prompt.; .* --caption_key"),
        ("t.csv", 'file_name,text\na,"b', "is no valid csv"),
        ("t.json", '{"a": 1}', "is not COCO's captions: it needs images .id, file_name."),
        ("t.json", '{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "has no 'caption'"),
        ("t.jsonl", "caf\xe9", "is not UTF-8 .line 1."),
    ],
)
def test_damaged_tables_are_refused_with_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_a_table_for_other_images_is_refused(tmp_path):
    write_folder(tmp_path, {"i/train/a.png": WHOLE, "t.csv": b"file_name,text\na.png,x"})
    with pytest.raises(ValueError, match="no image of the captions is below .*, where they name a.png; use its folder"):
        open_source(f"{tmp_path}/i@{tmp_path}/t.csv", DataConfig())


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"caption": 3}', "caption is not text"),
        ('{"caption": null}', "empty caption"),
        ('{"alt": "x"}', "no 'caption' in its .json"),
        ('["x"]', "no 'caption' in its .json"),
        ("{", "damaged .json"),
    ],
)
def test_json_beside_an_image_that_gives_no_caption(text, reason):
    with pytest.raises(BadEntry, match=reason):
        CaptionFormat(".json", "caption").parse(text.encode())


# --- DALL-E's crops and filter ---


def listing(h, w, target, rng, prior):
    """DALL-E's listings 1 (dVAE) and 2 (prior) as they stand, pixels as numbers -> left, top, right, bottom."""
    s = min(h, w)
    if prior:
        top = rng.integers(3 * (h - s) // 8, max(3 * (h - s) // 8 + 1, 5 * (h - s) // 8))
        left = rng.integers(3 * (w - s) // 8, max(3 * (w - s) // 8 + 1, 5 * (w - s) // 8))
        t = rng.integers(target, min(s, round(9 / 8 * target)) + 1)
    else:
        top, left = rng.integers(h - s + 1), rng.integers(w - s + 1)
        t = rng.integers(min(s, round(9 / 8 * target)), min(s, round(12 / 8 * target)) + 1)
    x, y = rng.integers(t - target + 1), rng.integers(t - target + 1)
    k = s / t
    return left + x * k, top + y * k, left + (x + target) * k, top + (y + target) * k


@pytest.mark.parametrize("name", ["dvae", "dalle"])
@pytest.mark.parametrize("h, w", [(300, 500), (500, 300), (256, 256), (260, 520)])
def test_crops_are_distributed_as_in_dalles_listings(name, h, w):
    im, rng = Image.new("RGB", (w, h)), np.random.default_rng(0)
    ours = np.array([CROPS[name](im, (64, 64), 0, rng) for _ in range(2000)])
    theirs = np.array([listing(h, w, 64, rng, name == "dalle") for _ in range(2000)])
    for a, b in ((ours, theirs), (ours[:, 2] - ours[:, 0], theirs[:, 2] - theirs[:, 0])):  # places, sizes
        assert np.abs(a.mean(0) - b.mean(0)).max() < 0.03 * max(h, w) and np.abs(a.std(0) - b.std(0)).max() < 10
        assert np.abs(a.min(0) - b.min(0)).max() < 25 and np.abs(a.max(0) - b.max(0)).max() < 25


@pytest.mark.parametrize("name", ["any", "dvae", "dalle"])
def test_every_crop_stays_in_small_and_oblong_images(name):
    for size in ((16, 16), (16, 24), (24, 16)):
        for w, h in ((1, 1), (3, 300), (300, 3), (17, 16), (100, 64)):
            for k in range(20):
                rng = np.random.default_rng(k)
                left, top, right, bottom = CROPS[name](Image.new("RGB", (w, h)), size, 0, rng)
                assert 0 <= left < right <= w + 1e-9 and 0 <= top < bottom <= h + 1e-9
                assert crop(Image.new("RGB", (w, h)), size, rng=rng, place=CROPS[name]).shape == (3, *size)


def test_the_crop_is_part_of_the_cache_and_of_the_checks(tmp_path):
    cfg = DataConfig(image_size="16")
    digests = {Crops(Scenes(3, (64, 64)), np.arange(3), replace(cfg, crop=name), 4).digest() for name in CROPS}
    assert len(digests) == len(CROPS)
    with pytest.raises(ValueError, match="crop 'centre' is not known; use one of any, dvae, dalle"):
        DataConfig(crop="centre")
    with pytest.raises(ValueError, match="leave --resize out"):
        DataConfig(crop="dalle", resize=80)
    with pytest.raises(ValueError, match="--crops 1 is the central one; use --crops 4"):
        train_prior.settle(GPTConfig(), DataConfig(crop="dalle"), train_prior.PriorTrainConfig(out=""))
    images = Images(Scenes(1, (64, 128)), np.arange(1), replace(cfg, crop="dalle"), seed=0)
    assert not images[0][0].equal(Images(Scenes(1, (64, 128)), np.arange(1), cfg, seed=0)[0][0])


def test_dalles_filter_counts_what_it_leaves_out(tmp_path):
    def wide(w, h):
        return png(Image.new("RGB", (w, h)))

    captions = {
        "short": b"a dog", "date": b"Photographed on 12 May 2015", "numbers": b"photo 12/05/2015, 2015-05-12",
        "wide": b"a dog on grass", "tall": b"a dog on grass", "good": b"a dog on grass", "edge": b"a dog on grass",
        "some": b"a dog\na dog on grass\ntaken on june 3rd, 2001",
    }  # fmt: skip
    sizes = {"wide": (41, 20), "tall": (20, 41), "edge": (40, 20)}
    write_folder(tmp_path, {f"{n}.png": wide(*sizes.get(n, (20, 20))) for n in captions})
    write_folder(tmp_path, {f"{n}.txt": text for n, text in captions.items()})
    source = open_source(str(tmp_path), DataConfig(data_filter="dalle"))
    used, skipped = used_and_skipped(source)
    assert isinstance(source, Filtered) and used == ["edge.png", "good.png", "some.png"]
    assert source.captions([source.key(i) for i in range(len(source))].index("some.png")) == ["a dog on grass"]
    assert Counter(skipped.values()) == {
        "caption is too short": 1, "caption is boilerplate": 2, "aspect ratio outside 1/2 to 2": 2
    }  # fmt: skip
    assert source.stamp(0) != Folder(tmp_path).stamp(0)
    with pytest.raises(ValueError, match="data_filter 'x' is not known; use one of dalle"):
        DataConfig(data_filter="x")


# --- sources and splits ---


def write_shards(root, n=30, shards=3):
    """img2dataset's layout: key.jpg, key.txt, key.json."""
    for s in range(shards):
        with tarfile.open(root / f"{s:05d}.tar", "w") as tar:
            for k in range(s, n, shards):
                im = Image.new("RGB", (20, 20), (8 * k, 0, 0))
                for ext, data in (
                    ("jpg", png(im, format="JPEG", quality=95)),
                    ("txt", f"number {k}".encode()),
                    ("json", json.dumps({"caption": "wrong"}).encode()),
                ):
                    info = tarfile.TarInfo(f"{k:09d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("spec", ["{00000..00002}.tar", "*.tar", "0000[0-2].tar"])
def test_shards_are_read_in_place(tmp_path, spec):
    write_shards(tmp_path)
    cfg = DataConfig(data=str(tmp_path / spec), image_size="16")
    source = open_source(cfg.data, cfg)
    assert len(source) == 30
    images = Images(source, np.arange(30), cfg)
    for i in range(30):
        image, caption, _ = images[i]
        k = int(caption.split()[1])
        assert abs(float(image[0].mean()) - (8 * k / 127.5 - 1)) < 0.03
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_cut_shard_gives_what_is_before_the_cut(tmp_path):
    write_shards(tmp_path)
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    source = Shards([str(tmp_path / f"{s:05d}.tar") for s in range(3)])
    images = Images(source, np.arange(len(source)), DataConfig(image_size="16"), seed=0)
    _, _, skips = collate([images[p] for p in range(2 * len(source))])
    used = {images[p][1] for p in range(2 * len(source))}
    assert source.skipped and "00001.tar" in source.skipped[0][0]
    assert 20 < len(used) < 30 and len(source) - len({k for k, _ in skips}) == len(used)


def test_split_is_stable_and_disjoint(tmp_path):
    write_shards(tmp_path)
    cfg = DataConfig(data=str(tmp_path / "*.tar"), val_data="0.3")
    (source, train), (_, val) = split(cfg)
    assert not set(train) & set(val) and len(train) + len(val) == 30 and 2 <= len(val) <= 18
    keys = {source.key(i) for i in val}
    os.remove(tmp_path / "00002.tar")  # fewer images do not move the others across
    (source, _), (_, val) = split(cfg)
    assert {source.key(i) for i in val} == {k for k in keys if k in {source.key(i) for i in range(len(source))}}


def test_several_captions_are_sampled_in_turn(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    images = Images(Folder(tmp_path), np.arange(1), DataConfig(image_size="8"), seed=0)
    assert {images[p][1] for p in range(40)} == {"one", "two", "three"}


def test_validation_entries_come_from_a_fraction_or_from_another_source(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "a.png")
    (source, train), (val_source, val) = split(DataConfig(data="scenes:40", val_data=str(tmp_path / "val")))
    assert len(train) == 40 and isinstance(source, Scenes) and isinstance(val_source, Folder) and len(val) == 1
    (_, train), (_, val) = split(DataConfig(data="scenes:40", val_data="0"))
    assert (len(train), len(val)) == (39, 1), "one is kept even so"
    for fraction in ("1", "2", "-0.1", "nan"):
        with pytest.raises(ValueError, match=r"val_data .* is not a fraction in \[0, 1\)"):
            split(DataConfig(val_data=fraction))
    with pytest.raises(ValueError, match="neither a folder nor a tar shard"):
        split(DataConfig(val_data="nowhere"))


def test_scenes_take_their_number_from_the_flag():
    cfg = DataConfig(image_size="16x24")
    assert len(open_source("scenes:7", cfg)) == 7 and len(open_source("scenes", cfg)) == data.N_SCENES
    assert Images(open_source("scenes:7", cfg), np.arange(7), cfg)[3][0].shape == (3, 16, 24)


# --- order ---


def test_order_visits_every_entry_once_an_epoch():
    order = Order(np.arange(5, 25), seed=1)
    epochs = [[order[p] for p in range(20 * e, 20 * e + 20)] for e in range(3)]
    assert all(sorted(e) == list(range(5, 25)) for e in epochs) and epochs[0] != epochs[1]
    again = Order(np.arange(5, 25), seed=1)
    assert [again[p] for p in (47, 3, 20)] == [epochs[2][7], epochs[0][3], epochs[1][0]]


@pytest.mark.parametrize("world, accum", [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_processes_and_micro_batches_divide_the_same_batches(world, accum):
    batches = {}
    for rank in range(world):
        parts = list(positions(3, TrainConfig(out="", steps=6, batch_size=8, accum=accum), rank, world))
        assert len(parts) == 3 * accum
        for k, part in enumerate(parts):
            batches.setdefault(3 + k // accum, []).extend(part)
    assert {s: sorted(b) for s, b in batches.items()} == {s: list(range(8 * s, 8 * s + 8)) for s in (3, 4, 5)}


def test_workers_do_not_hear_signals_to_the_trainers_group():
    """A Ctrl-C that ends the workers would leave the trainer without the batches that it needs before it can stop."""

    class Groups(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return os.getpgrp()

    cfg = TrainConfig(out="", steps=1, batch_size=2)
    (part,) = next(step_batches(Groups(), cfg, Processes("cpu"), 0, 1, list))
    assert len(part) == 2 and os.getpgrp() not in part


@pytest.mark.parametrize("size, expected", [("64", (64, 64)), ("96x64", (96, 64))])
def test_parse_size(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "0", "64x", "64x0", "-8", "6.4", "64x64x3"])
def test_parse_size_refuses(size):
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        parse_size(size)


def test_an_enormous_image_is_refused_by_its_header(tmp_path):
    """A terabyte that says it has 40,000 x 40,000 pixels: no memory would hold the file."""
    bomb = bytearray(png(Image.new("1", (64, 64))))
    bomb[16:24] = (40000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    path = tmp_path / "bomb.png"
    path.write_bytes(bytes(bomb))
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(BadEntry, match="more than 100 megapixels"):
        open_rgb(path)


# --- arrays that are computed once ---


def squares(array, rows):
    for r in rows:
        array[r] = [r * r, rank_and_world()[0]]


def test_a_cached_array_is_computed_once(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "squares.npy"
    array = cached_array(path, (5, 2), np.float32, squares)
    assert array[:, 0].tolist() == [0, 1, 4, 9, 16] and not array.flags.writeable
    assert cached_array(path, (5, 2), np.float32, None)[4, 0] == 16
    assert os.listdir(path.parent) == ["squares.npy"]

    def fails(array, rows):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_array(tmp_path / "other.npy", (5, 2), np.float32, fails)
    assert not (tmp_path / "other.npy").exists()


def shared(path):
    Processes("cpu")
    return np.array(cached_array(path, (5, 2), np.float32, squares))


def test_processes_share_the_work_on_a_cached_array(tmp_path):
    array = fork(2, shared, tmp_path / "a.npy")
    assert array[:, 0].tolist() == [0, 1, 4, 9, 16] and array[:, 1].tolist() == [0, 0, 1, 1, 1]
