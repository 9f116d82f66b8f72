"""``gpu.md`` and the plots, made from what the sections left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SPEEDUP = "speedup.svg"


def write(found: Mapping[str, Any], output: Path) -> None:
    """Write everything there is so far."""
    lines = ["# On the GPU", "", *_setting(found), ""]
    for name, section in found["sections"].items():
        lines += [f"## {name}", ""]
        if section["status"] != "ok":
            lines += [f"Not finished: {section['reason']}", ""]
        result = section.get("result")
        if result:
            lines += _claims(result.get("claims", ()), found["small"])
            lines += _absent(result.get("absent", {}))
            lines += BODIES.get(name, _nothing)(result, output)
    (output / "gpu.md").write_text("\n".join(lines).rstrip() + "\n", "utf-8")


def _setting(found: Mapping[str, Any]) -> list[str]:
    env = found["environment"]
    packages = ", ".join(f"{n} {v}" for n, v in env["packages"].items())
    gpus = [f"{g['name']}, driver {g['driver']}" for g in env["gpus"]]
    size = " **Tiny sizes: this run shows that the path works, not how fast anything is.**"
    return [f"Device: {found['device']}; {'; '.join(gpus) or 'no GPU'}; {env['cpu']}, "
            f"{env['cores']} cores. {packages}. "
            f"{sum(s['seconds'] for s in found['sections'].values()):.0f} s in all."
            + (size if found["small"] else "")]  # fmt: skip


def _claims(claims: Sequence[Mapping[str, Any]], small: bool) -> list[str]:
    """Targets are for real sizes: what tiny ones give is shown and not judged."""
    words = {True: "reached", False: "**not reached**", None: "open"}
    if not claims:
        return []
    return ["| to reach | found | |", "| --- | --- | --- |",
            *(f"| {c['claim']} | {c['found']} | {'not judged' if small else words[c['reached']]} |"
              for c in claims), ""]  # fmt: skip


def _absent(absent: Mapping[str, Any]) -> list[str]:
    return [*(f"- absent: {name}: {why}" if isinstance(why, str) else f"- skipped {why} ×: {name}"
              for name, why in absent.items()), ""] if absent else []  # fmt: skip


def _nothing(result: Mapping[str, Any], output: Path) -> list[str]:
    return []


def _grid(result: Mapping[str, Any], output: Path) -> list[str]:
    rows = result["rows"]
    shapes = [tuple(s) for s in result["shapes"]]
    names = list(dict.fromkeys(r["variant"] for r in rows))
    by = {(r["variant"], r["batch"], r["sequence"]): r for r in rows}
    lines = ["Milliseconds a call, inputs resident; in brackets times the speed of eager fp32. "
             "Wrong results carry their verdict instead. "
             + _processes(rows, "ratios are paired by process"), ""]  # fmt: skip
    head = "| batch × length | " + " | ".join(names) + " |"
    lines += [head, "| --- |" + " --- |" * len(names)]
    lines += ["| " + " | ".join([f"{b} × {s}", *(_cell(by.get((n, b, s))) for n in names)]) + " |"
              for b, s in shapes]  # fmt: skip
    lines += ["", "| variant | warm-up of the grid | host time at the smallest shape | with copies "
              "| of the GEMM ceiling at the largest | allocated |",
              "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        mine = [by[k] for k in by if k[0] == name]
        small, large = mine[0], mine[-1]
        memory = next(iter(result["runs"][name].values())).get("memory", {}).get("allocated")
        share = f"{large['of_gemm']:.0%}" if large["of_gemm"] else "no ceiling"
        allocated = f"{memory / 2**20:.0f} MiB" if memory else "–"
        warm = result["warm_up"].get(name)
        lines.append(
            f"| {name} | {warm:.1f} s | {small['host_ms']:.3f} ms | {small['copies_ms']:.3f} ms "
            f"| {share} | {allocated} |")
    if _plot(rows, output / SPEEDUP):
        lines += ["", f"![speed over eager fp32]({SPEEDUP})"]
    return [*lines, ""]


def _processes(rows: Sequence[Mapping[str, Any]], several: str) -> str:
    """What replicates a figure; one process says nothing of its spread."""
    counts = sorted({r["rounds"] for r in rows})
    if not counts:
        return ""
    if counts == [1]:
        return "One process each, so that no interval can be given."
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{number} processes each; {several}."


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["verdict"].startswith("wrong"):
        return row["verdict"]
    speedup = f" ({row['speedup']:.2f})" if row["speedup"] else ""
    return f"{row['ms']:.3g}{speedup}"


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Speed over the baseline against length, one panel for each batch size."""
    try:
        import altair as alt
        import vl_convert  # noqa: F401 - altair needs it to write SVG
    except ImportError:
        return False
    shown = [{k: r[k] for k in ("variant", "batch", "sequence", "speedup")}
             for r in rows if r["speedup"] and r["verdict"] == "right"]  # fmt: skip
    if not shown:
        return False
    log = alt.Scale(type="log", base=2)
    alt.Chart(alt.Data(values=shown), width=260, height=260).mark_line(point=True).encode(
        x=alt.X("sequence:Q", scale=log, title="length"),
        y=alt.Y("speedup:Q", scale=log, title="times eager fp32"),
        color=alt.Color("variant:N", title=None),
        column=alt.Column("batch:O", title="batch"),
    ).save(str(path))
    return True


def _sentences(result: Mapping[str, Any], output: Path) -> list[str]:
    by = {(r["variant"], r["order"], r["batch"]): r for r in result["rows"]}
    columns = list(dict.fromkeys((r["variant"], r["order"]) for r in result["rows"]))
    lines = ["Milliseconds a sentence, copies included, tokenisation not; sentences of mixed "
             "lengths (log-normal, median 20 tokens) in batches. "
             + _processes(result["rows"], "in brackets the fastest and the slowest"), "",
             "| batch | " + " | ".join(f"{n}, {o}" for n, o in columns) + " |",
             "| --- |" + " --- |" * len(columns)]  # fmt: skip
    for batch in dict.fromkeys(r["batch"] for r in result["rows"]):
        cells = [by.get((*column, batch)) for column in columns]
        lines.append(f"| {batch} | " + " | ".join(map(_sentence, cells)) + " |")
    return [*lines, ""]


def _sentence(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    spread = f" [{row['low']:.3g}, {row['high']:.3g}]" if row["rounds"] > 1 else ""
    return f"{row['ms']:.3g}{spread}"


def _markdown(result: Mapping[str, Any], output: Path) -> list[str]:
    return [line.replace("## ", "#### ", 1) if line.startswith("## ") else line
            for line in result["markdown"].splitlines()] + [""]  # fmt: skip


BODIES = {"grid": _grid, "sentences": _sentences, "t5": _markdown, "bark": _markdown}
