"""pyright accepts the code of a user, and the code of README and the guides."""

import json
import subprocess
import sys

import pytest

from tests.test_docs import PAGES, ROOT, python_blocks

# A page is one program, whose later blocks may redefine a function of an earlier one.
REDEFINED = ["reportRedeclaration"]
RELAXED = {
    "huggingface": ["reportMissingImports"],  # it needs an environment of its own
    # For Flax, `model.apply` may return a tuple.
    "linen": ["reportArgumentType", "reportOperatorIssue"],
    # pyright loses a type where blocks assign the same names again and again.
    "training": ["reportGeneralTypeIssues"],
}


def errors(*files):
    """What pyright says of some files."""
    pytest.importorskip("pyright")
    config = ["--project", str(ROOT / "pyproject.toml"), "--pythonpath", sys.executable]
    run = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", *config, *map(str, files)],
        capture_output=True,
        text=True,
    )
    report = json.loads(run.stdout)
    assert report["summary"]["filesAnalyzed"] == len(files)
    return [
        f"{found['file']}:{found['range']['start']['line'] + 1}: {found['message']}"
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]


@pytest.mark.frameworks
def test_user_code_and_pages(tmp_path):
    files = [ROOT / "tests" / "typing" / "user_code.py"]
    for page in PAGES:
        if blocks := python_blocks(page):
            rules = REDEFINED + RELAXED.get(page.stem, [])
            comments = [f"# pyright: {rule}=false\n" for rule in rules]
            files.append(tmp_path / f"page_{page.stem}.py")
            files[-1].write_text("".join(comments) + "\n".join(blocks))
    assert len(files) > 10
    assert not errors(*files)


@pytest.mark.frameworks
def test_wrong_types_are_errors(tmp_path):
    lines = [
        "import jax, lora_jax",
        "def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array: ...",
        "def use(params: dict[str, jax.Array], plan: lora_jax.AdapterPlan) -> None:",
        "    merged: int = lora_jax.merge_adapters(params, {}, plan)",
        "    lora_jax.adapt(apply, plan)(params, {}, 'x')",
        "    lora_jax._core",
    ]
    file = tmp_path / "wrong.py"
    file.write_text("\n".join(lines))
    found = [line.split(":")[1] for line in errors(file)]
    assert found == ["4", "5", "6"]
