"""Store of images on disk, so that a source that is held as a list does not hold its images."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from vlduet.data import images
from vlduet.data.records import ImageRef, Record, map_images


class ImageStore:
    """Folder of image files, named by their content."""

    def __init__(self, folder: Path | None):
        """Name the folder; nothing is written before the first image.

        Args:
            folder: folder that keeps its images, and that runs and processes may share; None: a
                folder for temporary files, which is deleted by `close`, or at last when Python
                exits.
        """
        self.num_bytes = 0
        """Size of all images that were stored, those that the folder held before included."""
        self._folder = folder
        self._delete: weakref.finalize[..., ImageStore] | None = None

    @property
    def folder(self) -> Path:
        """Folder of the images; a folder for temporary files is created at the first access."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="vlduet-images-"))
            self._delete = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def write_images(self, record: Record) -> Record:
        """Return a copy of a record with files in place of all images that are bytes in memory.

        Raises:
            DataError: a file cannot be written.
        """
        return map_images(record, self._write_image)

    def _write_image(self, ref: ImageRef) -> ImageRef:
        """Return the reference of an image's file, or `ref` itself if it holds no bytes."""
        if ref.data is None:
            return ref
        self.num_bytes += len(ref.data)
        return images.write_image_file(ref, self.folder)

    def close(self) -> None:
        """Delete the folder if it is one for temporary files; the images are missing afterwards."""
        if self._delete is not None:
            self._delete()
