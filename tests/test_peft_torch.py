"""Directories written here, loaded by PEFT itself: skipped without torch, transformers and peft."""

import warnings

import numpy as np
import pytest

import lorax
from lorax import AdaLoRA, LoRA, LoRAFA, TrainableTokens
from tests.peft_models import GOLDEN, PEFT_TOL, base_of, decoder, tied

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

QV = "layers/attn/(query|value)/kernel"
STABILISED = LoRA(rank=3, alpha=1, rank_stabilized=True)
OTHERS = {"layers/attn/query/kernel": LoRA(rank=2, alpha=5), "layers/mlp/.*": STABILISED}
CASES = {
    "lora": (decoder, {".*(kernel|embedding)": LoRA(rank=2, alpha=4)}, {}),
    "patterns": (decoder, OTHERS, {}),
    "rslora": (decoder, {QV: LoRA(rank=3, alpha=5, rank_stabilized=True)}, {}),
    "dora": (decoder, {QV + "|embed.*": lorax.DoRA(rank=3, alpha=5)}, {}),
    "pissa": (decoder, {QV: LoRA(rank=3, alpha=5, initializer="pissa")}, {}),
    "olora_dora": (decoder, {QV: lorax.DoRA(rank=3, alpha=5, initializer="olora")}, {}),
    "lorafa": (decoder, {QV: LoRAFA(rank=3, alpha=5)}, {}),
    "lora_bias": (decoder, {QV: LoRA(rank=3, alpha=5, bias=True)}, {}),
    "adalora": (decoder, {QV: AdaLoRA(rank=3, alpha=5)}, {}),
    "norms": (decoder, {".*scale": lorax.Full()}, {}),
    "full": (decoder, {"head/kernel|layers/mlp_norm/scale": lorax.Full(), QV: LoRA(rank=2)}, {}),
    "tokens": (decoder, {"embed/embedding": TrainableTokens(tokens=(5, 2)), QV: LoRA(rank=2)}, {}),
    "portable": (decoder, OTHERS, {"portable": True}),
    "tied_lora": (tied, {".*(kernel|embedding)": LoRA(rank=2, alpha=4)}, {}),
    "tied_full": (tied, {"embed/embedding": lorax.Full(), QV: LoRA(rank=2)}, {}),
    "tied_tokens": (tied, {"embed/embedding": TrainableTokens(tokens=(5, 2)), QV: LoRA(rank=2)}, {}),
}


def their_logits(base, directory):
    where = GOLDEN / ("peft_more/tied_base" if base is tied else "peft/base")
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(model, directory).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(np.asarray(base().x), dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same(case, tmp_path):
    base, spec, options = CASES[case]
    adapter = base().init(spec)
    base().save(tmp_path, adapter, **options)
    assert np.abs(base()(adapter) - base()(base().init(spec, scale=0.0))).max() > 100 * PEFT_TOL
    np.testing.assert_allclose(their_logits(base, tmp_path), base()(adapter), rtol=0, atol=PEFT_TOL)


AGAIN = ["rslora", "dora_embedding", "dora_patterns", "tokens_dict", "head", "tied_lora", "adalora_plain"]


@pytest.mark.parametrize("case", AGAIN)
def test_peft_reads_its_own_directory_written_again(case, tmp_path):
    base = base_of(case)
    base.save(tmp_path, base.load(GOLDEN / "peft_more" / case))
    logits = their_logits(tied if case.startswith("tied") else decoder, tmp_path)
    wanted = np.load(GOLDEN / "peft_more" / case / "golden.npz")["adapted"]
    np.testing.assert_allclose(logits[:, -1:], wanted, rtol=0, atol=PEFT_TOL)
