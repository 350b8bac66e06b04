"""Captioned images and where they lie: folders, tar shards, tables of captions, generated scenes.

A source numbers its entries: `key(i)`, `image(i) -> PIL image`, `captions(i) -> [str]`.  Whatever else it finds stands
in its `skipped` as (name, reason), which the scripts count: nothing is passed over in silence.  In a folder:

    photo.1.jpg  photo.1.txt      an image and its captions, one per line: the names differ in the last ending only
    photo.1.png                   another image with the same captions
    photo.1.json                  read with --caption_key only; other files beside an image are ignored
    metadata.jsonl, metadata.csv  file_name and text: captions of images below, which win over a .txt
    notes.md, photo.heic          no image of this name that Pillow opens: skipped, with the ending
    .git/                         hidden folders, and links to folders that are read already: skipped

In a tar (WebDataset) all files whose names are equal up to the first dot are one entry: its first image, its captions.
A second image is skipped, and so are hidden files and links out of the tar.

Captions stand in .txt files, or those of --caption_ext; --caption_key names the field of each image's .json
(img2dataset), the column of a table, or the field of COCO's annotations.

Text is UTF-8, with or without a byte-order mark, or UTF-16 with one; lines end at \\n or \\r\\n, nowhere else.
"""

import bisect
import codecs
import csv
import hashlib
import inspect
import io
import json
import os
import tarfile
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from minit2i import scenes
from minit2i.scenes import caption, render, scene_at

SCENES_SOURCE = hashlib.sha256(inspect.getsource(scenes).encode()).hexdigest()  # changed scenes are encoded anew


class BadEntry(Exception):
    """An entry that cannot be used; the message says why in a few words."""


# --- images --------------------------------------------------------------------------------------------

Image.preinit()  # the common formats are tried first
Image.init()
UNREADABLE = {"EPS", "MPEG"}  # EPS runs Ghostscript; of MPEG Pillow reads the header only, as of its "stubs"
STUBS = {name for name, (kind, _) in Image.OPEN.items() if kind in ImageFile.StubImageFile.__subclasses__()}
ENDINGS = {e: f for e, f in Image.EXTENSION.items() if f in Image.OPEN and f not in UNREADABLE | STUBS}
FORMATS = tuple(f for f in Image.ID if f in ENDINGS.values())
EXTENSIONS = frozenset(ENDINGS) | {".mpo"}  # what Pillow opens here; a .mpo is a JPEG with more after it
MAX_PIXELS = 100_000_000  # more is treated as a decompression bomb; a 50-megapixel photograph passes
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # 64 MB, also of a colour profile: Pillow's 1 MB refuses good images
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

FAULTS = (
    (Image.DecompressionBombError, "more than 100 megapixels"),
    (Image.UnidentifiedImageError, "not an image"),
    (FileNotFoundError, "missing file"),
    (PermissionError, "no permission"),
    (Exception, "damaged image"),  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, ...
)


def open_rgb(file, near=None):
    """Any image file (path or bytes) -> PIL RGB image, upright, transparency on white; of several frames the first.

    near: (height, width) that suffices; a large JPEG is then decoded at a fraction of its size.
    Raises BadEntry for a file that is empty, damaged, too large or not an image.
    """
    try:
        raw = isinstance(file, bytes)
        if not (len(file) if raw else os.path.getsize(file)):
            raise BadEntry("empty file")
        with Image.open(io.BytesIO(file) if raw else file, formats=FORMATS) as im:  # reads a path's header only
            if im.width * im.height > MAX_PIXELS:
                raise BadEntry("more than 100 megapixels")
            if near:
                im.draft("RGB", (near[1], near[0]))
            im.load()
            im = ImageOps.exif_transpose(im)
            if im.mode in ("I", "F") or im.mode.startswith("I;16"):  # Pillow would clip at 255
                im = Image.fromarray(to_8_bits(np.asarray(im)))
            if im.has_transparency_data:
                im = im.convert("RGBA")
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            return im.convert("RGB")
    except BadEntry:
        raise
    except Exception as e:
        raise BadEntry(next(why for kind, why in FAULTS if isinstance(e, kind))) from None


