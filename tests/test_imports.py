import ast
import subprocess
import sys
from pathlib import Path

import icae

HOME = Path(icae.__file__).parent

LEVELS = {
    "errors": 0,
    "atomic": 1,
    "journal": 1,
    "config": 1,
    "segments": 1,
    "fused": 0,
    "matmul": 1,
    "lean": 3,
    "trees": 6,
    "tree_loss": 7,
    "packed": 2,
    "muon": 1,
    "chat": 1,
    "metrics": 1,
    "base": 2,
    "slots": 2,
    "slot_batch": 3,
    "encoder": 4,
    "decoder": 4,
    "objectives": 4,
    "baselines": 4,
    "probe": 5,
    "reader": 5,
    "refine": 8,
    "loss": 6,
    "polish": 7,
    "focus": 6,
    "grounding": 0,
    "beginnings": 0,
    "overlap": 0,
    "stepwise": 0,
    "model": 9,
    "checkpoint": 10,
    "data": 10,
    "triples": 11,
    "instructions": 12,
    "room": 10,
    "callbacks": 2,
    "loop": 5,
    "train": 13,
    "qa": 12,
    "several": 13,
}
"""The core, from left to right: each room imports only rooms of a lower number, and nothing outside the core."""
LATE = {("model", "checkpoint")}
"""To the right, but only inside the function that a user calls (`ICAE.from_pretrained`), never when the room is imported."""


def tree(room):
    return ast.parse((HOME / f"{room}.py").read_text(encoding="utf-8"))


def rooms_in(node):
    """Rooms that one import statement names; `from icae import __version__` names none."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("icae."):
        return {node.module.split(".")[1]}
    if isinstance(node, ast.ImportFrom) and node.module == "icae":
        return {a.name for a in node.names if (HOME / f"{a.name}.py").exists() or (HOME / a.name).is_dir()}
    return {a.name.split(".")[1] for a in node.names if a.name.startswith("icae.")} if isinstance(node, ast.Import) else set()


def imports(room, inside=ast.AST):
    """Rooms that a room imports, in its functions alone where `inside` says so."""
    return {name for top in ast.walk(tree(room)) if isinstance(top, inside) for node in ast.walk(top) for name in rooms_in(node)}


def test_imports_run_one_way():
    pairs = {(room, other) for room in LEVELS for other in imports(room)}
    assert len(pairs) > 20
    assert {(a, b) for a, b in pairs if LEVELS.get(b, 99) >= LEVELS[a]} <= LATE
    top_level = {(room, name) for room in LEVELS for node in tree(room).body for name in rooms_in(node)}
    assert not LATE & top_level and all(b in imports(a, ast.FunctionDef) for a, b in LATE)


def test_the_two_sides_of_the_slots_do_not_know_each_other():
    assert not {"decoder", "model"} & imports("encoder")
    assert not {"encoder", "segments", "model"} & imports("decoder")
    assert imports("slots") == {"atomic", "config", "errors"}
    assert imports("segments") == {"errors"}


def heavy(room):
    return {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree(room))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    } & {"torch", "transformers", "peft", "numpy"}


def test_errors_config_and_segments_know_no_torch():
    assert {room: heavy(room) for room in ("errors", "config", "segments")} == dict.fromkeys(("errors", "config", "segments"), set())


def test_importing_the_package_is_instant():
    code = "import icae, sys; sys.exit(len({'torch', 'transformers', 'peft', 'numpy', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_can_be_imported():
    assert all(getattr(icae, name) is not None for name in icae.__all__)


def asks_for_the_kind(node):
    """Whether a comparison or a `match` is about a slot kind or the tensors that only one kind has."""
    if isinstance(node, ast.Compare):
        words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
        return bool(words & {"kv", "embedding", "embeddings", "keys", "values"})
    return isinstance(node, ast.Match) and "kind" in ast.unparse(node.subject)


def test_only_slots_encoder_and_decoder_branch_on_the_kind():
    rooms = [p.relative_to(HOME).with_suffix("").as_posix() for p in HOME.rglob("*.py")]
    asking = {room for room in rooms if any(asks_for_the_kind(node) for node in ast.walk(tree(room)))}
    assert asking <= {"slots", "encoder", "decoder"}
    assert "decoder" in asking  # or this test would see nothing anywhere
