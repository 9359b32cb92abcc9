"""What the project's own files say twice is the same in both, and what they name exists."""

import collections
import pathlib
import re
import shlex
import tomllib
import types

import pytest

import lora_jax
from tests import conftest

ROOT = pathlib.Path(lora_jax.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Repository"]


def read(name):
    return (ROOT / name).read_text()


def test_workflows_run_stages_of_ci():
    stages = []
    for variable, name in (("of_a_change", "tests"), ("of_a_night", "nightly")):
        own = re.search(rf"^{variable}=\((.*)\)$", read(".ci/run"), re.M)[1].split()
        matrix = re.search(r"stage: \[(.*)\]", read(f".github/workflows/{name}.yml"))[1]
        assert matrix.split(", ") == own
        stages += own
    assert re.findall(r"^#   (\w+) ", read(".ci/run"), re.M) == stages
    for name in ("docs", "release"):
        workflow = read(f".github/workflows/{name}.yml")
        assert set(re.findall(r"\.ci/run (\w+)", workflow)) <= {*stages}


def test_commits_are_formatted_by_the_ruff_of_ci():
    (pinned,) = re.findall(r'"(ruff==[\d.]+)"', read("pyproject.toml"))
    assert set(re.findall(r'"(ruff==[^"]*)"', read(".pre-commit-config.yaml"))) == {pinned}


def test_the_readme_has_links_that_work_on_a_package_index():
    """The hook in pyproject.toml makes links to files absolute."""
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    (rule,) = hook["substitutions"]
    assert rule["replacement"] == f"]({REPOSITORY}/blob/main/"
    text = re.sub(rule["pattern"], rule["replacement"], read("README.md"))
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    assert all(link.startswith(("https://", "#")) for link in links)


def test_one_address():
    urls = PROJECT["project"]["urls"].values()
    owner, name = REPOSITORY.removeprefix("https://github.com/").split("/")
    known = (REPOSITORY, f"https://{owner}.github.io/{name}/")
    site = re.search("^site_url: (.*)$", read(".mkdocs.yml"), re.M)[1]
    assert all(url.startswith(known) for url in (*urls, site))


def test_the_changelog_begins_with_this_version():
    heading = re.search(r"^## (\S+)", read("docs/changelog.md"), re.M)[1]
    if lora_jax.__version__.endswith(".dev0"):
        assert heading == "Unreleased"
    else:
        assert heading == lora_jax.__version__
        assert f"version = {{{lora_jax.__version__}}}" in read("README.md")


def test_the_readme_lists_the_extras_of_users():
    extras = PROJECT["project"]["optional-dependencies"]
    for_developers = {"tests", "frameworks", "lint", "docs"}
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", read("README.md"), re.M))
    assert rows.keys() == extras.keys() - for_developers
    for extra, shown in rows.items():
        named = [re.sub(r"lora_jax\[(.*)\]", r"\1", each) for each in extras[extra]]
        want = [re.split("[>=]", name)[0] for name in ",".join(named).split(",")]
        assert shown.replace("`", "").split(", ") == want
    assert f"git+{REPOSITORY}" in read("README.md")


def test_some_cases_are_slow_and_others_left_out():
    costly = "tests/layers/test_lora.py::"

    class Item:
        def __init__(self, test, case, *marks):
            own = {mark.name: mark for mark in marks}
            self.nodeid, self.get_closest_marker = f"{test}[{case}]", own.get
            self.add_marker = lambda name: own.setdefault(name, True)

    def run(most, default=None):
        items = [Item(f"{costly}a", i) for i in range(9)]
        items += [Item(f"{costly}b", i, pytest.mark.mostly_slow(2).mark) for i in range(4)]
        items += [Item(f"{costly}b", 9, pytest.mark.slow.mark)]
        items += [Item(f"{costly}c", i, pytest.mark.whole.mark) for i in range(4)]
        items += [Item("tests/plan/test_config.py::d", i) for i in range(5)]
        before, left_out = list(items), []
        config = types.SimpleNamespace(
            getoption={"cases": most}.get,
            option=types.SimpleNamespace(default_cases=default),
            hook=types.SimpleNamespace(
                pytest_deselected=lambda items: left_out.extend(items)
            ),
        )
        hook = conftest.pytest_collection_modifyitems(config, items)
        next(hook)
        assert items == before  # `-m` chooses here
        next(hook, None)
        assert items == [own for own in before if own not in left_out]
        slow = [own for own in before if own.get_closest_marker("slow")]
        return tuple(
            dict(collections.Counter(own.nodeid.partition("[")[0][-1] for own in some))
            for some in (items, slow)
        )

    assert run(None) == ({"a": 9, "b": 5, "c": 4, "d": 5}, {"b": 3})
    assert run(3) == ({"a": 3, "b": 3, "c": 4, "d": 5}, {"b": 3})
    assert run(1) == ({"a": 1, "b": 1, "c": 4, "d": 5}, {"b": 3})
    every = {"a": 9, "b": 5, "c": 4, "d": 5}
    assert run(None, default=3) == (every, {"a": 6, "b": 3, "c": 1})
    assert run(None, default=1) == (every, {"a": 8, "b": 4, "c": 3})


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        ([], conftest.DEFAULT_CASES),
        (["tests/test_project.py"], None),
        (["-k", "lora"], None),
        (["-m", "slow"], None),
        (["--cases", "2"], None),
    ],
    ids=str,
)
def test_a_run_of_everything_has_few_cases(arguments, most, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = shlex.split(PROJECT["tool"]["pytest"]["ini_options"]["addopts"])
    config = pytest.Config.fromdictargs({}, [*options, *arguments])
    conftest.pytest_configure(config)
    assert config.option.default_cases == most
