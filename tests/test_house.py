"""Tests of the house rules: allowed imports, lengths of files and functions, and the cost of importing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A file may import from lower floors and from its own room. A room is a subpackage or a file of the package.
FLOORS = {
    "checks": 0,
    "errors": 0,
    "host": 0,
    "interrupts": 0,
    "_source_tree": 0,
    "distributed": 1,
    "ops": 1,
    "diffusion": 1,
    "files": 1,
    "models": 2,
    "checkpoints": 3,
    "solvers": 3,
    "engine": 4,
    "sampling": 5,
    "accelerate": 6,
    "evaluation": 6,
    "runs": 6,
    "verify": 6,
    "training": 6,
    "app": 7,
    "compat": 7,
    "cli": 8,
    "__main__": 9,
}
# Rooms that may import from an equal floor: checks and the search for a device raise errors.
BESIDE = {("checks", "errors"), ("host", "errors")}
# Rooms that the public face, `admfast/__init__.py`, imports. The face itself is above floor 5.
FACE = {"accelerate", "errors", "models", "sampling", "solvers"}
LONGEST, LONGEST_FUNCTION = 450, 60


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(source: str) -> list[tuple[str, int, bool]]:
    """Return (dotted name, line, inside a function) of every import, also by `importlib.import_module`."""
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found.extend((f"{base}.{alias.name}", node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in ("import_module", "__import__"):
                found.append((str(node.args[0].value), node.lineno, inside))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def breaches(room: str, source: str) -> list[str]:
    """Return the imports in a file of `room` that break the rule, with their lines."""
    wrong = []
    for name, line, inside in imports(source):
        parts = name.split(".")
        if name.startswith("."):
            wrong.append(f"line {line}: {name}: imports are absolute")
        if parts[0] in ("kernels", "tests", "bench"):
            wrong.append(f"line {line}: {name}: not part of the package")
        if parts[0] != "admfast":
            continue
        other = parts[1] if len(parts) > 1 else "__init__"
        if other in ("kernels", "_C"):
            if room != "ops" and room != "_source_tree":
                wrong.append(f"line {line}: {name}: only from ops")
            elif not inside:
                wrong.append(f"line {line}: {name}: only inside functions")
        elif room == "__init__":
            if other not in FACE:
                wrong.append(f"line {line}: {name}: not for the public face")
        elif other not in FLOORS:
            # `from admfast import __version__` names the face itself, which is above floor 5.
            if FLOORS[room] <= 5:
                wrong.append(f"line {line}: {name}: the public face, from below it")
        elif other != room and FLOORS[other] >= FLOORS[room] and (room, other) not in BESIDE:
            wrong.append(f"line {line}: {name}: floor {FLOORS[other]} from floor {FLOORS[room]}")
    return wrong


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT / "admfast").parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", modules(ROOT / "admfast"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_lower_floors_and_its_own_room(path):
    room = room_of(path)
    assert room == "__init__" or room in FLOORS, f"{room}: add this room to FLOORS"
    assert breaches(room, path.read_text()) == []


def test_every_room_of_the_floors_exists():
    rooms = {room_of(path) for path in modules(ROOT / "admfast")}
    assert set(FLOORS) <= rooms, f"no such rooms: {', '.join(set(FLOORS) - rooms)}"


def test_the_rule_sees_what_is_against_it():
    seen = {
        ("ops", "from admfast.models import UNet"): "floor 2 from floor 1",
        ("ops", "def f():\n    from admfast.engine.step import Batch"): "floor 4 from floor 1",
        ("engine", "from admfast.sampling.loop import run"): "floor 5 from floor 4",
        ("diffusion", "import admfast.ops.update.noise"): "floor 1 from floor 1",
        ("runs", "from admfast.training.loop import train"): "floor 6 from floor 6",
        ("engine", "from admfast import load"): "the public face, from below it",
        ("models", "from ..ops import attention"): "imports are absolute",
        ("models", "def f():\n    from admfast.kernels import group_norm"): "only from ops",
        ("engine", "def f():\n    importlib.import_module('admfast._C')"): "only from ops",
        ("ops", "from admfast import _C"): "only inside functions",
        ("ops", "import kernels"): "not part of the package",
        ("__init__", "from admfast.runs.sampling import SampleRun"): "not for the public face",
    }
    for (room, source), message in seen.items():
        (breach,) = breaches(room, source)
        assert breach.endswith(message), source
    allowed = [
        ("ops", "from admfast.ops import native\ndef f():\n    from admfast import _C"),
        ("ops", "def f():\n    import admfast.kernels.group_norm"),
        ("sampling", "from admfast.sampling.pipeline import Pipeline"),
        ("cli", "from admfast import __version__\nfrom admfast.files.tables import table"),
        ("models", "import torch\nfrom admfast.errors import invalid\nfrom admfast.ops import attention"),
    ]
    assert not any(breaches(room, source) for room, source in allowed)


def test_the_engine_knows_rows_not_solvers():
    for path in modules(ROOT / "admfast" / "engine"):
        assert not [name for name, _, _ in imports(path.read_text()) if name.startswith("admfast.solvers")]


@pytest.mark.parametrize("path", modules(ROOT / "kernels"), ids=lambda path: path.name)
def test_kernels_know_torch_and_triton_alone(path):
    known = {"torch", "triton", *sys.stdlib_module_names}
    for name, line, _ in imports(path.read_text()):
        own = name.startswith(("admfast.kernels", "."))
        assert own or name.split(".")[0] in known, f"line {line}: {name}"


@pytest.mark.parametrize("folder", ["admfast", "kernels", "csrc", "bench", "tests"])
def test_no_file_is_too_long(folder):
    endings = {".py", ".cpp", ".cu", ".h", ".cuh"}
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in endings]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert files and {name: length for name, length in lengths.items() if length > LONGEST} == {}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    first, lines = function.body[0], function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def long_functions(source: str) -> dict[str, int]:
    """Return the functions with more code lines than allowed, and their lines."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    lengths = {function.name: code_lines(function) for function in nodes}
    return {name: lines for name, lines in lengths.items() if lines >= LONGEST_FUNCTION}


