"""The browser, or the reason why its tests are skipped."""

from __future__ import annotations

import shutil

import pytest

HOW = "make browser installs it"
playwright = pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed: {HOW}")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium in PATH", allow_module_level=True)
expect = playwright.expect
