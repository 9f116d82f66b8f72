"""Audio files in and out, other rates, and what is no recording."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from modelport import recordings
from modelport.errors import BackendUnavailable, UsageError


def tone(hertz: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    moments = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * moments)).astype(np.float32)


def pcm(
    path: Path, samples: np.ndarray, width: int, *, channels: int = 1, rate: int = 8000
) -> Path:
    """A file written without the code that is tested."""
    whole = np.round(samples * (2.0 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        whole += 128
    data = b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in whole.ravel())
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_is_read(tmp_path: Path, width: int) -> None:
    wanted = tone(440, 8000, 0.05)
    found, rate = recordings.read(pcm(tmp_path / "a.wav", wanted, width))
    assert (rate, found.dtype) == (8000, np.float32)
    np.testing.assert_allclose(found, wanted, atol=2.0 ** (2 - 8 * width) + 1e-7)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(440, 8000, 0.05), tone(300, 8000, 0.05)
    place = pcm(tmp_path / "a.wav", np.stack([left, right], 1), 2, channels=2)
    np.testing.assert_allclose(recordings.read(place)[0], (left + right) / 2, atol=1e-4)


def test_what_is_written_is_read_again_and_clipped(tmp_path: Path) -> None:
    recordings.write(tmp_path / "a.wav", np.array([0.25, -3.0, 3.0]), 24000)
    found, rate = recordings.read(tmp_path / "a.wav")
    assert rate == 24000
    np.testing.assert_allclose(found, [0.25, -1, 1], atol=1e-4)


@pytest.mark.parametrize(("rate", "wanted"), [
    (8000, 16000), (44100, 16000), (48000, 16000), (22050, 16000), (16000, 24000),
])  # fmt: skip
def test_a_tone_is_the_same_tone_at_another_rate(rate: int, wanted: int) -> None:
    found = recordings.resampled(tone(1000, rate), rate, wanted)
    assert (found.dtype, len(found)) == (np.float32, wanted // 2)
    inside = slice(wanted // 50, -wanted // 50)  # the ends know no neighbours
    np.testing.assert_allclose(found[inside], tone(1000, wanted)[inside], atol=2e-4)


def test_what_the_lower_rate_cannot_hold_is_silent() -> None:
    """A tone of 11 kHz would come back as one of 5 kHz."""
    found = recordings.resampled(tone(11000, 44100), 44100, 16000)
    assert np.abs(found[400:-400]).max() < 1e-4


def test_the_same_rate_is_the_same_array() -> None:
    samples = tone(440, 16000)
    assert recordings.resampled(samples, 16000, 16000) is samples


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_compressed_files_are_read(suffix: str, tmp_path: Path) -> None:
    wanted = tone(440, 16000)
    soundfile.write(tmp_path / f"a.{suffix}", wanted, 16000)
    found, rate = recordings.read(tmp_path / f"a.{suffix}")
    assert rate == 16000
    assert len(found) == len(wanted)
    np.testing.assert_allclose(found[1600:-1600], wanted[1600:-1600], atol=0.02)


def test_no_recording(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no recording")
    (tmp_path / "none.wav").write_bytes(b"")
    pcm(tmp_path / "silent.wav", np.zeros(0), 2)
    pcm(tmp_path / "slow.wav", np.zeros(9), 2, rate=100)
    for name, found in (("text", "no recording that can be read"), ("none", "no recording that"),
                        ("silent", "holds no samples"), ("slow", "100 samples a second"),
                        ("absent", "there is no file")):
        with pytest.raises(UsageError, match=found) as caught:
            recordings.read(tmp_path / f"{name}.wav")
        assert caught.value.allowed


def test_a_rate_that_is_not_taken_is_changed_by_the_command_that_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        recordings.read(pcm(tmp_path / "slow.wav", np.zeros(9), 2, rate=100))
    words = caught.value.hint.split()
    assert recordings.RATES[0] <= int(words[words.index("-ar") + 1]) <= recordings.RATES[1]


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_a_library_that_is_missing_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    recordings.write(tmp_path / "a.wav", tone(440, 16000), 16000)
    with pytest.raises(BackendUnavailable, match=f"{missing} can't be used") as caught:
        recordings.resampled(*recordings.read(tmp_path / "a.wav"), 8000)
    assert caught.value.hint == 'pip install "modelport[audio]"'
