"""Recordings: audio files in and out, and other sampling rates."""

from __future__ import annotations

import wave
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

RATES = (4_000, 384_000)
"""Samples a second of files that are taken for recordings."""

_CONVERT = "ffmpeg -i FILE -ac 1 -c:a pcm_s16le recording.wav"


def read(path: Path) -> tuple[np.ndarray, int]:
    """A file that libsndfile reads (WAV, FLAC, OGG, MP3 and others), its channels averaged.

    Returns:
        float32 samples [count] within −1 to 1, and how many there are a second.

    Raises:
        UsageError: no such file, another format, no samples, or a rate outside :data:`RATES`.
        BackendUnavailable: soundfile is not installed.
    """
    soundfile = _library("soundfile")
    if not path.is_file():
        raise UsageError(f"there is no file {path}", allowed="WAV, FLAC, OGG or MP3")
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise UsageError(f"{path} is no recording that can be read: {error}",
                         allowed="WAV, FLAC, OGG or MP3", hint=_CONVERT) from error
    if not RATES[0] <= rate <= RATES[1]:
        raise UsageError(f"{path} has {rate} samples a second",
                         allowed=f"{RATES[0]} to {RATES[1]}",
                         hint=_CONVERT.replace("-ac 1", "-ac 1 -ar 16000"))
    if not samples.size:
        raise UsageError(f"{path} holds no samples", allowed="one or more")
    return samples.mean(axis=1), rate


def write(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write 16-bit mono PCM, which needs no library beyond Python's own.

    Args:
        samples: [count] within −1 to 1; what lies outside is clipped.
        rate: samples a second.
    """
    import numpy as np

    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """The same recording at another rate, by the SoX resampler at its high quality.

    Args:
        samples: float32 [count].

    Returns:
        float32 [count × wanted / rate, rounded].

    Raises:
        BackendUnavailable: soxr is not installed.
    """
    if rate == wanted:
        return samples
    found: np.ndarray = _library("soxr").resample(samples, rate, wanted, quality="HQ")
    return found


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: without the C library that it wraps
        raise BackendUnavailable(f"{name} can't be used, by which recordings are read: {error}",
                                 hint='pip install "modelport[audio]"') from error
