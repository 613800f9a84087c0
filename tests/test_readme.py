"""The READMEs: requests return the responses shown, tables list what the code has, and cited pages exist."""

import ast
import re
import subprocess
from dataclasses import fields

import pytest
from service import ROOT, environment, serve

from ovms_rest.config import _MODEL_KEYS, _ROOT_KEYS
from ovms_rest.settings import PREFIX, Settings

PACKAGE = ROOT / "ovms_rest"
README = (ROOT / "README.md").read_text()
MODELS = (PACKAGE / "models" / "README.md").read_text()
PAGES = [path for path in sorted(ROOT.rglob("*.md")) if not any(part.startswith(".") for part in path.parts[1:])]
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
BLOCKS = [
    block
    for page in (README, *(path.read_text() for path in sorted(PACKAGE.rglob("README.md"))))
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
]
REQUESTS = [
    (command, answer) for block in BLOCKS for command, answer in re.findall(r"^\$ (.*)\n(.*)\n", block, re.MULTILINE)
]
DEMO = "http://127.0.0.1:8000"
CONTROL = "http://127.0.0.1:9000"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The service as the first command starts it, with a control address, on other ports."""
    with serve(tmp_path_factory.mktemp("demo"), OVMS_REST_CONTROL_BIND="127.0.0.1:0") as running:
        found = running.wait_for(lambda: re.search(r"control address: (http://127\.0\.0\.1:\d+)", running.log))
        running.control = found[1]
        yield running


def run(home, *command):
    """Run a command of a user in the checkout; return its output."""
    done = subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(("command", "answer"), REQUESTS)
def test_request_returns_the_response_shown(demo, command, answer, tmp_path):
    assert DEMO in command or CONTROL in command
    command = command.replace(DEMO, f"http://127.0.0.1:{demo.port}").replace(CONTROL, demo.control)
    pattern = re.escape(answer).replace(r"\[\.\.\.\]", r"\[[0-9.,e-]+\]")
    assert re.fullmatch(pattern, run(tmp_path, "bash", "-c", command))


def test_readmes_show_requests():
    assert len(REQUESTS) >= 12


def test_top_readme_has_at_most_250_lines():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page):
    """Links of a page are relative to it; a fragment is a heading as GitHub writes it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!\w+:)([^)\s]*)\)", text):
        path, _, fragment = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if fragment:
            linked = linked / "README.md" if linked.is_dir() else linked
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert fragment in [re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles], target


@pytest.mark.parametrize("page", sorted(PACKAGE.rglob("*.md")), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_named_by_a_page_of_the_package_exist(page):
    """A path in code quotes, such as `worker/` or `models/runtime.py`, is relative to the page or the package."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([a-z_/]+(?:\.py|/))`", text):
        folders = (PACKAGE, page.parent, ROOT)
        assert any((folder / name).exists() for folder in folders), name


def test_pages_cited_by_the_code_exist():
    """A citation is a path below the repository, the package or its own folder; docs/ belongs to other projects."""
    missing = []
    for source in SOURCES:
        for name, section in re.findall(
            r"(?<![\w/.{*<-])((?!docs/)(?:\w+/)*\w+\.md)\b(?:,? section (\d+))?", _comments(source)
        ):
            folders = (ROOT, PACKAGE, source.parent)
            found = next((folder / name for folder in folders if (folder / name).exists()), None)
            if found is None or (section and f"\n## {section}." not in found.read_text()):
                missing.append(f"{source.relative_to(ROOT)}: {name} {section}")
    assert not missing


def _comments(source):
    """Return the comments and docstrings of a module that may cite a page, as one text."""
    text = source.read_text()
    if ".md" not in text:  # parsing takes longer than all the rest
        return ""
    docstrings = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    return "\n".join([*docstrings, *re.findall(r"(?:^|\s)# .*$", text, re.MULTILINE)])


def test_python_example_runs(demo, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    output = run(tmp_path, "python", "-c", code.replace("127.0.0.1:8000", f"127.0.0.1:{demo.port}"))
    assert len(re.findall(r"\d\.\d+e[-+]\d+|\d\.\d+", output)) == 10


@pytest.mark.parametrize(("language", "interpreter"), [("sh", "sh"), ("sh", "bash"), ("py", "python")])
def test_recipe_sends_a_picture(demo, tmp_path, language, interpreter):
    section = MODELS.split("\n## Images\n")[1].split("\n## ")[0]
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    output = run(tmp_path, interpreter, "-c", code.replace("127.0.0.1:8000", f"127.0.0.1:{demo.port}"))
    assert "[6,5,9,0,2]" in output.replace(" ", "")


def test_table_of_settings_lists_those_of_the_code():
    page = (PACKAGE / "SETTINGS.md").read_text()
    rows = re.findall(r"^\| `(OVMS_REST_\w+)` \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    expected = [(PREFIX + field.name.upper(), field.default, field.metadata["meaning"]) for field in fields(Settings)]
    assert [(name, meaning) for name, _, meaning in rows] == [(name, meaning) for name, _, meaning in expected]
    assert [default for _, default, _ in rows[1:]] == [
        str(default).lower() if isinstance(default, bool) else str(default) or "(empty)"
        for _, default, _ in expected[1:]
    ]


@pytest.mark.parametrize(("title", "checks"), [("the file", _ROOT_KEYS), ("a model", _MODEL_KEYS)])
def test_table_of_keys_lists_those_of_the_code(title, checks):
    """The keys that are always refused are listed below the tables."""
    table = MODELS.split(f"## Keys of {title}\n", 1)[1].split("\n\n", 2)[0]
    keys = [key for names in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", names)]
    assert sorted(keys) == sorted(key for key, check in checks.items() if "is not supported" not in str(check(None)))


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = re.findall(r"^(pip install '\.\[test\]'.*)$", README, re.MULTILINE)
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()
