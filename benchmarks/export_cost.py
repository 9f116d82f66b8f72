"""What an export costs, side by side with optimum-onnx on the same checkpoint.

    python benchmarks/export_cost.py                 # CamemBERT-base size, opset 11 and 17
    python benchmarks/export_cost.py --large         # also a 3.5 GB and a 13 GB checkpoint
    python benchmarks/export_cost.py --rounds 7
    python benchmarks/export_cost.py --torch         # TorchScript and AOTInductor only

optimum-onnx is installed into an environment of its own below ``.bench/``. Both tools export the
same directory without validation, in turn (A B A B …), each run a process of its own. Results go
to ``benchmarks/results/export_cost.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _paired import Run, environment, once, ratios, records, summary, venv

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".bench"
RESULTS = HERE / "results"
PEER_REQUIREMENTS = ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0")
PACKAGES = ("modelport", "optimum-onnx", "optimum", "torch", "transformers", "onnx", "onnxruntime")

PEER = """
import sys
import zlib
from optimum.exporters.onnx import main_export
checkpoint, out, opset = sys.argv[1:]
main_export(checkpoint, out, task="fill-mask", opset=int(opset), do_validation=False)
"""


def ours(checkpoint: Path, out: Path, opset: int) -> list[str]:
    return [
        sys.executable, "-m", "modelport", "export", "onnx", "--model", str(checkpoint),
        "--opset", str(opset), "--output", str(out), "--no-validate", "--quiet",
    ]  # fmt: skip


def peers(python: Path, checkpoint: Path, out: Path, opset: int) -> list[str]:
    return [str(python), "-c", PEER, str(checkpoint), str(out), str(opset)]


def camembert() -> Path:
    """A checkpoint of CamemBERT-base's architecture with seeded weights, as one directory."""
    from modelport import checkpoints

    return checkpoints.resolve("camembert-base", weights="random").root


