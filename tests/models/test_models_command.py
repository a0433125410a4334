"""``fused-resnet models``."""

import pytest

from fused_resnet import cli


def test_the_table_fits_a_terminal(capsys, monkeypatch):
    chosen = ["resnet50", "vgg16_bn", "plain20"]
    monkeypatch.setattr("fused_resnet.models.command.names", lambda: chosen)  # all take seconds to count
    assert cli.main(["models"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "depth", "parameters", "multiply-adds", "images", "shortcut"]
    assert max(map(len, (head, *rows))) <= 80
    assert [row.split() for row in rows] == [
        ["resnet50", "50", "25.56", "M", "4,089", "M", "224x224", "B"],
        ["vgg16_bn", "16", "138.37", "M", "15,470", "M", "224x224", "none"],
        ["plain20", "20", "0.27", "M", "41", "M", "32x32", "none"],
    ]


def test_networks_and_their_shortcut_can_be_chosen(capsys):
    assert cli.main(["models", "resnet56", "plain56", "--shortcut", "A"]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [("resnet56", "A"), ("plain56", "none")]


def test_an_unknown_network_is_answered_with_those_that_exist(capsys):
    assert cli.main(["models", "resnet20", "resnet21"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fused-resnet models: error: NAME must be one of resnet18, ")
    assert captured.err.endswith("; got resnet21\n")
    assert not captured.out


def test_help_says_what_the_columns_and_the_shortcuts_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["models", "--help"])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("depth is", "multiply-adds are", "A, the identity", "examples:"))
