"""How many faults the validator sees, how often it cries wolf, and how other tools do.

    python benchmarks/validator.py                   # everything; half an hour on two cores
    python benchmarks/validator.py --only faults     # one part: faults, alarms, precisions,
                                                     # precision_alarms, constants, peers, speed
    python benchmarks/validator.py --peer optimum-onnx=/path/to/python

Six tiny architectures of three layers with seeded weights; every fault of tests/support/mutants.py
that an architecture can have. Peers are installed into environments of their own below ``.bench/``.
Parts that were run replace their results in ``benchmarks/results/validator.json``; the Markdown is
made from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "support"))

import mutants  # noqa: E402
import numpy as np  # noqa: E402
import subjects  # noqa: E402
from _paired import environment, once, venv  # noqa: E402
from _validator_report import markdown  # noqa: E402
from modelport import checkpoints, transforms, validate  # noqa: E402
from modelport.artifacts import onnx_files  # noqa: E402
from modelport.pipeline import deriving, opening  # noqa: E402
from modelport.pipeline import references as sides  # noqa: E402
from modelport.session import Session  # noqa: E402

WORK = HERE.parent / ".bench"
RESULTS = HERE / "results"
PEERS = {
    "polygraphy": ("numpy", "polygraphy==0.53.6"),
    "torch-onnx": ("torch==2.13.0", "onnx", "onnxscript", "numpy"),
    "optimum-onnx": ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0"),
}
OPSETS = (11, 14, 17, 21)
LEVELS = ("disabled", "extended", "all")
FIT, CHECK = ("bert", "camembert", "vit"), ("distilbert", "deberta-v2", "gpt2")


class Lowering(NamedTuple):
    """A transform with its options, what the manifest then states, the opset, and the runtime."""

    transform: str
    options: dict[str, Any]
    precision: str
    opset: int
    runtime: str


PRECISIONS = {
    "fp16": Lowering("cast", {"dtype": "float16"}, "float16", 17, "onnxruntime"),
    "bf16": Lowering("cast", {"dtype": "bfloat16"}, "bfloat16", 22, "openvino"),
    "int8": Lowering("quantize", {"scheme": "int8-dynamic"}, "int8-dynamic", 17, "onnxruntime"),
}
Known = dict[str, tuple[Session, Session, validate.Settings]]
"""Reference, truth and how to judge, by what they depend on besides model and precision."""

FAULTS = [*mutants.WEIGHTS, *mutants.GRAPHS]


@contextmanager
def quiet() -> Iterator[None]:
    """ONNX Runtime reports every failing node on stderr; failing is what is measured here."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def outcome(report: validate.ParityReport) -> dict[str, Any]:
    excess = [r.excess for r in report.results if r.excess is not None]
    first = report.failures[0] if report.failures else None
    return {
        "verdict": report.verdict, "accepted": report.accepted, "rho": report.worst_rho,
        "excess": max(excess, default=None), "comparisons": report.comparisons,
        "by": f"{first.gate}: {first.reason[:120]}" if first else "",
    }  # fmt: skip


def spoilt(one: subjects.Subject, root: Path) -> Iterator[tuple[str, Path]]:
    for name in (*FAULTS, *mutants.FAINT):
        out = root / one.kind / name.replace(" ", "-").replace("/", "-")
        try:
            if not out.exists():
                mutants.spoil(one.artifact, name, out)
        except mutants.AbsentError:
            continue
        yield name, out


def faults(root: Path) -> dict[str, Any]:
    """Every fault in every architecture, float32, the whole default matrix."""
    found: dict[str, Any] = {"onnx": {}, "torch": {}, "faint": {}}
    for kind in subjects.KINDS:
        one = subjects.subject(kind, root)
        assert one.judge_file(one.artifact.root).accepted, kind
        for name, out in spoilt(one, root / "spoilt"):
            place = "faint" if name in mutants.FAINT else "onnx"
            with quiet():
                found[place].setdefault(name, {})[kind] = outcome(one.judge_file(out))
        for name in (*mutants.WEIGHTS, *mutants.MODULES):
            try:
                session = one.spoilt(lambda module, n=name: mutants.spoil_module(module, n))
            except mutants.AbsentError:
                continue
            found["torch"].setdefault(name, {})[kind] = outcome(one.judge(session))
        print("faults", kind, flush=True)
    return found


