"""The rules that keep the code small: layers, cycles, sizes, annotations, pickles, prints, top-level files."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Layer of each place under sd_train/; the first pattern that matches counts. A file imports its own or a lower layer.
LAYERS: dict[str, int] = {
    "__init__.py": 0,
    "errors.py": 0,
    "types.py": 0,
    "randomness.py": 0,
    "files.py": 0,
    "terminal.py": 0,
    "config/*": 0,
    "data/columns.py": 0,
    "data/config.py": 0,
    "data/folders.py": 0,
    "data/keys.py": 0,
    "data/legacy.py": 0,
    "data/record.py": 0,
    "data/request.py": 0,
    "data/settings.py": 0,
    "data/styles.py": 0,
    "data/validation.py": 0,
    "data/*": 1,
    "diffusion/*": 1,
    "optim/*": 1,
    "families/*": 2,
    "trainables/*": 3,
    "objectives/*": 3,
    "compiling.py": 3,
    "device.py": 3,
    "memory.py": 3,
    "kernels/*": 3,
    "beside.py": 0,
    "checkpoint.py": 4,
    "control.py": 4,
    "guard.py": 4,
    "drawing.py": 4,
    "preview*.py": 4,
    "safety.py": 4,
    "samplers.py": 4,
    "snapshot.py": 4,
    "splitting.py": 4,
    "lora_files/*": 4,
    "names.py": 4,
    "retention.py": 4,
    "room.py": 4,
    "save_copy.py": 4,
    "save_forms.py": 4,
    "state.py": 4,
    "state_choice.py": 4,
    "state_files.py": 4,
    "validate.py": 4,
    "watch.py": 4,
    "report*.py": 4,
    "uploads.py": 4,
    "metadata*.py": 4,
    "prompts.py": 4,
    "loop.py": 5,
    "preflight.py": 5,
    "plan*.py": 6,
    "build*.py": 6,
    "contact_sheet.py": 6,
    "doctor/*": 6,
    "html.py": 4,
    "tiny_model.py": 6,
    "fine_tune.py": 7,
    "train_*.py": 7,
    "sdxl_train*.py": 7,
    "entry.py": 7,
    "__main__.py": 7,
    "commands/*": 7,
    "prepare/*": 7,
    "presets/*": 7,
    "demo/*": 7,
}
MOST_LINES = 400
KEY_TABLES = "sd_train/families/keys*.py"
MOST_FUNCTION_LINES = 80
LONG_FUNCTIONS = {"sd_train/loop.py:train": 200}
MOST_PARAMETERS = 8
LEAST_TESTS = 0.4
PICKLES = "sd_train/families/pickles.py"
ASKED = {"huggingface_hub", "wandb"}
ASKING = ("sd_train/uploads.py", "sd_train/families/hub.py", "sd_train/families/build.py", "sd_train/report_wandb.py")
"""Where the network may be used: each of them asks whether it was asked for (`build.py` takes an exception's class)."""
PRINTS = ("sd_train/report*.py", "sd_train/config/parser.py", "tools/*.py")
TOP_LEVEL = {"sd_train", "finetune", "tools", "tests", "pyproject.toml", "dataset_config.example.toml", "README.md"}
TOP_LEVEL |= {"LICENSE", "constraints.txt"}


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    path: str
    """From the project's root, with slashes."""
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """`sd_train.data.index`; a package has the name of its folder."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Import:
    """One import of a module of the project."""

    line: int
    target: str
    inside_function: bool


def layer(module: Module) -> int | None:
    """Place of `module` in the table, None if it has none. A package's `__init__.py` has its folder's layer."""
    place = module.path.removeprefix("sd_train/")
    return next((number for pattern, number in LAYERS.items() if matches(place, pattern)), None)


def matches(path: str, *patterns: str) -> bool:
    """Whether `path` is one of `patterns`; a pattern that ends in /* also holds what is in deeper folders."""
    return any(
        path.startswith(pattern[:-1]) if pattern.endswith("/*") else PurePosixPath("/" + path).match("/" + pattern)
        for pattern in patterns
    )


def parse(folder: str) -> list[Module]:
    paths = sorted(path for path in (ROOT / folder).rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return [Module(path.relative_to(ROOT).as_posix(), text, ast.parse(text, str(path))) for path, text in texts.items()]


@cache
def sources() -> list[Module]:
    return parse("sd_train")


@cache
def all_code() -> list[Module]:
    return [*sources(), *parse("finetune"), *parse("tools")]


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Qualified name, node and whether it is a method, of each function, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node, isinstance(tree, ast.ClassDef)
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix)


def imports(module: Module, known: set[str]) -> list[Import]:
    """The modules of the project that `module` imports, wherever the import stands, TYPE_CHECKING included."""
    inside = {node for _, function, _ in functions(module.tree) for node in ast.walk(function)}
    package = module.name if module.path.endswith("__init__.py") else module.name.rpartition(".")[0]
    found: list[Import] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in known else base for name in names]
        else:
            continue
        found += [Import(node.lineno, name, node in inside) for name in dict.fromkeys(targets) if name in known]
    return found


def graph(modules: list[Module]) -> dict[str, list[Import]]:
    known = {module.name for module in modules}
    return {module.name: imports(module, known) for module in modules}


def upward(modules: list[Module]) -> list[str]:
    """Imports that point to a higher layer."""
    layers = {module.name: layer(module) for module in modules}
    edges = graph(modules)
    return [
        f"{module.path}:{edge.line}: layer {layers[module.name]} imports {edge.target} of layer {layers[edge.target]}"
        for module in modules
        for edge in edges[module.name]
        if (layers[edge.target] or 0) > (layers[module.name] or 0)
    ]


def cycles(modules: list[Module]) -> list[str]:
    """Circles of imports, each written once; imports inside functions may close one."""
    edges = {
        name: [edge.target for edge in found if not edge.inside_function] for name, found in graph(modules).items()
    }
    done: set[str] = set()
    circles: list[str] = []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in edges[name]:
                visit(target, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    return circles


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> list[ast.arg]:
    """All parameters but self and cls."""
    given = node.args
    static = any(isinstance(item, ast.Name) and item.id == "staticmethod" for item in node.decorator_list)
    positional = [*given.posonlyargs, *given.args][1 if method and not static else 0 :]
    return [*positional, *given.kwonlyargs, *(extra for extra in (given.vararg, given.kwarg) if extra)]


def is_table(module: Module) -> bool:
    """Whether `module` may be long: the names inside files, and what is data alone in config/."""
    code = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    data = matches(module.path, "sd_train/config/*") and not any(isinstance(item, code) for item in module.tree.body)
    return data or matches(module.path, KEY_TABLES)


def too_large(module: Module) -> list[str]:
    """Files, functions and parameter lists above their limits."""
    found = []
    if (lines := len(module.text.splitlines())) > MOST_LINES and not is_table(module):
        found.append(f"{module.path}: {lines} lines, the limit is {MOST_LINES}: split it")
    for name, node, method in functions(module.tree):
        limit = LONG_FUNCTIONS.get(f"{module.path}:{name}", MOST_FUNCTION_LINES)
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > limit:
            found.append(f"{module.path}:{node.lineno}: {name} has {lines} lines, the limit is {limit}")
        if (count := len(parameters(node, method))) > MOST_PARAMETERS:
            found.append(f"{module.path}:{node.lineno}: {name} has {count} parameters, the limit is {MOST_PARAMETERS}")
    return found


def unannotated(module: Module) -> list[str]:
    """Functions with a parameter or a result without annotation."""
    return [
        f"{module.path}:{node.lineno}: {name} lacks an annotation"
        for name, node, method in functions(module.tree)
        if any(item.annotation is None for item in parameters(node, method))
        or (node.returns is None and not (method and node.name == "__init__" and parameters(node, method)))
    ]


CODE = {"eval", "exec", "compile", "__import__"}
RUNNERS = {"runpy", "codeop", "os.system", "os.popen", "builtins.eval", "builtins.exec"}
RUNNERS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub", "torch.jit.load", "torch.package"}
PICKLERS = {"pickle", "_pickle", "cPickle", "pickle5", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLERS |= {"torch.load", "torch.save", "torch.serialization", "pandas.read_pickle", "multiprocessing.reduction"}
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "ftplib", "smtplib", "requests", "httpx", "aiohttp"}
NETWORK |= {"websockets", "sentry_sdk", "posthog"}
"""Packages that reach other machines; the hub and wandb do it for us, where they were asked for."""
ALLOWED = {"trust_remote_code": "False", "weights_only": "True", "allow_pickle": "False"}
"""Arguments that open a way for foreign code, and the one value that they may have."""


def _is_pickle(name: str) -> bool:
    return any(name == picklers or name.startswith(f"{picklers}.") for picklers in PICKLERS)


def forbidden(module: Module) -> list[str]:
    """Pickles outside the one file that may read and write them, ways for data to become code, and prints where a
    library must be silent."""
    may_print = matches(module.path, *PRINTS) or layer(module) == 7 or not module.path.startswith("sd_train/")
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        elif isinstance(node, ast.Attribute | ast.Name):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if not any(keyword.arg == "weights_only" for keyword in node.keywords):
                found.append(f"{module.path}:{node.lineno}: torch.load needs weights_only=True")
            continue
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            found.append(f"{module.path}:{node.value.lineno}: a shell makes code of data")
            continue
        elif isinstance(node, ast.keyword) and node.arg in ALLOWED and ast.unparse(node.value) != ALLOWED[node.arg]:
            found.append(f"{module.path}:{node.value.lineno}: {node.arg} must be {ALLOWED[node.arg]}")
            continue
        else:
            continue
        if (isinstance(node, ast.Name) and node.id in CODE) or RUNNERS & set(names):
            found.append(f"{module.path}:{node.lineno}: {ast.unparse(node)} makes code of data")
        if isinstance(node, ast.Import | ast.ImportFrom) and module.path.startswith("sd_train/"):
            reached = {name.partition(".")[0] for name in names} & NETWORK
            found += [f"{module.path}:{node.lineno}: {name} reaches other machines" for name in sorted(reached)]
            if any(name.partition(".")[0] in ASKED for name in names) and not matches(module.path, *ASKING):
                found.append(f"{module.path}:{node.lineno}: the network is for {', '.join(ASKING)}")
        if module.path != PICKLES and (used := {name for name in names if _is_pickle(name)}):
            found.append(f"{module.path}:{node.lineno}: {min(used)} belongs in {PICKLES} alone")
        if isinstance(node, ast.Name) and node.id == "print" and not may_print:
            found.append(f"{module.path}:{node.lineno}: print belongs to commands, entry points, parser and report")
    return found


def test_ways_for_foreign_code_are_found() -> None:
    text = (
        "import torch, marshal\nexec(x)\nmodel.eval()\nf(trust_remote_code=True)\nload(p, weights_only=True)\n"
        "torch.load(p)\nfrom torch import save\nimport urllib.request\nrun(x, shell=True)\nos.system(x)\nimport wandb\n"
    )
    module = Module("sd_train/device.py", text, ast.parse(text))
    assert sorted(line.partition(":")[2] for line in forbidden(module)) == [
        "10: os.system makes code of data",
        f"11: the network is for {', '.join(ASKING)}",
        "1: marshal belongs in sd_train/families/pickles.py alone",
        "2: exec makes code of data",
        "4: trust_remote_code must be False",
        "6: torch.load belongs in sd_train/families/pickles.py alone",
        "6: torch.load needs weights_only=True",
        "7: torch.save belongs in sd_train/families/pickles.py alone",
        "8: urllib reaches other machines",
        "9: a shell makes code of data",
    ]


@pytest.mark.parametrize("rule", [too_large, unannotated, forbidden])
def test_code_keeps_the_rules(rule: Callable[[Module], list[str]]) -> None:
    broken = [line for module in all_code() for line in rule(module)]
    assert not broken, "\n".join(broken)


def test_every_module_has_a_layer_and_a_docstring() -> None:
    unknown = [module.path for module in sources() if layer(module) is None]
    assert not unknown, f"{unknown}: add the file to LAYERS in tests/test_architecture.py, where its imports allow it"
    silent = [module.path for module in all_code() if not ast.get_docstring(module.tree)]
    assert not silent, f"{silent}: say in one sentence at the top what the file is for"


def test_imports_point_down() -> None:
    assert not (broken := upward(sources())), "\n".join(broken)


def test_there_are_no_import_cycles() -> None:
    assert not (circles := cycles(sources())), "\n".join(circles)


def test_there_are_enough_tests() -> None:
    written = sum(len(module.text.splitlines()) for module in parse("tests"))
    tested = sum(len(module.text.splitlines()) for module in all_code() if not is_table(module))
    assert written >= LEAST_TESTS * tested, f"{written} lines of tests for {tested} lines of code"


def test_top_level_holds_only_what_the_design_lists() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0 or not listing.stdout:
        pytest.skip("not a git checkout with files")
    names = {name.split("/")[0] for name in listing.stdout.split("\0") if name}
    assert not {name for name in names if not name.startswith(".")} - TOP_LEVEL


def module(path: str, text: str) -> Module:
    return Module(path, text, ast.parse(text))


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("sd_train/errors.py", 0),
        ("sd_train/config/options/model.py", 0),
        ("sd_train/data/config.py", 0),
        ("sd_train/data/index.py", 1),
        ("sd_train/preview_samplers.py", 4),
        ("sd_train/commands/__init__.py", 7),
        ("sd_train/data.py", None),
        ("sd_train/helpers/build.py", None),
    ],
)
def test_layers_are_found(path: str, number: int | None) -> None:
    assert layer(module(path, "")) == number


def test_upward_imports_and_cycles_are_seen() -> None:
    loop = "from sd_train import build\nfrom sd_train.data import index\n"
    index = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..families import base\n"
        "def f():\n    from sd_train.loop import train\n"
    )
    files = {"loop.py": loop, "data/__init__.py": "", "data/index.py": index, "families/__init__.py": ""}
    files |= {"families/base.py": "import sd_train.data.images\n", "data/images.py": "from . import index\n"}
    files |= {"build.py": "", "__init__.py": ""}
    modules = [module(f"sd_train/{name}", text) for name, text in files.items()]
    assert [line.split(": ")[0] for line in upward(modules)] == [
        "sd_train/loop.py:1",
        "sd_train/data/index.py:3",
        "sd_train/data/index.py:5",
    ]
    assert cycles(modules) == [
        "sd_train.data.index -> sd_train.families.base -> sd_train.data.images -> sd_train.data.index"
    ]


def test_broken_rules_are_seen() -> None:
    long = "def f() -> None:\n" + "    pass\n" * 80
    assert too_large(module("sd_train/x.py", long)) == ["sd_train/x.py:1: f has 81 lines, the limit is 80"]
    assert not too_large(module("sd_train/loop.py", long.replace("f()", "train()")))
    assert len(too_large(module("sd_train/x.py", "\n" * 401))) == 1
    assert not too_large(module("sd_train/families/keys_sd1.py", "\n" * 401))
    assert not too_large(module("sd_train/config/table.py", "A = {}\n" + "\n" * 401))
    assert len(too_large(module("sd_train/config/model.py", "class A: ...\n" + "\n" * 401))) == 1
    method = "class A:\n    def f(self, a, b, c, d, e, f, g{}): ..."
    assert not too_large(module("sd_train/x.py", method.format(", *h")))
    assert len(too_large(module("sd_train/x.py", method.format(", *h, **i")))) == 1
    assert (
        len(unannotated(module("sd_train/x.py", "def f(a: int): ...\ndef g(*b) -> None: ...\ndef h() -> None: ...")))
        == 2
    )
    assert not unannotated(module("sd_train/x.py", "class A:\n    def __init__(self, a: int): ..."))
    bad = "import pickle\nfrom torch import load\nimport torch\ntorch.save(1)\nprint(1)\n"
    assert [line.split(":")[1] for line in forbidden(module("sd_train/x.py", bad))] == ["1", "2", "4", "5"]
    assert not forbidden(module(PICKLES, bad.replace("print(1)\n", "")))
    assert not forbidden(module("sd_train/commands/plan.py", "print(1)\n"))
