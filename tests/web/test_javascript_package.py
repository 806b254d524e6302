"""The JavaScript client as a package: its version, its types, and what npm would publish."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import pytest

from harness.javascript import node_modules

STATIC = Path(str(resources.files("trading_push.web"))) / "static"
PACKAGE = json.loads((STATIC / "package.json").read_text("utf-8"))
STRICT = ("--strict", "--target", "es2022", "--module", "nodenext")


def test_both_packages_have_one_version():
    assert PACKAGE["version"] == version("trading_push")


def test_it_is_one_module_without_dependencies():
    text = (STATIC / "trading-push.js").read_text("utf-8")
    assert not re.search(r"^\s*(import|export \* from|export \{.*\} from)\b", text, re.M)
    assert "dependencies" not in PACKAGE
    assert PACKAGE["exports"]["."]["default"] == "./trading-push.js"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def package(tmp_path) -> Path:
    """What npm publishes, with its types; skips where TypeScript is not installed."""
    modules = node_modules()
    if modules is None or not (modules / "typescript").is_dir():
        pytest.skip("npm's package `typescript` is not in $TESTS_NODE_MODULES")
    made = tmp_path / "node_modules" / "trading-push"
    shutil.copytree(STATIC, made)
    for each in ("typescript", "@typescript", "@types", "undici-types", "ws", ".bin"):
        if (modules / each).exists():
            (tmp_path / "node_modules" / each).symlink_to(modules / each)
    return made


@pytest.mark.browser
def test_the_strict_type_check_passes(package):
    tsc = package.parent / ".bin" / "tsc"
    run(tsc, "--noEmit", "--allowJs", "--checkJs", *STRICT, "trading-push.js", cwd=package)


@pytest.mark.browser
def test_npm_publishes_the_module_and_its_types(package, tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    run("npm", "run", "types", cwd=package)
    [packed] = json.loads(run("npm", "pack", "--json", "--ignore-scripts", cwd=package))
    names = {each["path"] for each in packed["files"]}
    assert names == {"package.json", "trading-push.js", "trading-push.d.ts"}
    # Programs that use it pass the strict check too, the class of `ws` handed in among them.
    program = tmp_path / "program.ts"
    program.write_text(
        """
        import { connect, type Push, type State } from "trading-push";
        import { WebSocket } from "ws";
        const client = connect({ url: "ws://127.0.0.1/ws", token: async () => "t", WebSocket });
        client.addEventListener("state", ({ detail }) => {
          const state: State = detail;
          if (state.state === "waiting") console.log(state.retryAt.toFixed(), state.reason);
          if (state.state === "ended") console.log(state.error?.message);
        });
        client.addEventListener("rtt", ({ detail: { ms } }) => console.log(ms.toFixed()));
        const show = (push: Push) => push.seq;
        const stop: () => void = client.subscribe("balance", show, { maxHz: 5 });
        for await (const push of client.pushes("fills", { channel: "pnl", maxHz: 1 })) {
          console.log(push.channel.length, client.latest("pnl")?.seq, client.user, client.rtt);
        }
        // @ts-expect-error there is no such event
        client.addEventListener("nope", () => {});
        // @ts-expect-error a token is no number
        connect({ url: "/ws", token: 5 });
        stop();
        """,
        "utf-8",
    )
    (tmp_path / "package.json").write_text('{"type": "module"}', "utf-8")
    tsc = package.parent / ".bin" / "tsc"
    run(tsc, "--noEmit", "--skipLibCheck", *STRICT, program, cwd=tmp_path)
