"""Images of a folder by id, and the choice between a folder and an LMDB."""

import os
from pathlib import Path, PurePosixPath
from typing import Protocol

from infogrowth.data.lmdb_store import LmdbImages, is_lmdb
from infogrowth.data.names import IMAGE_EXTENSIONS, extension_of, image_id, possible_names
from infogrowth.errors import UserError


class ImageStore(Protocol):
    """Encoded images by id; picklable."""

    def read(self, name: str) -> bytes:
        """The bytes; raises UserError naming the id when there is no such image."""
        ...

    def __contains__(self, name: str) -> bool: ...


def open_images(path: str | os.PathLike[str]) -> ImageStore:
    """The images at ``path``: an LMDB if it is one, else a folder of files.

    Raises:
        UserError: nothing is there.
    """
    if is_lmdb(path):
        return LmdbImages(path)
    if os.path.isdir(path):
        return FolderImages(path)
    raise UserError(f"{path} is neither an LMDB nor a folder of images; check the path")


class FolderImages:
    """Image files below a folder, by relative path, with or without the extension."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._listed: dict[str, dict[str, Path]] = {}  # only where a name is not found as it is

    def read(self, name: str) -> bytes:
        """The bytes of an image.

        Raises:
            UserError: no such file, one that cannot be read, or an id that leads out of the folder.
        """
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith("/") or "\0" in name:
            raise UserError(f"the image {name!r} would lie outside of the folder {self.path}")
        file = self._find(name)
        if file is None:
            raise UserError(f"the image {name!r} is not in the folder {self.path}; check both")
        try:
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the image {file}: {error.strerror}") from error

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def _find(self, name: str) -> Path | None:
        for possible in possible_names(name):
            file = self.path / possible
            if file.is_file():
                return file
        name = name.replace("\\", "/")
        folder = name.rpartition("/")[0]
        if folder not in self._listed:
            self._listed[folder] = self._images_in(folder)
        return self._listed[folder].get(image_id(name).casefold())

    def _images_in(self, folder: str) -> dict[str, Path]:
        """Files by their ids, whatever their capitals and form of Unicode."""
        try:
            names = [
                f"{folder}/{name}" if folder else name for name in os.listdir(self.path / folder)
            ]
        except OSError:
            return {}
        return {
            image_id(name).casefold(): self.path / name
            for name in sorted(names)
            if extension_of(name) in IMAGE_EXTENSIONS
        }