def to_8_bits(gray):
    """Gray values of 16 or 32 bits or floats (H, W) -> uint8.

    Files do not say their range, so the largest value decides: the range ends at 255, 4095 (12 bits) or 65535,
    whichever is the first that holds it, else at that value.  Floats below 2 are 0 to 1 with some overshoot.
    (16-bit colour is Pillow's: its upper 8 bits.)
    """
    top = float(gray[np.isfinite(gray)].max(initial=0))
    end = 1 if gray.dtype.kind == "f" and top < 2 else next((e for e in (255, 4095, 65535) if top <= e), top)
    gray = np.nan_to_num(gray.astype(np.float64), nan=0, posinf=end, neginf=0)
    return (gray.clip(0, end) * (255 / end)).round().astype(np.uint8)


# --- text ----------------------------------------------------------------------------------------------


def decode_text(raw):
    """bytes -> str: UTF-8, or UTF-16 with a byte-order mark.  UnicodeDecodeError for anything else."""
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16" if utf16 else "utf-8-sig")
    if 4 * text.count("\0") > len(text):
        raise UnicodeDecodeError("utf-8", raw, 0, 1, "zero bytes, as in UTF-16 without a mark, or UTF-32")
    return text


def text_lines(text):
    """The nonempty lines of a text; they end at \\n or \\r\\n (str.splitlines knows nine other ends)."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def read_text_file(path):
    """A text file -> str.  ValueError if it cannot be read or decoded."""
    try:
        return decode_text(raw := Path(path).read_bytes())
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}; a plain text file is needed") from None
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path} is not UTF-8 (line {line}); save it as UTF-8") from None


def as_captions(value):
    """A field of a json or a table, a caption or a list of captions -> [str]; BadEntry if there is none."""
    values = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    if not all(isinstance(v, str) for v in values):
        raise BadEntry("caption is not text")
    if not (found := [v.strip() for v in values if v.strip()]):
        raise BadEntry("empty caption")
    return found


@dataclass(frozen=True)
class CaptionFormat:
    """The file of an entry's captions: its ending, and the field of a .json, '' for plain lines."""

    ending: str = ".txt"
    key: str = ""

    def parse(self, raw):
        """bytes of the file -> captions; BadEntry if there is none."""
        try:
            text = decode_text(raw)
            fields = json.loads(text) if self.key else None
        except UnicodeDecodeError:
            raise BadEntry("caption is not UTF-8") from None
        except (ValueError, RecursionError):
            raise BadEntry(f"damaged {self.ending}") from None
        if not self.key:
            return as_captions(text_lines(text))
        if not isinstance(fields, dict) or self.key not in fields:
            raise BadEntry(f"no {self.key!r} in its {self.ending}")
        return as_captions(fields[self.key])


# --- tables of captions ----------------------------------------------------------------------------------


def read_rows(path):
    """A .csv, .jsonl or .json -> list of dicts, or COCO's one dict.  ValueError if it is damaged."""
    text, ending, number = read_text_file(path), Path(path).suffix.lower(), 1
    try:
        if ending == ".csv":
            csv.field_size_limit(2**27)
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        if ending == ".json":
            return json.loads(text)
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            rows += [json.loads(line)] if line.strip() else []
        return rows
    except (ValueError, csv.Error, RecursionError) as e:
        where = f" in line {number}" if ending == ".jsonl" else ""
        raise ValueError(f"{path} is no valid {ending[1:]}{where}: {e}") from None


class NoColumn(ValueError):
    """A table without the names or the captions of images."""


def read_table(path, key=""):
    """A table of captions -> {file_name: [caption]}.

    Rows of a .csv, a .jsonl or a list in a .json have `file_name` and `key` (text); a .json of one dict is COCO's, with
    `images` (id, file_name) and `annotations` (image_id and `key`, caption).  A file may have several rows.
    ValueError if the table is damaged, or has no such column.
    """
    rows = read_rows(path)
    if isinstance(rows, dict):
        try:
            names = {image["id"]: image["file_name"] for image in rows["images"]}
            rows = [a | {"file_name": names.get(a["image_id"], f"image {a['image_id']}")} for a in rows["annotations"]]
        except (KeyError, TypeError):
            raise ValueError(
                f"{path} is not COCO's captions: it needs images (id, file_name) and annotations (image_id, caption)"
            ) from None
        key = key or "caption"
    key, table = key or "text", {}
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is no table of captions; each row needs file_name and {key}")
    for column, mend in (("file_name", "name the images' column so"), (key, "name the captions' with --caption_key")):
        if not any(column in row for row in rows):
            known = ", ".join(str(name) for name in rows[0]) if rows else "no rows"
            raise NoColumn(f"{path} has no {column!r} (it has {known}); {mend}")
    for row in rows:
        value = row.get(key)
        table.setdefault(str(row.get("file_name")), []).extend(value if isinstance(value, list) else [value])
    return table


