"""Captioned images: their sources, crops and order.

A source numbers its entries: `key(i)`, `image(i) -> PIL image`, `captions(i) -> [str]`.  `Images` turns a source into
(image tensor, caption) samples, each a pure function of (seed, position): resuming, more workers or more processes
change nothing.

Shapes: B batch, H W image.
"""

import codecs
import contextlib
import glob
import hashlib
import inspect
import io
import os
import re
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps

from minit2i import scenes
from minit2i.collectives import barrier, gather_objects, rank_and_world
from minit2i.config import Settings, Group, at_least
from minit2i.scenes import caption, render, scene_at

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SCENES_SOURCE = hashlib.sha256(inspect.getsource(scenes).encode()).hexdigest()  # changed scenes are encoded anew
N_SCENES = 200_000  # of --data scenes
MAX_PIXELS = 100_000_000  # more is treated as a decompression bomb; a 50-megapixel photograph passes


class BadEntry(Exception):
    """An entry that cannot be used; the message says why in a few words."""


@dataclass(frozen=True)
class DataConfig(Settings):
    """The images and how they are cropped."""

    group = "Data"

    data: Annotated[str, "'scenes' or scenes:NUMBER, a folder, or tar shards (path, glob or {00000..00041})"] = "scenes"
    val_data: Annotated[str, "validation images, given like --data, or the fraction of --data kept for it"] = "0.02"
    image_size: Annotated[str, "pixels: 64, or HEIGHTxWIDTH as 96x64; empty: 64, or the tokenizer's"] = ""
    resize: Annotated[int, "short side after resizing, before the crop; 0: just large enough", at_least(0)] = 0
    workers: Annotated[int, "loader processes", Group("Scale"), at_least(0)] = 2


