from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from modelport import doctor
from modelport.cli import execute
from packaging.requirements import Requirement


@pytest.fixture(autouse=True)
def _nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that these versions are installed (None: that the package is not)."""
    real = doctor._installed

    def pretend(package: str) -> str | None:
        key = package.replace("-", "_")
        return versions[key] if key in versions else real(package)

    monkeypatch.setattr(doctor, "_installed", pretend)


def by_level(findings: tuple[doctor.Finding, ...], level: str) -> list[doctor.Finding]:
    return [f for f in findings if f.level == level]


def test_this_machine_is_healthy_and_absences_have_a_remedy() -> None:
    findings = doctor.examine()
    assert not by_level(findings, "broken")
    subjects = {f.subject for f in findings}
    assert {"torch", "onnxruntime on cpu", "torch_eager on cpu", "hub"} <= subjects
    for finding in findings:
        assert finding.found


def test_a_version_below_the_floor_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, transformers="5.4.0")
    (broken,) = by_level(doctor.examine(), "broken")
    assert broken.subject == "transformers"
    assert broken.remedy == 'pip install "transformers>=5.5"'


def test_both_builds_of_onnxruntime_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu="1.31.1")
    (broken,) = by_level(doctor.examine(), "broken")
    assert "same module" in broken.found
    assert "uninstall" in broken.remedy


def test_no_build_of_onnxruntime_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, onnxruntime=None, onnxruntime_gpu=None)
    assert any("no ONNX Runtime" in f.found for f in by_level(doctor.examine(), "broken"))


def test_every_extra_is_told_by_a_package_that_it_brings() -> None:
    project = (Path(doctor.__file__).parent / "pyproject.toml").read_text("utf-8")
    extras = tomllib.loads(project)["project"]["optional-dependencies"]
    assert set(doctor.OPTIONAL.values()) == set(extras) - {"dev"}
    for package, extra in doctor.OPTIONAL.items():
        assert package in {Requirement(line).name for line in extras[extra]}


def test_an_extra_that_is_missing_is_absent_and_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, adlfs=None)
    findings = doctor.examine()
    (found,) = [f for f in findings if f.subject == "adlfs"]
    assert (found.level, found.remedy) == ("absent", 'pip install "modelport[azure]"')
    assert doctor.record(findings)["healthy"]


def engines(findings: tuple[doctor.Finding, ...]) -> list[doctor.Finding]:
    return [f for f in findings if f.subject == "TensorRT engines"]


def test_what_is_missing_for_tensorrt_is_explained_step_by_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from modelport import gpu

    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda: None)
    monkeypatch.setattr(gpu, "unavailable", lambda: "TensorRT is not installed here")
    built, absent = engines(doctor.examine())
    assert (built.level, absent.level) == ("absent", "absent")
    assert "without CUDA" in built.found
    assert gpu.INSTALL in absent.remedy


def test_tensorrt_for_another_cuda_and_an_old_driver_are_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from modelport import gpu

    here = gpu.Machine("GPU", "9.0", "535.10", "13.0", "11.4.0.106")
    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda: "13")
    monkeypatch.setattr(gpu, "unavailable", lambda: None)
    monkeypatch.setattr(gpu, "machine", lambda: here)
    installed(monkeypatch, tensorrt_cu12="11.4.0.106", tensorrt_cu13=None)
    wheels, driver, fine = engines(doctor.examine())
    assert [f.level for f in (wheels, driver, fine)] == ["warning", "warning", "ok"]
    assert "tensorrt-cu13" in wheels.remedy
    assert "580" in driver.found
    assert "TensorRT 11.4.0.106 on GPU" in fine.found


def test_tensorrt_11_beside_onnxruntime_gpu_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, onnxruntime=None, onnxruntime_gpu="1.31.1", tensorrt="11.4.0")
    assert any("libnvinfer.so.10" in f.found for f in by_level(doctor.examine(), "warning"))


@pytest.fixture
def closed_port() -> Iterator[int]:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: a connection is refused at once
        yield held.getsockname()[1]


def test_an_unreachable_hub_names_what_works_without_it(
    monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    (hub,) = doctor._hub()
    assert hub.level == "warning"
    assert "--weights random" in hub.remedy


def test_an_answering_hub_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    class Silent(http.server.SimpleHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    (hub,) = doctor._hub()
    thread.join()
    server.server_close()
    assert hub.level == "ok"


def test_the_command_prints_json_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True
    assert execute(["doctor"]) == 0
    assert "torch_eager on cpu" in capsys.readouterr().out


def test_extras_are_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    finding = doctor.Finding("x", "absent", "not installed", 'pip install "modelport[gpu]"')
    Console(width=200).print(doctor.view((finding,)))
    assert 'modelport[gpu]"' in capsys.readouterr().out
