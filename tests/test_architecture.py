"""The rules that the source keeps, read from its syntax trees: imports point one way, and what is not allowed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "secateur"
FILES = sorted(PACKAGE.rglob("*.py"))

#: Components (subpackages and modules of the top level), the lowest first. A component imports from rows before
#: its own, and from itself; never from its own row or a later one.
ORDER = (
    ("errors",),
    ("registry", "facts", "disk", "documents", "frozen", "processes"),
    ("select", "schedule", "drivers", "holds", "symmetric", "lanes"),
    ("layers", "graph", "formats", "data", "printing"),
    ("masks", "evidence", "surgery", "measure", "kernels"),
    ("criteria", "granularity"),
    ("allocation", "solvers", "learned"),
    ("consistency",),
    ("recipe",),
    ("solve", "models"),
    ("record", "control", "tasks"),
    ("recover", "stream", "store", "quality", "structured", "calibrate"),
    ("report", "units", "compression", "runtime", "fuse"),
    ("pruned",),
    ("prune", "files"),
    ("directory", "coupled"),
    ("sources", "modules", "decomposed"),
    ("peak",),
    ("figures",),
    ("when", "families", "search"),
    ("supernet", "compound"),
    ("methods", "integrations"),
    ("compare",),
    ("recommend",),
    ("checks",),
    ("demo", "testing", "options"),
    ("terminal",),
    ("cli_compound",),
    ("cli_compare", "cli_measure", "cli_methods", "cli_recommend", "cli_runtime", "cli_search", "cli_train"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
LEVELS = {name: level for level, row in enumerate(ORDER) for name in row}

#: Components that know little on purpose -> all that they may import from the package.
NARROW = {
    "graph": {"errors"},
    "formats": {"errors"},
    "kernels": {"errors", "formats", "disk"},
    "data": {"errors"},
    "measure": {"errors", "layers"},  # and torch: it measures any model, pruned here or not
    "surgery": {"errors", "graph", "layers"},
}

#: (importing file, imported component) -> why this import may point up. It must be lazy: inside a function, or
#: under ``if TYPE_CHECKING``.
UPWARD = {
    ("criteria/curvature.py", "solvers"): "an annotation: the engine makes the factorization and hands it in",
    ("criteria/curvature.py", "granularity"): "an annotation: how the matrix is cut is handed in",
    ("consistency.py", "recipe"): "an annotation: a recipe asks whether its parts agree",
    ("when/train.py", "compound"): "a decomposition on a task is a compound of one step",
    ("recipe.py", "methods"): "the named methods are made of recipes, and `Recipe.of` looks one up by name",
}

#: File -> why it is longer than 400 lines.
LONG: dict[str, str] = {}

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "joblib.load", "yaml.unsafe_load", "yaml.full_load"}


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def component(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def nodes_with_scope(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether it is not executed on import."""
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        defers = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        )
        yield from nodes_with_scope(child, lazy or defers)


def absolute(file: Path, node: ast.ImportFrom) -> str:
    """The dotted module that a ``from`` import names."""
    if not node.level:
        return node.module or ""
    package = ["secateur", *file.relative_to(PACKAGE).parts[:-1]]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def imports(file: Path) -> Iterator[tuple[str, int, bool]]:
    """The package's components that a file imports, with the line and whether the import is lazy."""
    for node, lazy in nodes_with_scope(tree(file)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute(file, node)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "secateur" else [module]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "secateur":
                first = rest.partition(".")[0]
                known = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
                yield first if first and known else "__init__", node.lineno, lazy


def test_there_is_source() -> None:
    assert len(FILES) > 10


def test_every_component_has_a_level() -> None:
    unknown = sorted({component(file) for file in FILES} - set(LEVELS))
    assert not unknown, f"give {unknown} a row in ORDER: what may it import, and who may import it?"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_point_down(file: Path) -> None:
    here = component(file)
    wrong = []
    for there, line, lazy in imports(file):
        if there == here or (lazy and (relative(file), there) in UPWARD):
            continue
        if LEVELS[there] >= LEVELS[here]:
            wrong.append(f"line {line}: {here} imports {there}, which does not come before it in ORDER")
        elif here in NARROW and there not in NARROW[here]:
            wrong.append(f"line {line}: {here} imports {there}, and may import {sorted(NARROW[here])} only")
    assert not wrong, f"{relative(file)}: " + "; ".join(wrong)


def test_exceptions_are_in_use() -> None:
    used = {(relative(file), there) for file in FILES for there, _, lazy in imports(file) if lazy}
    assert set(UPWARD) <= used, "an exception in UPWARD that no import needs any more"
    assert set(LONG) <= {relative(file) for file in FILES if len(file.read_text().splitlines()) > 400}


def test_no_cycles_between_components() -> None:
    edges: dict[str, set[str]] = {}
    for file in FILES:
        found = {there for there, _, _ in imports(file) if (relative(file), there) not in UPWARD}
        edges.setdefault(component(file), set()).update(found - {component(file)})
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "import cycle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for there in sorted(edges.get(name, ())):
                visit(there, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_no_unsafe_loading(file: Path) -> None:
    wrong = []
    for node in ast.walk(tree(file)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            wrong += [f"line {node.lineno}: import of {m}" for m in modules if m.partition(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                wrong.append(f"line {node.lineno}: call of {name}")
            for keyword in node.keywords:
                if (keyword.arg, ast.unparse(keyword.value)) in {("allow_pickle", "True"), ("typ", "'unsafe'")}:
                    wrong.append(f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    assert not wrong, f"{relative(file)}: " + "; ".join(wrong)


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_public_functions_and_classes_have_docstrings(file: Path) -> None:
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    module = tree(file)
    bare = [n.name for n in module.body if isinstance(n, defined) and n.name[0] != "_" and not ast.get_docstring(n)]
    assert not bare, f"{relative(file)}: no docstring on {', '.join(bare)}"
    assert not module.body or ast.get_docstring(module), f"{relative(file)}: the module has no docstring"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_size_and_name(file: Path) -> None:
    assert "utils" not in file.with_suffix("").parts, "name a module after what it does"
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= 400 or relative(file) in LONG, (
        f"{relative(file)} has {lines} lines: split it, or give the reason in LONG"
    )
