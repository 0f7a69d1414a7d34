"""Fixture modules beside the tests can be imported; tiny models run fastest on one thread."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent / each) for each in ("fixtures", "comfyui")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; workers inherit it
_CACHE = tempfile.TemporaryDirectory(prefix="pcpo-test-cache-", ignore_cleanup_errors=True)
os.environ["PCPO_CACHE"] = _CACHE.name  # prompt embeddings, away from the user's

MOST_WORKERS = 8
"""Each imports all that the pack does, and takes 2 GiB."""
THOROUGH = """
architecture_page bench_suite benchmarks blocks branches cli compare demo_flow demo_model effects
embeds_cache
equal_rewards estimate evaluate export_full_size families families_flux families_klein
families_sd3 families_sdxl finite finite_files guard irg judges long_run lora lora_layouts
lora_layouts_flow memory
merge metrics metrics_networks modes nasty_words nodes_cost nodes_jobs odd_job_folders one_pass
panel_control parity_flow picture_files preference processes profile publish refused refused_flow
registry remedies resume rewards_bert_score rewards_command rewards_input rewards_ocr
rewards_parity rewards_remote rewards_serve_limits rewards_traps rewards_vlm rewards_web
rewards_weights row_lora sample score_command scoring statistics stop_now store taste_bad_input
taste_routes tastes train train_flow train_flow2 train_flow_files train_rewards train_sdxl weights
"""
"""Files whose tests train models or start processes, for 3 s and more: all others are `fast`."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Where all files are asked for they are shared out to processes, if pytest-xdist is there."""
    option, is_worker = config.option, "PYTEST_XDIST_WORKER" in os.environ
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not option.usepdb
    if is_worker or not is_whole or "slow" in option.markexpr:
        return
    from comfyui_pcpo.trainers.job.worker import cores

    if cores() > 1 and getattr(option, "numprocesses", 0) is None and option.dist == "no":
        option.numprocesses, option.dist = min(cores(), MOST_WORKERS), "worksteal"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark what is fast; tests that take minutes run where they are asked for: `pytest -m slow`."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    thorough = {f"test_{name}" for name in THOROUGH.split()}
    for item in items:
        if item.path.stem not in thorough and not item.get_closest_marker("slow"):
            item.add_marker("fast")
    if "slow" in config.getoption("-m"):
        return
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)
