"""The tests mirror the package: each folder of tests has its counterpart, and file names are unique."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "hf_fusion"
# what is measured and compared by hand, and the Spaces, which are not in the package
BESIDE = {"benchmarks": TESTS / "benchmarks", "peers": TESTS / "peers", "spaces": TESTS.parent / "spaces"}
FILES = sorted(TESTS.rglob("test_*.py"))


def test_each_folder_of_tests_has_its_counterpart():
    folders = {file.parent.relative_to(TESTS) for file in FILES} - {Path()}
    without = [
        str(folder)
        for folder in sorted(folders)
        if not (PACKAGE / folder).is_dir()
        and not (PACKAGE / folder).with_suffix(".py").is_file()
        and folder.parts[0] not in BESIDE
    ]
    assert folders
    assert not without, "no folder or module of hf_fusion is called like these folders of tests"


def test_each_part_of_the_package_has_its_tests():
    parts = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert parts - {file.relative_to(TESTS).parts[0] for file in FILES} == set()


def test_no_test_imports_from_another():
    """What several share lies in conftest.py or in a helper: a test file can be moved, split and run alone."""
    imported = {
        f"{file.name}: {module}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names])
        if module.startswith("test_")
    }
    assert not imported


def test_names_are_unique():
    """pytest imports a file by its name alone."""
    names = Counter(file.name for file in TESTS.rglob("*.py"))
    del names["conftest.py"]
    assert not [name for name, count in names.items() if count > 1]
