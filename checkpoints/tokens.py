"""Text to feeds, with the tokenizer that came with a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np


EXTRACTOR = "preprocessor_config.json"


def has_tokenizer(root: Path) -> bool:
    """Whether a checkpoint's or an artifact's directory holds a tokenizer."""
    return any((root / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def tokenizer(root: Path) -> Any:
    """The directory's tokenizer, as transformers loads it.

    Raises:
        UsageError: there is none.
    """
    if not has_tokenizer(root):
        raise UsageError(f"{root} has no tokenizer",
                         allowed="a directory with tokenizer.json or tokenizer_config.json",
                         hint="give arrays instead of text")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(root, local_files_only=True)


def feature_extractor(root: Path) -> Any:
    """What turns a recording into features, as transformers loads it.

    Raises:
        UsageError: the directory holds none.
    """
    if not any((root / name).is_file() for name in (EXTRACTOR, "processor_config.json")):
        raise UsageError(f"{root} has no feature extractor",
                         allowed=f"a directory with {EXTRACTOR}",
                         hint="generate(input_features=…) in Python")
    from transformers import AutoFeatureExtractor

    return AutoFeatureExtractor.from_pretrained(root, local_files_only=True)


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
        loaded: the directory's :func:`tokenizer`; None loads it.

    Returns:
        int64 arrays of shape [texts, tokens] by input name.

    Raises:
        UsageError: there is no tokenizer here, or it does not make one of ``names``.
    """
    import numpy as np

    extra = {"truncation": True, "max_length": max_length} if max_length else {}
    loaded = tokenizer(root) if loaded is None else loaded
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
