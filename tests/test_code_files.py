"""Rules depend on the code of the parts that they use, and on no other part's."""

from __future__ import annotations

import inspect
from pathlib import Path

from eesd.checks import DRAFTING
from eesd.code_files import SHARED, controller_files, drafter_files, methods_of, task_files
from eesd.registry import registered_in
from eesd.settings import load_config, traced_method


def stems(files: list[str]) -> set[str]:
    return {Path(file).stem for file in files}


def test_files_of_a_group():
    methods = methods_of(load_config(), "main")
    assert stems(controller_files(methods)) == {"base", "cost_aware", "heuristics", "static", "thompson"}
    assert stems(drafter_files(methods)) == {*SHARED, "exit_head", "vocabulary", "lookup"}
    assert {"early_exit", "medusa", "self_sd"} <= stems(drafter_files(methods_of(load_config(), "rivals")))


def test_files_of_a_trace_are_of_one_drafter():
    config = load_config()
    assert {"exit_head", "medusa"} & stems(drafter_files([traced_method(config, "deep1")])) == {"exit_head"}
    assert {"exit_head", "medusa"} & stems(drafter_files([traced_method(config, "medusa4")])) == {"medusa"}


def test_files_of_tasks():
    assert stems(task_files(["asdiv", "xsum"])) == {"asdiv", "xsum", "base"}


def test_every_drafter_is_found_without_importing_it():
    from eesd.drafting import DRAFTERS

    files = registered_in(DRAFTING, "DRAFTERS")
    assert sorted(files) == DRAFTERS.names()
    for name, path in files.items():
        assert inspect.getfile(DRAFTERS[name]) == str(path)
        assert str(path) in drafter_files([{"drafter": name, "lookup": None}])
