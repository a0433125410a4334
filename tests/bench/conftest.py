import argparse

import pytest

from fused_resnet.bench import command


@pytest.fixture
def bench():
    """Return a function that runs ``bench`` with the given words."""
    parser = argparse.ArgumentParser(prog="fused-resnet")
    command.add_bench(parser.add_subparsers())

    def run(*words):
        options = parser.parse_args(["bench", *map(str, words)])
        return options.run(options)

    return run
