"""Imports run one way: from the edges down to what one adapter is, never back; and no modules import each other in circles.

Imports inside functions and under ``TYPE_CHECKING`` count like any other.
"""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest floor up; a module may import its own room and lower floors.
FLOORS = [
    {"fedrot_kernels"},
    {"errors", "seeding", "options", "version"},
    {"adapters"},
    {"ranks"},
    {"methods"},
    {"robust"},
    {"report"},
    {"server"},
    {"merging", "admission"},
    {"agreement"},
    {"cli", "flower", "nvflare", "simulation"},
    {"fedrot"},
]
SIMULATOR = ("cli", "simulation")  # one of the edges may call another: the command line runs the simulator


@cache
def modules(package):
    """module name → its syntax tree."""
    trees = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text("utf-8"))
    return trees


@cache
def imports(package):
    """module name → the modules of both packages that it imports anywhere, but for the packages that they are in."""
    trees, known = modules(package), {*modules("fedrot"), *modules("fedrot_kernels")}
    packages = {name.rpartition(".")[0] for name in known}
    found = {}
    for module, tree in trees.items():
        targets = set()
        inside = module.split(".") if module in packages else module.split(".")[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*inside[: len(inside) + 1 - node.level], *([node.module] if node.module else [])])
                base = base if node.level else node.module
                for alias in node.names:
                    targets.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
        found[module] = targets & known - {module}
    return found


def room(module):
    package, _, rest = module.partition(".")
    return package if package == "fedrot_kernels" or not rest else rest.split(".")[0]


def floor(module):
    return next(i for i, rooms in enumerate(FLOORS) if room(module) in rooms)


def steps_back(graph):
    """Every import of a higher floor, or of another room on the same one."""
    for module, targets in graph.items():
        for target in sorted(targets):
            here, there = (room(module), floor(module)), (room(target), floor(target))
            if there[1] > here[1] or (there[1] == here[1] and there[0] != here[0] and (here[0], there[0]) != SIMULATOR):
                yield f"{module} imports {target}"


def circle(graph):
    """Modules that import each other in a circle, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_module_has_a_floor():
    rooms = {room(module) for package in ("fedrot", "fedrot_kernels") for module in modules(package)}
    assert rooms == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize("package", ["fedrot", "fedrot_kernels"])
def test_imports_run_one_way(package):
    graph = imports(package)
    assert sum(map(len, graph.values())) > len(graph)  # they were found
    assert list(steps_back(graph)) == []


@pytest.mark.parametrize("package", ["fedrot", "fedrot_kernels"])
def test_no_modules_import_each_other_in_circles(package):
    assert circle(imports(package)) == []


def test_a_step_back_and_a_circle_are_found():
    graph = {"fedrot.adapters.keys": {"fedrot.errors"}, "fedrot.errors": set(), "fedrot.merging.merge": {"fedrot.admission"}}
    assert list(steps_back(graph)) == ["fedrot.merging.merge imports fedrot.admission"] and circle(graph) == []
    graph["fedrot.errors"] = {"fedrot.adapters.keys"}
    assert next(steps_back(graph)) == "fedrot.errors imports fedrot.adapters.keys"
    assert set(circle(graph)) == {"fedrot.errors", "fedrot.adapters.keys"}
