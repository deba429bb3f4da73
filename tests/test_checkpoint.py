"""Checkpoints: exact round trips, damage that is found, other bases that are refused, and runs that are killed."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lorax
from lorax.checkpoint import TrainCheckpoints, metadata
from lorax.methods.base import METHODS
from tests import checkpoint_writer as writer
from tests.agreement import abstract, assert_identical, normal, randomised

ROOT = Path(__file__).parents[1]
PARAMS = {
    "layers": {"kernel": normal(1, 2, 6, 4), "bias": normal(2, 2, 4)},
    "table": normal(3, 7, 6, dtype=jnp.bfloat16),
    "steps": jnp.array(3),
}


def fn(p: Any, ids: Any) -> Any:
    x = p["table"][ids].astype(jnp.float32)
    return x @ p["layers"]["kernel"][0] + x @ p["layers"]["kernel"][1] + p["layers"]["bias"][0]


SPEC = lorax.Spec(
    {
        "layers/kernel": lorax.LoRA(rank=2, alpha=3, dropout=0.1, rank_stabilized=True, dtype="bfloat16"),
        "table": lorax.LoRA(rank=3, initializer="normal"),
        "layers/bias": lorax.Full(),
        "steps": None,
    }
)


def make() -> Any:
    sites = lorax.trace(fn, PARAMS, jnp.arange(3))
    return randomised(lorax.init(jax.random.key(0), SPEC, sites, PARAMS))


ADAPTER = make()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds the adapter; tests that change it copy it first."""
    path = tmp_path_factory.mktemp("adapter") / "saved"
    lorax.save(path, ADAPTER, base=PARAMS, metadata={"note": "tests", "steps": 7})
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Orbax leaves coroutines behind when a file cannot be read; they complain when they are collected.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(shutil.copytree(saved, tmp_path / "copy"))
    gc.collect()


def refused(path: Path, base: Any = PARAMS, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as error:
        lorax.restore(path, base=base, **kwargs)
    return str(error.value)


# The round trip.


def test_what_is_restored_is_what_was_saved(saved: Path) -> None:
    back = lorax.restore(saved, base=PARAMS)
    assert_identical(back, ADAPTER)
    assert back.plan == ADAPTER.plan
    assert back.spec == SPEC
    assert {x.dtype for x in back.params["layers/kernel"].values()} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(
        lorax.adapt(fn)(PARAMS, back, jnp.arange(3)), lorax.adapt(fn)(PARAMS, ADAPTER, jnp.arange(3))
    )


def test_a_restored_adapter_shares_the_compilation(saved: Path) -> None:
    step = jax.jit(lambda a: lorax.adapt(fn)(PARAMS, a, jnp.arange(3)))
    step(ADAPTER)
    step(lorax.restore(saved, base=PARAMS))
    assert step._cache_size() == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_odd_bits_survive(dtype: str, tmp_path: Path) -> None:
    """Negative zero, the smallest and largest numbers, infinities and NaN: saving judges nothing."""
    fn = lambda p, x: x @ p["w"]
    params = {"w": normal(1, 7, 4)}
    sites = lorax.trace(fn, params, jnp.ones((2, 7)))
    adapter = lorax.init(jax.random.key(0), lorax.Spec({"w": lorax.LoRA(rank=1, dtype=dtype)}), sites, params)
    limits = jnp.finfo(dtype)
    odd = np.array([-0.0, limits.tiny, limits.smallest_subnormal, limits.max, np.inf, -np.inf, np.nan], dtype)
    adapter = adapter.replace(params={"w": {"a": jnp.asarray(odd).reshape(7, 1), "b": adapter.params["w"]["b"]}})
    lorax.save(tmp_path / "odd", adapter, base=params)
    assert_identical(lorax.restore(tmp_path / "odd", base=params), adapter)


def test_metadata_and_versions_are_read_without_a_base(saved: Path) -> None:
    found = metadata(saved)
    assert found["metadata"] == {"note": "tests", "steps": 7}
    assert found["versions"]["lorax"] == lorax.__version__
    assert found["versions"]["jax"] == jax.__version__


def test_nothing_of_the_base_is_stored(saved: Path) -> None:
    size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
    wide = {"w": jnp.ones((512, 512))}
    fn = lambda p, x: x @ p["w"]
    adapter = lorax.init(
        jax.random.key(0), lorax.Spec({"w": lorax.LoRA(rank=1)}), lorax.trace(fn, wide, jnp.ones((2, 512))), wide
    )
    path = saved.parent / "wide"
    lorax.save(path, adapter, base=wide)
    assert sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) < size + 100_000 < 512 * 512 * 4


def test_one_sharding_or_one_for_each_array(saved: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    where = jax.sharding.NamedSharding(mesh, jax.P())
    for shardings in (where, jax.tree.map(lambda _: where, ADAPTER)):
        back = lorax.restore(saved, base=PARAMS, shardings=shardings)
        assert {x.sharding for x in jax.tree.leaves(back)} == {where}
        assert_identical(back, ADAPTER)
    other = ADAPTER.replace(params={"table": ADAPTER.params["table"]})
    assert "params/layers/bias/value" in refused(saved, shardings=jax.tree.map(lambda _: where, other))


def test_relative_and_string_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lorax.save("here", ADAPTER, base=PARAMS)
    assert_identical(lorax.restore(tmp_path / "here", base=PARAMS), ADAPTER)
    assert_identical(lorax.restore("here", base=PARAMS), ADAPTER)


def test_numpy_and_boxed_bases_are_the_same_base(saved: Path) -> None:
    assert_identical(lorax.restore(saved, base=jax.tree.map(np.asarray, PARAMS)), ADAPTER)


# Directories.


def test_a_directory_in_use_is_left_alone(saved: Path, tmp_path: Path) -> None:
    before = {f: f.read_bytes() for f in saved.rglob("*") if f.is_file()}
    with pytest.raises(ValueError, match=re.escape(str(saved))) as error:
        lorax.save(saved, ADAPTER, base=PARAMS)
    assert "nothing was written" in str(error.value)
    assert {f: f.read_bytes() for f in saved.rglob("*") if f.is_file()} == before
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(ValueError, match="in use"):
        lorax.save(other, ADAPTER, base=PARAMS)
    assert (other / "thesis.tex").read_text() == "irreplaceable"


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        lorax.save(path, ADAPTER, base=PARAMS)
        assert_identical(lorax.restore(path, base=PARAMS), ADAPTER)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, OSError)):
        lorax.save(tmp_path / "file", ADAPTER, base=PARAMS)
    assert (tmp_path / "file").read_text() == "mine"


def test_metadata_that_is_no_json_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata"):
        lorax.save(tmp_path / "new", ADAPTER, base=PARAMS, metadata={"array": jnp.ones(3)})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("what", ["missing", "empty", "other"])
def test_a_directory_without_an_adapter_says_so(what: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    if what == "empty":
        path.mkdir()
    if what == "other":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"w": jnp.ones(3)})
    text = refused(path)
    assert str(path) in text
    assert "no lorax checkpoint" in text


# Damage.


def survives(path: Path, what: str) -> None:
    """Restoring either says in a ValueError what is wrong, or returns the very adapter."""
    back, text = attempt(path, PARAMS)
    assert (back is None) == (str(path) in text), (what, text)
    if back is not None:
        assert back.plan == ADAPTER.plan, what
        assert_identical(back, ADAPTER)


def attempt(path: Path, base: Any) -> tuple[Any, str]:
    """The adapter, or what the ValueError says."""
    try:
        return lorax.restore(path, base=base), ""
    except ValueError as error:
        return None, str(error)


def files(path: Path) -> list[Path]:
    return sorted(f.relative_to(path) for f in path.rglob("*") if f.is_file())


def damaged(path: Path, change: Callable[[bytes], bytes]) -> None:
    whole = Path(f"{path}.whole")
    shutil.copytree(path, whole)
    for name in files(whole):
        original = (whole / name).read_bytes()
        (path / name).write_bytes(change(original))
        survives(path, str(name))
        (path / name).write_bytes(original)
    survives(path, "whole")


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_any_truncated_file_is_found(copy: Path, part: float) -> None:
    damaged(copy, lambda content: content[: int(len(content) * part)])


@pytest.mark.parametrize("part", [0.1, 0.35, 0.6, 0.85])
def test_any_flipped_byte_is_found(copy: Path, part: float) -> None:
    def flip(content: bytes) -> bytes:
        at = int(len(content) * part)
        return content[:at] + bytes(b ^ 0x11 for b in content[at : at + 1]) + content[at + 1 :]

    damaged(copy, flip)


def test_any_missing_file_is_found(copy: Path) -> None:
    whole = Path(f"{copy}.whole")
    shutil.copytree(copy, whole)
    for name in files(whole):
        (copy / name).unlink()
        survives(copy, str(name))
        shutil.copy2(whole / name, copy / name)


