"""Other tools' own comparison on given files and arrays; run by the interpreter that has the tool.

    python _peers.py polygraphy|torch-onnx|optimum-onnx JOBS.json

A job names an ONNX file, the checkpoint it claims to equal, and an archive with the outputs of both
sides for some cases. Prints a JSON object: job id to ``accepted``, ``rejected`` or the reason why
the tool could not judge.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any


def cases(job: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(candidate, reference) outputs by name, for each case."""
    import numpy as np

    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    with np.load(job["arrays"], allow_pickle=False) as archive:
        for key in archive.files:
            case, side, name = key.split("|")
            found.setdefault(case, ({}, {}))[side == "r"][name] = archive[key]
    return list(found.values())


def polygraphy(job: dict[str, Any]) -> str:
    """``Comparator.compare_accuracy`` with its default comparison, ``CompareFunc.simple``."""
    from polygraphy.comparator import Comparator, IterationResult, RunResults

    if job["raised"]:
        return "rejected"
    for candidate, reference in cases(job):
        results = RunResults()
        for runner, outputs in (("candidate", candidate), ("reference", reference)):
            results.append((runner, [IterationResult(outputs=outputs, runner_name=runner)]))
        if not bool(Comparator.compare_accuracy(results)):
            return "rejected"
    return "accepted"


def torch_onnx(job: dict[str, Any]) -> str:
    """``torch.onnx.verification.VerificationInfo`` measures and does not judge; torch's own
    ``assert_onnx_program`` does, by the defaults of ``torch.testing.assert_close``."""
    import torch
    from torch.onnx.verification import VerificationInfo

    if job["raised"]:
        return "rejected"
    for candidate, reference in cases(job):
        pairs = list(zip(reference.items(), candidate.items(), strict=False))  # by position
        if len(candidate) != len(reference):
            return "rejected"
        for (name, expected), (_, actual) in pairs:
            left, right = torch.from_numpy(expected), torch.from_numpy(actual)
            try:
                torch.testing.assert_close(right, left)
            except AssertionError:
                return "rejected"
            VerificationInfo.from_tensors(name, left, right)
    return "accepted"


def _with_axes(file: Path, config: Any) -> Path:
    """A copy beside the file, its axes named as the tool's configuration names them."""
    import onnx

    proto = onnx.load(file, load_external_data=False)
    names = config.inputs | config.outputs
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in names.get(value.name, {}).items():
            if axis < len(value.type.tensor_type.shape.dim):
                value.type.tensor_type.shape.dim[axis].dim_param = name
    copy = file.with_name("renamed.onnx")
    copy.write_bytes(proto.SerializeToString())
    return copy


_LOADED: dict[str, Any] = {}


def optimum_onnx(job: dict[str, Any]) -> str:
    """What ``validate_model_outputs`` runs: its own inputs, one shape, the architecture's
    tolerance. Called without the process it starts around each call, which takes ten seconds.

    It knows axes by its own names only, so it gets a copy in which they are called like that. An
    error of the runtime is a finding; what it cannot feed or read otherwise, it cannot judge."""
    from optimum.exporters.onnx.convert import _run_validation
    from optimum.exporters.tasks import TasksManager

    if job["checkpoint"] not in _LOADED:
        _LOADED.clear()
        _LOADED[job["checkpoint"]] = TasksManager.get_model_from_task(
            job["task"], job["checkpoint"], framework="pt").eval()
    model = _LOADED[job["checkpoint"]]
    config = TasksManager.get_exporter_config_constructor(
        model=model, exporter="onnx", task=job["task"], library_name="transformers")(model.config)
    if unknown := set(job["outputs"]) - set(config.outputs):
        raise LookupError(f"its configuration has no output {', '.join(sorted(unknown))}")
    try:
        _run_validation(config, model, _with_axes(Path(job["onnx"]), config), job["outputs"])
    except Exception as error:
        kinds = {base.__name__ for base in type(error).__mro__}
        raised = job["raised"] and "ONNXRuntime" in str(error)
        if raised or kinds & {"AtolError", "ShapeError", "OutputMatchError"}:
            return "rejected"
        raise
    return "accepted"


TOOLS = {"polygraphy": polygraphy, "torch-onnx": torch_onnx, "optimum-onnx": optimum_onnx}


def main(tool: str, jobs: str) -> None:
    found = {}
    with contextlib.redirect_stdout(sys.stderr):
        for job in json.loads(Path(jobs).read_text()):
            try:
                found[job["id"]] = TOOLS[tool](job)
            except Exception as error:  # noqa: BLE001 - what a tool cannot judge is a result
                text = str(error).strip().splitlines() or [""]
                found[job["id"]] = f"{type(error).__name__}: {text[0][:200]}"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
