"""The table of methods: its closed forms are those of the adapters, and what it prints is what was compiled."""

import re

import jax
import jax.numpy as jnp
import pytest

import lorax
from experiments.bench.decoder import Shape, biased_dense, decoder, init_params, with_biases
from experiments.bench.method_cost import compare_methods, compare_scanned, main, markdown, optimiser
from experiments.bench.methods import Entry, entries
from experiments.models.llama import LlamaConfig

TINY = Shape(layers=1, d_model=48, heads=4, kv_heads=2, d_ff=80, vocabulary=56)
ENTRIES = {entry.name: entry for entry in entries(rank=2, vera_rank=6, adalora_rank=3, width=5, length=4)}
FLOPS_OVER_LORA = 1.10  # what DoRA is allowed, at the size of the printed table
MEMORY_OVER_LORA = 1.05


def adapter_of(entry: Entry) -> lorax.Adapter:
    fn = decoder(TINY, biased_dense) if entry.has_biases else decoder(TINY)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), TINY))
    params = jax.eval_shape(with_biases, params) if entry.has_biases else params
    sites = lorax.trace(fn, params, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    return jax.eval_shape(lambda p: lorax.init(jax.random.key(0), entry.spec, sites, p), params)


def cells(printed: str, name: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", ENTRIES)
def test_the_closed_form_is_the_number_of_parameters_of_every_site(name: str) -> None:
    adapter = adapter_of(ENTRIES[name])
    got = {path: sum(x.size for x in arrays.values()) for path, arrays in adapter.params.items()}
    assert got == {site.path: ENTRIES[name].numbers(site) for site in adapter.sites}


def test_every_method_that_changes_a_decoder_has_a_row() -> None:
    used = {type(method) for entry in ENTRIES.values() for method in entry.rules.values()}
    named = {m for n in lorax.__all__ if isinstance(m := getattr(lorax, n), type) and issubclass(m, lorax.Method)}
    # Rows of a table that are trained by themselves are a part of full fine-tuning.
    assert used == named - {lorax.Method, lorax.TrainableTokens}


def test_methods_adapt_the_sites_that_their_setting_names() -> None:
    names = lambda entry: {re.sub(r"layers/\d+/", "", path) for path in adapter_of(ENTRIES[entry]).params}
    linear = {f"{n}/kernel" for n in ("query", "key", "value", "out", "gate", "up", "down", "head")}
    assert names("LoRA") == names("VeRA") == linear
    assert names("BitFit") == {n.replace("kernel", "bias") for n in linear}
    assert names("norm tuning") == {"norm_attn", "norm_mlp", "norm"}
    assert names("full") == linear | names("norm tuning") | {"embed"}
    assert names("(IA)³") == {"key/kernel", "value/kernel", "down/kernel"}


def test_the_biased_decoder_is_the_decoder_until_a_bias_moves() -> None:
    @jax.jit
    def logits(moved_by: jax.Array) -> tuple[jax.Array, jax.Array]:
        params, tokens = init_params(jax.random.key(0), TINY), jnp.arange(8).reshape(2, 4)
        biased = with_biases(params)
        biased["head"]["bias"] += moved_by
        return decoder(TINY)(params, tokens), decoder(TINY, biased_dense)(biased, tokens)

    plain, biased = logits(jnp.zeros(()))
    assert jnp.allclose(biased, plain, atol=1e-5)
    plain, biased = logits(jnp.ones(()))
    assert jnp.allclose(biased, plain + 1, atol=1e-5)


def test_adalora_gets_its_budget_update_and_no_other_method() -> None:
    state = lambda name: jax.eval_shape(optimiser(a := adapter_of(ENTRIES[name])).init, a.params)
    has_budget = [name for name in ENTRIES if isinstance(state(name), lorax.optim.AdaLoRAState)]
    assert has_budget == ["AdaLoRA"]


def test_the_table_prints_what_was_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [ENTRIES["LoRA"], ENTRIES["LoRA-FA"]]
    steps = compare_methods(TINY, chosen, batch=2, length=64, repeats=1)
    printed = capsys.readouterr().out
    row = cells(printed, "LoRA-FA")
    numbers = sum(chosen[1].numbers(site) for site in steps["LoRA-FA"].adapter.sites)
    assert row[2:5] == ["8", "rO", f"{numbers:,}"]
    assert row[7] == "yes"
    ratio = steps["LoRA-FA"].cost["GFLOP"] / steps["LoRA"].cost["GFLOP"]
    assert row[9] == f"{ratio:.3f}" and ratio < 1
    assert float(row[-1]) > 0
    assert cells(printed, "LoRA")[9::3][:2] == ["1.000", "1.000"]
    forward, both = (float(cells(printed, f"frozen, {n}")[8]) for n in ("forward", "and backward"))
    assert forward < both


@pytest.mark.slow
def test_a_scanned_decoder_over_nf4_has_a_smaller_base(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 64, "layers": 2, "dim": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn_dim": 64}
    config = LlamaConfig(**sizes, max_positions=8)
    steps = compare_scanned(config, rank=2, batch=1, length=8, remats=["full"], names=["LoRA over NF4"])
    kernels = steps["full", "LoRA over NF4"].base["layers"]["mlp"]
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    bits = [8 * size(node) / node["kernel"].size for node in kernels.values()]
    assert max(bits) < 5 and len(bits) == 3
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| every layer")]
    assert row.split(" | ")[1] == "LoRA over NF4" and row.endswith("| 1.000 |")


def test_an_unknown_method_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"LoRB.*known are LoRA, rsLoRA"):
        main(["--methods", "LoRA,LoRB"])


def test_a_table_has_a_line_for_each_row() -> None:
    assert markdown(["a", "b"], [[1, 2]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


@pytest.mark.slow
def test_dora_costs_what_it_may() -> None:
    chosen = [entry for entry in entries() if entry.name in ("LoRA", "DoRA")]
    steps = compare_methods(Shape(), chosen, batch=4, length=128)
    flops, memory = (steps["DoRA"].cost[what] / steps["LoRA"].cost[what] for what in ("GFLOP", "temp MiB"))
    assert flops <= FLOPS_OVER_LORA
    assert memory <= MEMORY_OVER_LORA


@pytest.mark.slow
def test_dora_costs_what_it_may_in_a_scan() -> None:
    """With all recomputed, what the output head keeps is as much as all the rest."""
    sizes = {"vocab_size": 2048, "layers": 6, "dim": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn_dim": 704}
    kept = compare_scanned(LlamaConfig(**sizes, max_positions=128), 8, 4, 128, remats=[None])
    memory = {name: step.cost["temp MiB"] for (_, name), step in kept.items()}
    assert memory["DoRA"] <= MEMORY_OVER_LORA * memory["LoRA"]
    assert memory["DoRA, LoRA on the head"] <= MEMORY_OVER_LORA * memory["LoRA"]
    assert memory["DoRA over NF4"] <= MEMORY_OVER_LORA * memory["LoRA over NF4"]
    wide = LlamaConfig(**{**sizes, "vocab_size": 16384}, max_positions=128)
    names = ["LoRA", "DoRA, LoRA on the head"]
    lora, dora = (
        step.cost["temp MiB"] for step in compare_scanned(wide, 8, 4, 128, remats=["full"], names=names).values()
    )
    assert dora <= MEMORY_OVER_LORA * lora
