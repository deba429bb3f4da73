"""Models by name: a server that answers as the Hugging Face Hub does, and none."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from tests.experiments.finetune_tiny import ROOT

GOLDEN = ROOT / "tests" / "golden"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SERVED = {"tiny/qwen3": GOLDEN / "decoders" / "qwen3", "tiny/clip": GOLDEN / "encoders" / "clip"}
NOT_WANTED = ("logits.npz", "outputs.npz", "onnx/model.safetensors")
LOAD = """
import sys
from experiments import models
try:
    model = (models.load_encoder if sys.argv[2:] else models.load)(sys.argv[1])
    print(type(model).__name__, model.config.__class__.__name__)
except ValueError as error:
    print("ValueError:", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """What the client asks of a repository: its files at a revision, and each of them."""

    def do_GET(self):
        self.answer(is_head=False)

    def do_HEAD(self):
        self.answer(is_head=True)

    def answer(self, is_head: bool) -> None:
        self.server.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if name not in SERVED:
            return self.refuse()
        files = {path.name: path for path in SERVED[name].iterdir()}
        if parts[0] == "api":
            listed = {name: path.stat().st_size for name, path in files.items()} | {NOT_WANTED[-1]: 1}
            if parts[4] == "tree":
                told = [{"type": "file", "path": name, "oid": name, "size": size} for name, size in listed.items()]
            else:
                told = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in listed]}
            return self.send(json.dumps(told).encode(), is_head)
        wanted = "/".join(parts[4:])
        return self.send(files[wanted].read_bytes(), is_head) if wanted in files else self.refuse()

    def refuse(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, body: bytes, is_head: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not is_head:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("localhost", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(endpoint: str, home: pathlib.Path, *arguments: str) -> str:
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "JAX_PLATFORMS": "cpu"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", LOAD, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_a_model_by_its_name_is_fetched_once_and_needs_no_network_afterwards(hub, tmp_path):
    endpoint = f"http://localhost:{hub.server_port}"
    assert load(endpoint, tmp_path, "tiny/qwen3") == "Model LlamaConfig"
    assert load(endpoint, tmp_path, f"tiny/clip@{COMMIT}", "encoder") == "ImageTextEncoder ClipConfig"
    fetched = [path.rsplit("/", 1)[1] for path in hub.asked if "/resolve/" in path]
    assert {"config.json", "model.safetensors"} == set(fetched)
    assert not any(name in path for path in hub.asked for name in NOT_WANTED)
    missing = load(endpoint, tmp_path, "tiny/absent")
    assert missing.startswith("ValueError: source='tiny/absent' is no directory here") and "404" in missing
    hub.shutdown()
    hub.server_close()
    assert load(endpoint, tmp_path, "tiny/qwen3") == "Model LlamaConfig"


def test_a_missing_network_is_a_clear_error(tmp_path):
    for which in ([], ["encoder"]):
        said = load("http://localhost:9", tmp_path, "tiny/qwen3", *which)
        assert said.startswith("ValueError: source='tiny/qwen3' is no directory here, and was not fetched")
        assert "Connection refused" in said and "give the path of a directory" in said
