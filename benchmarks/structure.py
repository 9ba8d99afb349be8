"""Measure the structure of a checkout from its text alone, e.g. to compare two versions of the project.

    python -m benchmarks.structure [--list] [ROOT]

ROOT is a checkout of this project, by default the one that holds this file; it may be older than the folders `demo` and
`benchmarks`. Prints one line per figure, then all figures as one line of JSON. "product" is every Python file of the
packages except the benchmark scripts. Lines of files include blank lines, comments and docstrings. `--list` prints
each place that a figure about language counts, instead of the figures.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Figures = dict[str, int | float | str]

PACKAGES = ("jobs", "pipelines", "ovis_model", "demo", "benchmarks")
ENGINE_TOOLS = tuple(f"benchmarks/{name}.py" for name in ("engine", "peer", "ranks", "roofline", "workload"))
"""Product: they stood in jobs/ at first."""
CONFIGURATIONS = {"RunConfig", "CaptionConfig", "AnnotateConfig"}
MAX_DOC_COLUMNS = 110
_VERB_LIST = """
abort accept acquire activate adapt add admit advance aggregate align allocate allow amend announce answer append apply
arrange ask assemble assert assign attach attend await balance begin bind blend bound branch brighten broadcast build
bump cache calculate call cancel capture cast catch chain change check choose clamp classify clean clear clip close
collapse collate collect combine compact compare compile compute concatenate configure confirm connect consume continue
convert copy count cover create crop cut cycle darken decide decode decorate decrement define delay delegate delete
deliver demand deny derive describe detach detect determine detokenize diff disable discard dispatch divide download
drain draw drop duplicate edit embed emit enable encode end enqueue ensure enter enumerate erase escape estimate
evaluate exchange exclude execute exit expand expect explain export expose extend extract fail feed fetch fill filter
find fingerprint finish fit flatten flush fold follow forbid force forget format forward free freeze fuse gain gather
generalize generate get give group grow guard guess halve handle hash highlight hint hold identify ignore import include
increase increment index infer inform inherit initialize insert inspect install interleave interpolate interpret
interrupt intersect invert invoke iterate join keep kill launch lay leave let limit link list load locate lock log look
lower maintain make manage map mark mask match measure merge migrate mirror move multiply name narrow normalize notify
obtain occupy offer open order overlap overwrite pack pad paint parse partition pass pause permute persist pick ping
place plan plot point poll pop predict prefer prefill prepare preserve prevent print probe proceed process produce
promote propagate provide prune publish pull push put quantize query quiet quit quote raise reach read rebuild receive
reconstruct record redact redirect redo reduce refill refresh refuse register reject relate release rely remember remove
rename render repair repeat replace replay report request require rescale reserve reset resize resolve respond restart
restore resume retain retire retrieve retry return reuse reverse revert rewind rewrite rotate round route run sample
satisfy save scale scan scatter schedule score search seed seek select send separate serialize serve set settle shard
share shift shorten show shrink shuffle shut signal simplify simulate skip sleep slice smooth solve sort spawn split
spread squeeze stack start steal step stop store stream strip submit substitute subtract suggest sum summarize suppress
swap switch sync synchronize synthesize take tally tell terminate test throw tile time toggle tokenize trace track train
transfer transform translate trim truncate try turn undo unify unite unlock unpack unwrap update upload use validate
verify view visit wait wake walk warm warn watch widen wrap write yield zip
"""
VERBS = frozenset(_VERB_LIST.split())


@dataclass(frozen=True)
class Module:
    """One Python file; `path` is relative to the checkout, with forward slashes."""

    path: str
    text: str

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def public_names(self) -> list[str]:
        top = ast.parse(self.text).body
        return [node.name for node in top if isinstance(node, Function | ast.ClassDef) and node.name[0] != "_"]

    @property
    def functions(self) -> list[Function]:
        return [node for node in self.nodes if isinstance(node, Function)]

    @property
    def is_benchmark_script(self) -> bool:
        is_old_script = self.path.startswith("tests/bench_")
        return is_old_script or (self.folder == "benchmarks" and self.path not in ENGINE_TOOLS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], metavar="ROOT")
    parser.add_argument("--list", action="store_true", help="print the places that fall short, instead of the figures")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(*find_language(arguments.root), sep="\n")
        return
    figures = measure(arguments.root)
    for name, value in figures.items():
        print(f"{name:<52} {value:>8}" if isinstance(value, int) else f"{name:<52} {value}")
    print(json.dumps(figures))


def measure(root: Path) -> Figures:
    """Return all figures of the checkout at `root`, by name. Raise ValueError if it holds none of the packages."""
    modules = read_modules(root)
    if not modules:
        raise ValueError(f"{root} holds none of {', '.join(PACKAGES)}; give the root of a checkout of this project")
    product = [module for module in modules if not module.is_benchmark_script]
    return {
        **count_lines(modules),
        **find_largest_classes(product),
        **measure_functions(product),
        **find_fullest_folder(modules),
        **count_couplings(product),
        "lines of import rules": count_import_rules(root / "pyproject.toml"),
        **measure_language(product),
        f"doc lines over {MAX_DOC_COLUMNS} characters": len(find_long_doc_lines(root)),
    }


def read_modules(root: Path) -> list[Module]:
    """Read the Python files of the packages and, in checkouts without `benchmarks/`, the benchmarks among the tests."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    paths += sorted((root / "tests").glob("bench_*.py"))
    return [Module(path.relative_to(root).as_posix(), path.read_text("utf-8")) for path in paths]


