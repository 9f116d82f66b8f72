"""The manifest: what an artifact is, where it came from, and the evidence that it is right.

Frozen records; pydantic checks them on reading, so a manifest from outside is data, never trusted.
:func:`dumps` is deterministic; ``loads(dumps(m)) == m`` for options and facts of JSON types.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from ..checkpoints.model import Source
from ..errors import PathEscape, UsageError
from ..spec import ModelSpec

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA: Final = 1
MANIFEST = "manifest.json"
PARITY = "parity.json"
BENCHMARK = "benchmark.json"
REPORTS = frozenset({PARITY, BENCHMARK})
"""Files that say something about the artifact and are no part of what it is."""

MAX_BYTES = 16 << 20  # a manifest is a few kilobytes; more is an attack on the parser
_NONFINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Digest (lower-case hex sha256) and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One strategy or transform that was tried, and what became of it."""

    strategy: str
    outcome: Literal["kept", "rejected", "failed", "skipped"]
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ParitySummary:
    """The verdict of one validation, and exactly what it was a verdict on.

    Attributes:
        verdict: ``pass``, ``suspect`` or ``fail``.
        identity: :attr:`Manifest.identity` of the artifact that was validated.
        gates: verdict by gate (``hygiene``, ``translation``, ``precision``, ``effect``).
        worst_rho: largest ratio of the candidate's to the reference's rounding error; None where
            no noise floor could be computed.
        comparisons: number of output × sample comparisons made.
        left_out: number of planned cases that the budget did not allow.
    """

    verdict: Literal["pass", "suspect", "fail"]
    identity: str
    gates: Mapping[str, str]
    worst_rho: float | None
    comparisons: int
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An artifact that another was made from; it need not exist any more.

    Attributes:
        identity: :attr:`Manifest.identity`.
        made_by: ``export`` or the transform that made it.
        options: as in its manifest.
        facts: as in its manifest.
        parity: its verdict; None where it was not validated itself.
    """

    identity: str
    made_by: str
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    parity: ParitySummary | None = None


@dataclass(frozen=True, slots=True)
class Component:
    """One graph of an artifact made of several.

    Attributes:
        file: of the graph, relative to the artifact's root.
        spec: its own inputs, outputs and dimensions.
        facts: what was found in that file, as :attr:`Manifest.facts`.
    """

    file: str
    spec: ModelSpec
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything known about an artifact.

    Attributes:
        format: the exporter's name (``onnx``, ``torchscript``, …).
        parent: identity of the artifact this one was made from, if any.
        options: what was asked for, by option name.
        facts: what was found in the file afterwards (opset, IR version, node counts, …).
        tools: versions of the packages that made it.
        target: what it is tied to (device, GPU, runtime); empty when it runs anywhere.
        files: every file of the artifact except the manifest itself, by POSIX path from its root.
        attempts: strategies and transforms tried, in order.
        parity: None until validated (``--no-validate``).
        lineage: what it was made from, step by step, the first export first; the last one is
            :attr:`parent`.
        components: its graphs by name, where it is made of several; :attr:`spec` is empty then.
    """

    format: str
    spec: ModelSpec
    source: Source
    options: Mapping[str, Any]
    facts: Mapping[str, Any]
    tools: Mapping[str, str]
    files: Mapping[str, FileEntry]
    attempts: tuple[Attempt, ...] = ()
    parity: ParitySummary | None = None
    parent: str | None = None
    target: Mapping[str, str] = field(default_factory=dict)
    lineage: tuple[Ancestor, ...] = ()
    schema: Literal[1] = SCHEMA
    components: Mapping[str, Component] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """sha256 over the sorted (path, sha256) of every file but the reports.

        Two artifacts with the same identity hold the same bytes; a verdict refers to it.
        """
        parts = sorted((p, e.sha256) for p, e in self.files.items() if p not in REPORTS)
        return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()

    @property
    def parity_is_current(self) -> bool:
        """Whether there is a parity verdict and it is on exactly these files."""
        return self.parity is not None and self.parity.identity == self.identity

    @property
    def proven(self) -> bool:
        """Whether a parity verdict of ``pass`` holds for exactly these files."""
        return self.parity is not None and self.parity.verdict == "pass" and self.parity_is_current


@dataclass(frozen=True, slots=True)
class Artifact:
    """A directory with a manifest that has been read (not necessarily verified).

    Attributes:
        graph: file of the one graph that is meant, in a view of a component; None where the
            artifact is one graph, whose file its format knows.
        entry: of the manifest's own file, as it was read; None where it was not.
    """

    root: Path
    manifest: Manifest
    graph: str | None = None
    entry: FileEntry | None = field(default=None, compare=False)

    @property
    def format(self) -> str:
        return self.manifest.format

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.spec

    @property
    def components(self) -> dict[str, Artifact]:
        """A view of each component as an artifact of one graph; empty where this is one."""
        return {name: self.component(name) for name in self.manifest.components}

    def component(self, name: str) -> Artifact:
        """A component as an artifact of one graph: its spec and facts, everything else shared.

        Raises:
            UsageError: there is none of that name.
        """
        found = self.manifest.components.get(name)
        if found is None:
            raise UsageError(
                f"{self.root} has no component {name}",
                allowed=", ".join(self.manifest.components) or "none: it is one graph",
            )
        facts = {**self.manifest.facts, **found.facts}
        manifest = replace(self.manifest, spec=found.spec, facts=facts, components={})
        return Artifact(self.root, manifest, found.file)


