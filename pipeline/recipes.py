"""``modelport run pipeline.yaml``: a matrix of models, formats, precisions and profiles.

Each cell is exported (and proven), then benchmarked, then published, each by the program itself in
a process of its own, here or on a cluster (:mod:`.executors`). A stage is named by the digest of
everything that determines it; what a stage of that name left behind is verified and used again, so
that the same command goes on after a kill.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from .. import artifacts, exporters
from ..artifacts._rename import write_durable
from ..artifacts.storage import refusals
from ..destinations.base import Reference
from ..errors import IncompleteError, ModelportError, UsageError
from .executors import Local, Needs, RayCluster
from .exporting import tool_versions
from .request import file_digest

if TYPE_CHECKING:
    from ..artifacts import Manifest
    from .request import Notify

Kind = Literal["export", "bench", "publish"]
Where = Literal["local", "ray"]

_KEYS: Final = {"output": str, "models": list, "formats": list, "precisions": list,
                "profiles": dict, "bench": dict, "publish": dict, "placement": dict}
"""What a recipe may hold, and as what."""
DONE = ".stages"
"""Below the output: for each cell and kind the stage that finished last, and the lock of a run."""
CONSENT = ("allow-pickle", "trust-remote-code")
"""What is allowed for a model is allowed in its benchmark, too, which runs it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One run of the program.

    Attributes:
        cell: the artifact's name: model, format, precision and profile.
        arguments: of the program.
        artifact: the directory it makes or uses.
        key: sha256 over the arguments, what they refer to, the tools, and the stage before.
        needs: what it asks of a cluster's node.
        tools: the versions that it must run with.
    """

    kind: Kind
    cell: str
    arguments: tuple[str, ...]
    artifact: Path
    key: str
    needs: Needs = field(default_factory=Needs)
    tools: Mapping[str, str] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether it was the last of its kind to run, and what it made is still there and whole."""
        try:
            record = json.loads(self._record.read_bytes())
            found = artifacts.verify(self.artifact).manifest
        except (OSError, ValueError, ModelportError):
            return False
        reported = self.kind != "bench" or artifacts.BENCHMARK in found.files
        return reported and self._made(found).items() <= record.items()

    @property
    def _record(self) -> Path:
        return self.artifact.parent / DONE / f"{self.cell}.{self.kind}.json"

    def _made(self, found: Manifest) -> dict[str, Any]:
        """What is there once it has run; a report is no part of an identity."""
        report = found.files.get(artifacts.BENCHMARK) if self.kind != "export" else None
        return {"key": self.key, "identity": found.identity,
                "benchmark": report.sha256 if report else None}

    def finish(self) -> None:
        """Note that it is done."""
        self._record.parent.mkdir(parents=True, exist_ok=True)
        made = self._made(artifacts.read(self.artifact).manifest)
        text = json.dumps({**made, "arguments": self.arguments})
        write_durable(self._record, text.encode() + b"\n")


def plan(recipe: Path) -> tuple[Stage, ...]:
    """The stages of a recipe, in order; every export first, then benchmarks, then publications.

    Raises:
        UsageError: not YAML, an unknown key, format or option; nothing has been run.
    """
    document = _read(recipe)
    output = Path(document.get("output", "out"))
    output = output if output.is_absolute() else recipe.parent / output
    content = cache(lambda model: _content(model, output, recipe))
    chains = [_chain(document, output, content, *cell) for cell in _cells(document)]
    if not chains:
        raise UsageError(f"{recipe} names no cell", allowed="at least one of each kind it lists")
    names = [chain[0].cell for chain in chains]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{recipe} names a cell twice, {twice}",
                         hint="a recipe for each of the models, with an output of its own")
    stages = [stage for chain in chains for stage in chain]
    order: tuple[Kind, ...] = ("export", "bench", "publish")
    return tuple(sorted(stages, key=lambda stage: order.index(stage.kind)))


