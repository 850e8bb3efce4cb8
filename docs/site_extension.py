"""What Sphinx is told about this repository: further names of objects, and its source files."""

import ast
import posixpath
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.preserve_defaults import DefaultValue, update_default_value
from sphinx.util import inspect

ROOT = Path(__file__).resolve().parents[1]
# Others' packages: without a network there is no inventory to link to.
STANDARD = {"abc", "collections", "contextlib", "datetime", "http", "pathlib", "types", "typing"}
INSTALLED = {
    "datasets",
    "jsonargparse",
    "lightning",
    "rich",
    "torch",
    "torchmetrics",
    "transformers",
}


def imported_from(module: str) -> dict[str, str]:
    """Return where a package's ``__init__`` imports its names from: full names by name."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    lines = ast.parse(Path(spec.origin).read_text()).body
    imports = [line for line in lines if isinstance(line, ast.ImportFrom)]
    return {name.name: f"{line.module}.{name.name}" for line in imports for name in line.names}


def add_aliases(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Let ``lightning_kd.GKD`` be another name of ``lightning_kd.modules.GKD``."""
    objects = env.domains.python_domain.objects
    packages = sorted({name.rpartition(".")[0] for name in objects} - {""})
    for package in [*(name for name in packages if is_package(name)), "lightning_kd.public"]:
        for name, home in imported_from(package).items():
            alias = f"{package.removesuffix('.public')}.{name}"
            if home in objects and alias not in objects:
                objects[alias] = objects[home]._replace(aliased=True)
    return []


def is_package(name: str) -> bool:
    """Return whether it is a package, not a module or a class."""
    return (ROOT / name.replace(".", "/") / "__init__.py").is_file()


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Show a name without a link if it is another project's, or one of ours without an entry.

    Ours must exist: a docstring that names what was renamed is still an error.
    """
    target = str(node.get("reftarget", ""))
    if target.partition(".")[0] in STANDARD | INSTALLED:
        return content
    module, _, name = target.rpartition(".")
    if target.startswith("lightning_kd.") and exists(module, name):
        return content
    return None


def exists(module: str, name: str) -> bool:
    """Return whether a module, or a class in one, has the name."""
    owner: Any
    try:
        owner = import_module(module)
    except ModuleNotFoundError:
        outer, _, inner = module.rpartition(".")
        return exists(outer, inner) and hasattr(getattr(import_module(outer), inner), name)
    return hasattr(owner, name)


def link_sources(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Lead links to configurations and modules to the pages of the site that show them."""
    for link in list(doctree.findall(download_reference)):
        path = (Path(app.srcdir, docname).parent / link["reftarget"]).resolve().relative_to(ROOT)
        folder, name = path.parts[0], ".".join(path.with_suffix("").parts)
        if folder == "configs" and path.suffix == ".yaml":
            place = "".join(path.parts[1:]).replace(".", "")
            address = app.builder.get_relative_uri(docname, "configs") + f"#{place}"
        elif folder == "lightning_kd" and name in getattr(app.env, "_viewcode_modules", {}):
            address = app.builder.get_relative_uri(docname, f"_modules/{name.replace('.', '/')}")
        else:
            continue
        link.replace_self(nodes.reference("", "", *link.children, refuri=address))


def show_titles(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Show the title of a page where a link shows its file: ``docs/data.md``."""
    for link in list(doctree.findall(nodes.reference)):
        found = re.fullmatch(r"(?:docs/)?([\w/]+)\.md", link.astext())
        folder = posixpath.dirname(docname)
        names = [posixpath.join(folder, found[1]), found[1]] if found else []
        for title in [app.env.titles[name] for name in names if name in app.env.titles][:1]:
            link.children = [nodes.Text(title.astext())]


def keep_first_line(
    app: Sphinx, what: str, name: str, subject: object, options: object, lines: list[str]
) -> None:
    """Keep what stands before a colon in an attribute's docstring: Napoleon would call it a type."""
    if what in {"attribute", "data", "property"}:
        lines[:0] = ["..", ""]  # an empty comment


def constructor_signature(
    app: Sphinx, what: str, name: str, subject: Any, options: object, signature: str, returned: str
) -> tuple[str, str] | None:
    """Show a constructor's own arguments, where a base class records those of any subclass.

    A default that is made anew, or has no text, is shown as dots.
    """
    if what != "class" or not re.search(r"\*args|<", str(signature)):
        return None
    if subject.__init__ is object.__init__:
        return "()", returned
    update_default_value(subject.__init__, bound_method=False)  # as they are written in the source
    own = inspect.signature(subject.__init__, bound_method=True)
    given = [
        each.replace(default=DefaultValue("..."))
        if each.default is not each.empty and repr(each.default).startswith("<")
        else each
        for each in own.parameters.values()
    ]
    return inspect.stringify_signature(
        own.replace(parameters=given), show_return_annotation=False, unqualified_typehints=True
    ), returned


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect them."""
    app.connect("doctree-resolved", link_sources)
    app.connect("doctree-resolved", show_titles)
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)
    app.connect("autodoc-process-signature", constructor_signature)
    app.connect("env-updated", add_aliases)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
