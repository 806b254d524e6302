"""The JavaScript client in each place where it runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.javascript import KINDS, Place, running


@pytest.fixture(scope="session", params=KINDS)
def js(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with running(request.param, tmp_path_factory.mktemp("javascript")) as place:
        yield place
