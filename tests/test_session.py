from __future__ import annotations

import numpy as np
import pytest
from modelport.errors import SpecError, UsageError
from modelport.session import Placement, Session
from modelport.spec import ModelSpec, TensorSpec


class Doubling(Session):
    runtime = "doubling"

    def __init__(self) -> None:
        tensor = TensorSpec("x", "float32", ("n",))
        super().__init__(ModelSpec((tensor,), (tensor,)))
        self.calls = 0

    def placement(self) -> Placement:
        return Placement("cpu")

    def _run(self, feeds):
        self.calls += 1
        return {"x": feeds["x"] * 2}


X = np.arange(3, dtype=np.float32)


def test_run_checks_the_feeds_before_the_runtime_sees_them() -> None:
    session = Doubling()
    with pytest.raises(SpecError):
        session.run({"y": X})
    assert session.calls == 0
    np.testing.assert_array_equal(session.run({"x": X})["x"], X * 2)


def test_bind_returns_a_launch_that_runs_once_per_call() -> None:
    session = Doubling()
    launch = session.bind({"x": X})
    launch()
    launch()
    assert session.calls == 2


def test_a_closed_session_says_so_and_may_be_closed_again() -> None:
    with Doubling() as session:
        pass
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run({"x": X})
    with pytest.raises(UsageError, match="closed"):
        session.bind({"x": X})
