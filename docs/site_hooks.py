"""What the site adds to the pages: signatures, and the sources of the examples.

MkDocs calls the functions, and Griffe, which reads the docstrings, the class. .mkdocs.yml
names this file for both. The pages stay plain Markdown.
"""

import json
import pathlib
import re
import textwrap
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SECTION = re.compile(r"^## (.+)\n((?:(?!^## ).*\n?)*)", re.M)
PROGRAMS = re.compile(r"^.*Programs?: (?:.+\n)+", re.M)
LINK = re.compile(r"\]\((\w+\.py)\)")
ROW = re.compile(r"^\| `(lora_jax\.[\w.]+)` \|", re.M)


class Docstrings(griffe.Extension):
    """Reads docstrings and dataclasses as this library writes them."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Leaves private fields out of the signature of a dataclass."""
        for name in [name for name in cls.members if re.match("_[^_]", name)]:
            if cls.members[name].is_attribute:
                cls.del_member(name)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Makes `Example:` a section of code, as `Examples:` is in Google's style."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.M
            )


def reference_pages(overview: str) -> dict[str, str]:
    """Returns the pages of signatures, one for each table of the API's overview.

    Args:
        overview: the text of `api.md`.

    Returns:
        `{path: text}` of the pages.
    """
    pages = {}
    for title, body in SECTION.findall(overview):
        if names := ROW.findall(body):
            path = "reference/" + re.sub(r"\W+", "_", title.lower()) + ".md"
            pages[path] = f"# {title}\n\n" + "\n".join(f"::: {name}\n" for name in names)
    return pages


def notebook_page(notebook: str) -> str:
    """Returns the Markdown of a notebook, with its outputs."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        code = cell["cell_type"] == "code"
        parts.append(f"```python\n{source}\n```" if code else source)
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text", "")})
            kind = next(k for k in ("image/png", "text/html", "text/plain") if k in data)
            text = "".join(data[kind]).strip()
            parts.append(
                {
                    "image/png": f"![Output](data:image/png;base64,{text})",
                    "text/html": text,
                    "text/plain": f"```text\n{text}\n```",
                }[kind]
            )
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of signatures and of notebooks, and their place in the navigation."""
    sources = {file.src_uri: file for file in files}
    pages = reference_pages(sources["api.md"].content_string)
    notebooks = {
        path.replace(".ipynb", ".md"): notebook_page(file.content_string)
        for path, file in sources.items()
        if path.endswith(".ipynb")
    }
    for path, text in (pages | notebooks).items():
        files.append(File.generated(config, path, content=text))
    for entry in config.nav or []:
        if "API" in entry:
            entry["API"] = ["api.md", *pages]
        if "Examples" in entry:
            entry["Examples"] += notebooks
    return files


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links names to signatures, and notebooks to pages; shows programs below links."""
    if page.file.src_uri == "api.md":
        return ROW.sub(_link, text)
    folder = pathlib.PurePosixPath(page.file.src_uri).parent

    def program(line: re.Match[str]) -> str:
        sources = (
            files.get_file_from_path(str(folder / name)) for name in LINK.findall(line[0])
        )
        return line[0] + "".join(map(_folded, filter(None, sources)))

    return PROGRAMS.sub(program, text.replace(".ipynb)", ".md)"))


def _folded(source: File) -> str:
    """A block with the text of a program, closed until the reader opens it."""
    text = textwrap.indent(f"```python\n{source.content_string}```", "    ")
    return f'\n??? example "{source.name}.py"\n\n{text}\n'


def _link(row: re.Match[str]) -> str:
    """A link to a signature, whose text may be cut at dots and underscores."""
    text = re.sub(r"([._])", r"\1<wbr>", row[1])
    return f'| <autoref identifier="{row[1]}"><code>{text}</code></autoref> |'
