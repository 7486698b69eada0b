"""As much of the Hugging Face hub as `datasets`, `snapshot_download` and `hf download` ask of it: one repository."""

import hashlib
import http.server
import json
import os
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

COMMIT = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Serves files by their name in the repository; `fetched` has the names that were asked for."""

    def __init__(self, repository: str, files: Mapping[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.fetched = files, set[str]()
        # Models have no prefix where files are fetched, but have one in the API.
        self.api = f"/api/{repository}"
        self.resolve = f"/{repository.removeprefix('models/')}/resolve/"
        self.address = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(repository: str, files: Mapping[str, bytes]) -> Iterator[Hub]:
    """A hub with "datasets/OWNER/NAME" or "models/OWNER/NAME"."""
    hub = Hub(repository, files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()


def fresh(home: Path, endpoint: str) -> dict[str, str]:
    """The environment of a machine whose only network is `endpoint`."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "DELORA_", "TRANSFORMERS_"))}
    proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    paths = {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}
    return {**kept, **proxies, **paths, "HF_ENDPOINT": endpoint}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self):
        path, hub = urllib.parse.unquote(self.path.split("?")[0]), self.server
        status, body, headers = 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        name = path.removeprefix(hub.resolve).partition("/")[2]
        if path == "/":
            status, body, headers = 200, b"", {}
        elif path.startswith(hub.resolve) and name in hub.files:
            hub.fetched.add(name)
            status, body = 200, hub.files[name]
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        elif path.startswith(f"{hub.api}/tree/"):
            under = path.removeprefix(f"{hub.api}/tree/").partition("/")[2]
            deep = "recursive=true" in self.path.lower()
            entries = [self.entry(file) for file in hub.files if deep or os.path.dirname(file) == under]
            folders = set() if under else {os.path.dirname(file) for file in hub.files} - {""}
            entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
            status, body, headers = 200, json.dumps(entries).encode(), {}
        elif path == hub.api or path.startswith(f"{hub.api}/revision/"):
            about = {
                "id": hub.api.split("/", 3)[3],
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "siblings": [{"rfilename": file} for file in hub.files],
            }
            status, body, headers = 200, json.dumps(about).encode(), {}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def entry(self, file: str) -> dict:
        data = self.server.files[file]
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": file}

    def log_message(self, *_):
        pass
