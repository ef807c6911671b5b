"""Real data is named by WOODJAX_DATA_DIR; tests that need it skip without."""

import gc
import os
from pathlib import Path

# Nearly all of the time of the tests goes into compiling small programs. LLVM's expensive passes change no semantics;
# set it to 0 to test with them. In the environment, before JAX is imported, so that jobs of their own see it too.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Eight devices on one CPU for the tests of meshes; all others use the first. One program after another, and threads
# (NPROC) for all: a device that waits for another keeps its thread.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("NPROC", "64")
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "false")

import hypothesis
import jax
import pytest

FEW = 3
# Compilation of a new shape takes longer than hypothesis allows an example by default.
hypothesis.settings.register_profile("woodjax", deadline=None, max_examples=12, derandomize=True)
hypothesis.settings.register_profile("few", deadline=None, max_examples=FEW, derandomize=True)  # the second run of CI
hypothesis.settings.load_profile("woodjax")


def pytest_collection_modifyitems(config, items):
    """The second run: of every test with many cases the last one, and few examples."""
    if hypothesis.settings().max_examples != FEW:
        return
    last = {item.nodeid.partition("[")[0]: item for item in items}
    kept = {id(item) for item in last.values()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
    for item in items:  # tests that say how many they want, too
        chosen = getattr(getattr(item, "obj", None), "_hypothesis_internal_use_settings", None)
        if chosen is not None and chosen.max_examples > FEW:
            item.obj._hypothesis_internal_use_settings = hypothesis.settings(chosen, max_examples=FEW)


@pytest.fixture(scope="session")
def data_dir():
    folder = os.environ.get("WOODJAX_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("WOODJAX_DATA_DIR names no folder with MNIST, CIFAR-10 and checkpoints")
    return Path(folder)


@pytest.fixture(scope="module", autouse=True)
def unload_programs():
    """Every compiled program keeps some memory maps; a process has 65,530 of them, and LLVM crashes without one."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
