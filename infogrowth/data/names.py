"""Extensions, ids and keys; and the one rule which files of a folder or archive are a sample."""

import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from infogrowth.data.captions import decode_text

# What Pillow calls the formats that images.py decodes; in order of preference.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif", ".jpe"),
    *(".mpo", ".apng", ".avifs", ".dib", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".ico"),
)
NO_IMAGE = "there is no image of this name"
ANOTHER_FORMAT = "there is no image of this name, only a file in a format that is not read"

_CAPTIONS = (".txt", ".caption", ".text", ".json")  # in order of preference
_UNUSUAL = "image"  # instead of the extension of an image that does not have one
_IMAGES = frozenset((*IMAGE_EXTENSIONS, _UNUSUAL))
_RANK = {kind: n for n, kind in enumerate((*IMAGE_EXTENSIONS, _UNUSUAL, *_CAPTIONS))}
# ".jpg" alone is a name, not an extension.
_ANY = "(?<=[^/])(" + "|".join(map(re.escape, IMAGE_EXTENSIONS)) + ")"
_EXTENSION = re.compile(f"{_ANY}$", re.IGNORECASE)
_EXTENSIONS = re.compile(f"{_ANY}+$", re.IGNORECASE)


def extension_of(name: str) -> str:
    """The extension in lower case, with its dot; empty if there is none."""
    return posixpath.splitext(name)[1].lower()


def strip_extension(name: str) -> str:
    """``name`` without its image extension (``.jpg``, ``.PNG``, …), folders kept."""
    return _EXTENSION.sub("", name)


def image_key(name: str) -> str:
    """The key under which an image is stored: file name without its image extension.

    An id without an image extension is its own key, slashes and dots included.
    """
    stem = strip_extension(name)
    return stem if stem == name else stem.rsplit("/", 1)[-1]


def possible_names(name: str) -> Iterator[str]:
    """Every name under which the image ``name`` may be stored, the surest first."""
    stems = dict.fromkeys((image_key(name), strip_extension(name)))
    yield from dict.fromkeys((name, *stems, name.rsplit("/", 1)[-1]))
    for stem in stems:
        yield from (stem + extension for extension in IMAGE_EXTENSIONS)


def clean_name(name: str) -> str:
    """A path in the form in which paths are compared, and ids are made of them."""
    if not name.isascii():
        name = decode_text(name.encode("utf-8", "surrogateescape"))[0]
        name = unicodedata.normalize("NFC", name)
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def image_id(name: str) -> str:
    """The id of an image: its path without image extensions, as :func:`clean_name` has it."""
    return clean_name(_EXTENSIONS.sub("", name))


def sample_id(name: str) -> str:
    """The path that files of one sample share: ``photo`` for ``photo.jpg.txt``."""
    return image_id(posixpath.splitext(name)[0])


class Entry(NamedTuple):
    """An image with its captions, as numbers of files.

    Attributes:
        id: their common name, which is the id of the sample.
        image: -1 if there is none.
        captions: surest first.
        problem: why there is no image.
    """

    id: str
    image: int
    captions: tuple[int, ...]
    problem: str | None


def entries_of(
    names: Sequence[str], archive: bool = False, named: Collection[int] = ()
) -> tuple[list[Entry], Counter[str]]:
    """The samples that some files make, and how many of what kind make none.

    A sample is one image with all captions of its name; several images of one name are several
    samples of one id. In an archive a name may occur again: then only members that follow one
    another belong together. There, ``x.image.png`` and ``x.caption.txt`` are a sample too, as
    webdataset has it, unless an extension would be a number, as in ``22.05.png``.

    Args:
        archive: names may repeat, and their order matters.
        named: numbers of files that are images whatever their extension, since a record says so.
    """
    kinds = [extension_of(name) for name in names]
    for n in named:
        kinds[n] = kinds[n] if kinds[n] in IMAGE_EXTENSIONS else _UNUSUAL
    found: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(sample_id(name), []).append(number)
    if archive:
        _join_up_to_first_dot(found, kinds)
    with_images = {
        name.rpartition("/")[0] for name, kind in zip(names, kinds, strict=True) if kind in _IMAGES
    }
    entries: list[Entry] = []
    ignored: Counter[str] = Counter()
    for key, numbers in found.items():
        for part in _runs(numbers, names) if archive else [numbers]:
            part.sort(key=lambda n: (_RANK.get(kinds[n], 0), names[n]))
            images = [n for n in part if kinds[n] in _IMAGES]
            captions = [n for n in part if kinds[n] in _CAPTIONS]
            others = sorted(n for n in part if kinds[n] not in _RANK)
            if not images and captions and others:
                problem = f"{ANOTHER_FORMAT}: {kinds[others[0]]}"
                entries.append(Entry(key, others.pop(0), tuple(captions), problem))
            elif not images and captions:
                if names[captions[0]].rpartition("/")[0] in with_images:
                    entries.append(Entry(key, -1, tuple(captions), NO_IMAGE))
                else:
                    others += captions
            entries.extend(_with_captions(key, images, captions, names))
            ignored.update(kinds[n] or "files without extension" for n in others)
    return entries, ignored


def _with_captions(
    key: str, images: list[int], captions: list[int], names: Sequence[str]
) -> Iterator[Entry]:
    """Each image with the captions that are its own (``x.png.txt``), then those of the name."""
    owners = {n: posixpath.splitext(names[n])[0] for n in captions}
    present = {names[image] for image in images}
    for position, image in enumerate(images):
        own = [n for n in captions if owners[n] == names[image]]
        shared = [n for n in captions if owners[n] not in present]
        apart = f"-{extension_of(names[image])[1:]}" if own and position else ""
        yield Entry(key + apart, image, (*own, *shared), None)


def _runs(numbers: list[int], names: Sequence[str]) -> list[list[int]]:
    """The members of one key; where a name occurs twice, the runs without a repetition."""
    if len({names[n] for n in numbers}) == len(numbers):
        return [numbers]
    runs: list[list[int]] = [[]]
    for n in numbers:
        run = runs[-1]
        if run and (n != run[-1] + 1 or names[n] in {names[m] for m in run}):
            runs.append(run := [])
        run.append(n)
    return runs


def _join_up_to_first_dot(found: dict[str, list[int]], kinds: Sequence[str]) -> None:
    """Join keys that are no sample by themselves but are one up to their first dot."""
    joined: dict[str, list[str]] = {}
    for key in found:
        folder, slash, base = key.rpartition("/")
        first, _, rest = base.partition(".")
        if first and not rest[:1].isdigit():
            joined.setdefault(folder + slash + first, []).append(key)
    for key, parts in joined.items():
        if len(parts) < 2:
            continue
        images = [sum(kinds[n] in _IMAGES for n in found[part]) for part in parts]
        captions = [sum(kinds[n] in _CAPTIONS for n in found[part]) for part in parts]
        whole = any(image and caption for image, caption in zip(images, captions, strict=True))
        if sum(images) == 1 and any(captions) and not whole:
            found[key] = sorted(n for part in parts for n in found.pop(part))
