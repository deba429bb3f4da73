"""One variant of `experiments.bench.train` by PEFT: `python train_peft.py SETTINGS`, in any Python that has torch.

Speaks as train_worker does. The same decoder, loss, optimiser and batch: Hugging Face's implementation of it, with its
own choice of attention.
"""

import json
import pathlib
import resource
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import peft
import torch
import transformers

from experiments.bench.worker_settings import LEARNING_RATE, SHAPES, Settings

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Serve steps."""
    settings = Settings(**json.loads(sys.argv[1]))
    s = SHAPES[settings.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=s["vocabulary"],
        num_hidden_layers=s["layers"],
        hidden_size=s["dim"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        intermediate_size=s["ffn"],
        max_position_embeddings=settings.length,
        tie_word_embeddings=s["tied"],
        use_cache=False,
    )
    with torch.device(device):
        base = transformers.LlamaForCausalLM(config).to(getattr(torch, settings.dtype))
    lora = peft.LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=TARGETS)
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-4)
    tokens = torch.randint(0, s["vocabulary"], (settings.batch, settings.length), device=device)
    run = torch.compile(model) if "compiled" in settings.variant else model

    def step() -> torch.Tensor:
        loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    print(json.dumps({"device": device_name, "versions": versions, "peak_flops": None}), flush=True)
    loss = None
    for line in sys.stdin:
        if line.strip() == "end":
            break
        start = time.perf_counter()
        loss = step()
        if device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"loss": None if loss is None else float(loss), "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