@pytest.mark.parametrize("folder", ["admfast", "bench"])
def test_no_function_is_too_long(folder):
    found = {str(path.relative_to(ROOT)): long_functions(path.read_text()) for path in modules(ROOT / folder)}
    assert found and {name: functions for name, functions in found.items() if functions} == {}


def test_a_docstring_makes_no_function_too_long():
    body = "    x = 1\n" * 58
    assert long_functions("def f():\n" + body) == {}
    assert long_functions("def f():\n" + body + "    x = 2\n") == {"f": 60}
    assert long_functions('def f():\n    """A\n\n    B.\n    """\n' + body) == {}


def test_the_names_of_test_files_are_unique():
    """pytest imports test files by their bare names if their folder isn't a package."""
    names = [path.name for path in modules(ROOT / "tests") if path.name.startswith("test_")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


# Cost of importing


def run(code: str, cwd: Path = ROOT, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter. It gets PYTHONPATH only in the checkout's root."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} if cwd == ROOT else {**os.environ}
    if cwd != ROOT:
        environment.pop("PYTHONPATH", None)
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# torch is loaded first, so that only the package's own imports count. -X importtime writes every import to
# stderr, in order.
COST = """
import sys, time
import admfast
assert not {"torch", "numpy"} & set(sys.modules), "the face is lazy"
import torch
before, start = set(sys.modules), time.process_time()
print("import admfast begins", file=sys.stderr)
for name in admfast.__all__:
    getattr(admfast, name)
spent = time.process_time() - start
assert not torch.cuda.is_initialized()
print(spent, *sorted(set(sys.modules) - before))
"""


def test_importing_is_cheap_and_loads_nothing_heavy():
    done = run(COST, flags=("-X", "importtime"))
    assert done.returncode == 0, done.stderr[-2000:]
    spent, *added = done.stdout.split()
    assert float(spent) < 2, "too many seconds of processor time, without torch's"
    assert "admfast.sampling.pipeline" in added and not {"admfast.kernels", "admfast._C"} & set(added)
    # The room `files` loads Pillow's core, which costs about 30 ms. Pillow's formats must not be loaded.
    packages = {name.split(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert packages <= {"admfast", "safetensors", "numpy", "PIL", "torch"}
    assert not [name for name in added if name.endswith("ImagePlugin")]
    # Each line is "import time: self | cumulative | name", with the name indented by depth.
    lines = done.stderr[done.stderr.index("import admfast begins") :].splitlines()[1:]
    names = {line.split("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "admfast.models.unet" in names
    assert not {name for name in names if name.split(".")[0] in ("triton", "xformers")}


def test_the_help_needs_no_torch():
    code = "import sys, time\nfrom admfast.cli.main import main\nassert main(['--help']) == 0\n"
    code += "print(time.process_time(), *sys.modules, file=sys.stderr)"
    done = run(code)
    assert done.returncode == 0 and "verify" in done.stdout, done.stderr[-2000:]
    spent, *loaded = done.stderr.split()
    assert float(spent) < 0.3, "too many seconds of processor time, with Python's start"
    assert not {"torch", "numpy", "PIL"} & set(loaded)


# Runs each order of imports in its own process, which prints the type of every public name and module.
ORDERS = """
import importlib, os, pkgutil, random, sys
import torch  # takes seconds
import admfast
rooms = [m for m in pkgutil.iter_modules(admfast.__path__) if not m.name.startswith("_")]
files = [(m.name, f.name) for m in rooms if m.ispkg
         for f in pkgutil.iter_modules([os.path.join(admfast.__path__[0], m.name)])]
values = admfast.__all__
asked = [*values, *("admfast." + m.name for m in rooms), *(f"admfast.{room}.{name}" for room, name in files)]
orders = [asked, asked[::-1], *(random.Random(seed).sample(asked, len(asked)) for seed in range(4))]
for order in orders:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        for name in order:
            importlib.import_module(name) if "." in name else getattr(admfast, name)
        names = sorted({*values, *(m.name for m in rooms)})
        kinds = [(name, type(getattr(admfast, name)).__name__) for name in names]
        kinds += [(room, name, type(getattr(getattr(admfast, room), name)).__name__) for room, name in files]
        print(kinds, flush=True)
    except BaseException as error:
        print(repr(error), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_name_is_the_same_in_every_order_of_imports():
    done = run(ORDERS)
    assert done.returncode == 0, done.stderr[-3000:]
    found = done.stdout.splitlines()
    assert len(found) == 6 and len(set(found)) == 1, found
    kinds = {kind[:-1]: kind[-1] for kind in ast.literal_eval(found[0])}
    assert kinds["load",] == "function" and kinds["models",] == "module"


def test_the_kernels_are_not_importable_by_their_folder_s_name(tmp_path):
    done = run("import kernels", cwd=tmp_path)
    assert done.returncode == 1 and "ModuleNotFoundError: No module named 'kernels'" in done.stderr
    done = run("import kernels; assert not hasattr(kernels, '__version__'); import kernels.group_norm")
    assert done.returncode == 1 and "No module named 'kernels.group_norm'" in done.stderr


def test_the_kernels_are_found_in_a_source_tree():
    code = "from admfast._source_tree import import_kernels\nprint(import_kernels().__name__)\n"
    code += "import admfast.kernels"
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, "admfast.kernels"), done.stderr


def test_the_public_face():
    import admfast

    assert len(set(admfast.__all__)) == len(admfast.__all__)
    assert all(getattr(admfast, name) is not None for name in admfast.__all__)
    # The names that a type checker sees
    seen = imports((ROOT / "admfast" / "__init__.py").read_text())
    named = {name.rpartition(".")[2] for name, _, _ in seen if name.startswith("admfast.")}
    assert named == set(admfast.__all__) - {"__version__"}
    assert set(admfast.__all__) <= set(dir(admfast))
    for name in ("nothing", "_nothing"):
        with pytest.raises(AttributeError, match=f"'admfast'.*{name}"):
            getattr(admfast, name)
    assert (ROOT / "admfast" / "py.typed").exists()
