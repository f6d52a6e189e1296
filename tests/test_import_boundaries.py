"""Which module may import what, read from the source. Imports of imports are not followed.

An import anywhere in a file counts, inside functions too, whether absolute or relative, and so does
`import_module("...")` with a literal name.
"""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, package: str) -> set[str]:
    """Dotted names that a module of `package` imports; `from a import b` gives `a.b`, as b may be a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")
                parent = parent[: len(parent) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def imports_of_file(path: Path) -> set[str]:
    name = module_name(path)
    return imports_of(path.read_text(), name if path.name == "__init__.py" else name.rpartition(".")[0])


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def files_under(folder: str) -> list[Path]:
    path = ROOT / folder
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files, f"{folder} has no Python file: the boundary below checks nothing"
    return files


def names_in(source: str) -> set[str]:
    """Every dotted name that a source mentions, `a.b.c` with its beginnings and its parts; comments do not count."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Name, ast.Attribute)):
            found.add(ast.unparse(node))
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found


# ---- the reader itself


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import ray", {"ray"}),
        ("import torch.optim as o, ray.util", {"torch.optim", "ray.util"}),
        ("from ray import get", {"ray.get"}),
        ("def f():\n    import ray", {"ray"}),
        ("from . import base", {"verl.workers.actor.base"}),
        ("from .base import x", {"verl.workers.actor.base.x"}),
        ("from .. import batch", {"verl.workers.batch"}),
        ("from ...trainer.ppo import ray_trainer", {"verl.trainer.ppo.ray_trainer"}),
        ("import importlib\nimportlib.import_module('ray')", {"importlib", "ray"}),
        ("# import ray\n'import ray'", set()),
    ],
)
def test_reader(source, expected):
    assert imports_of(source, "verl.workers.actor") == expected


def test_name_reader():
    assert {"torch.cuda", "cuda", "torch.cuda.empty_cache", "torch"} <= names_in("torch.cuda.empty_cache()  # x.y")
    assert "x.y" not in names_in("torch.cuda.empty_cache()  # x.y")


def test_packages_are_resolved_from_their_init():
    path = ROOT / "verl/workers/rollout/__init__.py"
    assert "verl.workers.rollout.base.BaseRollout" in imports_of_file(path)


# ---- boundaries

PURE = {
    "verl/trainer/ppo/core_algos.py": {
        "verl.trainer.ppo.discriminator_algos",
        "verl.trainer.ppo.preference_algos",
        "verl.utils.torch_functional",
    },
    "verl/trainer/ppo/preference_algos.py": set(),
    "verl/trainer/ppo/discriminator_algos.py": {"verl.utils.torch_functional", "verl.utils.user_code"},
    "verl/utils/user_code.py": {"contextlib", "importlib", "os", "pathlib", "sys", "verl.utils.signals"},
    "verl/utils/signals.py": {"contextlib", "os", "signal", "threading", "time"},
    "verl/trainer/ppo/metric_utils.py": {
        "verl.protocol",
        "verl.trainer.ppo.core_algos",
        "verl.trainer.ppo.discriminator_algos",
        "verl.utils.torch_functional",
    },
    "verl/utils/torch_functional.py": set(),
    "verl/utils/seqlen_balancing.py": set(),
}
STANDARD = {
    "__future__",
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "math",
    "typing",
}


@pytest.mark.parametrize("file", PURE)
def test_pure_modules_import_torch_and_numpy_only(file):
    imports = imports_of_file(ROOT / file)
    allowed = {"torch", "numpy", *STANDARD, *PURE[file]}
    assert {name for name in imports if not within(name, *allowed)} == set()
    assert {
        name for name in imports if within(name, "torch.distributed.fsdp", "torch.distributed._composable")
    } == set()


@pytest.mark.parametrize("file", PURE)
def test_pure_modules_name_no_fsdp(file):
    words = {word for name in names_in((ROOT / file).read_text()) for word in name.split(".")}
    assert words & {"fsdp", "FSDP", "fully_shard", "FullyShardedDataParallel", "ray", "hydra", "OmegaConf"} == set()