TABLES = ("metadata.jsonl", "metadata.csv")  # of Hugging Face's imagefolder; found in any folder


# --- sources -------------------------------------------------------------------------------------------


class Source:
    """Numbered captioned images: __len__, key(i), stamp(i), image(i, near), captions(i, rng).

    The key decides whether an entry is for training or validation; the stamp changes with the files' contents.
    """

    skipped = ()  # [(name, reason)] of what was found and is no entry

    def name(self, i):
        """What the log calls an entry; unlike keys, names are unique."""
        return self.key(i)

    def times(self, indices):
        """How often entries come in an epoch: a number for all, or an array with one for each."""
        return 1


def no_image(endings):
    """The reason of files of one name none of which is an image."""
    return f"no image, only {' '.join(sorted(filter(None, endings))) or 'a file without ending'}"


class Folder(Source):
    """Images below a folder, each with a caption file of the same stem beside it, or in another folder, or in a table.

    beside: '' or that folder or table; paths in it are relative to it, a table's to `root`.
    """

    def __init__(self, root, form=CaptionFormat(), beside=""):
        self.root, self.form, self.paths, self.skipped = Path(root), form, [], []
        self.table, self.renamed, self.no_caption = {}, {}, "no caption file"
        self.text_root = Path(beside) if os.path.isdir(beside) else None
        for here, names in self.walk(root):
            self.read_folder(here, names)
        self.paths.sort()
        if self.text_root:
            self.pair_with_captions()
        elif beside:
            self.add_table(beside, root)
        self.check_table(given=bool(beside))

    def say(self, path, why):
        self.skipped.append((os.path.relpath(path, self.root).encode("utf-8", "backslashreplace").decode(), why))

    def walk(self, root):
        """Yield (folder, file names), links followed, each folder once."""
        seen = set()
        tree = os.walk(root, followlinks=True, onerror=lambda e: self.say(e.filename, "no permission"))
        for here, folders, files in tree:
            real = os.path.realpath(here)
            if real in seen:  # a symbolic link back up
                folders.clear()
                self.say(here, "a folder that is read already")
                continue
            seen.add(real)
            for hidden in [name for name in folders if name.startswith(".")]:
                self.say(os.path.join(here, hidden), "hidden folder")
                folders.remove(hidden)
            folders.sort()
            yield here, sorted(files)

    def read_folder(self, here, names):
        """Sort the files of one folder by stem: images, captions, tables, and what is skipped."""
        stems = {}
        for name in names:
            if name in TABLES:
                try:
                    self.add_table(os.path.join(here, name), here)
                except NoColumn as e:  # labels, perhaps; a .txt will do
                    self.no_caption = f"no caption: {e}"
                continue
            stem, ending = os.path.splitext(name)
            stems.setdefault(stem, []).append(ending)
        for stem, endings in stems.items():
            images = [e for e in endings if e.lower() in EXTENSIONS]
            self.paths += [os.path.join(here, stem + e) for e in images]
            if not images:
                self.say(os.path.join(here, stem), no_image(endings))
            self.note_captions(here, stem, endings)

    def note_captions(self, here, stem, endings):
        """Remember a caption file with its ending in other letters, .TXT."""
        found = sorted(e for e in endings if e.lower() == self.form.ending.lower())
        if found and self.form.ending not in found:
            self.renamed[os.path.join(here, stem)] = os.path.join(here, stem + found[-1])
            found.pop()
        for ending in found:
            if ending != self.form.ending:
                self.say(os.path.join(here, stem + ending), f"another {self.form.ending} of its name")

    def pair_with_captions(self):
        """Look through the captions' own folder: .TXT, and captions without an image."""
        stems = {os.path.splitext(os.path.relpath(path, self.root))[0] for path in self.paths}
        for here, names in self.walk(self.text_root):
            for stem, ending in map(os.path.splitext, names):
                path = os.path.join(here, stem)
                if os.path.relpath(path, self.text_root) not in stems:
                    self.say(path + ending, "caption without an image")
                else:
                    self.note_captions(here, stem, [ending])

    def add_table(self, path, base):
        """Add the captions of a table whose file names are relative to `base`."""
        for name, lines in read_table(path, self.form.key).items():
            self.table.setdefault(os.path.normpath(os.path.join(base, name)), []).extend(lines)
        self.no_caption = f"no caption in {os.path.basename(path)}"

    def check_table(self, given):
        """Note the rows whose image is missing; ValueError if a given table names none of the images."""
        paths = set(map(os.path.normpath, self.paths)) if self.table else set()
        missing = [path for path in self.table if path not in paths and not os.path.exists(path)]
        for path in missing:
            self.say(path, "missing file")
        if given and missing and paths and not paths & {*self.table}:
            named = os.path.relpath(missing[0], self.root)
            raise ValueError(f"no image of the captions is below {self.root}, where they name {named}; use its folder")

    def __len__(self):
        return len(self.paths)

    def key(self, i):
        return os.path.relpath(self.paths[i], self.root).encode("utf-8", "backslashreplace").decode()

    def text_path(self, i):
        stem = os.path.splitext(self.paths[i])[0]
        if self.text_root:
            stem = os.path.join(self.text_root, os.path.relpath(stem, self.root))
        return self.renamed.get(stem, stem + self.form.ending)

    def in_table(self, i):
        return self.table.get(os.path.normpath(self.paths[i])) if self.table else None

    def stamp(self, i):
        """Sizes and modification times of the image and its caption file, which change with their contents."""
        stamp, row = [], self.in_table(i)
        for path in (self.paths[i], self.text_path(i))[: 1 if row else 2]:
            try:
                s = os.stat(path)
                stamp.append(f"{s.st_size} {s.st_mtime_ns}")
            except OSError:
                stamp.append("missing")
        return " ".join(stamp + ([str(row)] if row else [self.form.key] if self.form.key else []))

    def image(self, i, near=None):
        return open_rgb(self.paths[i], near)

    def captions(self, i, rng=None):
        if row := self.in_table(i):
            return as_captions(row)
        try:
            raw = Path(self.text_path(i)).read_bytes()
        except OSError:
            raise BadEntry(self.no_caption) from None
        return self.form.parse(raw)