def run(
    recipe: Path, *, jobs: int = 1, where: Where = "local", notify: Notify = lambda _: None
) -> tuple[Stage, ...]:
    """Run what is not done yet; the stages of the plan are returned.

    Here, exports and publications run ``jobs`` at a time, benchmarks one at a time with nothing
    beside them; on a cluster Ray decides, and each node runs one benchmark at a time. A cell that
    fails does not stop the others.

    Raises:
        UsageError: see :func:`plan`.
        BackendUnavailable: no cluster, or none that could run a stage.
        IncompleteError: some stages failed; says which and why.
    """
    stages = plan(recipe)
    failed: dict[str, str] = {}
    kinds: tuple[Kind, ...] = ("export", "bench", "publish")
    with (
        _alone(stages[0].artifact.parent, notify) as lock,
        (Local(jobs, lock) if where == "local" else RayCluster()) as executor,
    ):
        for kind in kinds:
            waiting = [s for s in stages if s.kind == kind and s.cell not in failed and not s.done]
            for stage, ended in executor.run(waiting, notify):
                if ended.problem:
                    failed[stage.cell] = f"{stage.kind} {stage.cell}: {ended.problem}"
                else:
                    stage.finish()
    if failed:
        raise IncompleteError(
            f"{len(failed)} of {len({s.cell for s in stages})} cells failed: "
            + "; ".join(failed.values()),
            hint="run the same command again: it does only what is missing",
        )
    return stages


@contextmanager
def _alone(output: Path, notify: Notify) -> Iterator[int]:
    """Hold the lock of a run, which the processes it starts keep too.

    So a run that follows a kill waits until what the killed one had started has ended, and does
    not meet it in the same directory.
    """
    import fcntl

    with refusals(output):
        (output / DONE).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / DONE / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify(f"waiting until an earlier run in {output} has ended")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _read(recipe: Path) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{recipe} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(document, dict) or not document.get("models"):
        raise UsageError(f"{recipe} names no models", allowed="models: [demo]")
    unknown = set(document) - set(_KEYS)
    if unknown:
        raise UsageError(f"{recipe} has {min(map(str, unknown))}", allowed=", ".join(sorted(_KEYS)))
    document = {name: value for name, value in document.items() if value is not None}
    for name, value in document.items():
        if not isinstance(value, _KEYS[name]):
            raise UsageError(f"{recipe} has {name}: {value}",
                             allowed={list: "a list", dict: "a mapping"}.get(_KEYS[name], "text"))
    for model in document["models"]:
        if not isinstance(model, str) and not (isinstance(model, dict) and model.get("model")):
            raise UsageError(f"{recipe} has a model {model}",
                             allowed="what --model takes, or {model: …, revision: …}")
    for name, options in document.get("profiles", {}).items():
        if not isinstance(options or {}, dict):
            raise UsageError(f"{recipe} has a profile {name}: {options}", allowed="a mapping")
    for name in document.get("formats", ["onnx"]):
        exporters.get(name)
    named = {*document.get("formats", ["onnx"]), *document.get("precisions", []),
             *(document.get("profiles") or {})}
    for name in document.get("placement") or {}:
        if name not in named:
            raise UsageError(
                f"{recipe} places {name}, which it does not name",
                allowed=", ".join(sorted(named)),
            )
    return document


def _cells(document: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, str, str, Any]]:
    """(model, format, precision, profile's name, its options) of each cell."""
    profiles = document.get("profiles") or {"": {}}
    for model, format_, precision, (name, options) in itertools.product(
        document["models"], document.get("formats", ["onnx"]),
        document.get("precisions", [""]), profiles.items(),
    ):
        given = {"model": model} if isinstance(model, str) else dict(model)
        yield given, format_, precision, name, options or {}


