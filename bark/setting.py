"""What Bark is asked to say and how long: prompts, voices, lengths."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

VOICE_KEYS = ("semantic_prompt", "coarse_prompt", "fine_prompt")
SUB_CONFIGS = ("semantic_config", "coarse_acoustics_config", "fine_acoustics_config")
TEXTS = (
    "Let's try generating speech, with Bark, a text-to-speech model.",
    "Batching speaks many sentences at once.",
    "Hello!",
    "The quick brown fox jumps over the lazy dog, again and again, until the dog gets up, "
    "stretches, and walks away without a word.",
    "What time does the last train leave?",
    "Numbers: one, two, three, four, five, six, seven, eight, nine, ten.",
    "It rained all night, and in the morning the street was a river.",
    "No.",
)
"""Prompts of uneven lengths."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How much is generated.

    Attributes:
        new_tokens: semantic tokens; the most where ``lengths`` is free.
        lengths: ``fixed`` generates exactly as many, whatever the model would have liked;
            ``free`` stops where it stops.
        text_window: padded length of a prompt; None is the checkpoint's own (256).
        fine_window: tokens that the fine model sees at once; None is the checkpoint's own (1024).
        voice: a name that the checkpoint knows, an ``.npz`` file, ``seeded``, or None.
        sample: draw tokens instead of taking the likeliest.
        seed: of prompts where there is no tokenizer, of the seeded voice, and of sampling.
    """

    new_tokens: int = 256
    lengths: Literal["fixed", "free"] = "fixed"
    text_window: int | None = None
    fine_window: int | None = None
    voice: str | None = None
    sample: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.new_tokens, self.text_window or 1, self.fine_window or 2)
        if min(sizes) < 1 or (self.fine_window or 2) % 2:
            raise UsageError(f"{self} can't be generated",
                             allowed="positive lengths, and an even fine window")

    def configure(self, model: Any) -> None:
        """Bring the model's generation config to this setting."""
        config = model.generation_config
        semantic, _, fine = (getattr(config, name) for name in SUB_CONFIGS)
        semantic["max_new_tokens"] = self.new_tokens
        semantic["min_new_tokens"] = self.new_tokens if self.lengths == "fixed" else None
        if self.text_window is not None:
            semantic["max_input_semantic_length"] = self.text_window
        if self.fine_window is not None:
            fine["max_fine_input_length"] = self.fine_window
            fine["max_fine_history_length"] = self.fine_window // 2
        self._check(model)

    def _check(self, model: Any) -> None:
        semantic, _, fine = (getattr(model.generation_config, name) for name in SUB_CONFIGS)
        context = int(model.semantic.config.block_size)
        needed = int(semantic["max_input_semantic_length"]) + 1 + self.new_tokens
        if needed > context:
            raise UsageError(f"the semantic model would need {needed} positions",
                             allowed=f"{context}", hint="fewer new tokens")
        longest = int(model.fine_acoustics.config.block_size)
        if int(fine["max_fine_input_length"]) > longest:
            raise UsageError(f"a fine window of {fine['max_fine_input_length']}",
                             allowed=f"at most {longest}")


ARTICLE = Setting()
"""256 new tokens and the checkpoint's own windows."""
SHORT = Setting(new_tokens=16, text_window=64, fine_window=128)
"""For a CPU: every sub-model runs, on a sixteenth of the tokens."""


def complete(config: Any) -> Any:
    """A generation config with the sub-models' own, as plain dicts, which is how Bark reads them.

    What a checkpoint leaves out (one drawn from a seed has none) takes the library's defaults.
    """
    from transformers.models.bark import generation_configuration_bark as library

    own = {name: getattr(config, name, None) or {} for name in SUB_CONFIGS}
    plain = {name: value if isinstance(value, dict) else value.to_dict()
             for name, value in own.items()}
    made = library.BarkGenerationConfig(**plain)
    result = copy.deepcopy(config)
    for name in SUB_CONFIGS:
        setattr(result, name, getattr(made, name).to_dict())
    for name in ("sample_rate", "codebook_size"):
        if getattr(config, name, None) is None:
            setattr(result, name, getattr(made, name))
    return result


