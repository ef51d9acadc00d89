import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import main as cli
from tests.unit.orchestrator.jobs import pipeline_job, write


def test_nothing_heavy_is_imported_for_help() -> None:
    code = "import sys, orchestrator.cli.main; print(sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    for heavy in ("torch", "ray", "mlflow", "numpy", "pyarrow", "pydantic", "cv2", "yaml"):
        assert f"'{heavy}'" not in modules.stdout


def test_dry_run_needs_no_data(tmp_path: Path) -> None:
    path = write(tmp_path / "job.yaml", pipeline_job(tmp_path / "nowhere"))
    shown = CliRunner().invoke(cli.app, ["run", "--dry-run", str(path)])
    assert shown.exit_code == 0
    assert "tiny-voc" in shown.output
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("arguments", [["run", "no.yaml"], ["no.yaml"]])
def test_errors_are_one_line_and_an_exit_code(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["atrous", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no.yaml: no such file\n"


def test_synthesize_prepare_and_a_wrong_source(tmp_path: Path) -> None:
    runner = CliRunner()
    drawn = runner.invoke(cli.app, ["data", "synthesize", str(tmp_path / "raw"), "--layout", "voc"])
    assert drawn.exit_code == 0, drawn.output
    done = runner.invoke(
        cli.app,
        [
            "data",
            "prepare",
            "voc",
            str(tmp_path / "raw/voc"),
            str(tmp_path / "voc"),
            "--split",
            "val",
        ],
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "voc" / "val" / "manifest.parquet").exists()
    wrong = runner.invoke(cli.app, ["data", "prepare", "coco", str(tmp_path / "raw/voc"), "x"])
    assert wrong.exit_code != 0
