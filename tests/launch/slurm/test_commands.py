"""Slurm's commands where they fail: one line with the cause and a fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from dist_train.cli import main

# As Slurm 22.05 prints them.
NO_CLUSTER = """{name}: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host
{name}: error: fetch_config: DNS SRV lookup failed
{name}: error: _establish_config_source: failed to fetch config
{name}: fatal: Could not establish a configuration source
"""
NO_ANSWER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
REFUSED = "{name}: error: AssocMaxSubmitJobLimit\n{name}: error: Batch job submission failed: Job violates policy\n"


@pytest.fixture(params=[["slurm", "submit", "-c", "smoke"], ["slurm", "status"]], ids=" ".join)
def command(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "bin:/bin")  # of Slurm's commands, only those that a test writes
    (tmp_path / "bin").mkdir()
    return list(request.param)


def install(said: str) -> None:
    """Write Slurm's commands, which fail with what they say."""
    for name in ("sinfo", "squeue", "sbatch"):
        script = Path("bin", name)
        script.write_text(f"#!/bin/sh\ncat >&2 <<END\n{said.format(name=name)}END\nexit 1\n")
        script.chmod(0o755)


@pytest.mark.parametrize(
    ("said", "cause", "fix"),
    [
        (NO_CLUSTER, "finds no cluster: Could not establish a configuration source. ", "set SLURM_CONF to "),
        (
            NO_ANSWER,
            "gets no answer from Slurm's controller: slurm_load_jobs error: Unable to contact slurm controller "
            "(connect failure). ",
            "scontrol ping",
        ),
        (REFUSED, "AssocMaxSubmitJobLimit Batch job submission failed: Job violates policy", ""),
        ("", "exit code 1", ""),
    ],
    ids=["no cluster", "no answer", "refused", "silent"],
)
def test_slurm_failures_are_explained(said: str, cause: str, fix: str, command: list[str]) -> None:
    install(said)
    failed = CliRunner().invoke(main, command)
    asked = "sinfo" if "submit" in command else "squeue"
    assert failed.exit_code == 1
    assert len(failed.output.splitlines()) == 1
    assert failed.output.startswith(f"error: {asked}")
    assert cause in failed.output
    assert fix in failed.output
    assert "DNS" not in failed.output


def test_missing_slurm_is_named(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path("bin").absolute()))
    failed = CliRunner().invoke(main, command)
    assert failed.exit_code == 1
    assert len(failed.output.splitlines()) == 1
    assert "this is not a submit host of a Slurm cluster" in failed.output
