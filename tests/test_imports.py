"""Imports go one way, from `errors` to `demo`, and deepspeed is behind one door."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    "bone_ds.errors, bone_ds.child_process, ds_configs",
    "bone_ds.provenance, bone_ds.tensor_file, bone_ds.publishing, bone_ds.live", "bone_ds.checksums",
    "bone_ds.bone",
    "bone_ds.config", "bone_ds.data_paths", "bone_ds.activation_policy, bone_ds.monitoring", "bone_ds.ds_json", "bone_ds.arch",
    "llama_adapters, rwkv_adapters", "bone_ds.methods", "bone_ds.inject", "bone_ds.resolution", "bone_ds.activation", "bone_ds.data",
    "bone_ds.loss", "bone_ds.objective", "bone_ds.adapter_file", "bone_ds.merge", "bone_ds.formats", "bone_ds.hugging_face", "bone_ds.plan",
    "bone_ds.out_of_memory", "bone_ds.stopping", "bone_ds.launch", "bone_ds.engine",
    "bone_ds.step", "bone_ds.checkpoint", "bone_ds.evaluate, bone_ds.generate", "bone_ds.conversation, bone_ds.prompt_shares",
    "bone_ds.run_lock", "bone_ds.run_directory, bone_ds.progress", "bone_ds.bad_steps, bone_ds.restarts",
    "bone_ds.inspection",
    "bone_ds.train", "bone_ds.profile", "bone_ds.cli_generate", "bone_ds.cli", "bone_ds.__main__", "bone_ds.demo"]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names.split(", ")}
OURS = ("bone_ds", "llama_adapters", "rwkv_adapters", "ds_configs")
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Everything a file imports anywhere in it, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(name: str) -> str | None:
    """The entry of ORDER that a module or a name in it belongs to; None for bone_ds itself, which imports none of ours by name."""
    return next((entry for entry in LEVEL if f"{name}.".startswith(f"{entry}.")), None)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path):
    name = module_name(path)
    used = imports(path)
    for ours in (imported for imported in used if imported.split(".")[0] in OURS):
        assert unit(ours) or ours == "bone_ds.__version__", f"{name} imports {ours}, which has no place in ORDER"
        if unit(ours) and unit(ours) != unit(name):
            assert unit(name) and LEVEL[unit(ours)] < LEVEL[unit(name)], f"{name} imports {ours}"
    packages = {imported.split(".")[0] for imported in used}
    assert "deepspeed" not in packages or unit(name) == "bone_ds.engine", f"{name} imports deepspeed"
    if unit(name) in ("llama_adapters", "rwkv_adapters"):
        assert {unit(ours) for ours in used if ours.startswith("bone_ds")} <= {
            "bone_ds.arch", "bone_ds.checksums", "bone_ds.config", "bone_ds.errors", "bone_ds.tensor_file"}
    if unit(name) == "bone_ds.bone":
        assert packages <= {"bone_ds", "torch", "__future__", "collections", "contextlib", "dataclasses", "functools", "math"}
        assert {unit(ours) for ours in used if ours.startswith("bone_ds")} <= {"bone_ds.bone", "bone_ds.errors"}


def test_every_package_is_installed():
    """An editable install finds those that setup.py leaves out."""
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    packages, = (keyword.value for node in ast.walk(setup) if isinstance(node, ast.Call) for keyword in node.keywords
                 if keyword.arg == "packages")
    assert sorted(ast.literal_eval(packages)) == sorted(module_name(path) for path in FILES if path.name == "__init__.py")


def test_every_module_has_its_place():
    assert {unit(module_name(path)) for path in FILES} - {None} == set(LEVEL)
    assert [module_name(path) for path in FILES if unit(module_name(path)) is None] == ["bone_ds"]
