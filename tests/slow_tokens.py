"""Tokens that take their time, so that a test can press Stop, or look, in the middle of an answer."""

from __future__ import annotations

import time

import pytest


def slow_tokens(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Each step of a model in this process takes so much longer."""
    from exl.engine.runner import Runner

    plain = Runner.step

    def step(self, *asked):
        time.sleep(seconds)
        return plain(self, *asked)

    patch.setattr(Runner, "step", step)
