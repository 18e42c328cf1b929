"""Writing a prepared set: quietly, completely or not at all."""

import contextlib
import io
import os
import tempfile
from typing import Any

import tensorflow_datasets as tfds


def write(builder: Any) -> None:
    """Prepares a builder that needs no download. If that fails, no folder is left behind."""
    made = [folder for folder in builder.data_path.parents if not folder.exists()]
    tfds.disable_progress_bar()
    try:
        # TFDS announces a download, and wants a folder for it
        with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=unused)
    except BaseException:
        # TFDS removes its half-written folder, not the ones above
        for folder in made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise
