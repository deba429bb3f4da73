"""What a compiled program does, by its text; and the plan of a run against the run."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.sizes import by_size
from experiments.plan import hlo, program, report, search
from experiments.training import settings
from tests.experiments.finetune_tiny import ROOT

COLLECTIVES = """
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from experiments.plan import hlo
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def body(a):
    def step(c, _):
        c = c + lax.psum(c, "x")
        c = c + lax.all_gather(c, "y", tiled=True).reshape(2, -1).sum(0).reshape(c.shape)
        return c + lax.ppermute(c, "x", [(i, (i + 1) % 4) for i in range(4)]), None
    return lax.scan(step, a, None, length=5)[0]
fn = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("x", "y"), out_specs=P("x", "y"), check_vma=False))
text = fn.lower(jax.ShapeDtypeStruct((32, 64), jnp.float32)).compile().as_text()
for c in hlo.costs(text).collectives:
    print(c.kind, c.group, int(c.count), int(c.bytes), int(c.wire_bytes))
"""
TPU_PRODUCT = """
HloModule batched, is_scheduled=true

%cond (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,64,16]{2,1,0:T(8,128)(2,1)} constant({...})
  %y = bf16[8,128,16]{2,1,0:T(8,128)(2,1)S(1)} constant({...})
  %conv = bf16[8,64,128]{2,1,0:T(8,128)(2,1)} convolution(%x, %y), window={size=8 stride=7 lhs_dilate=8}, \
dim_labels=0bf_0oi->0bf
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %p)
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) tuple(%zero, %a)
  %loop = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) while(%t), condition=%cond, body=%body
  ROOT %r = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
""".replace("\\\n", "")


def costs_of(fn, *args) -> hlo.Costs:
    return hlo.costs(jax.jit(fn).lower(*args).compile().as_text())


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_in_loops_count_as_often_as_they_run():
    x, w = shape(32, 64), shape(7, 64, 64)
    once = 2 * 32 * 64 * 64
    assert costs_of(lambda x, w: x @ w, x, shape(64, 64)).flops == once

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert costs_of(layers, x, w).flops == 7 * once
    twice = lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: layers(x, w), x)
    assert costs_of(twice, x, w).flops == 3 * 7 * once
    gradient = jax.grad(lambda x, w: layers(x, w).sum())
    assert costs_of(gradient, x, w).flops == 2 * 7 * once
    assert costs_of(jax.grad(lambda w, x: layers(x, w).sum()), w, x).flops == 3 * 7 * once
    batched = costs_of(lambda a, b: jnp.einsum("bik,bkj->bij", a, b), shape(5, 32, 64), shape(5, 64, 16))
    assert batched.flops == 5 * 2 * 32 * 64 * 16


def test_a_loop_over_a_stack_reads_it_once():
    stack = 64 * 256 * 256 * 4
    total = costs_of(
        lambda w: jax.lax.fori_loop(0, 64, lambda i, s: s + jnp.sin(w[i]), jnp.zeros((256, 256))), shape(64, 256, 256)
    )
    assert stack < total.bytes < 5 * stack  # with the sum, read and written at each step


def test_a_tpu_product_with_batch_axes_counts_without_its_padding():
    costs = hlo.costs(TPU_PRODUCT)
    assert costs.flops == 6 * 2 * 8 * 64 * 128 * 16
    counter = 3 * 4
    # what lies in the vector memory is not counted
    assert costs.bytes == 6 * (2 * (8 * 64 * 128 + 8 * 64 * 16) + counter)
    assert not costs.unknown_loops


@pytest.mark.parametrize("line", ["constant(6)", "add(%i, %one)", "constant(0)"])
def test_a_loop_without_a_known_count_is_named(line):
    costs = hlo.costs(TPU_PRODUCT.replace(line, "custom-call(%i)"))
    assert costs.unknown_loops == ("loop",)
    assert costs.flops == hlo.costs(TPU_PRODUCT).flops / 6


@pytest.mark.parametrize(("start", "step", "times"), [(0, 2, 3), (2, 1, 4), (1, 2, 3), (6, 1, 0)])
def test_a_loop_counts_from_its_start_in_its_steps(start, step, times):
    text = TPU_PRODUCT.replace("constant(0)", f"constant({start})").replace("constant(1)", f"constant({step})")
    assert hlo.costs(text).flops == times * hlo.costs(TPU_PRODUCT).flops / 6


def test_text_of_no_program_is_refused():
    with pytest.raises(ValueError, match="compiled.as_text"):
        hlo.costs("nothing")


def test_collectives_are_counted_as_often_as_they_run():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", COLLECTIVES]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    part = 8 * 32 * 4  # bytes of a device's part
    found = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in done.stdout.splitlines()}
    assert found == {
        "all-reduce": [4, 5, 5 * part, 5 * 2 * part * 3 // 4],
        "all-gather": [2, 5, 5 * 2 * part, 5 * part],
        "collective-permute": [2, 5, 5 * part, 5 * part],
    }


def configured(**changes) -> settings.config_dict.ConfigDict:
    config = settings.defaults()
    config.data.row_tokens, config.train.rows = 64, 4
    config.update_from_flattened_dict(changes)
    return config


def test_a_plan_of_what_is_held():
    shape = by_size("tiny")
    planned = program.plan(configured(), jax.devices(), shape=shape)
    weights = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 2 * 128 * 32 + 32
    assert planned.base == 4 * weights
    factors = 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert planned.adapter == 4 * (factors + 7)  # and a scale for each of the sites
    assert planned.moments == pytest.approx(2 * 4 * factors, abs=64)
    assert planned.batch == 4 * 6 * 4 * 64
    assert planned.peak > planned.base + planned.temporaries > planned.base + 0.5 * planned.activations > 0
    quantised = program.plan(configured(**{"model.quantize": "nf4"}), jax.devices(), shape=shape)
    assert planned.base / 3 < quantised.base < planned.base
    halved = program.plan(configured(**{"train.accumulate": 2}), jax.devices(), shape=shape)
    assert halved.activations == pytest.approx(planned.activations / 2, rel=1e-3)
    assert halved.costs.flops == pytest.approx(planned.costs.flops, rel=0.01)


def test_a_plan_says_what_to_change():
    planned = program.plan(configured(), jax.devices(), shape=by_size("tiny"), limit=1e5)
    assert planned.fits is False
    said = report.text(planned, configured())
    assert "it does not fit" in said and "config.model.remat=full" in said and "config.train.accumulate=2" in said
    assert re.search(r"peak +[\d.]+ MB of 100.000 kB", said)


def run(*arguments: str, config: str = "configs/quickstart.py") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.plan", f"--config={config}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_plans_and_refuses():
    done = run("--shape=tiny", "--config.data.row_tokens=64")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 x cpu; for each:" in done.stdout and "TFLOP" in done.stdout
    done = run("--shape=tiny", "--config.data.row_tokens=64", "--memory=0.0001")
    assert done.returncode == 5 and "it does not fit" in done.stdout
    done = run("--shape=tiny", "--config.train.rows=3", "--config.train.accumulate=2")
    assert done.returncode == 1 and "config.train.accumulate" in done.stderr


def test_a_search_finds_settings_that_fit():
    asked = configured()
    plan_of = lambda config: program.plan(config, jax.devices(), shape=by_size("tiny"), limit=1.2e6)
    assert plan_of(asked).fits is False
    tried = search.search(asked, jax.devices(), plan_of, most=6)
    assert len(tried) == 6 and asked == configured()
    best = search.frontier(tried)
    assert best and all(one.plan.fits for one in best)
    for one in best:  # what was tried is what a plan with these settings says
        assert one.plan == plan_of(configured(**one.choice))
        assert not any(t.plan.peak < one.plan.peak and t.cost < one.cost for t in tried if t.plan.fits)
        changed = [f"--config.{name}={value}" for name, value in one.choice.items() if tried[0].choice[name] != value]
        assert changed and " ".join(changed) in report.found(tried)


def test_a_search_in_vain_says_so():
    plan_of = lambda config: program.plan(config, jax.devices(), shape=by_size("tiny"), limit=1e5)
    said = report.found(search.search(configured(), jax.devices(), plan_of, most=2))
    assert re.match(r"none of 2 fits; the smallest takes [\d.]+ (kB|MB)", said)


MEASURE = """
import re, sys
import jax, numpy as np
from experiments.bench.sizes import by_size
from experiments.plan import program
from experiments.training import settings
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def now():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
config = settings.defaults()
config.data.row_tokens, config.train.rows = 512, 16
from experiments.training import devices
p = program.Program(config, devices.mesh(config.mesh), by_size("32m"))
step = p.lower().compile()
memory = step.memory_analysis()
held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
planned = held + memory.temp_size_in_bytes
before = now()
fill = lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding)
params, state, parts = jax.tree.map(fill, (p.params, p.state, p.parts))
open("/proc/self/clear_refs", "w").write("5")
state, out = step(params, state, parts, None)
jax.block_until_ready(state)
print(planned, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of a process is Linux's to tell")
def test_the_predicted_peak_is_the_measured_one():
    """On the CPU: what the process takes on top of what it took before its arrays were made."""
    # the allocator gives back what is free, so that it is not counted
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    planned, measured = map(int, done.stdout.split())
    np.testing.assert_allclose(planned, measured, rtol=0.05)
