"""Makes the site (mkdocs.yml) of the Markdown files as they are. mkdocs calls the two functions that begin with `on_`.

The pages link to each other and to source files by their place in the repository. README.md and the other pages outside
docs/ become pages of the site, and so does every Python file that a page links to.
Links to anything else (folders, the licence) become plain text.
"""

from __future__ import annotations

import ast
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
OUTSIDE |= {"bench/README.md": "bench.md"}
"""Pages outside docs/ and their names in the site."""
LINK = re.compile(r"(```.*?```)|(!?)\[([^\]]*)\]\(([^)\s]+)\)", re.DOTALL)


def site_name(file: Path) -> str | None:
    """The file's name in the site, None if it has no place there."""
    if file.is_relative_to(DOCS):
        return str(file.relative_to(DOCS))
    name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else ""
    return f"source/{name}.md" if name.endswith(".py") else OUTSIDE.get(name)


def convert(page: Path) -> tuple[str, set[tuple[Path, str]]]:
    """The page's text with the links of the site, and the Python files and definitions that it links to."""
    sources: set[tuple[Path, str]] = set()
    own = site_name(page)
    assert own is not None

    def replace(match: re.Match[str]) -> str:
        code, image, text, target = match.groups()
        name, _, anchor = (target or "").partition("#")
        if code or not name or re.match(r"[a-z]+:", target):
            return match[0]
        file = (page.parent / name).resolve()
        found = site_name(file)
        if not file.exists():
            return match[0]  # mkdocs says that it is dead
        if found is None:
            return str(text)
        if file.suffix == ".py":
            sources.add((file, anchor))
        return f"{image}[{text}]({os.path.relpath(found, Path(own).parent)}{'#' if anchor else ''}{anchor})"

    # Without the attribute, Markdown inside an HTML element stays as it is written.
    return LINK.sub(replace, page.read_text("utf-8")).replace("<details>", '<details markdown="1">'), sources


def source_page(file: Path, names: set[str]) -> str:
    """A page with the file's text, cut before each definition that is linked to."""
    text = file.read_text("utf-8")
    lines = text.splitlines()
    marks: dict[int, str] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if prefix + node.name in names:
                marks[min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])] = prefix + node.name
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(text).body, "")
    parts = [f"# {file.relative_to(ROOT)}"]
    for start, stop in pairwise([1, *sorted(marks), len(lines) + 1]):
        anchor = f'<a id="{marks[start]}"></a>' if start in marks else ""
        parts += [anchor, "\n".join(["````python", *lines[start - 1 : stop - 1], "````"])]
    return "\n\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/ and the source files that the pages link to."""
    sources: dict[Path, set[str]] = {}
    for page in [*DOCS.rglob("*.md"), *(ROOT / name for name in OUTSIDE)]:
        text, found = convert(page)
        for file, anchor in found:
            sources.setdefault(file, set()).add(anchor)
        if not page.is_relative_to(DOCS):
            files.append(File.generated(config, OUTSIDE[str(page.relative_to(ROOT))], content=text))
    for file, names in sorted(sources.items()):
        name = f"source/{file.relative_to(ROOT)}.md"
        files.append(File.generated(config, name, content=source_page(file, names)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The links of a page in docs/ as the site has them."""
    file = DOCS / page.file.src_uri
    return convert(file)[0] if page.file.generated_by is None and file.exists() else markdown
