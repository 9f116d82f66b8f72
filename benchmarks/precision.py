"""What reduced precision keeps and gains: similarities on real weights, size, and speed.

    python benchmarks/precision.py quality --output precision-quality.json
    python benchmarks/precision.py prepare --work DIR
    python benchmarks/precision.py speed --work DIR --output precision-speed.json
    python benchmarks/precision.py memory --work DIR --output precision-memory.json

Results are kept in ``benchmarks/results``.

quality: `demo`, 200 English sentences from the standard library's own documentation, mean-pooled
embeddings; Spearman's correlation of all 19900 pairwise cosine similarities with those of the
float32 artifact. speed: CamemBERT-base with seeded weights, sequence 128; one process for each
measurement (thread pools of two sessions disturb each other), interleaved, ratios pair by pair;
stops after ``--seconds`` and goes on from its output in the next call. memory: each transform on
a BERT of 3.5 GB, alone in a process.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import _paired
import numpy as np

NO_LIMIT = "sqnr_db=0,agreement=0,agreement_low=0"
VARIANTS: dict[str, dict[str, str]] = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "int8-dynamic, 20 dB": {"quantize": "int8-dynamic"},
    "int8-dynamic, all layers": {"quantize": "int8-dynamic", "budget": NO_LIMIT},
    "int8-static, all layers": {"quantize": "int8-static", "budget": NO_LIMIT},
    "int8-weights": {"quantize": "int8-weights", "budget": NO_LIMIT},
    "int4-weights": {"quantize": "int4-weights", "budget": NO_LIMIT},
    "fp32, fused": {"optimize": "fuse"},
    "int8-dynamic, fused": {"quantize": "int8-dynamic", "budget": NO_LIMIT, "optimize": "fuse"},
}
QUALITY = tuple(name for name in VARIANTS if "fused" not in name)
SPEED = ("fp32", "int8-dynamic, all layers", "int8-dynamic, fused", "int8-weights", "fp32, fused",
         "bf16", "int8-static, all layers")
RUNTIME = {"bf16": "openvino"}
SHAPES = ((1, 128), (8, 128), (32, 128))
SENTENCES = 200


def sentences() -> list[str]:
    """200 sentences of 6 to 30 words, spread evenly over the standard library's topics."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = [s for s in re.split(r"(?<=[.!?]) ", text)
             if 6 <= len(s.split()) <= 30 and re.fullmatch(r"[A-Z][\w ,;:'’()-]+[.!?]", s)]
    unique = list(dict.fromkeys(found))
    return unique[:: len(unique) // SENTENCES][:SENTENCES]


def export(model: str, name: str, out: Path, weights: str = "pretrained") -> Any:
    from modelport import pipeline
    from modelport.exporters.onnx import OnnxOptions

    request = pipeline.ModelRequest(model, weights=weights)
    return pipeline.export("onnx", request, out, OnnxOptions(opset=17, **VARIANTS[name]),
                           force=True, validate=False)


def embeddings(artifact: Any, runtime: str | None, texts: list[str]) -> np.ndarray:
    from modelport import checkpoints, pipeline

    rows = []
    with pipeline.open_session(artifact, runtime=runtime) as session:
        for start in range(0, len(texts), 8):
            feeds = checkpoints.tokenize(artifact.root, texts[start : start + 8],
                                         artifact.spec.input_names)
            hidden = session.run(feeds)["last_hidden_state"].astype(np.float64)
            mask = feeds["attention_mask"][..., None]
            rows.append((hidden * mask).sum(axis=1) / mask.sum(axis=1))
    made = np.concatenate(rows)
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def quality() -> dict[str, Any]:
    from scipy.stats import spearmanr

    texts = sentences()
    assert len(texts) == SENTENCES
    upper = np.triu_indices(SENTENCES, 1)
    result: dict[str, Any] = {"sentences": len(texts), "pairs": len(upper[0]), "variants": {}}
    base: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as place:
        for name in QUALITY:
            artifact = export("demo", name, Path(place, re.sub(r"\W+", "-", name)))
            made = embeddings(artifact, RUNTIME.get(name), texts)
            similarity = (made @ made.T)[upper]
            base = similarity if base is None else base
            facts = artifact.manifest.facts
            layers = facts.get("quantize", {}).get("layers", {})
            result["variants"][name] = {
                "spearman": float(spearmanr(base, similarity).statistic),
                "largest_difference": float(np.abs(base - similarity).max()),
                "runtime": RUNTIME.get(name, "onnxruntime"),
                "bytes": facts["weight_bytes"],
                "layers_in_float": sum(layer["kept"] for layer in layers.values()),
                "layers": len(layers),
            } | ({"matrices": facts["quantize"]["matrix_bytes"] / facts["quantize"]["float_bytes"]}
                 if layers else {})
            print(name, result["variants"][name], file=sys.stderr)
    return result


def prepare(work: Path) -> None:
    """Export what :func:`speed` measures; what is there already stays."""
    for name in SPEED:
        root = work / re.sub(r"\W+", "-", name)
        if not (root / "manifest.json").exists():
            export("camembert-base", name, root, "random")
            print(name, "exported", file=sys.stderr)


def speed(work: Path, before: dict[str, Any], repeats: int, seconds: float) -> dict[str, Any]:
    """Measure what ``before``, an earlier result, lacks; stop after about ``seconds``."""
    from modelport import artifacts

    raw: dict[str, dict[str, list[float]]] = before.get("seconds", {})
    facts: dict[str, Any] = {}
    places = {name: work / re.sub(r"\W+", "-", name) for name in SPEED}
    roots = {name: place for name, place in places.items() if (place / "manifest.json").exists()}
    names = tuple(roots)
    for name, root in roots.items():
        manifest = artifacts.read(root).manifest
        notes = manifest.facts.get("quantize", {})
        facts[name] = {"identity": manifest.identity, "bytes": manifest.facts["weight_bytes"],
                       "nodes": manifest.facts["nodes"],
                       "matrices": {k: v for k, v in notes.items() if k.endswith("bytes")}}
        if before and before["facts"].get(name, {}).get("identity") != manifest.identity:
            for times in raw.values():
                times.pop(name, None)
    until = time.monotonic() + seconds
    for turn in range(repeats):
        for shape in SHAPES:
            order = [*names[turn % len(names) :], *names[: turn % len(names)]]
            for name in order:
                times = raw.setdefault("x".join(map(str, shape)), {}).setdefault(name, [])
                if len(times) > turn or time.monotonic() > until:
                    continue
                times.append(measured(roots[name], RUNTIME.get(name), shape))
                print(turn, shape, name, round(1e3 * times[-1], 1), "ms", file=sys.stderr)
    ratios = {
        shape: {
            name: _spread([a / b for a, b in zip(times["fp32"], times[name], strict=False)])
            for name in names[1:] if times.get(name) and times.get("fp32")
        }
        for shape, times in raw.items()
    }
    missing = sum(max(0, repeats - len(times.get(name, ()))) for times in raw.values()
                  for name in SPEED)
    return {"seconds": raw, "times_fp32": ratios, "facts": facts, "missing": missing}


TRANSFORMS: dict[str, tuple[str, dict[str, str]]] = {
    "simplify": ("simplify", {}),
    "fuse": ("fuse", {}),
    "fp16": ("cast", {"dtype": "float16"}),
    "bf16": ("cast", {"dtype": "bfloat16"}),
    "int8-dynamic": ("quantize", {"scheme": "int8-dynamic"}),
    "int8-static": ("quantize", {"scheme": "int8-static"}),
    "int8-weights": ("quantize", {"scheme": "int8-weights"}),
    "int4-weights": ("quantize", {"scheme": "int4-weights"}),
}


def memory(work: Path, before: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Peak memory of each transform on 3.5 GB of weights, one process each."""
    import export_cost

    checkpoint, base = work / "large", work / "large-onnx"
    work.mkdir(parents=True, exist_ok=True)
    export_cost.large(checkpoint, hidden=2048, layers=16, dtype="float32", shards=4)
    if not base.exists():
        command = [sys.executable, "-m", "modelport", "export", "onnx", "--model", str(checkpoint),
                   "--output", str(base), "--no-validate"]
        run = _paired.once(command, work / "large.log")
        assert run.status == 0, run.stderr_tail
    found: dict[str, Any] = before.get("transforms", {})
    until = time.monotonic() + seconds
    for name in TRANSFORMS:
        if name in found or time.monotonic() > until:
            continue
        out = work / "derived"
        shutil.rmtree(out, ignore_errors=True)
        told = work / "derived.json"
        run = _paired.once(
            [sys.executable, __file__, "derive", "--root", str(base), "--output", str(told),
             "--work", str(out), "--name", name], work / "derived.log")
        assert run.status == 0, run.stderr_tail
        found[name] = {"wall_s": run.wall_s, **json.loads(told.read_text())}
        shutil.rmtree(out)
        print(name, found[name], file=sys.stderr)
    return {"transforms": found}


def derive(root: Path, out: Path, name: str) -> dict[str, Any]:
    """Apply one transform in this process and say what it took, by phase.

    ``anonymous``: memory of its own; ``resident``: with the pages of files that are mapped, which
    the system drops at will. Calibration runs the whole graph: its peak is told apart.
    """
    from modelport import artifacts, transforms, validate
    from modelport.artifacts import onnx_files
    from modelport.transforms import cast, quantize

    artifact = artifacts.read(root)
    peaks = _Peaks()
    transform, settings = TRANSFORMS[name]
    options: dict[str, Any] = dict(settings)
    sizes = (("batch", 2), ("sequence", 16))
    options["samples"] = [validate.draw(artifact.spec, validate.Case(sizes, "right", 0))]
    for module, function in ((quantize, "noise"), (quantize, "ranges"), (cast, "peaks")):
        setattr(module, function, peaks.told_apart(getattr(module, function)))
    peaks.start()
    result = transforms.get(transform).apply(onnx_files.load(root), options)
    out.mkdir()
    onnx_files.save(result.model, out)
    return peaks.stop()


class _Peaks(threading.Thread):
    """Looks at this process's memory every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "transform"
        self.found: dict[str, dict[str, float]] = {}
        self._over = threading.Event()

    def told_apart(self, measure: Any) -> Any:
        def measured(*given: Any) -> Any:
            self.phase = "calibration"
            try:
                return measure(*given)
            finally:
                self.phase = "transform"

        return measured

    def run(self) -> None:
        status = Path("/proc/self/status")
        while not self._over.wait(0.005):
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            seen = self.found.setdefault(self.phase, {"anonymous_mb": 0.0, "resident_mb": 0.0})
            for name, key in (("anonymous_mb", "RssAnon"), ("resident_mb", "VmRSS")):
                seen[name] = max(seen[name], round(int(lines[key].split()[0]) * 1024 / 1e6, 1))

    def stop(self) -> dict[str, Any]:
        self._over.set()
        self.join()
        return self.found


def measured(root: Path, runtime: str | None, shape: tuple[int, int]) -> float:
    """Median seconds of a run, in a process of its own."""
    import subprocess

    command = [sys.executable, __file__, "one", "--root", str(root), "--shape",
               f"{shape[0]}x{shape[1]}", "--runtime", runtime or "onnxruntime"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def one(root: Path, runtime: str, shape: tuple[int, int]) -> float:
    from modelport import artifacts, pipeline

    artifact = artifacts.read(root)
    rng = np.random.default_rng(0)
    feeds = {t.name: np.ones(shape, np.int64) if t.role == "mask" else
             rng.integers(2, t.high or 2, shape) for t in artifact.spec.inputs}
    with pipeline.open_session(artifact, runtime=runtime) as session:
        launch = session.bind(feeds)
        launch()
        times = []
        until = time.perf_counter() + 3
        while len(times) < 2 or (time.perf_counter() < until and len(times) < 30):
            start = time.perf_counter()
            launch()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3),
            "max": round(max(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "prepare", "speed", "memory", "derive", "one"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="keeps the artifacts between calls")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--name", default="simplify")
    parser.add_argument("--shape", default="1x128")
    chosen = parser.parse_args()
    if chosen.what == "one":
        batch, length = map(int, chosen.shape.split("x"))
        print(one(chosen.root, chosen.runtime, (batch, length)))
        return
    if chosen.what == "prepare":
        prepare(chosen.work)
        return
    before = json.loads(chosen.output.read_text()) if chosen.output and chosen.output.exists() \
        and chosen.what in ("speed", "memory") else {}
    if chosen.what == "derive":
        chosen.output.write_text(json.dumps(derive(chosen.root, chosen.work, chosen.name)))
        return
    found = quality() if chosen.what == "quality" else \
        memory(chosen.work, before, chosen.seconds) if chosen.what == "memory" else \
        speed(chosen.work, before, chosen.repeats, chosen.seconds)
    packages = ("modelport", "torch", "onnx", "onnxruntime", "openvino")
    environment = _paired.environment({sys.executable: packages})
    environment["versions"] = next(iter(environment["versions"].values()))
    text = json.dumps({"what": chosen.what, "environment": environment, **found}, indent=1)
    print(text)
    if chosen.output:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
