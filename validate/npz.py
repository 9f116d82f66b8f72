"""Reading and writing ``.npz`` archives of plain arrays, bfloat16 included; never pickles."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, BinaryIO
from zipfile import BadZipFile

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_BFLOAT16 = "::bfloat16"
"""Suffix of members that hold bfloat16 as its 16 bits: NumPy's format has no name for it."""

_PLAIN = "::"
"""Suffix of the others: an array called ``file`` would be taken for an argument of savez."""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an archive, by name.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, no archive, or holds pickled objects.
    """
    # numpy.load leaves a file that it opened itself open when the content is damaged.
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return dict(_decode(name, archive[name]) for name in archive.files)
        except (ValueError, KeyError, EOFError, AttributeError, BadZipFile, zlib.error) as error:
            raise ValueError(str(error) or "the file is empty") from error


def write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays so that :func:`read_arrays` gives them back."""
    np.savez(file, **dict(_encode(n, v) for n, v in arrays.items()))  # type: ignore[arg-type]


def _encode(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    if value.dtype == ml_dtypes.bfloat16:
        return name + _BFLOAT16, value.view(np.uint16)
    return name + _PLAIN, value


def _decode(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    if name.endswith(_BFLOAT16):
        return name.removesuffix(_BFLOAT16), value.view(ml_dtypes.bfloat16)
    return name.removesuffix(_PLAIN), value
