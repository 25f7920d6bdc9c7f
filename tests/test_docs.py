"""The documentation: its code runs, its commands exist, its pages are built."""

import os
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import BACKEND, ROOT
from tvkeras import config
from tvkeras.evaluation import trials
from tvkeras.evaluation.benchmark import benchmark
from tvkeras.evaluation.certified import Certification
from tvkeras.evaluation.detecting import Detection

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
SLOW = {
    "README.md",
    "docs/coming-from.md",
    "docs/defend.md",
    "docs/judge.md",
}  # they train, or audit
TENSORFLOW = {"docs/serve.md"}
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python -m (tvkeras\.\w+)\b(.*)")


def code(page, *languages):
    """The blocks of a page in some languages, in order."""
    return [textwrap.dedent(m[3]) for m in FENCE.finditer(PAGES[page]) if m[2] in languages]


def pages(*languages):
    """Those with such blocks, the slow ones marked."""
    found = [page for page in PAGES if code(page, *languages)]
    return [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in found]


def commands(page):
    """Module and flags, by name, of each command in a page's shell blocks."""
    text = "\n".join(code(page, "bash", "console")).replace("\\\n", " ")
    for module, rest in COMMAND.findall(text):
        flags = {}
        for argument in shlex.split(rest, comments=True):
            name, _, value = argument.partition("=")
            if name.startswith("--"):
                flags.setdefault(name.removeprefix("--"), []).append(value)
        yield module, flags


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A working directory with what pages use of a checkout."""
    for name in ("examples", "gin", "zoo"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", pages("python"))
def test_python_runs(page, checkout):
    if page in TENSORFLOW and BACKEND != "tensorflow":
        pytest.skip("exports by TensorFlow")
    namespace = {"__name__": "__main__"}
    for block in code(page, "python"):
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if code(page, "bash")])
def test_commands_run(page, checkout):
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    for block in code(page, "bash"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if [*commands(page)]])
def test_settings_of_commands_bind(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    config.configurable(benchmark, (Certification, Detection, *trials.library_attacks()))
    for module, flags in commands(page):
        files, bindings = flags.get("gin_file", []), flags.get("gin_param", [])
        if module == "tvkeras.train":
            config.bind(files, bindings)
            config.settings()
        elif module == "tvkeras.evaluate":
            config.bind(files, bindings)


@pytest.mark.slow
def test_flags_of_commands_exist():
    used = {}
    for page in PAGES:
        for module, flags in commands(page):
            used.setdefault(module, set()).update(flags)
    assert used
    for module, flags in used.items():
        shown = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False
        ).stdout
        known = set(re.findall(r"--(?:\[no\])?(\w+)", shown))
        assert flags <= known, f"{module}: {flags - known}"


@pytest.mark.slow
def test_the_site_is_built_and_asks_no_other_host(tmp_path):
    pytest.importorskip("mkdocs")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={tmp_path}"],
        cwd=ROOT,
        check=True,
    )
    for path in tmp_path.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:link|script|img|iframe)[^>]*(?:href|src)=\"(https?://[^\"]*)", text
        )
        assert not loaded, f"{path}: {loaded}"
    assert (tmp_path / "judge.ipynb").exists()