def _chain(
    document: Mapping[str, Any], output: Path, content: Callable[[str], Any],
    model: Mapping[str, Any], format_: str, precision: str, profile: str,
    options: Mapping[str, Any],
) -> list[Stage]:
    """The stages of one cell.

    Args:
        content: what a model holds; see :func:`_content`.
    """
    parts = (Path(str(model["model"])).name, format_, precision, profile)
    cell = "-".join(part for part in parts if part).replace(":", "-")  # a tag has none
    chosen = {**({"dtype": precision} if precision else {}), **options}
    known = {f.replace("_", "-") for f in exporters.get(format_).options_type.__dataclass_fields__}
    for name in chosen:
        if str(name).replace("_", "-") not in known:
            raise UsageError(f"{format_} has no option {name}", allowed=", ".join(sorted(known)))
    known_to_need = {
        "gpus": 1.0 if "cuda" in (chosen.get("device"), (document.get("bench") or {}).get("device"))
        or format_ == "tensorrt" else 0.0
    }
    needs = _needs(document.get("placement") or {}, known_to_need, format_, precision, profile)
    place = output / cell
    exported = ("export", format_, *_flags(model), *_flags(chosen))
    tools = tool_versions()
    basis: Any = (tools, content(str(model["model"])), _files(chosen))
    key = _digest(exported, basis)
    stages = [Stage("export", cell, (*exported, "--output", str(place), "--force"), place, key)]
    # No key holds the place, which is spelled otherwise from another working directory.
    if document.get("bench") is not None:
        # One block is for every model of the matrix, whether it generates or not.
        consent = {name: allowed for name, allowed in model.items()
                   if str(name).replace("_", "-") in CONSENT}
        flags = ("bench", *_flags({**consent, **document["bench"]}), "--any-kind")
        key = _digest(flags, stages[-1].key, _files(document["bench"]))
        if "output" not in document["bench"]:  # two nodes must not measure into one directory
            flags = (*flags, "--output", str(output / DONE / f"{cell}.run"))
        stages.append(Stage("bench", cell, (flags[0], str(place), *flags[1:]), place, key))
    if document.get("publish"):
        wanted = {name: _filled(name, value, cell) for name, value in document["publish"].items()}
        if "destination" not in wanted:
            raise UsageError("publish needs a destination", allowed="file:///path:{cell}")
        for name in ("destination", "against"):
            if name in wanted:
                Reference.parse(str(wanted[name]))
        destination = str(wanted.pop("destination"))
        flags = (destination, *_flags(wanted))
        key = _digest("publish", flags, stages[-1].key, _files(wanted))
        stages.append(Stage("publish", cell, ("publish", str(place), *flags), place, key))
    return [
        dataclasses.replace(s, tools=tools, needs=Needs() if s.kind == "publish" else needs)
        for s in stages
    ]


def _filled(name: str, value: Any, cell: str) -> Any:
    """An option of ``publish`` with the cell's name where it says ``{cell}``."""
    if not isinstance(value, str):
        return value
    try:
        return value.format(cell=cell)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"publish has {name}: {value}",
                         allowed="{cell}, and no other braces") from error


def _needs(placement: Mapping[str, Any], found: Mapping[str, Any], *names: str) -> Needs:
    """What a cell asks for: as found, then as placed by its format, its precision, its profile."""
    known = {f.name for f in dataclasses.fields(Needs)}
    wanted = dict(found)
    for name in names:
        given = placement.get(name) or {}
        unknown = set(given) - known if isinstance(given, dict) else {str(given)}
        if unknown:
            raise UsageError(
                f"the placement of {name} has {min(unknown)}", allowed=", ".join(sorted(known))
            )
        wanted |= given
    return Needs(**wanted)


def _flags(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Options as the command line takes them; true is a bare flag, false and null are left out."""
    found: list[str] = []
    for name, value in options.items():
        flag = "--" + str(name).replace("_", "-")
        if value is True:
            found.append(flag)
        elif value is not None and value is not False:
            found += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return tuple(found)


def _files(options: Mapping[str, Any]) -> list[str]:
    """The digests of the files that options name."""
    return [file_digest(value) for value in options.values()]


def _content(model: str, output: Path, recipe: Path) -> Any:
    """What a local checkpoint holds, as far as its files' names, sizes and times tell.

    Of a module of one's own the digest of its file, and so much of what lies beside it, Python
    below included: nothing tells what the file imports or loads. Logs and the recipe are not
    looked at, nor is ``output``.
    """
    file = model.rpartition(":")[0]
    if file.endswith(".py"):
        source = Path(file).expanduser().resolve()
        beside = [
            (name, *told) for name, *told in _below(source.parent, output)
            if (os.sep not in name or name.endswith(".py")) and not name.endswith(".log")
            and source.parent / name != recipe.resolve()]
        return [file_digest(str(source)), *beside]
    root = Path(model).expanduser().resolve()
    return _below(root, output) if root.is_dir() else None


def _below(root: Path, output: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files in a folder, but for what is hidden or made here."""
    output, found = output.resolve(), []
    for place, folders, names in os.walk(root):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".")
                      and name != "__pycache__" and here / name != output]
        for file in (here / name for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):  # what a process that goes on removes meanwhile
                told = file.stat()
                found.append((str(file.relative_to(root)), told.st_size, told.st_mtime_ns))
    return sorted(found)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