def alarms(root: Path) -> list[dict[str, Any]]:
    """Correct exports: seeds × opsets × optimisation levels, and other runtimes.

    On the smaller matrix of the default tests; the slow tests use the whole one.
    """
    from modelport import runtimes

    found = []
    for kind in subjects.KINDS:
        for seed in (0, 1, 2):
            one = subjects.subject(kind, root, seed=seed, sizes=subjects.FEW)
            for opset in OPSETS:
                out = root / f"{kind}-{seed}-{opset}"
                artifact = subjects.export(one.checkpoint, out, opset=opset)
                for level in LEVELS:
                    report = one.judge_file(artifact.root, level=level)
                    found.append({"kind": kind, "seed": seed, "runtime": f"opset {opset} {level}",
                                  **outcome(report)})
            script = subjects.export(one.checkpoint, root / f"{kind}-{seed}-script", "torchscript")
            for name, session in (
                ("torchscript", runtimes.get("torchscript").open(script)),
                ("eager", subjects.opened(one.model)),
            ):
                found.append({"kind": kind, "seed": seed, "runtime": name,
                              **outcome(one.judge(session))})
        print("alarms", kind, len(found), flush=True)
    return found


def precisions(root: Path) -> dict[str, Any]:
    """Gate B alone, without the verdict of Gate A that it rests on, on faults and on the original.

    The fault is in the float32 graph, which is then cast or quantised.
    """
    found: dict[str, Any] = {}
    for label in PRECISIONS:
        place = root / label
        place.mkdir()
        for kind in ("bert", "gpt2", "vit"):
            one = subjects.subject(kind, place, opset=PRECISIONS[label].opset, sizes=subjects.FEW)
            files = [(n, p) for n, p in spoilt(one, place / "spoilt") if n not in mutants.FAINT]
            known: Known = {}
            found.setdefault(label, {})[kind] = {
                name: lowered(one, label, source, place / "lowered" / source.name, known)
                for name, source in (("", one.artifact.root), *files)}
            print("precisions", label, kind, flush=True)
    return found


def precision_alarms(root: Path) -> list[dict[str, Any]]:
    """Gate B alone on correct artifacts: precisions × architectures × seeds."""
    found = []
    for label in PRECISIONS:
        for kind in subjects.KINDS:
            place = root / label / kind
            place.mkdir(parents=True)
            for seed in (0, 1, 2):
                one = subjects.subject(kind, place, seed=seed, opset=PRECISIONS[label].opset,
                                       sizes=subjects.FEW)
                verdict = lowered(one, label, one.artifact.root, place / f"lowered-{seed}", {})
                found.append({"precision": label, "kind": kind, "seed": seed, **verdict})
            print("precision alarms", label, kind, flush=True)
    return found


def lowered(
    one: subjects.Subject, label: str, source: Path, out: Path, known: Known
) -> dict[str, Any]:
    """Gate B's verdict on a float32 graph once it is cast or quantised."""
    how = PRECISIONS[label]
    feeds = deriving.samples(checkpoints.load(one.checkpoint))
    try:
        with quiet():
            result = transforms.get(how.transform).apply(
                onnx_files.load(source), {**how.options, "samples": feeds})
    except Exception as error:  # noqa: BLE001 - a fault can keep a graph from being cast
        return {"accepted": None, "by": f"{type(error).__name__}: {error}"[:120]}
    out.mkdir(parents=True)
    onnx_files.save(result.model, out)
    facts = {how.transform: dict(result.notes), "precision": result.precision or how.precision}
    manifest = replace(one.artifact.manifest, facts={**one.artifact.manifest.facts, **facts})
    placed = replace(one.artifact, root=out, manifest=manifest)
    # A fault in a weight can change which layers stay in float32, and with it what is compared
    # with; nothing else in the facts does.
    layers = facts[how.transform].get("layers", {})
    key = json.dumps({name: layer["kept"] for name, layer in layers.items()}, sort_keys=True)
    if key not in known:
        pair = sides.references(placed, placed.spec, one.checkpoint, "cpu")
        known[key] = (subjects.Remembered(pair.reference()), subjects.Remembered(pair.truth()),
                      pair.settings)
    reference, truth, settings = known[key]
    with quiet():
        report = validate.judge(
            lambda: opening.open_session(placed, runtime=how.runtime, options={"threads": 1}),
            reference, truth, one.plan, spec=placed.spec, settings=settings)
    gates = (report.gates.get("precision"), report.gates["hygiene"])
    return {**outcome(report), "accepted": gates == ("pass", "pass")}


