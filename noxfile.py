"""The project's checks: `nox` runs tests, lint and types; `nox -s tests-3.12 -- -k tape` a part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">= 2025.11.12"
nox.options.sessions = ["tests", "browser", "asks", "lint", "types"]
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
# CI would make it an error; the one that runs nox is there in any case.
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
RUNNING = f"{sys.version_info[0]}.{sys.version_info[1]}"
# Of the others, those that this machine has.
PYTHONS = sorted({"3.11", "3.12", "3.13", RUNNING}, key=lambda version: int(version[2:]))


def _look_behind_shims() -> None:
    """Add pyenv's own directories to the end of PATH.

    A shim of a version that is not selected is an executable that fails.
    """
    path = os.get_exec_path()
    for shims in (Path(entry) for entry in path if Path(entry).name == "shims"):
        for versions in ("versions/3.*/bin", "versions/2.7.*/bin"):
            path += map(str, sorted(shims.parent.glob(versions)))
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys(path))


_look_behind_shims()


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Test the installed package with each Python that is there; arguments go to pytest."""
    project = nox.project.load_toml("pyproject.toml")
    session.install(".", *nox.project.dependency_groups(project, "test"))
    # Not from the root, where processes that the tests start would import the source.
    session.chdir("tests")
    # Several wait for a real clock: three at a time, whatever the machine.
    side_by_side = ("--numprocesses=3", "--dist=worksteal")
    session.run("pytest", *side_by_side, *map(_from_root, session.posargs))


def _from_root(argument: str) -> str:
    path = ROOT / argument.partition("::")[0]
    return str(ROOT / argument) if argument.startswith("tests") and path.exists() else argument


# What the tests of JavaScript take from npm.
NPM = ("ws@8", "@types/ws@8", "typescript@>=5.4", "playwright-core@1")


@nox.session(python=PYTHONS[-1])
def browser(session: nox.Session) -> None:
    """The JavaScript client in Node and Chromium, and its types; arguments go to pytest."""
    if shutil.which("npm") is None:
        session.skip("npm is not installed")
    project = nox.project.load_toml("pyproject.toml")
    session.install(".", *nox.project.dependency_groups(project, "test"))
    modules = Path(session.create_tmp()).resolve()
    session.run(
        "npm", "install", "--no-audit", "--no-fund", f"--prefix={modules}", *NPM, external=True
    )
    session.chdir("tests")
    files = session.posargs or ["web"]
    env = {"TESTS_NODE_MODULES": str(modules / "node_modules")}
    side_by_side = ("--numprocesses=2", "--dist=loadfile")
    session.run("pytest", "-m", "browser", *side_by_side, *map(_from_root, files), env=env)


@nox.session
def asks(session: nox.Session) -> None:
    """The HTTP source's tests, by asks in place of httpx; arguments go to pytest."""
    project = nox.project.load_toml("pyproject.toml")
    session.install(".", *nox.project.dependency_groups(project, "test"))
    # As the README says. Its metadata would have an anyio that fails on today's trio.
    session.install("--no-deps", "asks", "async_generator", "h11")
    session.chdir("tests")
    files = ("sources/http", "sources/test_every_source.py", "-k", "http")
    env = {"TESTS_HTTP_CLIENT": "asks"}
    session.run("pytest", *files, *map(_from_root, session.posargs), env=env)


@nox.session
def soak(session: nox.Session) -> None:
    """What takes minutes: crowds, 20 minutes of faults, half a million inputs, a random client."""
    project = nox.project.load_toml("pyproject.toml")
    session.install(".", *nox.project.dependency_groups(project, "test"))
    session.chdir("tests")
    counts = {"TESTS_ABORTS": "20000", "TESTS_STORM": "5000", "TESTS_FUZZ": "500000"}
    counts["TESTS_FLASK"] = "100000"
    files = session.posargs or [
        *("hard/test_load.py", "hard/test_fuzz.py", "hard/test_soak.py"),
        *("hard/test_random_client.py", "sources/test_flask.py", "test_flask_page.py"),
    ]
    session.run("pytest", "-s", "-m", "", *map(_from_root, files), env=counts)


@nox.session
def settings(session: nox.Session) -> None:
    """Write the table of settings and the sample file, which mirror trading_push/settings."""
    session.install("-e", ".")
    session.run("python", "-m", "trading_push.settings.reference", str(ROOT))


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, its ASYNC rules among others, and flake8-async, which knows more of trio."""
    session.install("ruff == 0.17.*", "flake8 == 7.*", "flake8-async == 26.*")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run(
        "flake8",
        "--isolated",
        "--select=ASYNC1,ASYNC2,ASYNC3",  # ASYNC9 wants a checkpoint in every async function
        "--startable-in-context-manager=run,serve_native,_reload_at_sighup",
        "trading_push",
    )


@nox.session
def types(session: nox.Session) -> None:
    """Mypy on the source, on a program that uses the installed package, and on examples."""
    project = nox.project.load_toml("pyproject.toml")
    session.install(*nox.project.dependency_groups(project, "test"))
    session.install(".[postgres,http,proxy,flask,aio]", "mypy == 2.*")
    session.run("mypy", "--strict")
    session.chdir(session.create_tmp())  # where only an installed py.typed gives it types
    session.run("mypy", "--config-file=", "--strict", "-c", "import trading_push")
    session.chdir(ROOT / "tests")
    session.run("pytest", "-q", "test_printed_types.py")


@nox.session
def bench(session: nox.Session) -> None:
    """Measure against other servers; arguments go to tests/bench/run.py (`-- --help`)."""
    project = nox.project.load_toml("pyproject.toml")
    session.install(".", *nox.project.dependency_groups(project, "bench"))
    session.run("python", "tests/bench/run.py", *session.posargs)


@nox.session
def autobahn(session: nox.Session) -> None:
    """Autobahn|Testsuite against both endpoints; arguments are cases (`-- 1.* 7.1.1`)."""
    session.install(".")
    temporary = Path(session.create_tmp()).resolve()
    wstest = _wstest(session, temporary)
    # Not from the root, where the servers would import the source.
    session.chdir("tests")
    session.run(
        "python",
        "autobahn/run.py",
        f"--wstest={wstest}",
        f"--reports={temporary / 'autobahn'}",
        *session.posargs,
    )


def _wstest(session: nox.Session, temporary: Path) -> Path:
    """The suite's command, in an environment of Python 2.7, which it still needs."""
    # A shim of a version that is not selected says so, and fails.
    python = next(filter(_is_python_2, (Path(at) / "python2.7" for at in os.get_exec_path())), None)
    if python is None:
        session.skip("Autobahn|Testsuite needs Python 2.7, and there is none")
    there = temporary / "python2.7"
    wstest = there / "bin" / "wstest"
    if not wstest.exists():
        # The last virtualenv that makes such environments; it needs an older platformdirs than
        # the package.
        maker = temporary / "virtualenv"
        session.install(f"--target={maker}", "virtualenv == 20.21.*")
        session.run(
            *("python", "-m", "virtualenv", f"--python={python}", str(there)),
            env={"PYTHONPATH": str(maker)},
        )
        # It pins all that it needs.
        pip = (str(there / "bin" / "python"), "-m", "pip", "install")
        session.run(*pip, "autobahntestsuite == 25.10.1", external=True)
    return wstest


def _is_python_2(python: Path) -> bool:
    if not python.exists():
        return False
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
