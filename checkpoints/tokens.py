"""Text to feeds, with the tokenizer that came with a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..artifacts import MANIFEST
from ..errors import RemoteCodeRefused, UsageError
from . import consent
from .files import CONFIG

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np


TOKENIZER, EXTRACTOR = "tokenizer_config.json", "preprocessor_config.json"


def _holds_one(root: Path) -> bool:
    return any((root / name).is_file() for name in ("tokenizer.json", TOKENIZER))


def has_tokenizer(root: Path) -> bool:
    """Whether a checkpoint's or an artifact's directory holds a tokenizer that may be loaded."""
    if not _holds_one(root):
        return False
    configs = (root / CONFIG, root / TOKENIZER)
    if not any(b"auto_map" in file.read_bytes() for file in configs if file.is_file()):
        return True
    try:  # transformers' own class may do
        tokenizer(root)
    except RemoteCodeRefused:
        return False
    return True


def tokenizer(root: Path) -> Any:
    """The directory's tokenizer, as transformers loads it.

    Raises:
        UsageError: there is none.
        RemoteCodeRefused: it is Python of the checkpoint's own, which was not allowed.
    """
    if not _holds_one(root):
        raise UsageError(f"{root} has no tokenizer",
                         allowed=f"a directory with tokenizer.json or {TOKENIZER}",
                         hint="give arrays instead of text")
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer.from_pretrained, root, TOKENIZER)


def feature_extractor(root: Path) -> Any:
    """What turns a recording into features, as transformers loads it.

    Raises:
        UsageError: the directory holds none.
        RemoteCodeRefused: as :func:`tokenizer`.
    """
    if not any((root / name).is_file() for name in (EXTRACTOR, "processor_config.json")):
        raise UsageError(f"{root} has no feature extractor",
                         allowed=f"a directory with {EXTRACTOR}",
                         hint="generate(input_features=…) in Python")
    from transformers import AutoFeatureExtractor

    return _loaded(AutoFeatureExtractor.from_pretrained, root, EXTRACTOR)


def _loaded(load: Callable[..., Any], root: Path, config: str) -> Any:
    """What transformers loads, which asks on the terminal where it isn't told what is trusted.

    An artifact is nothing but files: it brings no code of its own.
    """
    artifact = (root / MANIFEST).is_file()
    trusted = consent.given().trust_remote_code and not artifact
    try:
        return load(root, local_files_only=True, trust_remote_code=trusted)
    except ValueError as error:
        if trusted or "trust_remote_code" not in str(error):
            raise
        raise RemoteCodeRefused(f"{root} wants to run Python of its own (auto_map in {config})",
                                allowed="classes that transformers has",
                                hint="give arrays (modelport.open_artifact in Python): an artifact "
                                     "brings no code" if artifact else
                                     "read that code, then --trust-remote-code") from error


def tokenize(
    root: Path,
    texts: Sequence[str],
    names: Sequence[str] | None = None,
    max_length: int | None = None,
    loaded: Any = None,
) -> dict[str, np.ndarray]:
    """Feeds for a batch of texts, padded to the longest.

    Args:
        root: a checkpoint's or an artifact's directory.
        texts: at least one.
        names: the model's inputs; what else the tokenizer makes is left out.
        max_length: tokens to cut a text at.
        loaded: the directory's :func:`tokenizer`; None loads it. One without a token to pad with
            is given one.

    Returns:
        int64 arrays of shape [texts, tokens] by input name.

    Raises:
        UsageError: there is no tokenizer here, or it does not make one of ``names``.
    """
    import numpy as np

    extra = {"truncation": True, "max_length": max_length} if max_length else {}
    loaded = tokenizer(root) if loaded is None else loaded
    if len(texts) > 1 and loaded.pad_token is None:
        # Decoders come without one. A mask hides what fills a row, whatever it is; where there is
        # no mask, an end is what such a model reads between two texts.
        loaded.pad_token = (loaded.eos_token or loaded.unk_token
                            or loaded.convert_ids_to_tokens(0))
    made = loaded(list(texts), padding=len(texts) > 1, return_tensors="np", **extra)
    wanted = tuple(names) if names is not None else tuple(made)
    feeds = {}
    for name in wanted:
        if name in made:
            feeds[name] = np.asarray(made[name], dtype=np.int64)
        elif name == "token_type_ids":
            feeds[name] = np.zeros_like(np.asarray(made["input_ids"], dtype=np.int64))
        else:
            raise UsageError(f"the tokenizer of {root} does not make {name}",
                             allowed=", ".join(made), hint="give arrays instead of text")
    return feeds
