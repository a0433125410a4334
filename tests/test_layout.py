"""The house stays as drawn in docs/design.md, section 6: imports run one way, and no file holds too much."""

import ast
import graphlib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_resnet"
# A room imports those in the rows below its own, and nobody in its own row.
ROWS = (
    "__main__",
    "cli",
    "experiments doctor",
    "training bench",
    "__init__",
    "verification",
    "surgery",
    "tracing",
    "blocks functional",
    "chain",
    "ops",
    "engines",
    "models system",
    "version",
)
ROW_OF = {room: i for i, row in enumerate(ROWS) for room in row.split()}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imported(tree: ast.AST) -> set[str]:
    """The package's modules that a module imports, within functions, too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            # what is no module is a name in one
            names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            }
    return names & MODULES.keys()


def room_of(module: str) -> str:
    return (*module.split("."), "__init__")[1]


def test_every_room_has_a_row():
    assert {room_of(module) for module in MODULES} == ROW_OF.keys()
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_rooms_below_it(module):
    room = room_of(module)
    above = {
        other
        for other in imported(MODULES[module])
        if room_of(other) != room and ROW_OF[room_of(other)] <= ROW_OF[room]
    }
    assert not above, f"{module} imports {', '.join(above)}, which docs/design.md, section 6, draws beside or above it"


def test_no_import_is_in_a_circle():
    sorter = graphlib.TopologicalSorter({module: imported(tree) - {module} for module, tree in MODULES.items()})
    sorter.prepare()  # raises with the circle


def drawn() -> dict[str, list[str]]:
    """The rooms and modules of the drawing, in its order, with the files that it names in each."""
    drawing = (ROOT / "docs" / "design.md").read_text().partition("## 6. Layout")[2].partition("```")[2]
    rooms: dict[str, list[str]] = {}
    for line in drawing.partition("fused_resnet/ ")[2].partition("benchmarks/")[0].splitlines()[1:]:
        if named := re.match(r"  (\w+)(?:/|\.py)", line):
            room = named[1]
        rooms.setdefault(room, []).extend(re.findall(r"(\w+)\.py", line))
    return rooms


def test_the_drawing_has_every_room_in_its_row():
    rooms = drawn()
    alone = {"doctor"}  # stands in the line of another
    assert {room for room in ROW_OF if not room.startswith("__")} - alone == rooms.keys()
    rows = [ROW_OF[room] for room in rooms if room not in ("models", "system")]
    assert rows == sorted(rows)


def test_the_drawing_names_files_that_are_there():
    rooms = drawn()
    assert sum(map(len, rooms.values())) > 40
    for room, files in rooms.items():
        there = {path.stem for path in (*PACKAGE.glob("*.py"), *(PACKAGE / room).rglob("*.py"))}
        assert set(files) <= there, room


@pytest.mark.parametrize("folder", ["fused_resnet", "csrc", "benchmarks", "tests"])
def test_no_file_holds_too_much(folder):
    most = 500 if folder == "tests" else 450
    files = itertools.chain.from_iterable(
        (ROOT / folder).rglob(f"*.{suffix}") for suffix in ("py", "cpp", "cu", "h", "cuh")
    )
    assert not {str(path.relative_to(ROOT)): n for path in files if (n := len(path.read_text().splitlines())) > most}
