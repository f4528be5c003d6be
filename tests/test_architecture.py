"""The rules of the house, enforced by walking the imports of every file (lazy ones in functions included).

Imports point down only. Modules of one room (model, data, ...) may use each other without cycles; modules of a layer
that share no room do not import each other. A new module has to be given a place in `LAYERS`.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "unihetero_jax"
SOURCE_FOLDERS = (PACKAGE, "experiments", "data_pipelines", "benchmarks")

LAYERS: list[set[str]] = [
    {"arrays", "config", "storage", "hlo", "text_table", "html_page", "safetensors_files"},
    {"config_rules"},
    {"config_reading"},
    {
        "sharding", "optim", "flops", "data.records", "data.tokenizer", "data.question_files", "data.schedule",
        "data.open_questions", "data.labelled_images",
        "data.row_plan", "command_line", "hf_config", "workdir", "distributed", "topology",
    },
    {
        "state", "metrics", "integrity", "profiling", "watchdog", "data.shards", "data.sources", "data.transforms",
        "data.roles", "data.packing", "inference.sampling", "model.layers", "model.splash", "model.attention",
        "model.vision_encoder",
        "model.connectors", "model.semantic_encoder", "model.decoder", "model.semantic_head",
        "model.pixel_decoder", "text_loss", "patch_codec",
    },
    {"model.unihetero", "objectives", "data.mixture", "checkpoint", "roofline", "hf_weights"},
    {
        "verdicts", "inference", "pretrained", "step", "gradient_table",
        "reporting", "data_stats", "stored_steps", "export", "figures", "job_array",
    },
    {"train", "evaluation", "scaling", "claims", "compile_ahead", "explain", "hf_import", "hf_export"},
    {"loaded_run"},
    {"evaluate_run"},
    {"train_run"},
    {"sweep_plan", "failure_signatures"},
    {"preregistration", "sweep", "report", "run_report"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
"""From the bottom up; a name stands for the module or for all modules of the folder."""

MAX_CLOSURE_MODULES = 47
MAX_CLOSURE_LINES = 12_650
"""What a reader of train.py has to open (the field's trainers need 55 to 178 modules).

Above the design's guide of 22 and 4,500: the step, the text loss, the gradient table, what a run reports, its traces
and its lock, the processes, the watchdog, the digests, pretrained weights (four modules), the pixel decoder and its
codec, the connectors, the TPU's attention and the opening of sources are modules of their own, so that each file stays
short; a third of the lines are docstrings.
"""

SHOWN_AS_LOADED = {"data_pipelines.report": {"packing", "row_plan", "transforms"}}
"""What shows samples and rows as the model will see them uses the loader's own code: a copy of it could differ."""

BESIDE_DATA = {f"{PACKAGE}.{name}" for name in ("storage", "html_page", "text_table", "__version__")}
"""What data_pipelines may use besides the stored records: where files are, and how tables and pages look."""

FOREIGN = {"torch", "tensorflow", "apache_beam"}
JAX_FAMILY = {"jax", "jaxlib", "flax", "optax", "orbax", "clu"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}


def read_sources(folder: str) -> dict[str, ast.Module]:
    """Dotted module name -> syntax tree of every file under a folder; a package is named like its folder."""
    trees = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
    return trees


def imported_names(tree: ast.Module) -> set[str]:
    """Every dotted name that the module may import; `from a import b` gives `a` and `a.b`, as b may be a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def top_level(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def import_graph(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules of the same tree that it imports."""
    return {name: (imported_names(tree) & trees.keys()) - {name} for name, tree in trees.items()}


def closure(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(graph[name])
    return seen


def layer_of(module: str) -> int | None:
    """Layer of a module given without the package's name; the longest match decides."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for level, members in enumerate(LAYERS):
            if name in members:
                return level
    return None


def layer_faults(graph: Mapping[str, set[str]]) -> list[str]:
    """What breaks the layers; `graph` names modules without the package's name, packages left out."""
    faults = [f"{module}: has no place in LAYERS" for module in graph if layer_of(module) is None]
    for module, imports in graph.items():
        for other in imports:
            here, there = layer_of(module), layer_of(other)
            if here is None or there is None:
                continue
            room, other_room = module.rpartition(".")[0], other.rpartition(".")[0]
            if there > here:
                faults.append(f"{module} (L{here}) imports upwards: {other} (L{there})")
            elif there == here and (not room or room != other_room):
                faults.append(f"{module} imports its sibling {other} of L{here}")
    faults.extend(
        f"{module}: part of an import cycle" for module in graph if module in _reached_from_imports(graph, module)
    )
    return sorted(faults)


def _reached_from_imports(graph: Mapping[str, set[str]], module: str) -> set[str]:
    return {name for other in graph[module] for name in closure(graph, other)}


def package_graph() -> dict[str, set[str]]:
    trees = read_sources(PACKAGE)
    packages = {name for name in trees if (ROOT / Path(*name.split(".")) / "__init__.py").exists()}
    prefix = len(PACKAGE) + 1
    return {
        name[prefix:]: {other[prefix:] for other in imports - packages}
        for name, imports in import_graph(trees).items()
        if name not in packages
    }


def test_layer_rule_itself():
    assert layer_faults({"config": set(), "optim": {"config"}, "train": {"optim"}}) == []
    assert layer_faults({"config": {"optim"}, "optim": set()}) == ["config (L0) imports upwards: optim (L3)"]
    assert layer_faults({"state": {"metrics"}, "metrics": set()}) == ["state imports its sibling metrics of L4"]
    assert layer_faults({"model.decoder": {"model.layers"}, "model.layers": set()}) == []
    assert layer_faults({"model.decoder": {"model.layers"}, "model.layers": {"model.decoder"}}) == [
        "model.decoder: part of an import cycle",
        "model.layers: part of an import cycle",
    ]
    assert layer_faults({"novelty": set()}) == ["novelty: has no place in LAYERS"]
    assert (
        layer_of("evaluation.runner") == 7
        and layer_of("inference.sampling") == 4
        and layer_of("inference.generate") == 6
    )


def test_imports_are_found_wherever_they_stand():
    tree = ast.parse("import a.b\nfrom c import d\ndef f():\n    if True:\n        from e.f import g as h\n")
    assert imported_names(tree) == {"a.b", "c", "c.d", "e.f", "e.f.g"}


def test_imports_point_down():
    assert layer_faults(package_graph()) == []


def test_package_initialisers_import_nothing():
    for folder in SOURCE_FOLDERS:
        for path in (ROOT / folder).rglob("__init__.py"):
            assert not imported_names(ast.parse(path.read_text())), f"{path}: importing a package must cost nothing"


def test_model_knows_no_losses_no_data_no_mesh():
    for name, imports in package_graph().items():
        if name.startswith("model."):
            allowed = {"arrays", "config", "sharding"}
            others = {other for other in imports if not other.startswith("model.")} - allowed
            assert not others, f"{name} imports {others}"
    for name, tree in read_sources(f"{PACKAGE}/model").items():
        names = imported_names(tree)
        meshes = {n for n in names if n.startswith("jax.sharding") or n in (f"{PACKAGE}.sharding.make_mesh",)}
        assert not meshes, f"{name} names a mesh: {meshes}"


def test_objectives_see_arrays_and_no_module():
    imports = package_graph()["objectives"]
    assert imports <= {"arrays", "config", "text_loss", "patch_codec"}, imports


@pytest.mark.parametrize("folder", [PACKAGE, "data_pipelines", "experiments"])
def test_other_frameworks_stay_out(folder):
    for name, tree in read_sources(folder).items():
        banned = top_level(imported_names(tree)) & FOREIGN
        if folder == "data_pipelines":
            banned -= {"apache_beam"}  # its cluster engine
        assert not banned, f"{name} imports {banned}"


def test_data_is_free_of_jax_even_indirectly():
    trees = {name: tree for folder in (PACKAGE, "data_pipelines") for name, tree in read_sources(folder).items()}
    graph = import_graph(trees)
    for name in trees:
        if name.startswith((f"{PACKAGE}.data", "data_pipelines")):
            for member in closure(graph, name):
                found = top_level(imported_names(trees[member])) & JAX_FAMILY
                assert not found, f"{name} reaches {member}, which imports {found}"


def test_data_pipelines_know_few_modules_of_the_package():
    for name, tree in read_sources("data_pipelines").items():
        modules = {"records", "tokenizer", "question_files"} | SHOWN_AS_LOADED.get(name, set())
        allowed = {f"{PACKAGE}.data.{module}" for module in modules} | BESIDE_DATA
        for imported in imported_names(tree):
            inside = imported == PACKAGE or imported.startswith(PACKAGE + ".")
            is_prefix = any(module.startswith(imported) for module in allowed)
            is_member = any(imported.startswith(module) for module in allowed)
            assert not inside or is_prefix or is_member, f"{name} imports {imported}"


def test_only_the_top_reaches_outside_the_package():
    for name, tree in read_sources(PACKAGE).items():
        outside = top_level(imported_names(tree)) & {"experiments", "data_pipelines", "benchmarks", "tests"}
        levels = [layer_of(one) or 0 for one in (name.removeprefix(PACKAGE + "."), "evaluate_run")]
        allowed = {"data_pipelines", "experiments"} if levels[0] >= levels[1] else set()
        assert outside <= allowed, f"{name} imports {outside}"


def test_names_say_something_and_hide_no_standard_module():
    for folder in SOURCE_FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if not path.stem.startswith("__"):
                assert path.stem not in VAGUE_NAMES, f"{path}: name it after what it does"
                assert path.stem not in sys.stdlib_module_names, f"{path}: named like a standard module"


def unsafe_uses(tree: ast.Module) -> list[str]:
    """Ways to run code or trust bytes that came from outside."""
    found = [f"imports {name}" for name in sorted(top_level(imported_names(tree)) & UNSAFE_MODULES)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        if function in ("eval", "exec", "__import__", "yaml.load", "yaml.unsafe_load", "os.system"):
            found.append(f"line {node.lineno}: {function}(")
        for keyword in node.keywords:
            if keyword.arg in ("trust_remote_code", "allow_pickle") and ast.unparse(keyword.value) != "False":
                found.append(f"line {node.lineno}: {keyword.arg}")
            if keyword.arg == "shell" and ast.unparse(keyword.value) != "False":
                found.append(f"line {node.lineno}: shell")
    return found


def test_unsafe_rule_itself():
    bad = "import pickle\neval('1')\nexec(x)\nyaml.load(f)\nf(trust_remote_code=True)\nnp.load(f, allow_pickle=flag)\n"
    assert len(unsafe_uses(ast.parse(bad))) == 6
    assert unsafe_uses(ast.parse("model.eval()\nnp.load(f, allow_pickle=False)\nyaml.safe_load(f)\n")) == []


def test_nothing_from_outside_is_run():
    for folder in SOURCE_FOLDERS:
        for name, tree in read_sources(folder).items():
            assert not unsafe_uses(tree), f"{name}: {unsafe_uses(tree)}"


def test_a_reader_of_train_can_open_everything():
    graph = package_graph()
    entry = "train" if "train" in graph else "step"
    members = closure(graph, entry)
    lines = {
        name: len((ROOT / PACKAGE / Path(*name.split("."))).with_suffix(".py").read_text().splitlines())
        for name in members
    }
    report = f"{len(members)} modules, {sum(lines.values())} lines: " + ", ".join(
        f"{n} {lines[n]}" for n in sorted(lines)
    )
    assert len(members) <= MAX_CLOSURE_MODULES, report
    assert sum(lines.values()) <= MAX_CLOSURE_LINES, report