MAGIC = {
    b"\x1f\x8b": "is gzipped; unpack it with gunzip",
    b"BZh": "is compressed; unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed; unpack it with unxz",
    b"(\xb5/\xfd": "is compressed; unpack it with unzstd",
    b"PK\x03\x04": "is a zip; unpack it to a folder",
    b"PAR1": "is parquet; write its images and captions to a folder first (pandas.read_parquet)",
    b"<": "is an HTML page, not a tar: the download failed",
}


def tar_members(file):
    """Yield the members of an open tar, and of tars appended to it, with offsets from the start of the file.

    ValueError that says what is wrong, after the members before it.
    """
    size, start = file.seek(0, os.SEEK_END), 0
    while start < size:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from tar
            start = tar.offset
        file.seek(start)
        if any(block := file.read(512)) or not block:  # a tar ends with empty blocks
            raise ValueError(f"damaged shard (no header at byte {start})" if block else "shard cut short")
        while block and not any(block):
            start, block = start + 512, file.read(512)
    if not size:
        raise ValueError("is empty")


class Shards(Source):
    """WebDataset tar shards as img2dataset writes them: key.jpg, key.txt, key.json side by side.

    Only the tar headers are read at the start, and nothing is unpacked: a member is read where it lies in its shard, by
    any process or worker.  Links in a shard are followed; names are unique with their shard's path before them.
    """

    def __init__(self, paths, form=CaptionFormat()):
        self.shards, self.form, self.entries, self.skipped = paths, form, [], []
        for shard, path in enumerate(paths):
            for key, parts in self.group(path, self.read_headers(path)).items():
                self.add(shard, key, parts)

    def read_headers(self, path):
        """A shard -> {member's name: (offset, size), or the name that it links to}."""
        members = {}
        try:
            with open(path, "rb") as f:
                head = f.read(512)
                why = next((why for magic, why in MAGIC.items() if head.lstrip().startswith(magic)), None)
                if why and head[257:262] != b"ustar":  # a tar may begin with a file called BZh.jpg
                    raise ValueError(why)
                for m in tar_members(f):
                    if m.isdir():
                        continue
                    if m.name in members:
                        self.skipped.append((f"{path}:{m.name}", "replaced by a later member of its name"))
                    if m.issym() or m.islnk():
                        folder = os.path.dirname(m.name) if m.issym() else ""
                        members[m.name] = os.path.normpath(os.path.join(folder, m.linkname))
                    else:
                        members[m.name] = (m.offset_data, m.size) if m.isreg() and not m.issparse() else ""
        except (tarfile.TarError, EOFError, OSError, ValueError) as e:
            why = (
                f"damaged shard ({e})" if isinstance(e, tarfile.TarError | EOFError) else getattr(e, "strerror", str(e))
            )
            self.skipped.append((path, f"{why}; the entries before that are used" if members else why))
        return members

    def group(self, path, members):
        """Members of a shard -> {key: {ending: (offset, size)}}."""
        plain, groups = {os.path.normpath(name): place for name, place in members.items()}, {}
        for name, place in members.items():
            for _ in range(9):  # a link to a link to ...
                place = plain.get(place, place) if isinstance(place, str) else place
            folder, _, file = name.rpartition("/")
            stem, _, ending = file.partition(".")  # WebDataset: the key ends at the first dot
            if isinstance(place, str):
                self.skipped.append((f"{path}:{name}", "a link out of its shard" if place else "not a plain file"))
            elif not stem:
                self.skipped.append((f"{path}:{name}", "hidden file"))
            else:
                groups.setdefault(f"{folder}/{stem}" if folder else stem, {})[ending] = place
        return groups

    def add(self, shard, key, parts):
        """Add the entry of a key; its {ending: place}.  Plain endings (jpg) go before long ones (seg.jpg)."""
        last = {e: f".{e.rpartition('.')[2].lower()}" for e in sorted(parts, key=lambda e: "." in e)}
        images = [e for e in last if last[e] in EXTENSIONS]
        texts = [e for e in last if last[e] == self.form.ending.lower()]
        name = f"{self.shards[shard]}:{key}"
        if not images:
            self.skipped.append((name, no_image({e.rstrip(".") for e in last.values()})))
            return
        self.entries.append((shard, key, parts[images[0]], parts[texts[0]] if texts else None))
        for what, more in (("image", images[1:]), (self.form.ending, texts[1:])):
            self.skipped += [(f"{name}.{ending}", f"another {what} of its key") for ending in more]

    def __len__(self):
        return len(self.entries)

    def key(self, i):
        return self.entries[i][1]

    def name(self, i):
        return f"{self.shards[self.entries[i][0]]}:{self.entries[i][1]}"

    def stamp(self, i):
        shard, _, image, text = self.entries[i]
        s = os.stat(self.shards[shard])
        more = "" if self.form == CaptionFormat() else f" {text} {self.form.key}"
        return f"{shard} {image} {s.st_size} {s.st_mtime_ns}{more}"

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
        return self.form.parse(self.read(shard, part))


