"""A language model, a tokenizer and data so small that a fine-tuning run takes seconds."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
from ml_collections import config_dict
from tokenizers import pre_tokenizers

from experiments.models.tokenizer import byte_level_bpe
from experiments.training import settings

ROOT = pathlib.Path(__file__).parents[2]
LAYERS, WIDTH, HEADS, KV_HEADS, FFN = 2, 32, 4, 2, 48
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'][0] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a:{% endif %}"
)


def get_config() -> config_dict.ConfigDict:
    """Return settings for a run of seconds, without the model's and the data's place."""
    config = settings.defaults()
    config.name = "tiny"
    config.data.row_tokens = 64
    config.lora.rank = 2
    config.train.update(steps=12, rows=2, warmup_steps=2, learning_rate=1e-2)
    config.evaluation.update(examples=4, loss_examples=4, progress_examples=2, max_new_tokens=4, samples=2)
    config.evaluation.every = 6
    config.checkpoint.every = 2
    return config


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
    weights = {name: np.ones(s) if len(s) == 1 else draw.normal(0, 0.2, s) for name, s in shapes.items()}
    weights = {f"{name}.weight": weight.astype(np.float32) for name, weight in weights.items()}
    save_file(weights, directory / "model.safetensors")
    byte_level_bpe(tokens, [], SPECIAL, pre="gpt-2").save(str(directory / "tokenizer.json"))
    tokenizer = {"eos_token": SPECIAL[1], "pad_token": SPECIAL[1], "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory


def write_data(path: pathlib.Path, count: int = 40) -> pathlib.Path:
    """Write `count` questions with JSON answers."""
    lines = [{"prompt": f"{i} odd?", "completion": json.dumps({"odd": i % 2})} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A folder with a model and a data file for tiny runs."""

    folder: pathlib.Path

    @classmethod
    def write(cls, folder: pathlib.Path) -> "Inputs":
        """Write the model and the data."""
        write_model(folder / "model")
        write_data(folder / "data.jsonl")
        (folder / "tiny.py").write_text("from tests.experiments.finetune_tiny import get_config\n")
        return cls(folder)

    def settings(self, run_dir: pathlib.Path, **changes: Any) -> dict[str, Any]:
        """Return the settings that a run in `run_dir` needs besides `get_config()`, by dotted name."""
        own = {
            "run_dir": run_dir,
            "model.source": self.folder / "model",
            "data.path": self.folder / "data.jsonl",
        }
        return {name: str(value) for name, value in own.items()} | changes

    def config(self, run_dir: pathlib.Path, **changes: Any) -> config_dict.ConfigDict:
        """Return the configuration of a run in `run_dir`."""
        config = get_config()
        config.update_from_flattened_dict(self.settings(run_dir, **changes))
        return config

    def command(self, run_dir: pathlib.Path, **changes: Any) -> list[str]:
        """Return the command line of a run in `run_dir`."""
        given = [f"--config.{name}={value}" for name, value in self.settings(run_dir, **changes).items()]
        return [sys.executable, "-m", "experiments.finetune", f"--config={self.folder / 'tiny.py'}", *given]

    def start(self, run_dir: pathlib.Path, **changes: Any) -> subprocess.Popen[str]:
        """Start that command in a process of its own."""
        # Programs that one process compiled are found by the next: compiling would take most of the time.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs")}
        cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            self.command(run_dir, **changes),
            cwd=ROOT,
            env=os.environ | cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