def count_lines(modules: list[Module]) -> Figures:
    """Count files and lines per package, of the product and of the benchmark scripts."""
    groups = {package: [m for m in modules if m.path.startswith(f"{package}/")] for package in PACKAGES}
    groups["product"] = [module for module in modules if not module.is_benchmark_script]
    groups["benchmark scripts"] = [module for module in modules if module.is_benchmark_script]
    figures: Figures = {}
    for name, group in groups.items():
        figures[f"{name}: files"] = len(group)
        figures[f"{name}: lines"] = sum(module.num_lines for module in group)
    return figures


def find_largest_classes(modules: list[Module], count: int = 3) -> Figures:
    """Return the `count` classes with the most methods; properties count as methods."""
    sizes = [
        (sum(isinstance(statement, Function) for statement in node.body), f"{module.path} {node.name}")
        for module in modules
        for node in module.nodes
        if isinstance(node, ast.ClassDef)
    ]
    top = sorted(sizes, key=lambda size: (-size[0], size[1]))[:count]
    return {f"largest class {place}": f"{methods} methods, {name}" for place, (methods, name) in enumerate(top, 1)}


def measure_functions(modules: list[Module]) -> Figures:
    """Return the median, 90th percentile and maximum of lines of a function's body without its docstring."""
    lengths = sorted(count_body_lines(function) for module in modules for function in module.functions)
    return {
        "functions": len(lengths),
        "lines of a function: median": statistics.median(lengths),
        "lines of a function: p90": lengths[len(lengths) * 9 // 10],
        "lines of a function: max": lengths[-1],
    }


def count_body_lines(function: Function) -> int:
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def find_fullest_folder(modules: list[Module]) -> Figures:
    """Return the number of modules in the folder that directly holds the most; `__init__` is not counted."""
    counts = Counter(m.folder for m in modules if not m.path.endswith("/__init__.py") and m.folder != "tests")
    [(folder, count)] = counts.most_common(1)
    return {"folders": len(counts), "most modules in a folder": f"{count} in {folder}/"}


def count_couplings(modules: list[Module]) -> Figures:
    """Count what ties parts together: imports of the whole configuration, and rows handed over as dictionaries."""
    pipelines = [module for module in modules if module.path.startswith("pipelines/")]
    return {
        "modules that import the whole configuration": sum(map(imports_configuration, modules)),
        "aliases Row = dict[str, Any]": sum(map(is_row_alias, _nodes(pipelines))),
        "functions annotated with such a Row": sum(len(find_row_functions(module)) for module in pipelines),
    }


def imports_configuration(module: Module) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and (node.module or "").endswith("config")
        and CONFIGURATIONS.intersection(alias.name for alias in node.names)
        for node in module.nodes
    )


def is_row_alias(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node) == "Row = dict[str, Any]"


def find_row_functions(module: Module) -> list[Function]:
    """Return the functions that take or return a `Row`, in a module where that is an alias of a dictionary."""
    has_alias = any(map(is_row_alias, module.nodes))
    return [function for function in module.functions if has_alias and _mentions_row(function)]


