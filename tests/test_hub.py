"""Downloads from a hub, with a local server in its place; the user's cache folder."""

import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from typing import ClassVar

import numpy as np
import pytest

from refimpl import files
from refimpl.checkpoint import names, safetensors
from refimpl.cli import run
from refimpl.errors import RefimplError
from refimpl.tiny import FP8_DIR, GGUF_DIR

ID = "someone/tiny-v3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """What `snapshot_download` asks of a hub: the repository's facts, its file list, and the files at one
    commit.
    """

    files = {p.name: p.read_bytes() for p in FP8_DIR.iterdir()} | {
        "modeling_deepseek.py": b"raise SystemExit('run me not')",
        "x.bin": b"pickle",
    }
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == f"/api/models/{ID}/revision/main":
            self._send(
                json.dumps(
                    {"_id": "1", "id": ID, "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]}
                ).encode()
            )
        elif path.startswith(f"/api/models/{ID}/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(b), "oid": f"{hash(n) & 0xFFFF:040x}"}
                for n, b in self.files.items()
            ]
            self._send(json.dumps(rows).encode())
        elif path.startswith(f"/{ID}/resolve/") and (name := path.split("/", 5)[5]) in self.files:
            self.asked.append(name)
            self._send(
                self.files[name],
                {"X-Repo-Commit": COMMIT, "ETag": f'"{len(name)}-{name.replace("/", "-")}"'},
                "application/octet-stream",
            )
        else:
            self._send(b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, status=404)

    do_HEAD = do_GET

    def _send(self, body: bytes, headers=None, kind="application/json", status=200):
        self.send_response(status)
        for key, value in (
            {"Content-Type": kind, "Content-Length": str(len(body))} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub_env(tmp_path):
    pytest.importorskip("huggingface_hub", reason="the extra `hub`")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.asked.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    path = os.pathsep.join(p for p in sys.path if p)
    yield env | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": path,
        "NO_PROXY": "*",
    }
    server.shutdown()
    server.server_close()


def chat(env, *args):
    return subprocess.run(
        [sys.executable, "-m", "refimpl.chat", *args], env=env, capture_output=True, text=True
    )


def test_a_model_comes_from_the_hub_without_its_code(hub_env):
    done = chat(hub_env, "--model_path", ID, "-p", "What is 7 + 8?", "--greedy")
    assert (done.returncode, done.stdout) == (0, "15\n"), done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(Hub.asked)
    assert not {"modeling_deepseek.py", "x.bin"} & set(Hub.asked)


@pytest.mark.parametrize("weights", [True, False])
def test_all_that_text_needs_is_fetched(hub_env, weights, monkeypatch):
    names = ("tiktoken.model", "chat_template.jinja", "additional_chat_templates/rag.jinja", "spiece.model")
    monkeypatch.setattr(Hub, "files", Hub.files | dict.fromkeys(names, b"x"))
    program = f"from refimpl.loading import hub; print(hub.resolve({ID!r}, weights={weights}))"
    done = subprocess.run([sys.executable, "-c", program], env=hub_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(names[:3]) <= set(Hub.asked) and "spiece.model" not in Hub.asked
    assert ("model.safetensors" in Hub.asked) == weights


def test_beside_a_local_gguf_only_the_small_files_are_fetched(hub_env, hybrid_folder):
    done = chat(
        hub_env, "--model_path", ID, "--gguf_path", str(hybrid_folder), "-p", "What is 7 + 8?", "--greedy"
    )
    assert (done.returncode, done.stdout) == (0, "15\n"), done.stderr
    assert "tokenizer.json" in Hub.asked and "model.safetensors" not in Hub.asked


def test_a_merge_fetches_only_the_files_that_it_reads(hub_env, hybrid_folder, tmp_path, monkeypatch):
    tensors = safetensors.read_folder(FP8_DIR)[0]
    parts = {"model-00001-of-00003.safetensors": {}, "model-00002-of-00003.safetensors": {}}
    for name, info in tensors.items():
        parts[sorted(parts)[names.is_routed_expert(name)]][name] = (
            info.dtype,
            np.array(safetensors.view(info)),
        )
    for file, arrays in parts.items():
        safetensors.save(tmp_path / file, arrays)
    weight_map = {n: file for file, arrays in parts.items() for n in arrays} | {
        "model.layers.4.enorm.weight": "model-00003-of-00003.safetensors"
    }
    shards = {file: (tmp_path / file).read_bytes() for file in parts} | {
        "model-00003-of-00003.safetensors": b"of the layer beyond the last"
    }
    small = {n: b for n, b in Hub.files.items() if n != "model.safetensors"}
    monkeypatch.setattr(
        Hub, "files", small | shards | {safetensors.INDEX: json.dumps({"weight_map": weight_map}).encode()}
    )
    convert = [
        sys.executable,
        "-m",
        "refimpl.convert_model",
        "--gguf_path",
        GGUF_DIR,
        "--output_path",
        tmp_path / "out",
        "--from-hub",
    ]
    done = subprocess.run([*convert, ID], env=hub_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [n for n in Hub.asked if n.endswith(".safetensors")].count("model-00001-of-00003.safetensors") >= 1
    assert not {
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "modeling_deepseek.py",
        "x.bin",
    } & set(Hub.asked)
    for path in hybrid_folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    done = subprocess.run([*convert, "../x"], env=hub_env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("refimpl: E4021 ../x: not a hub id")


def test_an_unknown_repository_is_one_line(hub_env):
    done = chat(hub_env, "--model_path", "someone/else", "-p", "x")
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert "E5111 someone/else" in done.stderr.splitlines()[-1]


def test_the_cache_folder_is_the_user_s_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "a" / "cache"))
    assert files.cache_folder().stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "file"))
    with pytest.raises(RefimplError, match="E5104"):
        files.cache_folder()
    assert run(lambda argv: files.cache_folder() and None, []) == 1


def test_without_refimpl_cache_the_platform_s_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("REFIMPL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "refimpl"
