"""The three rules that keep the tree readable: imports point up the page, every setting is documented, the README is true."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from r1ray.config import Config, keys, load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "r1ray"
RANKS = {
    **dict.fromkeys(("errors", "types"), 0),
    **dict.fromkeys(("config", "settings", "environment", "cluster", "registry", "observe"), 1),
    **dict.fromkeys(("model", "data"), 2),
    **dict.fromkeys(("engine", "retrieval"), 3),
    "evaluate": 4,
    **dict.fromkeys(("train", "serve"), 5),
    "compress": 6,
    "tune": 7,
    **dict.fromkeys(("entry", "cli"), 8),
}
# Ranks 0-1 share one rank in the design's picture but registry, cluster and observe stand on config and settings.
SAME_RANK_ALLOWED = {"types", "config", "settings", "environment", "registry", "observe", "model", "data", "cluster", "entry"}


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) for every import of r1ray in a file, function bodies included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "r1ray" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "r1ray" and len(parts) > 1 and parts[1] != "__version__":
                yield node.lineno, parts[1]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_follow_the_ranks() -> None:
    upward = []
    for path in modules():
        room = room_of(path)
        for line, other in rooms_imported(path):
            same_rank = RANKS[other] == RANKS[room] and other in SAME_RANK_ALLOWED
            if other != room and RANKS[other] >= RANKS[room] and not same_rank:
                upward.append(f"{path.relative_to(ROOT)}:{line} {room} -> {other}")
    assert upward == []


def test_configs_and_low_ranks_import_without_torch_or_ray() -> None:
    cheap = [f"r1ray.{room}" for room in ("errors", "types", "config", "settings", "environment", "cluster", "registry", "entry", "cli")]
    cheap += [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.glob("*/config.py")]
    code = f"import sys\nfrom importlib import import_module\n[import_module(m) for m in {cheap!r}]\n"
    code += "print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


def test_no_module_is_called_after_a_junk_drawer() -> None:
    junk = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [path for path in modules() if {part.removesuffix(".py") for part in path.parts} & junk] == []


def test_every_module_says_what_it_is() -> None:
    silent = [str(path) for path in modules() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def job_schemas() -> dict[str, type[Config]]:
    """Config file -> the schema of the job whose docstring names that file."""
    schemas: dict[str, type[Config]] = {}
    for job in sorted((ROOT / "jobs").glob("*.py")):
        tree = ast.parse(job.read_text(encoding="utf-8"))
        call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "entry.run")
        name = ast.unparse(call.args[0])
        module = next(
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}
        )
        schema = getattr(importlib.import_module(module), name)
        for config in sorted((ROOT / "jobs" / "configs").glob(f"{job.stem}*.yaml")):
            schemas[str(config.relative_to(ROOT))] = schema
    return schemas


def leaf_keys(tree: object, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from leaf_keys(value, f"{prefix}{key}.")


def commented(lines: list[str], index: int) -> bool:
    """A key is documented by a comment on its line or in the block of comment lines just above it."""
    return "#" in lines[index] or (index > 0 and lines[index - 1].lstrip().startswith("#"))


def test_every_job_config_loads_and_belongs_to_a_job() -> None:
    schemas = job_schemas()
    assert set(schemas) == {str(path.relative_to(ROOT)) for path in (ROOT / "jobs" / "configs").glob("*.yaml")}
    for path, schema in schemas.items():
        load_config(schema, ROOT / path)


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "jobs" / "configs").glob("*.yaml")), *sorted(ROOT.glob("serve_config*.yaml")), ROOT / "cluster.yaml"],
    ids=lambda p: p.name,
)
def test_every_key_of_a_config_file_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    keyed = re.compile(r"^\s*(- )?[A-Za-z_][\w.]*:(\s|$)")
    bare = [
        f"{path.name}:{number + 1} {line.strip()}"
        for number, line in enumerate(lines)
        if keyed.match(line) and not commented(lines, number)
    ]
    assert bare == []


def test_every_config_field_has_a_description() -> None:
    missing = []
    for path in PACKAGE.glob("*/config.py"):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, schema in vars(module).items():
            if isinstance(schema, type) and issubclass(schema, Config) and schema is not Config:
                missing += [f"{path.parent.name}.{name}.{field}" for field, info in schema.model_fields.items() if not info.description]
    assert missing == []


def test_config_keys_in_docs_exist() -> None:
    """`section.key=value` overrides that the documents show are keys of some job."""
    known = {key for schema in set(job_schemas().values()) for key in keys(schema)}
    leaves = {key.split(".")[-1] for key in known}
    wrong = []
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for override in re.findall(r"(?<![\w./-])((?:train|data|engine|sampling)\.[a-z_.]+)=", document.read_text(encoding="utf-8")):
            if override not in known and override.split(".")[-1] not in leaves:
                wrong.append(f"{document.name}: {override}")
    assert wrong == []


def readme_tree() -> set[str]:
    """Paths that the README's tree names: indentation gives the folder, text before the comment the name."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- tree -->\s*```\w*\n(.*?)```", text, re.S)
    assert block, "README.md has no <!-- tree --> block"
    paths, stack = set(), []
    for line in block.group(1).splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        stack[depth:] = [name.rstrip("/")]
        paths.add("/".join(stack))
    return paths


def test_readme_tree_names_what_exists_and_misses_nothing() -> None:
    named = readme_tree()
    assert sorted(path for path in named if not (ROOT / path).exists()) == []
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = re.compile(r"(r1ray|jobs)/.*(?<!__init__)\.py$|scripts/|docs/.*\.md$|[\w.]+\.(yaml|toml|lock)$")
    # A folder without lines below it speaks for its files.
    summarised = {path for path in named if not any(other.startswith(path + "/") for other in named)}
    unnamed = [path for path in tracked if wanted.match(path) and path not in named and not parents(path) & summarised]
    assert unnamed == []


def parents(path: str) -> set[str]:
    return {str(parent) for parent in Path(path).parents}


def test_readme_links_and_commands_are_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#]+[^)]*)\)", text)]
    assert [link for link in links if not (ROOT / link).exists()] == []
    files = re.findall(r"(?<![\w/.])((?:scripts|jobs|docs)/[\w./-]+)", text)
    assert [file for file in files if not (ROOT / file.rstrip(".")).exists()] == []


def test_ci_runs_the_readme_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "scripts/test" in ci and "scripts/check" in ci
    assert "scripts/test" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_folder_of_integration_tests_holds_what_needs_a_cluster_and_nothing_else() -> None:
    """`scripts/test` runs it one by one, and beside it all the others at once."""
    marked = re.compile(r"pytest\.mark\.ray\b")
    needing = {path for path in (ROOT / "tests").rglob("test_*.py") if marked.search(path.read_text(encoding="utf-8"))}
    assert needing == set((ROOT / "tests" / "integration").glob("test_*.py"))


def test_lock_file_pins_by_hash_and_names_no_host() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = re.findall(r"^[\w.\[\]-]+==\S+", lock, re.M)
    assert len(pins) > 150
    assert lock.count("--hash=sha256:") >= len(pins)
    assert "://" not in lock


def test_serve_config_is_yaml_with_one_application() -> None:
    tree = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    assert [application["import_path"] for application in tree["applications"]] == ["r1ray.serve.app:build"]