def dumps(manifest: Manifest) -> str:
    """The manifest as JSON: sorted keys, two spaces, a final newline; equal for equal manifests.

    Infinity and NaN, which JSON lacks, become ``"Infinity"``, ``"-Infinity"`` and ``"NaN"``.
    """
    data = _named_nonfinite(asdict(manifest))
    if not manifest.components:
        del data["components"]  # as it was written before there were any
    text = json.dumps(
        data,
        indent=2,
        sort_keys=True,
        ensure_ascii=False,
        allow_nan=False,
        default=_jsonable,
    )
    return text + "\n"


def loads(text: str | bytes) -> Manifest:
    """Read a manifest, trusting nothing in it.

    Raises:
        UsageError: not JSON, another schema, or a field that is missing, unknown or of a wrong
            type; the message names the field.
        PathEscape: a file's path is absolute, contains ``..`` or is not in its plain form.
    """
    from pydantic import ValidationError

    data = parse(text)
    _check_schema(data)
    lineage = data.get("lineage")
    ancestors = lineage if isinstance(lineage, list) else []
    for holder in (data, *(a for a in ancestors if isinstance(a, dict))):
        parity = holder.get("parity")
        if isinstance(parity, dict) and isinstance(parity.get("worst_rho"), str):
            parity["worst_rho"] = _NONFINITE.get(parity["worst_rho"], parity["worst_rho"])
    adapter = _adapter()
    try:
        manifest = adapter.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        _malformed(".".join(map(str, first["loc"])) or "the document", first["msg"])
    except UsageError as error:  # a record's own check, such as Dim's
        _malformed("spec", error.found)
    _refuse_unknown(data, adapter.dump_python(manifest, mode="json"), "")
    for path, entry in manifest.files.items():
        check_path(path)
        check_entry(path, entry)
    for name, component in manifest.components.items():
        if component.file not in manifest.files:
            _malformed(f"components.{name}.file", f"{component.file!r} is not among the files")
    return manifest


def check_entry(path: str, entry: FileEntry) -> None:
    """Refuse a digest or a size that is none.

    Raises:
        UsageError: not 64 lower-case hexadecimal digits, or a negative size.
    """
    if len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
        _malformed(f"files.{path}.sha256", "not 64 lower-case hexadecimal digits")
    if entry.size < 0:
        _malformed(f"files.{path}.size", "negative")


def check_path(path: str) -> None:
    """Refuse a path that is not a plain relative POSIX path to a file below the artifact's root.

    Raises:
        PathEscape: empty, absolute, with ``..``, ``.``, an empty part, a backslash, a control
            character, or the manifest itself.
    """
    plain = (
        path
        and path != MANIFEST
        and not PurePosixPath(path).is_absolute()
        and str(PurePosixPath(path)) == path
        and ".." not in path.split("/")
        and path != "."
        and "\\" not in path
        and all(character.isprintable() for character in path)
    )
    if not plain:
        raise PathEscape(
            f"the manifest names a file {path!r}",
            allowed="a relative path below the artifact, such as model.onnx",
            hint="do not use this artifact; export it again or fetch it from a source you trust",
        )


def prepare() -> None:
    """Import and build what :func:`loads` needs, for who has time now and will read later."""
    _adapter()


@cache
def _adapter() -> TypeAdapter[Manifest]:
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def parse(text: str | bytes) -> dict[str, Any]:
    """A JSON object from outside: of bounded size, no key given twice.

    Raises:
        UsageError: it is not one.
    """
    if len(text) > MAX_BYTES:
        _malformed("the document", f"larger than {MAX_BYTES} bytes")
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _malformed("the document", f"not JSON ({error})")
    if not isinstance(data, dict):
        _malformed("the document", "not a JSON object")
    return data


def _check_schema(data: dict[str, Any]) -> None:
    schema = data.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise UsageError(
            f"the manifest has schema {schema!r}",
            allowed=f"schema {SCHEMA}",
            hint="use the modelport version that wrote it, or export the artifact again",
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        _malformed(twice, "given twice")
    return found


def _refuse_unknown(given: Any, known: Any, where: str) -> None:
    """What was read, written again, must hold every key that was given."""
    if isinstance(given, dict) and isinstance(known, dict):
        for key, value in given.items():
            path = f"{where}.{key}" if where else key
            if key not in known:
                _malformed(path, "unknown")
            _refuse_unknown(value, known[key], path)
    elif isinstance(given, list) and isinstance(known, list):
        for index, (value, other) in enumerate(zip(given, known, strict=True)):
            _refuse_unknown(value, other, f"{where}.{index}")


def _jsonable(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)


def _named_nonfinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _named_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named_nonfinite(item) for item in value]
    return value


def _malformed(field_name: str, problem: str) -> NoReturn:
    raise UsageError(
        f"the manifest is malformed: {field_name}: {problem}",
        hint="export the artifact again, or fetch it again from where it was published",
    )