def _mentions_row(function: Function) -> bool:
    annotations = [node.annotation for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    return any(
        isinstance(node, ast.Name) and node.id == "Row"
        for annotation in [*annotations, function.returns]
        if annotation is not None
        for node in ast.walk(annotation)
    )


def count_import_rules(pyproject: Path) -> int:
    """Count the lines from the table of the import linter to the end of the file, where its contracts stand."""
    _, found, rules = pyproject.read_text("utf-8").partition("[tool.importlinter]\n")
    return len((found + rules).splitlines())


def measure_language(modules: list[Module]) -> Figures:
    """Return the shares of function docstrings and of function names whose first word is in VERBS.

    Some words there are nouns too ("list", "sample"), so both shares are a little high. Names of dunder methods and of
    properties are left out, and so are docstrings of properties, which describe a value.
    """
    functions = [function for module in modules for function in module.functions]
    docstrings = [docstring for function in functions if (docstring := _get_action(function))]
    names = [function.name for function in functions if is_action(function)]
    identifiers = set(find_identifiers(_nodes(modules)))
    return {
        "function docstrings that begin with a verb": _share(docstrings),
        "function names that begin with a verb": _share(names),
        "names with most_": sum(map(is_most_name, identifiers)),
        "public names defined in more than one module": len(find_shared_names(modules)),
    }


def find_language(root: Path) -> Iterator[str]:
    """Yield a line for each docstring, name and line of a page that falls short of a figure about language."""
    modules = [module for module in read_modules(root) if not module.is_benchmark_script]
    for module in modules:
        for function in module.functions:
            place = f"{module.path}:{function.lineno}"
            if is_action(function) and not begins_with_verb(function.name):
                yield f"{place} name {function.name}"
            docstring = _get_action(function)
            if docstring and not begins_with_verb(docstring):
                yield f"{place} docstring {docstring.splitlines()[0]}"
        yield from (f"{module.path} name {name}" for name in find_identifiers(module.nodes) if is_most_name(name))
    yield from (f"{name} is defined in {', '.join(paths)}" for name, paths in find_shared_names(modules).items())
    yield from find_long_doc_lines(root)


def find_shared_names(modules: list[Module]) -> dict[str, list[str]]:
    """Return {public function or class at the top of a module: paths}, where more than one module defines that name.

    `main` is left out: each entry point has one.
    """
    paths: dict[str, list[str]] = {}
    for module in modules:
        for name in module.public_names:
            paths.setdefault(name, []).append(module.path)
    return {name: found for name, found in sorted(paths.items()) if len(found) > 1 and name != "main"}


def _get_action(function: Function) -> str | None:
    return None if is_property(function) else ast.get_docstring(function)


def is_action(function: Function) -> bool:
    """Return whether the name of `function` should be a verb: not a property, not a dunder method."""
    return not is_dunder(function.name) and not is_property(function)


def is_most_name(name: str) -> bool:
    return bool(re.search("(^|_)most_", name.lower()))


def _share(texts: list[str]) -> str:
    num_verbs = sum(begins_with_verb(text) for text in texts)
    return f"{num_verbs / max(1, len(texts)):.1%} ({num_verbs} of {len(texts)})"


def begins_with_verb(text: str) -> bool:
    """Return whether the first word of a sentence or of a snake_case name is in VERBS."""
    words = re.findall(r"[A-Za-z]+", text.split()[0])
    return bool(words) and words[0].lower() in VERBS


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def is_property(function: Function) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in function.decorator_list)


def find_identifiers(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the names that a program defines: functions, classes, arguments, variables and attributes."""
    for node in nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def find_long_doc_lines(root: Path) -> list[str]:
    """Return a line for each line of a page that is longer than MAX_DOC_COLUMNS, with its place."""
    pages = [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]
    return [
        f"{page.relative_to(root)}:{number} {len(line)} characters"
        for page in pages
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1)
        if len(line) > MAX_DOC_COLUMNS
    ]


def _nodes(modules: list[Module]) -> Iterator[ast.AST]:
    return (node for module in modules for node in module.nodes)


if __name__ == "__main__":
    main()
