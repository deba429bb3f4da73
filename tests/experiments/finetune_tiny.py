"""A language model, a tokenizer and data so small that a fine-tuning run takes seconds."""

import json
import pathlib
import subprocess
import sys

import numpy as np
from tokenizers import pre_tokenizers

from experiments.models.tokenizer import byte_level_bpe

ROOT = pathlib.Path(__file__).parents[2]
LAYERS, WIDTH, HEADS, KV_HEADS, FFN = 2, 32, 4, 2, 48
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a:{% endif %}"
)
CONFIG = """
from experiments.training import settings


def get_config():
    config = settings.defaults()
    config.name = "tiny"
    config.data.row_tokens = 64
    config.lora.rank = 2
    config.lora.dropout = 0.1
    config.train.update(dict(steps=12, rows=2, warmup_steps=2, learning_rate=1e-2))
    config.evaluation.update(dict(examples=4, loss_examples=4, every=6, progress_examples=2, max_new_tokens=4, samples=2))
    config.checkpoint.every = 2
    return config
"""


def write_model(directory: pathlib.Path) -> pathlib.Path:
    """Write a random Llama with tied embeddings and a byte tokenizer as a Hugging Face directory."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokens),
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config))
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"model.embed_tokens": (len(tokens), WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qo"}
        shapes |= {f"{block}.self_attn.{name}_proj": (kv, WIDTH) for name in "kv"}
        shapes |= {f"{block}.mlp.{name}_proj": (FFN, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj": (WIDTH, FFN)}
        shapes |= {f"{block}.{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
    draw = np.random.default_rng(0)
    weights = {
        f"{name}.weight": (np.ones(shape) if len(shape) == 1 else draw.normal(0, 0.2, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors")
    byte_level_bpe(tokens, [], SPECIAL, pre="gpt-2").save(str(directory / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[1], "pad_token": SPECIAL[1], "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_data(path: pathlib.Path, count: int = 40) -> pathlib.Path:
    """Write `count` questions with JSON answers."""
    lines = [{"prompt": f"{i} odd?", "completion": json.dumps({"odd": i % 2})} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(folder: pathlib.Path, run_dir: pathlib.Path, *overrides: str) -> list[str]:
    """Return the command that fine-tunes on what `folder` holds; the model and the data are written when missing."""
    model, samples, config = folder / "model", folder / "data.jsonl", folder / "tiny.py"
    if not config.exists():
        write_model(model)
        write_data(samples)
        config.write_text(CONFIG)
    settings = {"run_dir": run_dir, "model.source": model, "data.path": samples}
    given = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "experiments.finetune", f"--config={config}", *given, *overrides]


def finetune(folder: pathlib.Path, run_dir: pathlib.Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(command(folder, run_dir, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=240)
