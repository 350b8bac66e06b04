"""Captioned pictures: where they come from, how they are cropped, in which order they are read.

A source knows its entries by number: `key(i)`, `picture(i) -> PIL image`, `captions(i) -> [str]`.
`Pictures` turns a source into (image tensor, caption) samples, each a pure function of
(seed, position), so that resuming, more workers or more processes change nothing.

Shapes: B batch, H W picture.
"""

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
from minit2i.scenes import caption, render, scene_at

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SCENES_SOURCE = hashlib.sha256(inspect.getsource(scenes).encode()).hexdigest()  # other scenes, other codes
MAX_PIXELS = 100_000_000  # more is taken for a decompression bomb; a 50-megapixel photograph passes


class BadEntry(Exception):
    """An entry that cannot be used; the message says why in a few words."""


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are cropped; both scripts have these flags."""

    data: Annotated[str, "'scenes', a folder, or tar shards (path, glob or {00000..00041})"] = "scenes"
    val_data: Annotated[str, "validation pictures, given like --data; empty: a part of --data"] = ""
    val_fraction: Annotated[float, "part of --data kept for validation, chosen by a hash of the key"] = 0.02
    size: Annotated[str, "picture size in pixels: 64, or HEIGHTxWIDTH as 96x64; empty: 64, or the tokenizer's"] = ""
    resize: Annotated[int, "short side after resizing, before the crop; 0: just large enough"] = 0
    flip: Annotated[bool, "mirror half of the training pictures (wrong for captions with 'left of')"] = False
    captions: Annotated[bool, "entries need a caption; train_vq can do with --no-captions"] = True
    n_scenes: Annotated[int, "how many different scenes '--data scenes' draws"] = 200_000
    workers: Annotated[int, "loader processes"] = 2


def parse_size(size):
    """'64' -> (64, 64), '96x64' -> (96, 64) as (height, width); ValueError otherwise."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size):
        raise ValueError(f"size {size!r} is not a number of pixels; use 64, or HEIGHTxWIDTH as 96x64")
    h, *w = map(int, size.split("x"))
    return h, w[0] if w else h


# --- pictures ----------------------------------------------------------------------------------------


FAULTS = (
    (Image.DecompressionBombError, "more than 100 megapixels"),
    (Image.UnidentifiedImageError, "not a picture"),
    (FileNotFoundError, "missing file"),
    (PermissionError, "no permission"),
    (Exception, "damaged picture"),  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ...
)


def open_rgb(file, near=None):
    """Any picture file (path or bytes) -> PIL RGB image, upright, transparency on white.

    near: (height, width) that will do, so that a large JPEG need not be decoded in full.
    Raises BadEntry for what is empty, damaged, too large or no picture.
    """
    try:
        raw = isinstance(file, bytes)
        if not (len(file) if raw else os.path.getsize(file)):
            raise BadEntry("empty file")
        with Image.open(io.BytesIO(file) if raw else file) as im:  # a path: the header first, it may be enormous
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
    """PIL image -> (3, H, W) tensor in [-1, 1]: short side resized, then cropped to size = (H, W).

    With rng the crop is random (and mirrored half of the time if flip), without it central.
    """
    h, w = size
    scale = max(h / im.height, w / im.width)
    if resize:
        scale = max(scale, resize / min(im.height, im.width))
    full_w, full_h = max(w, round(im.width * scale)), max(h, round(im.height * scale))
    if rng is None:
        x, y, mirror = (full_w - w) // 2, (full_h - h) // 2, False
    else:
        x, y = rng.integers(full_w - w + 1), rng.integers(full_h - h + 1)
        mirror = flip and rng.random() < 0.5
    if (full_w, full_h) != im.size:
        sx, sy = im.width / full_w, im.height / full_h  # resize the crop's part only: a 1x10000 picture is cheap
        im = im.resize((w, h), Image.BICUBIC, box=(x * sx, y * sy, (x + w) * sx, (y + h) * sy))
    else:
        im = im.crop((x, y, x + w, y + h))
    array = np.array(im)  # (H, W, 3)
    if mirror:
        array = array[:, ::-1].copy()
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1)