def parse_size(image_size):
    """'64' -> (64, 64), '96x64' -> (96, 64) as (height, width); ValueError otherwise."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", image_size):
        raise ValueError(f"image_size {image_size!r} is not a number of pixels; use 64, or HEIGHTxWIDTH as 96x64")
    h, *w = map(int, image_size.split("x"))
    return h, w[0] if w else h


# --- images --------------------------------------------------------------------------------------------


FAULTS = (
    (Image.DecompressionBombError, "more than 100 megapixels"),
    (Image.UnidentifiedImageError, "not an image"),
    (FileNotFoundError, "missing file"),
    (PermissionError, "no permission"),
    (Exception, "damaged image"),  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ...
)


def open_rgb(file, near=None):
    """Any image file (path or bytes) -> PIL RGB image, upright, transparency on white.

    near: (height, width) that suffices; a large JPEG is then decoded at a fraction of its size.
    Raises BadEntry for a file that is empty, damaged, too large or not an image.
    """
    try:
        raw = isinstance(file, bytes)
        if not (len(file) if raw else os.path.getsize(file)):
            raise BadEntry("empty file")
        with Image.open(io.BytesIO(file) if raw else file) as im:  # of a path, only the header is read here
            if im.width * im.height > MAX_PIXELS:
                raise BadEntry("more than 100 megapixels")
            if near:
                im.draft("RGB", (near[1], near[0]))
            im.load()
            im = ImageOps.exif_transpose(im)
            if im.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):  # 16-bit gray: Pillow would clip at 255
                im = Image.fromarray((np.asarray(im).clip(0, 65535) / 257).round().astype(np.uint8))
            if im.mode == "F":  # float TIFFs hold 0..1 or 0..255
                array = np.nan_to_num(np.asarray(im))
                array = array * (255 if array.max() <= 1 else 1)
                im = Image.fromarray(array.clip(0, 255).round().astype(np.uint8))
            if im.has_transparency_data:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            return im.convert("RGB")
    except BadEntry:
        raise
    except Exception as e:
        raise BadEntry(next(why for kind, why in FAULTS if isinstance(e, kind))) from None


def crop(im, size, resize=0, flip=False, rng=None):
    """PIL image -> (3, H, W) tensor in [-1, 1]: resize the short side, then crop to size = (H, W).

    With rng the crop is random (and mirrored half of the time if flip), without it central.
    """
    h, w = size
    scale = max(h / im.height, w / im.width, resize / min(im.size))
    full_w, full_h = max(w, round(im.width * scale)), max(h, round(im.height * scale))
    if rng is None:
        x, y, mirror = (full_w - w) // 2, (full_h - h) // 2, False
    else:
        x, y = rng.integers(full_w - w + 1), rng.integers(full_h - h + 1)
        mirror = flip and rng.random() < 0.5
    sx, sy = im.width / full_w, im.height / full_h  # resize the cropped part only: a 1x10000 image is cheap
    array = np.array(im.resize((w, h), Image.BICUBIC, box=(x * sx, y * sy, (x + w) * sx, (y + h) * sy)))  # (H, W, 3)
    if mirror:
        array = array[:, ::-1].copy()
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1)


# --- text ----------------------------------------------------------------------------------------------


def decode_text(raw):
    """bytes -> str: UTF-8, or UTF-16 with a byte-order mark.  UnicodeDecodeError for anything else."""
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if utf16 else "utf-8-sig")


def read_text_file(path):
    """A text file -> str.  ValueError if it cannot be read or decoded."""
    try:
        return decode_text(raw := Path(path).read_bytes())
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}; a plain text file is needed") from None
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path} is not UTF-8 (line {line}); save it as UTF-8") from None


def caption_lines(raw):
    """bytes of a .txt file -> its captions, one per nonempty line.  BadEntry if there is none."""
    try:
        lines = [line.strip() for line in decode_text(raw).splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise BadEntry("caption is not UTF-8") from None
    if not lines:
        raise BadEntry("empty caption")
    return lines


# --- sources -------------------------------------------------------------------------------------------


class Folder:
    """Images below a folder, each with a .txt file of the same stem beside it."""

    damaged = ()

    def __init__(self, root):
        self.root, self.paths, seen = Path(root), [], set()
        for here, folders, files in os.walk(root, followlinks=True):
            real = os.path.realpath(here)
            if real in seen:  # a symbolic link back up
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            self.paths += [os.path.join(here, f) for f in files if f.lower().endswith(EXTENSIONS)]
        self.paths.sort()

    def __len__(self):
        return len(self.paths)

    def key(self, i):
        return os.path.relpath(self.paths[i], self.root).encode("utf-8", "backslashreplace").decode()

    def text_path(self, i):
        return os.path.splitext(self.paths[i])[0] + ".txt"

    def stamp(self, i):
        """Sizes and modification times of the image and its caption file, which change with their contents."""
        stamp = []
        for path in (self.paths[i], self.text_path(i)):
            try:
                s = os.stat(path)
                stamp.append(f"{s.st_size} {s.st_mtime_ns}")
            except OSError:
                stamp.append("missing")
        return " ".join(stamp)

    def image(self, i, near=None):
        return open_rgb(self.paths[i], near)

    def captions(self, i, rng=None):
        try:
            return caption_lines(Path(self.text_path(i)).read_bytes())
        except OSError:
            raise BadEntry("no caption file") from None


class Shards:
    """WebDataset tar shards as img2dataset writes them: key.jpg, key.txt, key.json side by side.

    Only the tar headers are read at the start, and nothing is unpacked: a member is read where it lies in its shard, by
    any process or worker.
    """

    def __init__(self, paths):
        self.shards, self.entries, self.damaged = paths, [], []
        for shard, path in enumerate(paths):
            found = {}  # key -> {"image": (offset, size), "txt": (offset, size)}
            try:
                with tarfile.open(path, "r:") as tar:
                    for m in tar:
                        folder, _, name = m.name.rpartition("/")
                        stem, _, extension = name.partition(".")  # WebDataset: the key ends at the first dot
                        kind = "image" if f".{extension.lower()}" in EXTENSIONS else extension.lower()
                        if m.isfile() and kind in ("image", "txt"):
                            key = f"{folder}/{stem}" if folder else stem
                            found.setdefault(key, {})[kind] = (m.offset_data, m.size)
                with open(path, "rb") as f:
                    f.seek(-512, os.SEEK_END)
                    whole = not any(f.read())  # a tar ends with empty blocks
                if not whole:
                    self.damaged.append((path, "shard cut short; the entries before the cut are used"))
            except (tarfile.TarError, OSError, EOFError) as e:
                self.damaged.append((path, f"damaged shard ({e}); the entries before the damage are used"))
            self.entries += [(shard, k, v["image"], v.get("txt")) for k, v in found.items() if "image" in v]

    def __len__(self):
        return len(self.entries)

    def key(self, i):
        return self.entries[i][1]

    def stamp(self, i):
        shard, _, image, _ = self.entries[i]
        s = os.stat(self.shards[shard])
        return f"{shard} {image} {s.st_size} {s.st_mtime_ns}"

    def read(self, shard, part):
        offset, size = part
        with open(self.shards[shard], "rb") as f:
            f.seek(offset)
            return f.read(size)

    def image(self, i, near=None):
        shard, _, part, _ = self.entries[i]
        return open_rgb(self.read(shard, part), near)

    def captions(self, i, rng=None):
        shard, _, _, part = self.entries[i]
        if part is None:
            raise BadEntry("no caption file")
        return caption_lines(self.read(shard, part))


class Scenes:
    """Generated images (scenes.py): entry i is a pure function of (seed, i)."""

    damaged = ()

    def __init__(self, n, size, seed=0):
        self.n, self.size, self.seed = n, size, seed

    def __len__(self):
        return self.n

    def key(self, i):
        return f"scene-{self.seed}-{i}"

    def stamp(self, i):
        return SCENES_SOURCE

    def image(self, i, near=None):
        return render(scene_at(self.seed, i), *self.size)

    def captions(self, i, rng=None):
        rng = np.random.default_rng((self.seed, i, 1)) if rng is None else rng
        return [caption(scene_at(self.seed, i), rng)[0]]


def open_source(spec, cfg):
    """--data or --val_data -> source.  ValueError if there is nothing there."""
    if generated := re.fullmatch(r"scenes(?::([1-9]\d*))?", spec):
        return Scenes(int(generated[1] or N_SCENES), parse_size(cfg.image_size or "64"))
    if os.path.isdir(spec):
        source = Folder(spec)
    else:
        if braces := re.search(r"\{(\d+)\.\.(\d+)\}", spec):
            lo, hi = braces.groups()
            names = [spec.replace(braces[0], str(k).zfill(len(lo))) for k in range(int(lo), int(hi) + 1)]
        else:
            names = sorted(glob.glob(spec)) or [spec]
        if missing := [n for n in names if not os.path.isfile(n)]:
            raise ValueError(
                f"{missing[0]} is neither a folder nor a tar shard; --data takes 'scenes' or scenes:NUMBER, a folder, "
                "or shards as path, glob or {00000..00041}"
            )
        source = Shards(names)
    if not len(source):
        raise ValueError(f"no images in {spec}; looked for {' '.join(EXTENSIONS)}")
    return source


def captions(source, indices):
    """Yield the captions of some entries, as far as they can be read."""
    for i in indices:
        with contextlib.suppress(BadEntry):
            yield from source.captions(int(i))


def split(cfg):
    """-> (source, indices of training entries), (source, indices of validation entries).

    A fraction is chosen by a hash of the key: adding or removing entries does not move the others between the two sets.
    """
    source = open_source(cfg.data, cfg)
    everything = np.arange(len(source))
    try:
        fraction = float(cfg.val_data)
    except ValueError:
        val = open_source(cfg.val_data, cfg)
        return (source, everything), (val, np.arange(len(val)))
    if not 0 <= fraction < 1:
        raise ValueError(f"val_data {cfg.val_data} is not a fraction in [0, 1); use 0.02, or a folder or shards")
    share = np.array([zlib.crc32(source.key(i).encode("utf-8", "replace")) for i in everything]) / 2**32
    train, val = everything[share >= fraction], everything[share < fraction]
    if not len(val):  # a handful of images: keep one for validation, or validate on the only one
        val = everything[np.argsort(share)[:1]]
        train = everything if len(everything) == 1 else everything[np.argsort(share)[1:]]
    return (source, train), (source, val)


# --- samples of stage 1 --------------------------------------------------------------------------------


class Order:
    """Position p = 0, 1, 2, ... -> entry: a new permutation every epoch, a pure function of (seed, epoch)."""

    def __init__(self, indices, seed):
        self.indices, self.seed, self.epoch, self.permutation = indices, seed, None, None

    def __getitem__(self, p):
        epoch, i = divmod(p, len(self.indices))
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = np.random.default_rng((self.seed, epoch)).permutation(self.indices)
        return int(self.permutation[i])


class Images(torch.utils.data.Dataset):
    """Position p -> (image (3, H, W) in [-1, 1], caption, skipped).

    An entry that cannot be used is replaced by the next in order; skipped lists its (key, why).
    seed None: entries in order, central crop, first caption (validation).  captions False: entries need none.
    Raises ValueError if no entry can be used.
    """

    def __init__(self, source, indices, cfg, seed=None, captions=True, flip=False):
        self.source, self.indices, self.cfg, self.seed = source, indices, cfg, seed
        self.captions, self.flip, self.size = captions, flip, parse_size(cfg.image_size)
        self.order = None if seed is None else Order(indices, seed)

    def __len__(self):
        return len(self.indices)

    def load(self, i, rng):
        """Entry i -> image, caption; BadEntry if either is missing."""
        lines = self.source.captions(i, rng) if self.captions else [""]
        near = [2 * max(s, self.cfg.resize) for s in self.size]
        image = crop(self.source.image(i, near), self.size, self.cfg.resize, self.flip, rng)
        return image, lines[0 if rng is None else rng.integers(len(lines))]

    def __getitem__(self, p):
        skipped = []
        for q in range(p, p + 2 * len(self.indices)):  # two epochs from anywhere see every entry
            rng = None if self.seed is None else np.random.default_rng((self.seed, p))
            i = int(self.indices[q % len(self.indices)]) if self.order is None else self.order[q]
            try:
                return *self.load(i, rng), skipped
            except BadEntry as e:
                skipped.append((self.source.key(i), str(e)))
        raise none_usable(self.indices, skipped)


def none_usable(indices, skipped):
    """The error (to raise) that no entry can be used; skipped: [(key, reason)], of which it names three."""
    why = "; ".join(f"{k}: {r}" for k, r in skipped[:3])
    return ValueError(f"none of the {len(indices)} entries can be used ({why})")


def collate(samples):
    """[(image, caption, skipped)] -> images (B, 3, H, W), captions, skipped."""
    images, captions, skipped = zip(*samples)
    return torch.stack(images), list(captions), [s for part in skipped for s in part]


class Skipped:
    """The entries that could not be used: each key once, counted by reason; the first hundred are printed."""

    def __init__(self, say=print):
        self.why, self.say = {}, say

    def add(self, skipped):
        for key, reason in skipped:
            if key not in self.why:
                self.why[key] = reason
                if len(self.why) <= 100:
                    self.say(f"skipped {key}: {reason}" + ("; no more are named" if len(self.why) == 100 else ""))

    def __str__(self):
        parts = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(self.why.values()).items()))
        return f"skipped {len(self.why)} entries" + (f" ({parts})" if parts else "")


# --- batches -------------------------------------------------------------------------------------------


def positions(start, cfg, rank, world):
    """Yield the positions of each micro-batch that one process reads from step `start` on.

    The global batch of step s is positions s*batch_size ... (s+1)*batch_size - 1; process `rank` of `world` takes its
    contiguous share, in `accum` micro-batches.
    """
    n = cfg.batch_size // (cfg.accum * world)
    for step in range(start, cfg.steps):
        first = step * cfg.batch_size + rank * n * cfg.accum
        for k in range(cfg.accum):
            yield range(first + k * n, first + (k + 1) * n)


def own_group(worker):
    """Shield a worker from signals to the process group (Ctrl-C, torchrun's SIGTERM): the last step needs it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def step_batches(dataset, cfg, procs, start, workers, collate_fn):
    """This process's micro-batches, a list for each step from `start`, the same for any number of workers.

    cfg: train.TrainConfig; procs: train.Processes.
    """
    sampler = positions(start, cfg, procs.rank, procs.world)
    settings = dict(num_workers=workers, worker_init_fn=own_group, pin_memory=torch.cuda.is_available())
    parts = iter(torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn, **settings))
    return ([next(parts) for _ in range(cfg.accum)] for _ in range(start, cfg.steps))


# --- arrays that are computed once -----------------------------------------------------------------------


def cached_array(path, shape, dtype, fill):
    """A read-only memory-mapped array (.npy), computed at the first call, mapped from disk afterwards.

    fill(array, rows): compute the rows (a range) that are this process's share.  The file appears when it is complete.
    """
    path, (rank, world) = Path(path), rank_and_world()
    if any(gather_objects(not path.exists())):
        part = path.with_name(f"{path.name}.{gather_objects(os.getpid())[0]}.part")  # two runs may share the cache
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(part, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash later
                with open(part, "rb+") as f:
                    os.posix_fallocate(f.fileno(), 0, os.path.getsize(part))
        barrier()
        array = np.load(part, mmap_mode="r+")
        fill(array, range(shape[0] * rank // world, shape[0] * (rank + 1) // world))
        array.flush()
        del array  # Windows renames no file that is mapped
        barrier()
        if rank == 0:
            os.replace(part, path)
        barrier()
    return np.load(path, mmap_mode="r")
