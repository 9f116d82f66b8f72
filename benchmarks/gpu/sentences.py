"""The CamemBERT article's columns: formats by batch size over sentences of mixed lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grid
import numpy as np

FORMATS = ("eager fp32", "TorchScript fp32", "ONNX Runtime fp32", "ONNX Runtime fp16, fused")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ORDERS = ("padded", "sorted")


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each variant, order and batch size: median, least and most over rounds."""
    taken: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for name, runs in found["runs"].items():
        for one in runs.values():
            for made in one.get("passes", ()):
                taken.setdefault((name, made["order"], made["batch"]), []).append(made)
    rows = []
    for (name, order, batch), made in taken.items():
        times = [m["seconds"] / m["sentences"] * 1e3 for m in made]
        rows.append({"variant": name, "order": order, "batch": batch, "rounds": len(made),
                     "ms": float(np.median(times)), "low": min(times), "high": max(times),
                     "padding": made[0]["padding"]})  # fmt: skip
    return rows


def claims(rows: list[dict[str, Any]], absent: Mapping[str, str]) -> list[dict[str, Any]]:
    """What the article says of the GPU, and what was found; None where what was not measured might
    decide."""
    whole = not set(absent) & set(FORMATS)
    ms = {(r["variant"], r["order"], r["batch"]): r["ms"] for r in rows}
    first = ms.get(("eager fp32", "padded", 1))
    fastest = min(
        ((value, key) for key, value in ms.items() if key[2] in (32, 64)), default=None
    )
    at_64 = [v for (name, order, batch), v in ms.items()
             if (order, batch) == ("padded", 64) and name.endswith("fp32")]  # fmt: skip
    gain = first / fastest[0] if first and fastest else None
    spread = max(at_64) / min(at_64) if len(at_64) > 1 else None
    return [
        {"claim": "28 × the baseline (eager, one sentence at a time) at batch 32 to 64",
         "found": f"{gain:.1f} ×, {', '.join(map(str, fastest[1]))}" if gain and fastest
         else "not measured", "reached": grid.decided(gain >= 28, whole) if gain else None},
        {"claim": "float32 formats within 10 % of each other at batch 64",
         "found": f"slowest over fastest {spread:.2f}" if spread else "not measured",
         "reached": spread <= 1.1 if spread and whole else None},
    ]  # fmt: skip