# The floors of the house, from the ground up. A room imports from its own floor and from those below.
FLOORS = [
    "verl/compat",
    "verl/utils",
    "verl/config",
    "verl/monitor",
    "verl/protocol.py",
    "verl/models",
    "verl/batch.py",
    "verl/memory",
    "verl/single_controller",
    "verl/workers",
    "verl/trainer",
    "verl/model_merger",
    "verl/tools",
    "verl/data_tools",
    "verl/launch",
    "verl/pipeline",
    "verl/scripts",
    "verl/cli",
]
# The one exemption: users look for the algorithms where verl has them, and the workers train with them.
ALGORITHMS = (
    "verl.trainer.ppo.core_algos",
    "verl.trainer.ppo.discriminator_algos",
    "verl.trainer.ppo.preference_algos",
)


def test_every_room_has_a_floor():
    rooms = {f"verl/{path.name}" for path in (ROOT / "verl").iterdir() if not path.name.startswith("__")}
    assert rooms == set(FLOORS)


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=FLOORS)
def test_no_import_goes_up(floor):
    above = [name.removesuffix(".py").replace("/", ".") for name in FLOORS[floor + 1 :]]
    allowed = ALGORITHMS if FLOORS[floor] == "verl/workers" else ()
    offending = {
        (module_name(path), name)
        for path in files_under(FLOORS[floor])
        for name in imports_of_file(path)
        if within(name, *above) and not within(name, *allowed)
    }
    assert offending == set()


def test_verls_names_are_taken_from_where_verl_has_them():
    homes = {"verl.protocol", "verl.single_controller.base.worker_group"}
    importing = {
        module_name(path)
        for path in files_under("verl")
        if any(within(name, "verl.compat") for name in imports_of_file(path))
    }
    assert {name for name in importing if not within(name, "verl.compat")} == homes


def test_no_modules_import_each_other_in_a_circle():
    """Imports for annotations alone count too."""
    modules = {module_name(path): path for path in files_under("verl")}

    def module_of(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {
        name: {module_of(found) for found in imports_of_file(path) if within(found, "verl")} - {name, ""}
        for name, path in modules.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)


def test_settings_are_read_without_torch():
    # The driver reads settings, without a model's code coming along.
    names = {name for path in files_under("verl/config") for name in imports_of_file(path)}
    assert {name for name in names if within(name, "torch", "transformers", "ray")} == set()


NO_RAY = [
    "verl/utils",
    "verl/config",
    "verl/monitor",
    "verl/models",
    "verl/memory",
    "verl/single_controller/base",
    "verl/model_merger",
    "verl/tools",
    "verl/data_tools",
    "verl/cli",
]


@pytest.mark.parametrize("folder", NO_RAY)
def test_no_ray(folder):
    offending = {
        (module_name(path), name)
        for path in files_under(folder)
        for name in imports_of_file(path)
        if within(name, "ray", "verl.single_controller.ray")
    }
    assert offending == set()


def test_what_tools_know_of_trainer_and_workers():
    # Tools score with the discriminator's own pooling, and generate with the trainer's engines; they train nothing of
    # the trainer's.
    allowed = ("verl.trainer.ppo.discriminator_algos", "verl.workers.rollout", "verl.workers.critic.groups")
    offending = {
        (module_name(path), name)
        for path in files_under("verl/tools")
        for name in imports_of_file(path)
        if within(name, "verl.trainer", "verl.workers") and not within(name, *allowed)
    }
    assert offending == set()


def test_trainer_sees_no_module_optimizer_or_device():
    path = ROOT / "verl/trainer/ppo/ray_trainer.py"
    modules = ("torch.optim", "torch.nn", "torch.cuda", "torch.distributed")
    modules += ("verl.models.answer_models", "verl.models.sharding")
    assert {name for name in imports_of_file(path) if within(name, *modules)} == set()
    names = names_in(path.read_text())
    assert {name for name in names if within(name, *modules)} == set()
    assert names & {"nn", "optim", "cuda", "Module", "Optimizer", "backward", "zero_grad"} == set()
