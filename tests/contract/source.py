"""Reads source code: what ours takes from vLLM, and what vLLM's does with it.

The touches of vLLM are taken from our own source where that is possible, so that a new one is checked without
anyone thinking of it. Reading ours imports nothing: whatever moved in vLLM, each test still runs and says so.
"""

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Import:
    """`from module import name as known_as`."""

    module: str
    name: str
    known_as: str

    def resolve(self) -> Any:
        """The object that it names."""
        module = importlib.import_module(self.module)
        if hasattr(module, self.name):
            return getattr(module, self.name)
        return importlib.import_module(f"{self.module}.{self.name}")


@dataclass(frozen=True)
class Call:
    """A call, by its shape: the text of its positional arguments, the names of its keywords."""

    function: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def misfit(self, function: Any, is_bound: bool = False) -> str | None:
        """Why `function` does not take this call, or None; `is_bound` says that `self` is given besides."""
        signature = inspect.signature(function)
        try:
            signature.bind(*[None] * (is_bound + len(self.positional)), **dict.fromkeys(self.keywords))
        except TypeError as error:
            return f"{self.function}({', '.join([*self.positional, *self.keywords])}) for {signature}: {error}"
        return None


@dataclass(frozen=True)
class OurClass:
    """A class of ours that inherits from one of vLLM's."""

    file: str
    name: str
    tree: ast.ClassDef

    base: Import

    def load(self) -> type:
        module = importlib.import_module(self.file.removesuffix(".py").replace("/", "."))
        return getattr(module, self.name)

    def methods(self) -> set[str]:
        return {node.name for node in self.tree.body if isinstance(node, ast.FunctionDef)}

    def inherited_attributes(self) -> set[str]:
        """The names that its methods read from `self` and that neither it nor a base of ours in its file makes."""
        read = {name for name, is_read in attributes_of_self(self.tree) if is_read}
        bases = {ast.unparse(base) for base in self.tree.bases}
        ours = [node for node in our_files()[self.file].body if getattr(node, "name", None) in bases]
        made = {name for tree in (self.tree, *ours) for name, is_read in attributes_of_self(tree) if not is_read}
        declared = {
            node.target.id
            for node in self.tree.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        methods = {node.name for tree in ours for node in tree.body if isinstance(node, ast.FunctionDef)}
        return read - made - declared - self.methods() - methods


@functools.cache
def our_files() -> dict[str, ast.Module]:
    """The syntax tree of each module of the package, by its path in the repository."""
    paths = sorted((REPOSITORY / "vllm_del").rglob("*.py"))
    return {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text()) for path in paths}


def imports_from_vllm(file: str) -> list[Import]:
    """Every name that `file` imports from vLLM, at its top or inside a function."""
    found = []
    for node in ast.walk(our_files()[file]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found += [Import(str(node.module), alias.name, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [(alias, alias.name.rpartition(".")) for alias in node.names]
            found += [
                Import(parent, name, alias.asname or alias.name)
                for alias, (parent, _, name) in modules
                if parent.split(".")[0] == "vllm"
            ]
    return found


def our_classes() -> list[OurClass]:
    """Every class of ours with a base from vLLM."""
    found = []
    for file, tree in our_files().items():
        theirs = {imported.known_as: imported for imported in imports_from_vllm(file)}
        for node in ast.walk(tree):
            bases = map(ast.unparse, node.bases) if isinstance(node, ast.ClassDef) else ()
            found += [OurClass(file, node.name, node, theirs[base]) for base in bases if base in theirs]
    return found


def calls(tree: ast.AST) -> Iterator[Call]:
    """Every call in `tree`; without those that spread a list or a dict, whose shape only running them shows."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            spreads = any(isinstance(argument, ast.Starred) for argument in node.args)
            keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg is not None)
            if not spreads and len(keywords) == len(node.keywords):
                yield Call(ast.unparse(node.func), tuple(map(ast.unparse, node.args)), keywords)


def attributes_of_self(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Each `self.name` in `tree`, and whether it is read there; else it is set."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr, isinstance(node.ctx, ast.Load)


@functools.cache
def tree_of(thing: Any) -> ast.Module:
    """The syntax tree of one of vLLM's functions, classes or modules. That of a runner takes a second to find."""
    return ast.parse(textwrap.dedent(inspect.getsource(thing)))


@functools.cache
def calls_in(thing: Any) -> tuple[Call, ...]:
    """Every call in one of vLLM's functions, classes or modules."""
    return tuple(calls(tree_of(thing)))


def has_attribute(cls: type, name: str) -> bool:
    """Whether instances of `cls` have `name`: on the class, as a declared field, or set by one of its methods."""
    bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "vllm"]
    return (
        hasattr(cls, name)
        or any(name in vars(base).get("__annotations__", {}) for base in bases)
        or any((name, False) in attributes_of_self(tree_of(base)) for base in bases)
    )
