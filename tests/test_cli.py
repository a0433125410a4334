import subprocess
import sys

import pytest

from fused_resnet import cli


def test_help_names_the_subcommands(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    assert "train" in capsys.readouterr().out


def test_without_a_subcommand_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 2
    assert "SUBCOMMAND" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "fused_resnet", "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: fused-resnet")
