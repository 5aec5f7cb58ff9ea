"""The shape of the repository: one notebook one module, imports along the arrows, notebooks fit to be read."""
import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT / "nbs", ROOT / "video_study"
ROOMS = {  # a room may import itself, core and what stands here
    "core": set(),
    "data": set(),
    "models": set(),
    "training": {"data", "models"},
    "launch": {"training", "data", "models", "evidence"},
    "evidence": {"models"},  # costs are rebuilt from models; results and published tables are files
}
LATE = {"torchvision", "decord", "av", "submitit", "papermill", "cv2", "seaborn", "matplotlib", "yaml", "IPython", "nbconvert", "nbformat", "tqdm", "PIL"}
NEVER = {"nbdev", "fastcore", "execnb"}


def notebooks():
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


def modules():
    return sorted(p for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def exported_to(path):
    names = [m[1] for c in cells(path) if c["cell_type"] == "code" for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)]
    assert len(names) <= 1, f"{path.name} names {len(names)} modules"
    return names[0] if names else None


def name(path):
    return path.relative_to(ROOT).as_posix()


LIBRARY = [p for p in notebooks() if exported_to(p)]
STUDY = [p for p in notebooks() if not exported_to(p)]


def test_settings_are_the_one_place_for_the_version():
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini")
    init = (LIB / "__init__.py").read_text()
    assert f'__version__ = "{config["DEFAULT"]["version"]}"' in init


def test_one_notebook_one_module():
    expected = {NBS.joinpath(*exported_to(p).split(".")).with_suffix(".ipynb"): p for p in LIBRARY}
    assert {name(a): name(b) for a, b in expected.items() if a != b} == {}, "a notebook exports to a module of another name"
    assert len(expected) == len(LIBRARY), "two notebooks export to the same module"
    made = {LIB / p.relative_to(NBS).with_suffix(".py") for p in LIBRARY}
    assert {name(p) for p in set(modules()) - made} == set(), "modules without a notebook"
    assert {name(p) for p in made - set(modules())} == set(), "notebooks without a module"


@pytest.mark.parametrize("path", STUDY, ids=name)
def test_study_notebooks_stand_at_the_top_and_export_nothing(path):
    assert path.parent == NBS
    assert not any(re.match(r"#\|\s*export", source(c)) for c in cells(path))


def imports(path, top=False):
    """Module names imported by a file; at module level only, with `top`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[:-node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield module
            if module.startswith("video_study"):
                yield from (f"{module}.{a.name}" for a in node.names)


@pytest.mark.parametrize("path", modules(), ids=name)
def test_imports_follow_the_arrows(path):
    room = path.relative_to(LIB).with_suffix("").parts[0]
    allowed = ROOMS[room] | {room, "core"}
    rooms = {m.split(".")[1] for m in imports(path) if m.startswith("video_study.")} & set(ROOMS)
    assert rooms <= allowed, f"{name(path)} imports {rooms - allowed}"
    assert not {m.split(".")[0] for m in imports(path)} & NEVER
    late = {m.split(".")[0] for m in imports(path, top=True)} & LATE
    assert not late, f"{name(path)} imports {late} at the top instead of where it is used"
    assert "import *" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_notebook_is_clean(path):
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert (nb["nbformat"], nb["nbformat_minor"]) >= (4, 5)
    ids = [c["id"] for c in nb["cells"]]
    assert len(set(ids)) == len(ids)
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    for c in nb["cells"]:
        assert set(c["metadata"]) <= {"tags"}, c["metadata"]
        if c["cell_type"] != "code":
            continue
        assert c["execution_count"] is None
        for out in c["outputs"]:
            where = f"{name(path)} cell {c['id']}"
            assert out["output_type"] != "error", where
            assert out.get("name") != "stderr", f"{where}: {''.join(out['text'])[:200]}"
            text = "".join(out.get("text", [])) + "".join("".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/"))
            assert "widget" not in str(list(out.get("data", {}))), where
            assert not re.search(r"\bat 0x[0-9a-f]{6}", text), f"{where}: a memory address"
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|var)/", text), f"{where}: a path of one machine"
            assert not re.search(r"\d+%\|", text), f"{where}: a progress bar"


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_notebook_opens_with_title_and_promise(path):
    first = next(c for c in cells(path) if c["cell_type"] != "raw")
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S.*\n\n> \S", source(first)), f"{name(path)} opens without a title and a one-line promise"


def code_lines(cell):
    return [line for line in source(cell).splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_cells_are_short(path):
    sizes = {c["id"]: len(code_lines(c)) for c in cells(path) if c["cell_type"] == "code" and code_lines(c)}
    assert {k: v for k, v in sizes.items() if v > 30} == {}, "cells above 30 lines"
    assert median(sizes.values()) <= 6


@pytest.mark.parametrize("path", STUDY, ids=name)
def test_study_notebooks_define_next_to_nothing(path):
    code = "\n".join(re.sub(r"^[%!].*", "", source(c), flags=re.M) for c in cells(path) if c["cell_type"] == "code")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.end_lineno - node.lineno < 5, f"{name(path)}: {node.name} belongs in the library"


@pytest.mark.parametrize("path", [p for p in STUDY if p.stem != "index"], ids=name)
def test_study_notebooks_have_one_parameters_cell_with_help(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for line in code_lines(tagged[0]):
        assert re.match(r"\w+: [\w\[\], |]+ = .+  # \S", line), f"{name(path)}: {line!r} lacks type or help"


def test_launch_parameters_are_the_same_everywhere():
    """What says where runs are made is declared in the same words by all studies that offer a cluster."""
    from video_study.launch.study import LAUNCH
    said = {}
    for path in STUDY:
        lines = [line for c in cells(path) if "parameters" in c["metadata"].get("tags", []) for line in code_lines(c)]
        if any(line.startswith("partition:") for line in lines):
            for line in lines:
                if line.partition(":")[0] in LAUNCH:
                    said.setdefault(line.partition(":")[0], {}).setdefault(line, []).append(name(path))
    assert {k: v for k, v in said.items() if len(v) > 1} == {}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_import_is_light():
    done = run("import sys, video_study; assert 'torch' not in sys.modules, 'torch'; assert 'pandas' not in sys.modules, 'pandas'")
    assert done.returncode == 0, done.stderr
