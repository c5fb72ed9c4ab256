"""What the documents say must hold: examples run, links lead somewhere, commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(path: Path, language: str) -> list[str]:
    """Contents of the fenced code blocks of one language."""
    return [
        body for found, body in FENCE.findall(path.read_text(encoding="utf-8")) if found == language
    ]


def numbered(language: str) -> list[tuple[str, str]]:
    """(name, code) of every block of one language in all documents."""
    return [
        (f"{path.name}-{i}", body)
        for path in DOCUMENTS
        for i, body in enumerate(blocks(path, language))
    ]


PYTHON_BLOCKS = numbered("python")
SHELL_BLOCKS = numbered("bash")


@pytest.mark.parametrize("name, code", PYTHON_BLOCKS, ids=[name for name, _ in PYTHON_BLOCKS])
def test_python_example_runs(name: str, code: str) -> None:
    namespace: dict[str, object] = {"__name__": "example"}
    exec(compile(code, name, "exec"), namespace)
    loss = namespace.get("loss", torch.zeros(()))
    assert isinstance(loss, torch.Tensor) and loss.isfinite(), "the example did not train"


def test_the_readme_has_an_example_that_trains() -> None:
    first = blocks(ROOT / "README.md", "python")[0]
    assert "sparsify(" in first and "SparseMomentum(" in first and ".step()" in first
    assert "signal=" not in first  # what a newcomer copies has the default, which is the cheap one
    assert len([line for line in first.splitlines() if line.strip()]) <= 13


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    broken = []
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "#")):
            continue
        place = (path.parent / target.split("#")[0]).resolve()
        if not place.exists():
            broken.append(target)
    assert broken == []


def shell_commands() -> list[tuple[str, list[str]]]:
    """(document, words) of each line of the shell blocks, comments and leading VAR=value cut."""
    found = []
    for name, block in SHELL_BLOCKS:
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                found.append((name, words))
    return found


def test_make_targets_in_the_documents_exist() -> None:
    targets = set()
    for makefile in (ROOT / "Makefile", *(ROOT / "make").glob("*.mk")):
        targets |= set(re.findall(r"^([a-z-]+):", makefile.read_text(encoding="utf-8"), re.M))
    named = {words[1] for _, words in shell_commands() if words[0] == "make"}
    for path in DOCUMENTS:
        named |= set(re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8")))
    assert named, "no make command found in the documents: the test looks in the wrong place"
    assert named - targets == set()


def test_command_lines_in_the_documents_are_accepted() -> None:
    from sparse_kernels.cli import main

    lines = [
        words for _, words in shell_commands() if words[0].endswith("sparse-kernels") and words[1:]
    ]
    assert lines, "no sparse-kernels command found in the documents"
    for words in lines:
        command, context, rest = main, main.make_context("sparse-kernels", ["info"]), words[1:]
        while hasattr(command, "commands") and rest:
            assert rest[0] in command.commands, f"{' '.join(words)}: no command {rest[0]!r}"
            command, rest = command.commands[rest[0]], rest[1:]
        # Parsing alone: nothing is run.
        if rest != ["--help"]:
            command.make_context(words[0], list(rest), parent=context)


def test_files_named_in_commands_exist() -> None:
    missing = [
        " ".join(words)
        for _, words in shell_commands()
        for word in words[1:]
        if re.fullmatch(r"(examples|tools|benchmarks|tests|make)(/[\w.]+)+", word)
        and not (ROOT / word).exists()
    ]
    assert missing == []


def run_example(name: str, folder: Path, *arguments: str) -> str:
    """Output of an example script, run in `folder` with the modules that this process imports."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_loop_trains(tmp_path: Path) -> None:
    output = run_example("mnist_mlp.py", tmp_path, "--epochs", "2", "--width", "256")
    accuracy = float(re.findall(r"test accuracy ([\d.]+)", output)[-1])
    assert accuracy > 0.5, output  # ten classes: chance is 0.1


def test_the_example_rule_conserves_the_number_of_weights(tmp_path: Path) -> None:
    output = run_example("own_rule.py", tmp_path)
    counts = [
        (int(conv), int(linear))
        for conv, linear in re.findall(r"conv (\d+), in linear (\d+)", output)
    ]
    assert len(counts) == 3 and len({sum(pair) for pair in counts}) == 1, output


def test_the_example_growth_rule_conserves_the_number_of_weights(tmp_path: Path) -> None:
    output = run_example("own_growth.py", tmp_path)
    counts = re.findall(r"(\d+) moved, (\d+) kept", output)
    assert len(counts) == 2 and len({kept for _, kept in counts}) == 1, output
    assert all(int(moved) > 0 for moved, _ in counts)
    source = (ROOT / "examples" / "own_growth.py").read_text(encoding="utf-8")
    rule = source.split("def grow_half_at_random", 1)[1].split("\n\n\n", 1)[0]
    assert len(rule.splitlines()) <= 10
    body = rule.rsplit('"""\n', 1)[1].rstrip()
    assert body in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_table_of_methods_is_that_of_the_package() -> None:
    from sparse_kernels.training import METHODS

    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.split("### The methods of the field")[1].split("- **N:M**")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) - {"method"} == set(METHODS)
