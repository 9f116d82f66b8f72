"""The model hub, through huggingface_hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import HubUnreachable, UsageError
from .files import CONFIG, INDEX, MODULE, MODULES, SIDECARS, SINGLE, shards

_TIMEOUT_S = 10.0
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = (SINGLE, INDEX)
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where a model's files are.

    Attributes:
        root: a directory, in the hub's cache or elsewhere.
        commit: of a hub model.
        pickled: whether there are weights as a pickle, be they fetched or not.
    """

    root: Path
    commit: str | None = None
    pickled: bool = False


def is_id(model: str) -> bool:
    """Whether this could be a hub id: ``name`` or ``owner/name``."""
    return bool(_ID.fullmatch(model)) and ".." not in model


def fetch(
    model: str,
    revision: str | None,
    *,
    with_weights: bool,
    with_pickle: bool = False,
    with_code: bool = False,
) -> Snapshot:
    """Download config, tokenizer and weights of one commit, or take them from the cache.

    Honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Where the hub does not answer, what
    the cache holds is used.

    Raises:
        UsageError: no such model or revision, or no access to it.
        HubUnreachable: no answer, and the cache lacks the files.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(model, revision=revision, timeout=_TIMEOUT_S)
        names = [s.rfilename for s in info.siblings or ()]
        patterns = _patterns(names, with_weights, with_pickle) + ["*.py"] * with_code
        # By the name that was given, so that the cache knows it without the hub, too.
        root = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        if INDEX in patterns:  # which alone knows what the shards are called
            named = [name for name in shards(root) if name.endswith(".safetensors")]
            snapshot_download(model, revision=root.name, allow_patterns=named)
        return Snapshot(root, root.name, any(_is_pickle(n) for n in names))
    except GatedRepoError as error:
        raise UsageError(f"{model} is gated, and this account has no access to it",
                         hint="ask for access on its page, then set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{model} has no revision {revision}",
                         allowed="a branch, a tag or a commit of it") from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"the hub has no model {model}, or it is private",
                         allowed="a hub id, a directory, or demo",
                         hint="check the name, or set HF_TOKEN") from error
    except (OfflineModeIsEnabled, OSError, HfHubHTTPError) as error:
        return _from_cache(model, revision, with_weights, with_pickle, error)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests"):
            raise
        return _from_cache(model, revision, with_weights, with_pickle, error)


def _patterns(names: list[str], with_weights: bool, with_pickle: bool) -> list[str]:
    wanted = [*SIDECARS, MODULES, f"{MODULE}/{CONFIG}"]
    if with_weights:
        wanted.append(f"{MODULE}/{SINGLE}")
        safe = [name for name in _WEIGHTS if name in names][:1]
        wanted += safe
        if not safe and with_pickle:
            wanted += _PICKLES
    return wanted


def _from_cache(
    model: str, revision: str | None, with_weights: bool, with_pickle: bool, cause: Exception
) -> Snapshot:
    from huggingface_hub import snapshot_download

    def cached(patterns: list[str]) -> Path:
        return Path(snapshot_download(model, revision=revision, local_files_only=True,
                                      allow_patterns=patterns))

    try:
        root = cached([CONFIG])
        names = [file.name for file in root.iterdir()]
        patterns = _patterns(names, with_weights, with_pickle)
        if with_weights and not any(fnmatchcase(n, p) for n in names for p in _WEIGHTS + _PICKLES):
            raise FileNotFoundError("its weights are not in the cache")
        cached(patterns)
    except Exception as error:
        raise _unreachable(model, cause) from error
    return Snapshot(root, root.name, any(_is_pickle(n) for n in names))


def _is_pickle(name: str) -> bool:
    return any(fnmatchcase(name, p) for p in _PICKLES)


def _unreachable(model: str, cause: Exception) -> HubUnreachable:
    reason = str(cause).strip().splitlines()
    return HubUnreachable(
        f"{model} is not in the local cache and the hub can't be reached"
        + (f" ({reason[0][:200]})" if reason else ""),
        allowed="a reachable hub, a filled cache (HF_HOME; HF_HUB_OFFLINE=1 uses it alone), "
                "or a local directory",
        hint="--weights random runs the same command on the architecture with seeded weights")
