"""Code as a cause of what it computes: what is loaded, and what lies behind a function."""

import ast
import functools
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_sources(root: Path) -> dict[str, str]:
    """The text of every module of the project by name: scripts in `root`, and lab/."""
    paths = [*sorted(root.glob("*.py")), *sorted((root / "lab").rglob("*.py"))]
    names = (".".join(path.relative_to(root).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path.read_text(encoding="utf-8", errors="replace")
            for name, path in zip(names, paths)}


def read_script() -> str | None:
    """The text of the script that runs, under `python -m cProfile` too; None without a script."""
    script = Path(sys.argv[0]) if sys.argv else Path()
    is_text = script.suffix == ".py" and script.is_file()
    return script.read_text(encoding="utf-8", errors="replace") if is_text else None


def keep_lines(path: Path, text: str) -> None:
    """Let whoever asks for lines of this file get the text as it is now.

    nnsight reads the lines of a block when it first traces it. Where an entry of linecache has no
    time, nothing ever looks at the file again.
    """
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))


class Definition:
    """What a name of a module, or of a class in it, is defined by."""

    def __init__(self, owner: ast.ClassDef | None):
        self.nodes: list[ast.stmt] = []
        self.owner = owner

    @functools.cached_property
    def code(self) -> str:
        """What runs, in a form that is the same under every version of Python."""
        return repr(skeleton(self.nodes))

    @functools.cached_property
    def names(self) -> set[str]:
        """Names that the code uses; those of a method, of its class's own members too."""
        used = names_in(self.nodes)
        if self.owner:
            own, parts = self.owner.name, running_parts(self.nodes)
            used |= names_in(self.owner.bases) | {
                f"{own}.{part.attr}" for part in parts if isinstance(part, ast.Attribute)
                and isinstance(part.value, ast.Name) and part.value.id in ("self", "cls", own)}
            used |= {f"{own}.__init__"} if "self" in used else set()
        return used


PROSE = ("annotation", "returns", "type_comment")  # fields of a syntax tree that do not run


def is_prose(node: Any) -> bool:
    """Whether it is a docstring, or nothing at all."""
    is_expression = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Pass) or is_expression and isinstance(node.value.value, str)


def skeleton(node: Any) -> Any:
    """A syntax tree without prose, as nested lists."""
    if isinstance(node, list):
        return [skeleton(part) for part in node if not is_prose(part)]
    if not isinstance(node, ast.AST):
        return node
    fields = {field: value for field, value in ast.iter_fields(node) if field not in PROSE}
    return [type(node).__name__, *((field, skeleton(value)) for field, value in fields.items()
                                   if value is not None and value != [])]


def running_parts(node: Any) -> Iterator[ast.AST]:
    """All nodes of a syntax tree without prose."""
    if isinstance(node, ast.AST):
        yield node
        node = [value for field, value in ast.iter_fields(node) if field not in PROSE]
    for part in node if isinstance(node, list) else ():
        yield from running_parts(part)


def names_in(node: Any) -> set[str]:
    return {part.id for part in running_parts(node) if isinstance(part, ast.Name)}


class Module:
    """A source file: its definitions, and where the names that it imports are defined."""

    def __init__(self, text: str):
        self.text = text

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """Module and name of what is imported, wherever in the file; the name of a module is ""."""
        places = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                places |= {alias.asname or alias.name: (node.module or "", alias.name)
                           for alias in node.names}
            elif isinstance(node, ast.Import):
                places |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
        return places

    @functools.cached_property
    def definitions(self) -> dict[str, Definition]:
        """By name; those of a class's members as Class.member."""
        made: dict[str, Definition] = {}
        for node in self.tree.body:
            for name in sorted(bound_names(node)):
                made.setdefault(name, Definition(None)).nodes.append(node)
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                for name in sorted(bound_names(member)):
                    made.setdefault(f"{node.name}.{name}", Definition(node)).nodes.append(member)
        return made

    def find(self, name: str) -> list[tuple[str, str]]:
        """Where the name is defined, as far as this module tells; all names of a module."""
        if name in self.definitions:
            return []
        where, original = self.imports.get(name, ("", ""))
        whole = where if not original else f"{where}.{original}"
        if whole in CODE:
            return [(whole, name) for name in CODE[whole].definitions]
        return [(where, original)]


def bound_names(node: ast.stmt) -> set[str]:
    """Names that a statement defines: of a function or class, or assigned to."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    return names_in([*getattr(node, "targets", ()), getattr(node, "target", None)])


def read_code(root: Path) -> dict[str, Module]:
    """The project's modules by name, as they are on disk now."""
    return {name: Module(text) for name, text in read_sources(root).items()}


def code_behind(*roots: Any, values: tuple[Any, ...] = ()) -> dict[str, str]:
    """Code of `roots` (functions, classes, methods) and of all in this project that they name.

    Docstrings, comments and annotations are left out, and with them what is only named there: an
    object that a function is given is a root of its own. Left out too is PLUMBING, but for its
    `randomness`, and `values`, whose values are causes of their own. The script that runs counts as
    "experiment", whatever its file is called. Raises LookupError for a root whose code is unknown.
    """
    skipped = {item.__qualname__ for item in values}
    waiting = [place_of(base) for root in roots for base in getattr(root, "__mro__", (root,))]
    seen: set[tuple[str, str]] = set()
    behind: dict[str, str] = {}
    while waiting:
        where, name = waiting.pop()
        module = CODE.get(where)
        is_plumbing = where in PLUMBING and name != "randomness"
        if module is None or is_plumbing or name in skipped or (where, name) in seen:
            continue
        seen.add((where, name))
        waiting += module.find(name)
        if (definition := module.definitions.get(name)) is not None:
            behind[f"{where}.{name}".replace("__main__.", "experiment.", 1)] = definition.code
            waiting += [(where, other) for other in definition.names]
    return behind


def place_of(root: Any) -> tuple[str, str]:
    """Module and name of the definition in which a function, class or method is."""
    where, name = root.__module__, root.__qualname__.split(".<locals>")[0]
    if where in CODE and name not in CODE[where].definitions:
        name = name.split(".")[0]
        if name not in CODE[where].definitions:
            raise LookupError(f"the code of {root.__qualname__} is not in the text of {where}")
    return where, name


# As they were when the program started: what is edited later is not what runs.
SOURCES = read_sources(Path(__file__).parents[1])
SCRIPT = read_script()
CODE = {name: Module(text) for name, text in SOURCES.items()}
CODE["__main__"] = Module(SCRIPT) if SCRIPT else CODE.get("experiment", Module(""))
PLUMBING = ("lab.code", "lab.console", "lab.distributed", "lab.storage")  # carry numbers, make none
keep_lines(Path(__file__).with_name("language_model.py"), SOURCES.get("lab.language_model", ""))
