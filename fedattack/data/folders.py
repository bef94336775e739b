"""Data sets of picture files: LFW, CelebA, ImageNet, Caltech-101 and any folder or archive of pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from fedattack.config import DataConfig
from fedattack.data.dataset import Listing, cut_note, joined
from fedattack.data.files import (
    ARCHIVE_SUFFIXES,
    Missing,
    Tree,
    by_torchvision,
    data_dir,
    is_archive,
    open_tree,
    with_download,
)
from fedattack.data.pixels import SUFFIXES, decode, from_pictures, require_memory
from fedattack.errors import DataError
from fedattack.reading import read_text

_WNID = re.compile(r"n\d{8}")
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def is_picture(name: PurePosixPath) -> bool:
    """Whether the name is that of a picture file."""
    return name.suffix.lower() in SUFFIXES


def read_pictures(
    tree: Tree,
    names: Sequence[str],
    image_size: int | None,
    channels: int | None,
    remarks: Counter[str] | None = None,
) -> np.ndarray:
    """Pixels uint8 (n, C, S, S) of the named files: centre-cropped, resized, grey only if all are.

    `remarks`: as of :func:`~fedattack.data.pixels.decode`. Raises DataError if one cannot be read, or sizes differ
    and `image_size` is None.
    """
    if image_size is not None:
        require_memory(len(names), channels or 3, image_size)
    decoded = (decode(tree.read(name), name, image_size, remarks) for name in names)
    return from_pictures(decoded, len(names), channels)


def by_folder(tree: Tree) -> tuple[list[str], np.ndarray, tuple[str, ...], str]:
    """Names, labels int64 (N,), class names and note of pictures in class folders, or of one class "all" without.

    Folders that wrap everything are looked through: all of an archive's, and those of a folder that still leave
    class folders below. So are folders of parts (train, val, test), whose pictures are taken together, which the note
    says. Raises DataError if there is no picture, or pictures lie beside class folders.
    """
    names = tree.names
    if not names:
        raise Missing(f"{str(tree.path)!r} holds no pictures ({', '.join(SUFFIXES)})")
    parts = [PurePosixPath(name).parts for name in names]
    shortest = 2 if tree.path.is_file() else 3
    while min(map(len, parts)) >= shortest and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    note, splits = "", sorted({part[0] for part in parts})
    if len(splits) > 1 and all(name.lower() in _SPLITS for name in splits) and min(map(len, parts)) > 2:
        parts = [part[1:] for part in parts]
        note = f"{' and '.join(splits)} hold one set of classes: their pictures are taken together"
    flat = [len(part) == 1 for part in parts]
    if all(flat):
        return names, np.zeros(len(names), np.int64), ("all",), note
    if any(flat):
        stray = names[flat.index(True)]
        raise DataError(f"{str(tree.path)!r}: picture {stray!r} lies beside class folders; put it into one")
    return names, *_numbered([part[0] for part in parts]), note


def _numbered(classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    found, labels = np.unique(np.array(classes, dtype=object).astype(str), return_inverse=True)
    return labels.astype(np.int64), tuple(str(name) for name in found)


def _pictures(
    tree: Tree, names: list[str], channels: int | None, remarks: Counter[str]
) -> Callable[[np.ndarray, int | None], np.ndarray]:
    return lambda ids, size: read_pictures(tree, [names[i] for i in ids], size, channels, remarks)


def image_folder(config: DataConfig) -> Listing:
    """Any folder or archive of pictures: sub-folders are classes, no sub-folders is one class "all".

    A folder means a person, too, where `data.groups` is "folder".
    """

    def read() -> Listing:
        remarks: Counter[str] = Counter()
        root = data_dir(config, "a folder or archive of pictures, one sub-folder a class")
        tree = open_tree(root, is_picture)
        if not tree.names and root.is_dir():
            tree = open_tree(_only_archive(config, root), is_picture)
        names, labels, class_names, note = by_folder(tree)
        people = config.groups == "folder"
        return Listing(
            labels=labels,
            class_names=class_names,
            groups=labels if people else None,
            group_names=class_names if people else None,
            read=_pictures(tree, names, None, remarks),
            remarks=remarks,
            note=note,
        )

    return with_download(config, None, read)


def _only_archive(config: DataConfig, root: Path) -> Path:
    archives = [path for path in sorted(root.iterdir()) if path.is_file() and is_archive(path)]
    if not archives:
        raise Missing(f"setting 'data.dir' = {config.dir!r} holds no pictures ({', '.join(SUFFIXES)})")
    if len(archives) > 1:
        found = ", ".join(path.name for path in archives)
        raise DataError(f"setting 'data.dir' = {config.dir!r} holds several archives; name one of {found}")
    return archives[0]


def first_tree(
    places: Sequence[Path], stems: Sequence[str], wanted: Callable[[PurePosixPath], bool]
) -> Tree | None:
    """First folder or archive called one of `stems` in `places` that has a wanted file; a place may be an archive."""
    for place in places:
        candidates = [place] if place.is_file() else []
        for stem in stems if place.is_dir() else ():
            candidates += [place / stem, *(place / f"{stem}{suffix}" for suffix in ARCHIVE_SUFFIXES)]
        for path in candidates:
            if path.exists():
                tree = open_tree(path, wanted)
                if tree.names:
                    return tree
    return None


def _is_lfw(name: PurePosixPath) -> bool:
    return is_picture(name) and re.fullmatch(re.escape(name.parent.name) + r"_\d{4}", name.stem) is not None


def lfw(config: DataConfig) -> Listing:
    """Faces of public people (Labeled Faces in the Wild), 13,233 images of 5,749 people, 250x250 colour.

    Read as ``<Name>/<Name>_0001.jpg`` from a folder or archive called lfw, lfw_funneled, lfw-deepfunneled, lfw64 or
    lfw32 (the first that is there), or from what `data.dir` itself names. A person is a class and a group.

    References
    ----------
    .. [1] G. B. Huang et al., "Labeled Faces in the Wild", University of Massachusetts, TR 07-49, 2007.
    """

    def read() -> Listing:
        remarks: Counter[str] = Counter()
        root = data_dir(config, "a folder or archive with <Name>/<Name>_0001.jpg")
        stems = ("lfw", "lfw_funneled", "lfw-deepfunneled", "lfw64", "lfw32", ".")
        tree = first_tree([root, root / "LFW", root / "lfw-py"], stems[:-1], _is_lfw)
        tree = tree or first_tree([root], stems[-1:], _is_lfw)
        if tree is None:
            raise Missing(
                f"setting 'data.dir' = {config.dir!r}: no <Name>/<Name>_0001.jpg (or .png) of LFW there"
            )
        labels, people = _numbered([PurePosixPath(name).parent.name for name in tree.names])
        return Listing(
            labels=labels,
            class_names=people,
            groups=labels,
            group_names=people,
            read=_pictures(tree, tree.names, 3, remarks),
            remarks=remarks,
            note=joined(
                f"read from {tree.path.name}",
                cut_note(len(labels), 13_233, "images"),
                cut_note(len(people), 5_749, "people"),
            ),
        )

    return with_download(config, None, read)


def celeba(config: DataConfig) -> Listing:
    """Faces of celebrities (CelebA), 202,599 images of 10,177 people, 178x218 colour, centre-cropped.

    Read from img_align_celeba (folder or .zip) and identity_CelebA.txt. The identity, counted from 0, is the class
    and the group; the label space stays 10,177 wide for a cut set too.

    References
    ----------
    .. [1] Z. Liu, P. Luo, X. Wang, X. Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015.
    """

    def read() -> Listing:
        remarks: Counter[str] = Counter()
        root = data_dir(config, "a folder with img_align_celeba (folder or .zip) and identity_CelebA.txt")
        places = [root, root / "celeba", root / "CelebA"]
        identities = next(
            (p / "identity_CelebA.txt" for p in places if (p / "identity_CelebA.txt").is_file()), None
        )
        if identities is None:
            raise Missing(f"setting 'data.dir' = {config.dir!r}: no file identity_CelebA.txt")
        tree = first_tree([identities.parent], ("img_align_celeba",), is_picture)
        if tree is None:
            raise Missing(
                f"setting 'data.dir' = {config.dir!r}: no pictures in img_align_celeba (folder or .zip)"
            )
        whose = _identities(identities)
        unknown = [name for name in tree.names if PurePosixPath(name).name not in whose]
        if unknown:
            raise DataError(f"{str(identities)!r} does not say who picture {unknown[0]!r} shows")
        labels = np.array([whose[PurePosixPath(name).name] - 1 for name in tree.names], np.int64)
        people = tuple(str(i) for i in range(1, 10_178))
        return Listing(
            labels=labels,
            class_names=people,
            groups=labels,
            group_names=people,
            read=_pictures(tree, tree.names, 3, remarks),
            remarks=remarks,
            note=cut_note(len(labels), 202_599, "images"),
        )

    fetch = by_torchvision("CelebA", split="all", target_type="identity")
    return with_download(config, fetch, read)


def _identities(path: Path) -> dict[str, int]:
    whose: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or not re.fullmatch(r"[0-9]{1,5}", parts[1]) or not 1 <= int(parts[1]) <= 10_177:
            raise DataError(
                f"{str(path)!r} line {number}: wanted a file name and an identity 1..10177, got {line[:80]!r}"
            )
        whose[parts[0]] = int(parts[1])
    return whose


def imagenet(config: DataConfig) -> Listing:
    """Photographs (ImageNet, ILSVRC 2012), 1,281,167 training images, colour, 1,000 classes; mixed sizes.

    Read from class folders called by their WordNet id (n01484850, ...), directly or under train, or from an archive
    of them whose name starts with imagenet.

    References
    ----------
    .. [1] O. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 115, 2015.
    """

    def wanted(name: PurePosixPath) -> bool:
        return is_picture(name) and _WNID.fullmatch(name.parent.name) is not None

    def read() -> Listing:
        remarks: Counter[str] = Counter()
        root = data_dir(config, "class folders n01484850/*.JPEG, or an archive of them")
        tree = open_tree(root, wanted) if root.is_file() else _imagenet_below(root, wanted)
        if tree is None or not tree.names:
            raise Missing(
                f"setting 'data.dir' = {config.dir!r}: no pictures in WordNet folders (n01484850, ...)"
            )
        labels, wnids = _numbered([PurePosixPath(name).parent.name for name in tree.names])
        return Listing(
            labels=labels,
            class_names=wnids,
            read=_pictures(tree, tree.names, 3, remarks),
            remarks=remarks,
            note=joined(cut_note(len(labels), 1_281_167), cut_note(len(wnids), 1_000, "classes")),
        )

    return with_download(config, None, read)


def _imagenet_below(root: Path, wanted: Callable[[PurePosixPath], bool]) -> Tree | None:
    places = [
        root,
        *(p for p in sorted(root.iterdir()) if p.is_dir() and p.name.lower().startswith("imagenet")),
    ]
    for place in places:
        for folder in (place / "train", place):
            if folder.is_dir() and any(_WNID.fullmatch(p.name) for p in folder.iterdir() if p.is_dir()):
                return open_tree(folder, wanted)
        for path in sorted(place.iterdir()):
            if path.is_file() and is_archive(path) and path.name.lower().startswith("imagenet"):
                return open_tree(path, wanted)
    return None


def caltech101(config: DataConfig) -> Listing:
    """Photographs of objects (Caltech-101), 8,677 images, colour, 101 classes; mixed sizes.

    Read from 101_ObjectCategories (folder or .tar.gz); the background pictures are left out.

    References
    ----------
    .. [1] L. Fei-Fei, R. Fergus, P. Perona, "Learning generative visual models from few training examples", CVPR
       Workshop 2004.
    """

    def wanted(name: PurePosixPath) -> bool:
        return is_picture(name) and name.parent.name not in ("", "BACKGROUND_Google", "101_ObjectCategories")

    def read() -> Listing:
        remarks: Counter[str] = Counter()
        root = data_dir(config, "a folder with 101_ObjectCategories (folder or .tar.gz)")
        places = [root, root / "caltech101", root / "caltech-101", root / "Caltech101"]
        tree = first_tree(places, ("101_ObjectCategories",), wanted)
        if tree is None and root.name == "101_ObjectCategories":
            tree = open_tree(root, wanted)
        if tree is None or not tree.names:
            raise Missing(f"setting 'data.dir' = {config.dir!r}: no pictures in 101_ObjectCategories/<class>")
        labels, class_names = _numbered([PurePosixPath(name).parent.name for name in tree.names])
        return Listing(
            labels=labels,
            class_names=class_names,
            read=_pictures(tree, tree.names, 3, remarks),
            remarks=remarks,
            note=joined(cut_note(len(labels), 8_677, "images"), cut_note(len(class_names), 101, "classes")),
        )

    return with_download(config, by_torchvision("Caltech101"), read)