def constants(root: Path) -> dict[str, Any]:
    """False alarms and missed faults by m and k, on one half of the architectures and the other."""
    table = []
    for group, kinds in (("fit", FIT), ("check", CHECK)):
        for kind in kinds:
            one = subjects.subject(kind, root, sizes=subjects.FEW)
            files = [(n, p) for n, p in spoilt(one, root / "spoilt") if n not in mutants.FAINT]
            for m in (1.0, 1.25, 1.5, 2.0, 3.0, 10.0, 50.0):
                for k in (0.0, 4.0):
                    rule = validate.Rule(m=m, m_small=max(m, m * 1.5), k=k, suspect=m)
                    wrong = missed = 0
                    with quiet():
                        for level in LEVELS:
                            wrong += not judged(one, one.artifact.root, rule, level)
                        if k == 4.0:
                            missed = sum(judged(one, path, rule) for _, path in files)
                    table.append({"group": group, "kind": kind, "m": m, "k": k, "alarms": wrong,
                                  "runs": len(LEVELS), "faults": len(files) if k == 4.0 else None,
                                  "missed": missed if k == 4.0 else None})
            print("constants", group, kind, flush=True)
    return {"fit": FIT, "check": CHECK, "table": table}


def judged(one: subjects.Subject, root: Path, rule: validate.Rule, level: str = "all") -> bool:
    placed = replace(one.artifact, root=root)
    return validate.judge(
        lambda: subjects.open_onnx(placed, level), one.reference, one.truth, one.plan,
        spec=placed.spec, settings=validate.Settings(rule=rule, case_seconds=20)).accepted


