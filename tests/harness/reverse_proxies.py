"""The real nginx and Caddy in front of a server, with the samples that the docs print."""

from __future__ import annotations

import os
import shutil
import ssl
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
import trustme

from harness.readme import block
from harness.support import free_port, process

SAMPLES = {"nginx": "nginx.conf", "caddy": "Caddyfile"}


@attrs.frozen
class ReverseProxy:
    """A proxy that runs."""

    kind: str
    scheme: str
    host: str
    port: int
    tls: ssl.SSLContext | None

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://{self.authority}/ws"


def found(kind: str) -> str:
    """The program, or a skip."""
    program = shutil.which(kind, path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip(f"{kind} is not installed")
    return program


def replaced(sample: str, *changes: tuple[str, str]) -> str:
    """A sample with what is different on this machine."""
    for printed, here in changes:
        assert printed in sample
        sample = sample.replace(printed, here)
    return sample


def opened(sample: str) -> str:
    """A sample with its commented block in force, for this machine's address."""
    lines = sample.splitlines()
    [begin] = [at for at, line in enumerate(lines) if "# What back ends and operators use" in line]
    end = next(at for at in range(begin, len(lines)) if not lines[at].strip())
    for at in range(begin + 1, end):
        lines[at] = lines[at].replace("# ", "", 1)
    return replaced("\n".join(lines) + "\n", ("10.0.0.0/8", "127.0.0.1"))


@contextmanager
def reverse_proxy(
    kind: str, home: Path, server_port: int, *, inside: bool = False
) -> Iterator[ReverseProxy]:
    """Run the printed sample before a server of this port."""
    program, port = found(kind), free_port()
    sample = block("nginx" if kind == "nginx" else "caddy")
    sample = opened(sample) if inside else sample
    sample = replaced(sample, ("127.0.0.1:8000", f"127.0.0.1:{server_port}"))
    if kind == "nginx":
        authority = trustme.CA()
        certificate = authority.issue_cert("push.example.com")
        certificate.cert_chain_pems[0].write_to_path(home / "push.example.com.pem")
        certificate.private_key_pem.write_to_path(home / "push.example.com.key")
        sample = replaced(
            sample,
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("/etc/ssl/", f"{home}/"),
        )
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = "".join(f"{each}_temp_path {home}/{each};\n" for each in kinds)
        (home / "nginx.conf").write_text(
            f"daemon off;\nmaster_process off;\npid {home}/pid;\nerror_log stderr;\n"
            f"events {{}}\nhttp {{\naccess_log off;\n{places}{sample}}}\n"
        )
        command = (program, "-p", str(home), "-c", str(home / "nginx.conf"))
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        made = ReverseProxy(kind, "https", "push.example.com", port, trusting)
    else:
        # No certificate is to be had here; a site without a name answers to each.
        sample = replaced(sample, ("push.example.com {", f"http://:{port} {{"))
        (home / "Caddyfile").write_text(f"{{\n\tadmin off\n}}\n{textwrap.dedent(sample)}")
        command = (program, "run", "--config", str(home / "Caddyfile"))
        made = ReverseProxy(kind, "http", "push.example.com", port, None)
    env = {"HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_DATA_HOME": str(home)}
    with process(*command, env=env):
        yield made
