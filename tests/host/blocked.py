"""A pytest plugin: ``--blocked a,b`` makes packages a and b look as if they were not installed."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder

import pytest


class Blocker(MetaPathFinder):
    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)
        return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--blocked", default="", metavar="PACKAGES", help="separated by commas")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    names = frozenset(filter(None, early_config.known_args_namespace.blocked.split(",")))
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    sys.meta_path.insert(0, Blocker(names))
