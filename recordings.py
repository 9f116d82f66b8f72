"""Recordings: WAV files in and out, and other sampling rates."""

from __future__ import annotations

import wave
from functools import cache
from math import gcd
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

RATES = (4_000, 384_000)
"""Samples a second of files that are taken for recordings."""

_CROSSINGS = 16
"""Zero crossings of the sinc on either side; with the window below, aliases lie under −80 dB."""

_BETA = 8.6
"""Of the Kaiser window: Oppenheim and Schafer, Discrete-Time Signal Processing, section 7.5.3."""

_AT_ONCE = 1 << 16
"""Output samples computed together, which bounds the memory."""

_CONVERT = "ffmpeg -i FILE -ac 1 -c:a pcm_s16le recording.wav"


def read(path: Path) -> tuple[np.ndarray, int]:
    """A WAV file of integer PCM, its channels averaged.

    Returns:
        float32 samples [count] within −1 to 1, and how many there are a second.

    Raises:
        UsageError: no such file, another format, no samples, or a rate outside :data:`RATES`.
    """
    allowed = "WAV files of 8, 16, 24 or 32-bit PCM"
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            frames = file.readframes(file.getnframes())
            told = file.getnframes()
    except (OSError, wave.Error, EOFError) as error:
        why = str(error) or "it ends early"
        raise UsageError(f"{path} is no recording that can be read: {why}",
                         allowed=allowed, hint=_CONVERT) from error
    if not RATES[0] <= rate <= RATES[1]:
        raise UsageError(f"{path} has {rate} samples a second",
                         allowed=f"{RATES[0]} to {RATES[1]}", hint=_CONVERT)
    if len(frames) != told * channels * width:
        raise UsageError(f"{path} ends after {len(frames)} of {told * channels * width} bytes",
                         allowed="a file that is whole")
    samples = _integers(frames, width).reshape(-1, channels).mean(axis=1)
    if not samples.size:
        raise UsageError(f"{path} holds no samples", allowed="one or more")
    return samples.astype("float32"), rate


def write(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write 16-bit mono PCM.

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
    """The same recording at another rate, by a windowed sinc below the lower rate's half.

    Args:
        samples: float32 [count].

    Returns:
        float32 [count × wanted / rate, rounded up].
    """
    import numpy as np

    if rate == wanted:
        return samples
    common = gcd(rate, wanted)
    up, down = wanted // common, rate // common
    taps = _taps(up, down)
    half = taps.shape[1] // 2
    padded = np.pad(samples, half)
    count = -(-len(samples) * up // down)
    found = np.empty(count, np.float32)
    for start in range(0, count, _AT_ONCE):
        moments = np.arange(start, min(start + _AT_ONCE, count)) * down
        whole, phase = moments // up, moments % up
        near = padded[whole[:, None] + np.arange(1, 2 * half + 1)]
        found[start: start + len(moments)] = np.einsum("nt,nt->n", near, taps[phase])
    return found


@cache
def _taps(up: int, down: int) -> np.ndarray:
    """Weights of the neighbours of an output sample, for each of its places between two inputs."""
    import numpy as np

    cutoff = min(1.0, up / down)
    half = int(np.ceil(_CROSSINGS / cutoff))
    away = np.arange(up)[:, None] / up - np.arange(1 - half, half + 1)
    inside = np.clip(1 - (away / half) ** 2, 0, None)
    window = np.i0(_BETA * np.sqrt(inside)) / np.i0(_BETA)
    weights = cutoff * np.sinc(cutoff * away) * window
    made: np.ndarray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return made


def _integers(frames: bytes, width: int) -> np.ndarray:
    """PCM as float64 within −1 to 1; 8-bit samples have no sign."""
    import numpy as np

    if width == 1:
        return (np.frombuffer(frames, np.uint8) - 128.0) / 128.0
    if width == 3:
        low = np.frombuffer(frames, np.uint8).reshape(-1, 3).astype(np.int32)
        joined = (low[:, 0] | low[:, 1] << 8 | low[:, 2] << 16) << 8
        return joined / 2.0**31
    return np.frombuffer(frames, f"<i{width}") / 2.0 ** (8 * width - 1)