def compare(python: Path, checkpoint: Path, opset: int, rounds: int) -> dict[str, Any]:
    """Both tools in turn; the first pair warms the disk cache and is not counted."""
    runs: dict[str, list[Run]] = {"modelport": [], "optimum-onnx": []}
    for number in range(rounds + 1):
        for name in runs:
            out = WORK / "out" / name
            shutil.rmtree(out, ignore_errors=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            command = (
                ours(checkpoint, out, opset)
                if name == "modelport"
                else peers(python, checkpoint, out, opset)
            )
            run = once(command, WORK / f"{name}.log")
            print(f"opset {opset} round {number} {name}: {run}", flush=True)
            if number:
                runs[name].append(run)
    mine, theirs = runs.values()
    return {
        "opset": opset,
        "modelport": {**summary(mine), "raw": records(mine)},
        "optimum-onnx": {**summary(theirs), "raw": records(theirs)},
        "ratio": {name: ratios(mine, theirs, name) for name in ("wall_s", "cpu_s", "peak_mb")},
    }


def large(directory: Path, *, hidden: int, layers: int, dtype: str, shards: int) -> Path:
    """Write a seeded BERT encoder shard by shard; memory holds one tensor at a time."""
    import numpy as np
    import torch
    from ml_dtypes import bfloat16
    from modelport.artifacts.weights import write_safetensors
    from transformers import BertConfig, BertModel

    if (directory / "model.safetensors.index.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, architectures=["BertModel"], dtype=dtype,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in BertModel(config).named_parameters()}
    kind = np.dtype(bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    names = list(shapes)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]

        def data(name: str) -> bytes:
            draw = np.random.default_rng(zlib.crc32(name.encode()))
            values = draw.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.02)
            return values.astype(kind).tobytes()

        write_safetensors(
            directory / file,
            [(n, dtype, shapes[n], lambda n=n: [data(n)]) for n in part],
        )
        index |= dict.fromkeys(part, file)
    config.save_pretrained(directory)
    total = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return directory


def disk_speed(size_gb: float) -> float:
    """MB/s of writing and syncing a file of zeros-free bytes: the floor for any exporter."""
    import os
    import time

    block = os.urandom(1 << 24)
    path = WORK / "disk"
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(int(size_gb * 1e9 / len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = path.stat().st_size / 1e6 / (time.perf_counter() - start)
    path.unlink()
    return round(speed, 1)


def exports_of_large(rounds: int) -> list[dict[str, Any]]:
    cases = (
        ("3.5 GB, fp32, 4 shards", WORK / "large-3.5", {
            "hidden": 2048, "layers": 16, "dtype": "float32", "shards": 4}),
        ("13 GB, bf16, 8 shards", WORK / "large-13", {
            "hidden": 4096, "layers": 32, "dtype": "bfloat16", "shards": 8}),
    )
    found = []
    for name, directory, shape in cases:
        # In a process of its own: a child's peak starts at what its parent held when it forked.
        making = [sys.executable, __file__, "--make", str(directory), json.dumps(shape)]
        subprocess.run(making, check=True)
        checkpoint = directory
        size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
        runs = []
        for _ in range(rounds):
            out = WORK / "out" / "large"
            shutil.rmtree(out, ignore_errors=True)
            speed = disk_speed(2.0)
            run = once(ours(checkpoint, out, 17), WORK / "large.log")
            written = sum(f.stat().st_size for f in out.glob("*")) if out.exists() else 0
            print(f"{name}: {run} {written / 1e9:.2f} GB, disk {speed} MB/s", flush=True)
            runs.append({**records([run])[0], "written_gb": round(written / 1e9, 3),
                         "disk_mb_s": speed})
        found.append({"checkpoint": name, "gb": round(size / 1e9, 3), "runs": runs})
        shutil.rmtree(WORK / "out" / "large", ignore_errors=True)
        shutil.rmtree(directory)
    return found


TORCH_FORMATS = {
    "torchscript, trace": ["torchscript", "--mode", "trace"],
    "torchscript, script": ["torchscript", "--mode", "script"],
    "aotinductor": ["aotinductor"],
}
IMPORTS = "import torch, transformers; from transformers import CamembertForMaskedLM"


def torch_formats(checkpoint: Path, rounds: int) -> dict[str, Any]:
    """Peak memory of the formats whose weights pass through torch, beside the weights' own size."""
    program = [sys.executable, "-m", "modelport", "export"]
    log, out = WORK / "torch.log", WORK / "out" / "torch"
    imports = [once([sys.executable, "-c", IMPORTS], log) for _ in range(rounds)]
    weights = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")) / 1e6
    found: dict[str, Any] = {
        "weights_mb": round(weights, 1), "imports": summary(imports), "exports": {}
    }
    for name, arguments in TORCH_FORMATS.items():
        runs = []
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            runs.append(once([*program, *arguments, "--model", str(checkpoint), "--output",
                              str(out), "--no-validate", "--quiet"], log))
            print(f"{name}: {runs[-1]}", flush=True)
        found["exports"][name] = {**summary(runs), "raw": records(runs)}
    shutil.rmtree(out, ignore_errors=True)
    return found


def startup(rounds: int) -> dict[str, Any]:
    """``modelport --help`` and ``modelport inspect`` as whole processes."""
    artifact = WORK / "out" / "modelport"
    program = [sys.executable, "-m", "modelport"]
    found = {}
    for name, arguments in (("--help", ["--help"]), ("inspect", ["inspect", str(artifact)])):
        runs = [once([*program, *arguments], WORK / "start.log") for _ in range(rounds)]
        found[name] = {**summary(runs), "raw": records(runs)}
    return found


def markdown(result: dict[str, Any]) -> str:
    env = result["environment"]
    lines = [
        "# What an export costs",
        "",
        f"{env['cpu']}, {env['cores']} cores, {env['memory_gb']} GB. Checkpoint: CamemBERT-base "
        "architecture, 110 M parameters, fp32, seeded weights. Export without validation; median "
        "[min, max] over interleaved processes.",
        "",
        "| | modelport | optimum-onnx | ratio, pair by pair |",
        "| --- | --- | --- | --- |",
    ]
    for case in result["comparisons"]:
        for name, unit in (("wall_s", "s"), ("cpu_s", "s CPU"), ("peak_mb", "MB peak")):
            cells = [_cell(case[tool], name, unit) for tool in ("modelport", "optimum-onnx")]
            ratio = case["ratio"][name]
            shown = f"{ratio['median']} [{ratio['min']}, {ratio['max']}]" if ratio else "–"
            lines.append(f"| opset {case['opset']} | {cells[0]} | {cells[1]} | {shown} |")
    for case in result.get("large", []):
        for run in case["runs"]:
            lines.append(
                f"\n{case['checkpoint']}: {run['wall_s']} s, peak {run['peak_mb']} MB, wrote "
                f"{run['written_gb']} GB (plain write and fsync here: {run['disk_mb_s']} MB/s), "
                f"exit {run['status']}."
            )
    if "torch" in result:
        lines += _torch_lines(result["torch"])
    for name, found in result["startup"].items():
        wall = found["wall_s"]
        lines.append(f"\n`modelport {name}`: {wall['median']} s [{wall['min']}, {wall['max']}]")
    return "\n".join(lines) + "\n"


def _torch_lines(found: dict[str, Any]) -> list[str]:
    """Peak over the imports, in multiples of the weights."""
    imports, weights = found["imports"]["peak_mb"]["median"], found["weights_mb"]
    lines = ["", f"The same checkpoint ({weights:.0f} MB of weights; importing torch and "
             f"transformers peaks at {imports:.0f} MB) in the formats whose weights pass through "
             f"torch; {found['imports']['runs']} runs each:", "",
             "| | wall | peak | above imports |", "| --- | --- | --- | --- |"]
    for name, runs in found["exports"].items():
        over = (runs["peak_mb"]["max"] - imports) / weights if "peak_mb" in runs else None
        shown = f"{over:.2f} × weights" if over is not None else "–"
        lines.append(f"| {name} | {_cell(runs, 'wall_s', 's')} | "
                     f"{_cell(runs, 'peak_mb', 'MB')} | {shown} |")
    return lines


def _cell(found: dict[str, Any], name: str, unit: str) -> str:
    if name not in found:
        return "failed: " + found["raw"][0]["stderr_tail"].rpartition(" | ")[2][:150]
    value = found[name]
    return f"{value['median']} {unit} [{value['min']}, {value['max']}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="3.5 and 13 GB; needs 60 GB of disk")
    parser.add_argument("--torch", action="store_true",
                        help="TorchScript and AOTInductor only; the other results stay")
    parser.add_argument("--peer", type=Path, help="interpreter that has optimum-onnx already")
    parser.add_argument("--make", nargs=2, metavar=("DIR", "JSON"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.make:
        large(Path(chosen.make[0]), **json.loads(chosen.make[1]))
        return
    WORK.mkdir(exist_ok=True)
    if chosen.torch:
        result = json.loads((RESULTS / "export_cost.json").read_text())
        result["torch"] = torch_formats(camembert(), min(chosen.rounds, 3))
        result["torch"]["environment"] = environment({sys.executable: PACKAGES})
        versions = result["torch"]["environment"]["versions"]
        result["torch"]["environment"]["versions"] = versions[sys.executable]
        write(result)
        return
    python = chosen.peer or venv(WORK / "optimum", PEER_REQUIREMENTS)
    checkpoint = camembert()
    result: dict[str, Any] = {
        "environment": environment({sys.executable: PACKAGES, str(python): PACKAGES}),
        "comparisons": [compare(python, checkpoint, opset, chosen.rounds) for opset in (11, 17)],
        "startup": startup(chosen.rounds),
        "torch": torch_formats(checkpoint, min(chosen.rounds, 3)),
    }
    versions = result["environment"].pop("versions")
    result["environment"]["versions"] = dict(
        zip(("modelport", "optimum-onnx"), versions.values(), strict=True)
    )
    if chosen.large:
        result["large"] = exports_of_large(1)
    write(result)


def write(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "export_cost.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "export_cost.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