def prompts(root: Path, setting: Setting, model: Any) -> Mapping[str, torch.Tensor]:
    """Padded ids and mask of every prompt: real text where there is a tokenizer, else seeded ids.

    The rows are of uneven length, as :data:`TEXTS` are.
    """
    import torch

    window = int(model.generation_config.semantic_config["max_input_semantic_length"])
    rows = _tokenised(root) or _seeded(setting, model, window)
    ids = torch.zeros((len(rows), window), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        kept = row[:window]
        ids[index, : len(kept)] = torch.tensor(kept)
        mask[index, : len(kept)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _tokenised(root: Path) -> list[list[int]] | None:
    from ..checkpoints import has_tokenizer, tokenizer

    if not has_tokenizer(root):
        return None
    encoded = tokenizer(root)(list(TEXTS), add_special_tokens=False)["input_ids"]
    return [list(row) for row in encoded]


def _seeded(setting: Setting, model: Any, window: int) -> list[list[int]]:
    rng = np.random.default_rng(setting.seed)
    offset = int(model.generation_config.semantic_config["text_encoding_offset"])
    pad = int(model.generation_config.semantic_config["text_pad_token"])
    high = min(pad, int(model.semantic.config.input_vocab_size)) - offset
    lengths = [max(1, window * (n + 1) // len(TEXTS)) for n in rng.permutation(len(TEXTS))]
    return [rng.integers(0, high, length).tolist() for length in lengths]


def voice(root: Path, setting: Setting, model: Any) -> dict[str, torch.Tensor] | None:
    """The speaker to imitate, or None.

    Raises:
        UsageError: neither a file nor a name the checkpoint knows, or a damaged file.
    """
    import torch

    if setting.voice is None:
        return None
    found = (_seeded_voice(model, setting.seed) if setting.voice == "seeded"
             else _read_voice(root, setting.voice))
    return {key: torch.from_numpy(np.ascontiguousarray(found[key])) for key in VOICE_KEYS}


def _seeded_voice(model: Any, seed: int) -> dict[str, np.ndarray]:
    """A history of a second and a half, of tokens that the sub-models can have made."""
    config, rng = model.generation_config, np.random.default_rng([seed, 1])
    semantic, coarse, fine = (getattr(config, name) for name in SUB_CONFIGS)
    frames = min(112, fine["max_fine_history_length"])
    tokens = int(frames * semantic["semantic_rate_hz"] / coarse["coarse_rate_hz"])
    codes = rng.integers(0, config.codebook_size, (fine["n_fine_codebooks"], frames))
    return {"semantic_prompt": rng.integers(0, semantic["semantic_vocab_size"], tokens),
            "coarse_prompt": codes[: coarse["n_coarse_codebooks"]], "fine_prompt": codes}


def _read_voice(root: Path, name: str) -> dict[str, np.ndarray]:
    files: Sequence[Path] = [Path(name)]
    if not name.endswith(".npz"):
        home = root / "speaker_embeddings"
        files = [home / f"{name}.npz", *(home / f"{name}_{key}.npy" for key in VOICE_KEYS)]
    try:
        if files[0].is_file():
            with np.load(files[0], allow_pickle=False) as archive:
                found = {key: archive[key] for key in VOICE_KEYS}
        else:
            found = {key: np.load(file, allow_pickle=False)
                     for key, file in zip(VOICE_KEYS, files[1:], strict=True)}
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(f"{name!r} is no voice preset: {error}",
                         allowed=f"an .npz file with {', '.join(VOICE_KEYS)}, a name with files in "
                                 f"{root / 'speaker_embeddings'}, or seeded") from error
    if any(found[key].ndim != dims for key, dims in zip(VOICE_KEYS, (1, 2, 2), strict=True)):
        raise UsageError(f"{name!r} holds arrays of other ranks", allowed="1, 2 and 2")
    return found


def shorter(setting: Setting, new_tokens: int) -> Setting:
    """The same setting with at most so many new tokens."""
    return replace(setting, new_tokens=min(setting.new_tokens, new_tokens))