def peers(root: Path, given: dict[str, Path], tools: Sequence[str] = ()) -> dict[str, Any]:
    """The same files and arrays judged by other tools' own functions at their defaults."""
    jobs, ours = [], {}
    for kind in subjects.KINDS:
        one = subjects.subject(kind, root, sizes=subjects.FEW)
        correct = [(f"level {level}", one.artifact.root, level) for level in LEVELS]
        spoilt_files = [(n, p, "all") for n, p in spoilt(one, root / "spoilt")
                        if n not in mutants.FAINT]
        for name, path, level in (*correct, *spoilt_files):
            job = f"{kind}|{name}"
            with quiet():
                ours[job] = "accepted" if one.judge_file(path, level=level).accepted else "rejected"
                arrays = root / "arrays" / f"{len(jobs)}.npz"
                raised, names = outputs(one, path, level, arrays)
            jobs.append({"id": job, "onnx": str(path / "model.onnx"), "arrays": str(arrays),
                         "raised": raised, "checkpoint": str(one.checkpoint.root),
                         "task": one.checkpoint.task, "outputs": names})
    listing = root / "jobs.json"
    listing.write_text(json.dumps(jobs))
    found: dict[str, Any] = {"modelport": ours}
    versions = {}
    for tool, requirements in PEERS.items():
        if tools and tool not in tools:
            continue
        python = given.get(tool) or venv(WORK / tool, requirements)
        done = subprocess.run(
            [str(python), str(HERE / "_peers.py"), tool, str(listing)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        found[tool] = json.loads(done.stdout) if done.returncode == 0 else {}
        packages = ("polygraphy", "torch", "optimum-onnx", "transformers", "onnxruntime", "numpy")
        versions[tool] = environment({str(python): packages})["versions"][str(python)]
        print("peers", tool, flush=True)
    return {"verdicts": found, "versions": versions}


def outputs(
    one: subjects.Subject, path: Path, level: str, file: Path
) -> tuple[bool, list[str]]:
    """Store both sides' outputs; masked positions are zero on both, as a careful user would do."""
    from modelport.validate.compare import kept
    from modelport.validate.inputs import mask_arrays

    arrays: dict[str, np.ndarray] = {}
    raised, names = False, []
    tensors = {t.name: t for t in one.artifact.spec.outputs}
    try:
        session = subjects.open_onnx(replace(one.artifact, root=path), level)
        names = [o.name for o in session._session.get_outputs()]
        for index, case in enumerate(one.plan.cases):
            feeds = validate.draw(one.artifact.spec, case)
            masks = mask_arrays(one.artifact.spec, feeds)
            for side, values in (("c", session.run(feeds)), ("r", one.reference.run(feeds))):
                for name, value in values.items():
                    keep = kept(tensors[name], masks) if name in tensors else None
                    clean = value
                    if keep is not None and keep.ndim == value.ndim:
                        clean = np.where(keep, value, 0).astype(value.dtype)
                    arrays[f"{index}|{side}|{name}"] = clean
    except Exception:  # noqa: BLE001 - any tool that runs the file sees it
        raised = True
    file.parent.mkdir(exist_ok=True)
    np.savez(file, **arrays)
    return raised, names


IMPORTS = ("import gc, os; gc.set_threshold(100_000, 50, 50); "  # as the program does
           "import torch, transformers, modelport.pipeline; "
           "from transformers import AutoModel, AutoTokenizer, BertModel; os._exit(0)")
ROUNDS = {"camembert-base": 2, "tiny": 5}


def speed(root: Path, only: Sequence[str]) -> dict[str, Any]:
    """``modelport validate`` as a whole process, on a CamemBERT-base and on a tiny artifact."""
    found: dict[str, Any] = {"load_before": os.getloadavg()}
    program = [sys.executable, "-m", "modelport"]
    tiny = subjects.checkpoint_of("bert", root)
    log = root / "speed.log"
    found["imports_s"] = sorted(once([sys.executable, "-c", IMPORTS], log).wall_s
                                for _ in range(ROUNDS["tiny"]))
    for name, model in (
        ("camembert-base", ["camembert-base", "--weights", "random"]), ("tiny", [str(tiny.root)]),
    ):
        if only and name not in only:
            continue
        out = root / "speed" / name
        once([*program, "export", "onnx", "--model", *model, "--output", str(out),
              "--no-validate", "--quiet"], log)
        runs = []
        for _ in range(ROUNDS[name]):
            with Peak() as peak:
                run = once([*program, "validate", str(out), "--no-cache"], log)
            report = validate.from_json((out / "parity.json").read_bytes())
            runs.append({
                "wall_s": run.wall_s, "cpu_s": run.cpu_s, "peak_mb": peak.megabytes,
                "exit": run.status, "stderr": run.stderr_tail, "judge_s": round(report.seconds, 2),
                "cases": len(report.cases), "comparisons": report.comparisons,
                "left_out": [f"{c.case}: {c.reason}" for c in report.left_out],
                "notes": report.notes, "verdict": report.verdict,
                "slowest": sorted((round(c.seconds, 2), c.label) for c in report.cases)[-5:],
            })  # fmt: skip
        found[name] = runs
    found["load_after"] = os.getloadavg()
    return found


class Peak:
    """The most memory that all processes below this one held at once.

    Sampled five times a second; a page that several hold is shared out among them (PSS).
    """

    def __enter__(self) -> Self:
        self.megabytes = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            held = sum(map(_pss, _below(os.getpid())))
            self.megabytes = max(self.megabytes, round(held / 1e6, 1))


def _below(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            for child in map(int, task.read_text().split()):
                found += [child, *_below(child)]
    return found


def _pss(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="part to run; may be given several times")
    parser.add_argument("--peer", action="append", default=[], metavar="TOOL=PYTHON",
                        help="interpreter that has a tool already")
    parser.add_argument("--tool", action="append", default=[],
                        help="of the peers, only this one; the others' verdicts stay")
    parser.add_argument("--artifact", action="append", default=[], choices=list(ROUNDS),
                        help="of the speed, only this one's; the other's stays")
    chosen = parser.parse_args(arguments)
    given = {tool: Path(path) for tool, path in (item.split("=", 1) for item in chosen.peer)}
    parts: dict[str, Callable[[Path], Any]] = {
        "faults": faults, "alarms": alarms, "precisions": precisions,
        "precision_alarms": precision_alarms, "constants": constants,
        "peers": lambda root: peers(root, given, chosen.tool),
        "speed": lambda root: speed(root, chosen.artifact),
    }
    wanted = chosen.only or list(parts)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "validator.json"
    result: dict[str, Any] = {}
    packages = ("modelport", "torch", "transformers", "onnx", "onnxruntime", "openvino", "numpy")
    for name in wanted:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="modelport-validator-") as root:
            # Messages of runtimes name files; where those lay is nobody's business.
            found = json.loads(json.dumps(parts[name](Path(root))).replace(f"{root}/", ""))
        machine = environment({sys.executable: packages})
        machine["versions"] = next(iter(machine["versions"].values()))
        # Read late: another part may have been measured meanwhile.
        result = json.loads(file.read_text()) if file.exists() else {}
        if name == "peers" and name in result:
            before = result[name]["result"]
            found = {key: {**before[key], **found[key]} for key in before}
        elif name == "speed" and chosen.artifact and name in result:
            found = {**result[name]["result"], **found}
        result[name] = {"result": found, "environment": machine, "load": os.getloadavg(),
                        "seconds": round(time.perf_counter() - started, 1)}
        file.write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "validator.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