def to_pil(image):
    """(3, H, W) in [-1, 1] -> PIL image."""
    array = image.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def grid_image(images, columns, gap=2):
    """images (B, 3, H, W) in [-1, 1] -> one PIL image, row by row, on white."""
    b, _, h, w = images.shape
    rows = -(-b // columns)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(to_pil(image), (i % columns * (w + gap), i // columns * (h + gap)))
    return sheet


def caption_lines(raw):
    """bytes of a .txt -> its captions, one a line, without empty ones.  BadEntry if there is none."""
    lines = [line.strip() for line in raw.decode("utf-8-sig", "replace").splitlines() if line.strip()]
    if not lines:
        raise BadEntry("empty caption")
    return lines


# --- sources -----------------------------------------------------------------------------------------


class Folder:
    """Pictures below a folder, each with a same-stem .txt beside it."""

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
            self.paths += [os.path.join(here, f) for f in sorted(files) if f.lower().endswith(EXTENSIONS)]
        self.paths.sort()

    def __len__(self):
        return len(self.paths)

    def key(self, i):
        return os.path.relpath(self.paths[i], self.root).encode("utf-8", "backslashreplace").decode()

    def text_path(self, i):
        return os.path.splitext(self.paths[i])[0] + ".txt"

    def stamp(self, i):
        """What changes when the picture or its caption file does."""
        stamp = []
        for path in (self.paths[i], self.text_path(i)):
            try:
                s = os.stat(path)
                stamp.append(f"{s.st_size} {s.st_mtime_ns}")
            except OSError:
                stamp.append("missing")
        return " ".join(stamp)

    def picture(self, i, near=None):
        return open_rgb(self.paths[i], near)

    def captions(self, i, rng=None):
        try:
            return caption_lines(Path(self.text_path(i)).read_bytes())
        except OSError:
            raise BadEntry("no caption file") from None


class Shards:
    """WebDataset tar shards as img2dataset writes them: key.jpg, key.txt, key.json side by side.

    Only the tar headers are read at the start; a member is then read where it lies in its shard.
    Nothing is unpacked, and any process or worker can read any entry at any time.
    """

    def __init__(self, paths):
        self.shards, self.entries, self.damaged = paths, [], []
        for shard, path in enumerate(paths):
            found = {}  # key -> {"picture": (offset, size), "txt": (offset, size)}
            try:
                with tarfile.open(path, "r:") as tar:
                    for m in tar:
                        folder, _, name = m.name.rpartition("/")
                        stem, _, extension = name.partition(".")  # WebDataset: the key ends at the first dot
                        kind = "picture" if f".{extension.lower()}" in EXTENSIONS else extension.lower()
                        if m.isfile() and kind in ("picture", "txt"):
                            key = f"{folder}/{stem}" if folder else stem
                            found.setdefault(key, {})[kind] = (m.offset_data, m.size)
                with open(path, "rb") as f:
                    f.seek(-512, os.SEEK_END)
                    whole = not any(f.read())  # a tar ends with empty blocks
                if not whole:
                    self.damaged.append((path, "shard cut short; what is there is used"))
            except (tarfile.TarError, OSError, EOFError) as e:
                self.damaged.append((path, f"damaged shard ({e}); what is before is used"))
            self.entries += [(shard, k, v["picture"], v.get("txt")) for k, v in found.items() if "picture" in v]

    def __len__(self):
        return len(self.entries)

    def key(self, i):
        return self.entries[i][1]

    def stamp(self, i):
        shard, _, picture, _ = self.entries[i]
        s = os.stat(self.shards[shard])
        return f"{shard} {picture} {s.st_size} {s.st_mtime_ns}"

    def read(self, shard, part):
        offset, size = part
        with open(self.shards[shard], "rb") as f:
            f.seek(offset)
            return f.read(size)

    def picture(self, i, near=None):
        shard, _, part, _ = self.entries[i]
        return open_rgb(self.read(shard, part), near)

    def captions(self, i, rng=None):
        shard, _, _, part = self.entries[i]
        if part is None:
            raise BadEntry("no caption file")
        return caption_lines(self.read(shard, part))


class Scenes:
    """Generated pictures (scenes.py): entry i is a pure function of (seed, i)."""

    damaged = ()

    def __init__(self, n, size, seed=0):
        self.n, self.size, self.seed = n, size, seed

    def __len__(self):
        return self.n

    def key(self, i):
        return f"scene-{self.seed}-{i}"

    def stamp(self, i):
        return SCENES_SOURCE

    def picture(self, i, near=None):
        return render(scene_at(self.seed, i), *self.size)

    def captions(self, i, rng=None):
        rng = np.random.default_rng((self.seed, i, 1)) if rng is None else rng
        return [caption(scene_at(self.seed, i), rng)[0]]


def open_source(spec, cfg):
    """--data or --val_data -> source.  Raises ValueError when there is nothing there."""
    if spec == "scenes":
        return Scenes(cfg.n_scenes, parse_size(cfg.size))
    if os.path.isdir(spec):
        source = Folder(spec)
    else:
        braces = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
        if braces:
            lo, hi = braces.groups()
            names = [spec.replace(braces[0], str(k).zfill(len(lo))) for k in range(int(lo), int(hi) + 1)]
        else:
            names = sorted(glob.glob(spec)) or [spec]
        missing = [n for n in names if not os.path.isfile(n)]
        if missing:
            raise ValueError(
                f"{missing[0]} is neither a folder nor a tar shard; --data takes 'scenes', a folder, "
                "or shards as path, glob or {00000..00041}"
            )
        source = Shards(names)
    if not len(source):
        raise ValueError(f"no pictures in {spec}; looked for {' '.join(EXTENSIONS)}")
    return source


def captions(source, indices):
    """The captions of some entries, as far as they can be read."""
    for i in indices:
        with contextlib.suppress(BadEntry):
            yield from source.captions(int(i))


def split(cfg):
    """-> (source, indices of training entries), (source, indices of validation entries)."""
    if not 0 <= cfg.val_fraction < 1:
        raise ValueError(f"val_fraction {cfg.val_fraction} is no part in [0, 1)")
    source = open_source(cfg.data, cfg)
    everything = np.arange(len(source))
    if cfg.val_data:
        val = open_source(cfg.val_data, cfg)
        return (source, everything), (val, np.arange(len(val)))
    share = np.array([zlib.crc32(source.key(i).encode("utf-8", "replace")) for i in everything]) / 2**32
    train, val = everything[share >= cfg.val_fraction], everything[share < cfg.val_fraction]
    if not len(val):  # a handful of pictures: validate on what is there rather than not at all
        val = everything[np.argsort(share)[:1]]
        train = everything if len(everything) == 1 else everything[np.argsort(share)[1:]]
    return (source, train), (source, val)


# --- samples of stage 1 ------------------------------------------------------------------------------


class Order:
    """Position p = 0, 1, 2, ... -> entry: every epoch a new permutation, a pure function of (seed, epoch)."""

    def __init__(self, indices, seed):
        self.indices, self.seed, self.epoch, self.perm = indices, seed, None, None

    def __getitem__(self, p):
        epoch, i = divmod(p, len(self.indices))
        if epoch != self.epoch:
            self.epoch = epoch
            self.perm = np.random.default_rng((self.seed, epoch)).permutation(self.indices)
        return int(self.perm[i])


class Pictures(torch.utils.data.Dataset):
    """Position p -> (image (3, H, W) in [-1, 1], caption, skipped).

    An entry that cannot be used gives way to the next in order; skipped lists its (key, why).
    seed None: entries in order, central crop, first caption (validation).
    Raises ValueError when no entry can be used.
    """

    def __init__(self, source, indices, cfg, seed=None):
        self.source, self.indices, self.cfg, self.seed = source, indices, cfg, seed
        self.size = parse_size(cfg.size)
        self.order = None if seed is None else Order(indices, seed)

    def __len__(self):
        return len(self.indices)

    def load(self, i, rng):
        """Entry i -> image, caption; BadEntry if either is missing."""
        lines = self.source.captions(i, rng) if self.cfg.captions else [""]
        near = [2 * max(s, self.cfg.resize) for s in self.size]
        im = self.source.picture(i, near)
        image = crop(im, self.size, self.cfg.resize, self.cfg.flip, rng)
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
        why = "; ".join(f"{k}: {r}" for k, r in skipped[:3])
        raise ValueError(f"none of the {len(self.indices)} entries can be used ({why})")


def collate(samples):
    """[(image, caption, skipped)] -> images (B, 3, H, W), captions, skipped."""
    images, captions, skipped = zip(*samples)
    return torch.stack(images), list(captions), [s for part in skipped for s in part]


class Skipped:
    """What was passed over: each key once, counted by reason, the first ones named."""

    def __init__(self, say=print):
        self.why, self.say = {}, say

    def add(self, skipped):
        for key, reason in skipped:
            if key not in self.why:
                self.why[key] = reason
                if len(self.why) <= 100:
                    self.say(f"skipped {key}: {reason}" + ("; no more are named" if len(self.why) == 100 else ""))

    def counts(self):
        return dict(sorted(Counter(self.why.values()).items()))

    def __str__(self):
        parts = ", ".join(f"{n} {r}" for r, n in self.counts().items())
        return f"skipped {len(self.why)} entries" + (f" ({parts})" if parts else "")


class StepSampler:
    """The positions that one process reads at steps start ... stop - 1, micro-batch by micro-batch.

    The global batch of step s is positions s*batch ... (s+1)*batch - 1; process `rank` of `world` takes
    its contiguous share of each, in `accum` parts.
    """

    def __init__(self, start, stop, batch, accum=1, rank=0, world=1):
        self.steps, self.batch, self.accum, self.rank, self.world = range(start, stop), batch, accum, rank, world

    def __len__(self):
        return len(self.steps) * self.accum

    def __iter__(self):
        n = self.batch // (self.accum * self.world)
        for step in self.steps:
            first = step * self.batch + self.rank * n * self.accum
            for k in range(self.accum):
                yield list(range(first + k * n, first + (k + 1) * n))


def own_group(worker):
    """Signals to the process group (Ctrl-C, torchrun's SIGTERM) reach the trainer, which saves, not its workers."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def step_batches(dataset, cfg, p, start, workers, collate_fn):
    """The parts of this process's batches, a list for each step from `start`, the same whatever the number of workers.

    cfg: train.TrainConfig; p: train.Processes.
    """
    sampler = StepSampler(start, cfg.steps, cfg.batch_size, cfg.accum, p.rank, p.world)
    how = dict(num_workers=workers, worker_init_fn=own_group, pin_memory=torch.cuda.is_available())
    parts = iter(torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn, **how))
    return ([next(parts) for _ in range(cfg.accum)] for _ in range(start, cfg.steps))
