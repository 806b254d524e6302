"""Fixtures that several files need."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

pytest.register_assert_rewrite("harness")

from harness import mariadb_server, postgres_server
from harness.embedded import Embedded, embed


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A server's chain and key, and a client's context that trusts it."""
    authority = trustme.CA()
    pem = tmp_path_factory.mktemp("tls") / "chain.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return pem, trust


@pytest.fixture
def embedded() -> Iterator[Embedded]:
    with embed() as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.PostgresServer]:
    """A server for the whole run: what is in it belongs into a database of the test's own."""
    with postgres_server.running() as server:
        yield server


@pytest.fixture(scope="session")
def mariadb() -> Iterator[mariadb_server.MariaDbServer]:
    """A server for the whole run: what is in it belongs into a database of the test's own."""
    with mariadb_server.running() as server:
        yield server