def test_every_byte_of_the_document_counts(copy: Path) -> None:
    """Edits that leave the JSON readable, such as another rank or alpha."""
    file = copy / "lorax" / "metadata"
    text = file.read_text()
    for old, new in (('"alpha": 3', '"alpha": 4'), ('"dropout": 0.1', '"dropout": 0.2'), ('"tests"', '"tasts"')):
        assert old in text
        file.write_text(text.replace(old, new))
        assert str(file) in refused(copy)
    document = json.loads(text)
    del document["digest"]
    file.write_text(json.dumps(document))
    assert "digest" in refused(copy)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Store other tensors in a checkpoint, leaving its document as it is."""
    handler = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    tensors = dict(handler.restore(path / "arrays"))
    change(tensors)
    shutil.rmtree(path / "arrays")
    handler.save(path / "arrays", args=ocp.args.StandardSave(tensors))


def test_a_missing_tensor_an_extra_one_and_an_edited_one_are_named(copy: Path, saved: Path) -> None:
    rewrite(copy, lambda t: t.pop("params/layers/kernel/b"))
    assert "missing tensors ['params/layers/kernel/b']" in refused(copy)
    rewrite(copy, lambda t: t.update({"params/layers/kernel/b": jnp.ones(3), "params/spare/a": jnp.ones(3)}))
    assert "extra tensors ['params/spare/a']" in refused(copy)
    fresh = Path(shutil.copytree(saved, copy.parent / "fresh"))
    rewrite(fresh, lambda t: t.update({"params/table/a": t["params/table/a"] + 1}))
    text = refused(fresh)
    assert "params/table/a" in text
    assert "params/table/b" not in text


def test_a_tensor_of_another_shape_or_dtype_is_never_cut_or_cast(copy: Path, saved: Path) -> None:
    rewrite(copy, lambda t: t.update({"params/table/b": jnp.ones((4, 6))}))
    assert str(copy) in refused(copy)
    fresh = Path(shutil.copytree(saved, copy.parent / "fresh"))
    rewrite(fresh, lambda t: t.update({"params/table/b": t["params/table/b"].astype(jnp.bfloat16)}))
    assert str(fresh) in refused(fresh)


def test_a_newer_format_is_refused(copy: Path) -> None:
    file = copy / "lorax" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    assert "99" in refused(copy)
    assert "upgrade lorax" in refused(copy)


# Another base.


def changed(path: str, change: Callable[[Any], Any]) -> Any:
    first, _, last = path.partition("/")
    if last:
        return {**PARAMS, first: {**PARAMS[first], last: change(PARAMS[first][last])}}
    return {**PARAMS, first: change(PARAMS[first])}


@pytest.mark.parametrize(
    ("base", "needles"),
    [
        (changed("table", lambda x: x[:-1]), ["table", "shape", "[7, 6]", "[6, 6]"]),
        (changed("table", lambda x: x.astype(jnp.float32)), ["table", "dtype", "bfloat16", "float32"]),
        (changed("layers/kernel", lambda x: x.at[1, 2, 3].multiply(1 + 1e-6)), ["layers/kernel", "contents"]),
        (changed("layers/bias", lambda x: x[::-1]), ["layers/bias", "contents"]),
        (changed("steps", lambda x: x + 1), ["steps", "contents"]),
        ({**PARAMS, "spare": jnp.ones(3)}, ["spare", "only in the given base"]),
        ({k: v for k, v in PARAMS.items() if k != "steps"}, ["steps", "only in the saved base"]),
        ({"model": PARAMS}, ["model/layers/kernel", "only in the given base"]),
    ],
    ids=["shape", "dtype", "contents", "order", "integer", "extra", "missing", "prefix"],
)
def test_another_base_is_refused_by_name(saved: Path, base: Any, needles: list[str]) -> None:
    text = refused(saved, base)
    assert all(needle in text for needle in (*needles, str(saved), "Load that one")), text


def test_a_merged_base_is_refused(saved: Path) -> None:
    """Applying an adapter to a base it was merged into would add it twice."""
    assert "layers/kernel: contents" in refused(saved, lorax.merge(PARAMS, ADAPTER))


# Methods that are not there.


def test_a_method_that_is_not_registered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @lorax.register
    class Elsewhere(lorax.Method):
        strength: float = 2.0
        arrays = {"shift": "O"}

        def init(self, key: jax.Array, site: lorax.Site, base: Any) -> Any:
            return {"shift": jnp.zeros(site.dims("O"))}, {}

        def weight(self, w: Any, *, shift: Any) -> Any:
            return w + shift

    try:
        fn = lambda p, x: x @ p["w"]
        params = {"w": normal(1, 4, 3)}
        sites = lorax.trace(fn, params, jnp.ones((2, 4)))
        adapter = lorax.init(jax.random.key(0), lorax.Spec({"w": Elsewhere()}), sites, params)
        lorax.save(tmp_path / "adapter", adapter, base=params)
        assert_identical(lorax.restore(tmp_path / "adapter", base=params), adapter)
    finally:
        del METHODS["Elsewhere"]
    text = refused(tmp_path / "adapter", params)
    for needle in ("Elsewhere", "not registered", "LoRA", "Import what defines it"):
        assert needle in text

    @lorax.register
    class Elsewhere(lorax.Method):  # a version without the setting
        arrays = {"shift": "O"}

    monkeypatch.setitem(METHODS, "Elsewhere", Elsewhere)
    text = refused(tmp_path / "adapter", params)
    assert "strength" in text
    assert "no setting" in text


# Training checkpoints.


def trained(count: int, adapter: Any, opt_state: Any, key: Any) -> tuple[Any, Any, Any]:
    for _ in range(count):
        key, batch_key = jax.random.split(key)
        adapter, opt_state = writer.train(adapter, opt_state, batch_key)
    return adapter, opt_state, key


def restored(checkpoints: TrainCheckpoints, **kwargs: Any) -> Any:
    adapter, opt_state = writer.start()
    return checkpoints.restore(base=writer.PARAMS, opt_state_like=opt_state, **kwargs)


def one_step(directory: Path, rng: Any = None) -> Any:
    """Training checkpoints with a complete step 1, and what is in it."""
    adapter, opt_state = writer.start()
    checkpoints = TrainCheckpoints(directory)
    checkpoints.save(1, adapter, opt_state=opt_state, base=writer.PARAMS, rng=rng)
    checkpoints.wait()
    return checkpoints, adapter, opt_state


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    adapter, opt_state, key = trained(2, *writer.start(), jax.random.key(1))
    checkpoints = TrainCheckpoints(tmp_path)
    assert checkpoints.latest_step() is None
    data = {"epoch": 1, "order": [3, 1, 2], "seed": None}
    checkpoints.save(
        2, adapter, opt_state=opt_state, base=writer.PARAMS, rng=key, data_state=data, metadata={"run": "a"}
    )
    checkpoints.close()
    again = TrainCheckpoints(tmp_path)
    assert again.latest_step() == 2
    state = restored(again)
    assert (state.step, state.data_state, state.metadata) == (2, data, {"run": "a"})
    assert_identical((state.adapter, state.opt_state, state.rng), (adapter, opt_state, key))
    assert state.adapter.plan == adapter.plan
    straight = trained(3, adapter, opt_state, key)
    resumed = trained(3, state.adapter, state.opt_state, state.rng)
    assert_identical(resumed, straight)
    assert type(state.opt_state) is type(opt_state)
    again.close()


def test_opt_state_may_be_described_by_shapes(tmp_path: Path) -> None:
    checkpoints, adapter, opt_state = one_step(tmp_path)
    like = jax.eval_shape(writer.TX.init, abstract(adapter.params))
    state = checkpoints.restore(base=writer.PARAMS, opt_state_like=like)
    assert_identical(state.opt_state, opt_state)
    assert state.rng is None
    checkpoints.close()


@pytest.mark.parametrize("rng", [jax.random.key(5), jax.random.PRNGKey(5), jax.random.split(jax.random.key(5), 3)])
def test_typed_and_raw_keys(tmp_path: Path, rng: Any) -> None:
    checkpoints, *_ = one_step(tmp_path, rng)
    assert_identical(restored(checkpoints, rng_like=rng).rng, rng)
    checkpoints.close()


def test_a_key_of_another_implementation_and_a_tree_of_keys(tmp_path: Path) -> None:
    rng = {"data": jax.random.key(5, impl="rbg"), "dropout": jax.random.key(6), "noise": jnp.ones(3, jnp.bfloat16)}
    checkpoints, *_ = one_step(tmp_path, rng)
    back = restored(checkpoints, rng_like=rng).rng
    assert_identical(back, rng)
    assert str(jax.random.key_impl(back["data"])) == "rbg"
    checkpoints.close()


def test_the_newest_steps_are_kept(tmp_path: Path) -> None:
    adapter, opt_state = writer.start()
    checkpoints = TrainCheckpoints(tmp_path, keep=2)
    for step in (1, 5, 9):
        marked = adapter.replace(params=jax.tree.map(lambda x, s=step: x * 0 + s, adapter.params))
        checkpoints.save(step, marked, opt_state=opt_state, base=writer.PARAMS)
    checkpoints.wait()
    assert checkpoints.latest_step() == 9
    assert {p.name for p in tmp_path.iterdir()} == {"5", "9"}
    for step in (None, 5, 9):
        state = restored(checkpoints, step=step)
        assert state.step == (step or 9)
        assert {float(x.ravel()[0]) for x in jax.tree.leaves(state.adapter.params)} == {float(step or 9)}
    with pytest.raises(ValueError, match=r"no complete step 1; there are \[5, 9\]"):
        restored(checkpoints, step=1)
    checkpoints.close()


def test_no_step_at_all_says_so(tmp_path: Path) -> None:
    checkpoints = TrainCheckpoints(tmp_path)
    with pytest.raises(ValueError, match="no complete step") as error:
        restored(checkpoints)
    assert str(tmp_path) in str(error.value)
    checkpoints.close()


def test_a_step_that_is_there_is_left_alone(tmp_path: Path) -> None:
    adapter, opt_state = writer.start()
    checkpoints = TrainCheckpoints(tmp_path)
    checkpoints.save(1, adapter, opt_state=opt_state, base=writer.PARAMS)
    checkpoints.save(1, randomised(adapter), opt_state=opt_state, base=writer.PARAMS)
    checkpoints.wait()
    assert_identical(restored(checkpoints).adapter, adapter)
    checkpoints.close()


def test_what_is_saved_may_be_donated_or_overwritten_at_once(tmp_path: Path) -> None:
    adapter, opt_state, key = trained(1, *writer.start(), jax.random.key(1))
    numpy_adapter, want = (jax.tree.map(np.array, x) for x in (adapter, (adapter, opt_state)))
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints = TrainCheckpoints(tmp_path)
    checkpoints.save(1, adapter, opt_state=opt_state, base=writer.PARAMS, rng=key)
    jax.block_until_ready(donate((adapter, opt_state)))
    assert any(x.is_deleted() for x in jax.tree.leaves((adapter, opt_state)))
    checkpoints.save(2, numpy_adapter, opt_state=want[1], base=writer.PARAMS, rng=key)
    for x in jax.tree.leaves(numpy_adapter.params):
        x[...] = np.nan
    checkpoints.wait()
    for step in (1, 2):
        state = restored(checkpoints, step=step)
        assert_identical((state.adapter.params, state.opt_state), (want[0].params, want[1]))
    checkpoints.close()


def test_another_optimiser_or_base_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints, adapter, opt_state = one_step(tmp_path)
    with pytest.raises(ValueError, match="tensors") as error:
        checkpoints.restore(base=writer.PARAMS, opt_state_like=optax.sgd(0.1, momentum=0.9).init(adapter.params))
    assert "opt_state" in str(error.value)
    with pytest.raises(ValueError, match="up: contents"):
        checkpoints.restore(base={**writer.PARAMS, "up": writer.PARAMS["up"] + 1}, opt_state_like=opt_state)
    with pytest.raises(ValueError, match="JSON"):
        checkpoints.save(2, adapter, opt_state=opt_state, base=writer.PARAMS, data_state={"x": jnp.ones(2)})
    checkpoints.close()


def test_a_training_step_is_an_adapter_too(tmp_path: Path) -> None:
    """Or says that it is none: never something in between."""
    adapter, opt_state = writer.start()
    checkpoints = TrainCheckpoints(tmp_path)
    checkpoints.save(1, adapter, opt_state=opt_state, base=writer.PARAMS)
    checkpoints.close()
    back, text = attempt(tmp_path / "1", writer.PARAMS)
    if back is None:
        assert str(tmp_path) in text
    else:
        assert_identical(back, adapter)


@pytest.mark.parametrize("steps_before", [2, 4])
def test_a_killed_run_leaves_its_steps_readable(tmp_path: Path, steps_before: int) -> None:
    """SIGKILL while a step is being written; what is there is whole, and equals the same run uninterrupted."""
    command = [sys.executable, "-m", "tests.checkpoint_writer", str(tmp_path / "run")]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= steps_before:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    checkpoints = TrainCheckpoints(tmp_path / "run", keep=100)
    step = checkpoints.latest_step()
    assert step is not None
    assert step >= steps_before - 1, "a step was being written when the next had begun"
    state = restored(checkpoints)
    assert (state.step, state.data_state) == (step, {"position": step})
    want = trained(step, *writer.start(), jax.random.key(1))
    assert_identical((state.adapter, state.opt_state, state.rng), want)
    # The run goes on in the same directory, past the step that was cut off.
    adapter, opt_state, key = trained(1, state.adapter, state.opt_state, state.rng)
    for number in (step + 1, step + 2):
        checkpoints.save(number, adapter, opt_state=opt_state, base=writer.PARAMS, rng=key)
    checkpoints.wait()
    assert restored(checkpoints).step == step + 2
    checkpoints.close()
