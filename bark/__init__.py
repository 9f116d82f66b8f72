"""Bark in torch: what makes it faster or smaller, what it is asked to say, and proof of both.

    from modelport.bark import Optimisations, Setting, open_speaker

    speaker = open_speaker(root, Optimisations(attention="fused"), Setting(), device="cuda")
    audio = speaker.speak([0, 1])
"""

from __future__ import annotations

from .attention import fuse
from .optimisations import Optimisations, combinations
from .parity import Agreement, Recording, compare, record
from .setting import ARTICLE, SHORT, SUB_CONFIGS, Setting, complete, prompts, voice
from .speaker import Speaker, open_speaker

__all__ = [
    "ARTICLE",
    "SHORT",
    "SUB_CONFIGS",
    "Agreement",
    "Optimisations",
    "Recording",
    "Setting",
    "Speaker",
    "combinations",
    "compare",
    "complete",
    "fuse",
    "open_speaker",
    "prompts",
    "record",
    "voice",
]