class Scenes(Source):
    """Generated images (scenes.py): entry i is a pure function of (seed, i)."""

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


class Joined(Source):
    """Several sources one after another; each entry of part k comes times[k] times in an epoch."""

    def __init__(self, names, sources, times):
        self.names, self.sources, self.counts = names, sources, times
        self.starts = [0, *accumulate(map(len, sources))]
        self.skipped = [(f"{name}: {file}", why) for name, part in zip(names, sources) for file, why in part.skipped]

    def part(self, i):
        """Entry i -> number of its part, entry of the part."""
        k = bisect.bisect(self.starts, i) - 1
        return k, i - self.starts[k]

    def ask(self, method, i, *args):
        k, i = self.part(i)
        return getattr(self.sources[k], method)(i, *args)

    def __len__(self):
        return self.starts[-1]

    def key(self, i):
        return self.ask("key", i)

    def name(self, i):
        return f"{self.names[self.part(i)[0]]}: {self.ask('name', i)}"

    def times(self, indices):
        return np.array(self.counts)[np.searchsorted(self.starts, indices, "right") - 1]

    def stamp(self, i):
        return f"{self.part(i)[0]} {self.ask('stamp', i)}"

    def image(self, i, near=None):
        return self.ask("image", i, near)

    def captions(self, i, rng=None):
        return self.ask("captions", i, rng)


DATA_FILTERS = {}  # --data_filter: source -> the source without what a paper's data left out
