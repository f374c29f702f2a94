"""Downloading D4RL's files from a server that fails in many ways."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from forked import children

from dydiff.cli import main
from dydiff.data import dataset_path, dataset_url, download, load_dataset
from dydiff.errors import DydiffError

NAME = "hopper-medium-v2"
ROWS = 400


def make_arrays(observation_dim=11, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "observations": generator.normal(size=(ROWS, observation_dim)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (ROWS, 3)).astype(np.float32),
        "rewards": generator.normal(size=ROWS).astype(np.float32),
        "terminals": np.arange(ROWS) % 40 == 39,
        "timeouts": np.zeros(ROWS, bool),
    }


def make_file(arrays) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for key, values in arrays.items():
            file[key] = values
    return buffer.getvalue()


@dataclass
class Server:
    """What the server on loopback does, and what it was asked."""

    content: bytes
    version: str | None = '"1"'  # ETag
    ranges: bool = True
    length: int | None = 0  # announced beyond the truth; None: no length at all
    cuts: list[int] = field(default_factory=list)  # bytes after which the next connections break
    status: list[int] = field(default_factory=list)  # answers to the next connections
    page: bytes | None = None
    pause: float = 0.0  # seconds without a byte after the first 3,000, or until it is set back
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        state: Server = self.server.state
        state.requests.append({"path": self.path, **self.headers})
        if state.status:
            self.send_error(state.status.pop(0))
            return
        body, start = state.page or state.content, 0
        wanted = self.headers.get("Range")
        if wanted and state.ranges and self.headers.get("If-Range", state.version) == state.version:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if state.length is not None:
            self.send_header("Content-Length", str(len(body) - start + state.length))
        if state.version:
            self.send_header("ETag", state.version)
        self.end_headers()
        body = body[start : start + state.cuts.pop(0)] if state.cuts else body[start:]
        if state.pause:
            self.wfile.write(body[:3000])
            deadline = time.monotonic() + state.pause
            while state.pause and time.monotonic() < deadline:
                time.sleep(0.01)
            return
        self.wfile.write(body)

    def log_message(self, format, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.state = Server(make_file(make_arrays()), url=f"http://127.0.0.1:{http.server_port}/mirror/")
    monkeypatch.setenv("DYDIFF_D4RL_URL", http.state.url)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http.state
    http.shutdown()
    thread.join()
    http.server_close()


def check_whole(server):
    path = dataset_path(NAME)
    assert path.read_bytes() == server.content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "something was left behind"


def leftovers():
    folder = dataset_path(NAME).parent
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def test_download(command, server):
    outcome = command("data", "download", NAME)
    assert outcome.status == 0 and str(dataset_path(NAME)) in outcome.output
    check_whole(server)
    assert [request["path"] for request in server.requests] == ["/mirror/gym_mujoco_v2/hopper_medium-v2.hdf5"]
    assert load_dataset(NAME).observation_dim == 11
    assert command("data", "download", NAME).status == 0 and len(server.requests) == 1  # it is there


@pytest.mark.parametrize("version", ['"1"', None, 'W/"1"'])
def test_dropped_connections_are_resumed(server, version):
    server.version = version
    server.cuts = [1, 3, 2000, 0, 5000]
    download.download_dataset(NAME)
    check_whole(server)
    assert [request.get("Range") for request in server.requests] == [
        None,
        *(f"bytes={start}-" for start in (1, 4, 2004, 2004, 7004)),
    ]
    assert all(request.get("If-Range") == '"1"' for request in server.requests[1:]) == (version == '"1"')


def test_server_without_ranges_starts_over(server):
    server.ranges = False
    server.cuts = [3000, 4000]
    download.download_dataset(NAME)
    check_whole(server)


def test_download_goes_on_in_another_process(server, monkeypatch):
    server.cuts = [3000] + [0] * 5
    with pytest.raises(DydiffError, match=r"the connection ended after 3,000 of [\d,]+ bytes.*DYDIFF_D4RL_URL.*by|put"):
        download.download_dataset(NAME)
    assert leftovers() == ["hopper_medium-v2.hdf5.part", "hopper_medium-v2.hdf5.part.tag"]
    download.download_dataset(NAME)
    check_whole(server)
    assert server.requests[-1]["Range"] == "bytes=3000-"


def test_changed_file_is_not_patched_together(server):
    server.cuts = [3000] + [0] * 5
    with pytest.raises(DydiffError):
        download.download_dataset(NAME)
    server.content, server.version = make_file(make_arrays(seed=1)), '"2"'
    download.download_dataset(NAME)
    check_whole(server)


def test_partial_file_longer_than_the_file(server):
    part = dataset_path(NAME).with_name("hopper_medium-v2.hdf5.part")
    part.parent.mkdir()
    part.write_bytes(bytes(len(server.content) + 7))
    download.download_dataset(NAME)
    check_whole(server)


def test_partial_file_that_is_whole(server):
    part = dataset_path(NAME).with_name("hopper_medium-v2.hdf5.part")
    part.parent.mkdir()
    part.write_bytes(server.content)
    download.download_dataset(NAME)
    check_whole(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("length", [5000, None])
def test_wrong_and_missing_lengths(server, length):
    server.length = length
    download.download_dataset(NAME)  # the rest does not exist, as the server itself says when asked for it
    check_whole(server)


def test_length_that_is_never_reached(server):
    server.length, server.ranges = 5000, False
    with pytest.raises(DydiffError, match="the connection ended after"):
        download.download_dataset(NAME)
    assert dataset_path(NAME).exists() is False
    assert len(server.requests) <= download.PATIENCE + 1


@pytest.mark.parametrize("length", [0, None])
def test_truncated_file_is_refused(server, length):
    server.content, server.length = server.content[:-2000], length
    with pytest.raises(DydiffError, match="is not the dataset 'hopper-medium-v2' and was removed.*truncated or damaged"):
        download.download_dataset(NAME)
    assert leftovers() == []


def test_pages_are_refused(server):
    server.page = b"<html>we are moving</html>"
    with pytest.raises(DydiffError, match="is not an HDF5 file"):
        download.download_dataset(NAME)
    assert leftovers() == [] and len(server.requests) == 1


@pytest.mark.parametrize("status", [404, 403])
def test_refusals_are_final(server, status):
    server.status = [status]
    with pytest.raises(DydiffError, match=f"answers {status} .*hopper_medium-v2.hdf5"):
        download.download_dataset(NAME)
    assert leftovers() == [] and len(server.requests) == 1


def test_failures_of_the_moment_are_not(server):
    server.status = [503, 500, 429]
    download.download_dataset(NAME)
    check_whole(server)
    dataset_path(NAME).unlink()
    server.status = [503] * 10
    with pytest.raises(DydiffError, match="it answers 503"):
        download.download_dataset(NAME)
    assert len(server.status) == 10 - download.PATIENCE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": None}, "lacks rewards"),
        ({"observations": np.zeros((ROWS, 17))}, "17 observation and 3 action columns, but hopper has 11 and 3"),
        ({"actions": np.full((ROWS, 3), np.nan)}, "actions holds NaN"),
    ],
)
def test_schema_is_checked(server, change, words):
    arrays = {key: values for key, values in {**make_arrays(), **change}.items() if values is not None}
    server.content = make_file(arrays)
    with pytest.raises(DydiffError, match=words):
        download.download_dataset(NAME)
    assert leftovers() == []


def download_slowly(folder: str, url: str, output: Path) -> None:
    """The body of a process that downloads from a server which stops sending."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where tests run in the background
    os.environ.update(D4RL_DATASET_DIR=folder, DYDIFF_D4RL_URL=url, no_proxy="127.0.0.1")
    with open(output, "w") as sys.stderr:
        status = main(["data", "download", NAME])
    os._exit(status)


def test_ctrl_c_says_what_is_kept(server, tmp_path):
    server.pause = 30.0  # after the first bytes
    child = children.Process(target=download_slowly, args=(str(tmp_path / "datasets"), server.url, tmp_path / "output"))
    child.start()
    part = tmp_path / "datasets" / "hopper_medium-v2.hdf5.part"
    while not (part.is_file() and part.stat().st_size == 3000):
        time.sleep(0.01)
        assert child.is_alive()
    os.kill(child.pid, signal.SIGINT)
    child.join(20)
    last = (tmp_path / "output").read_text().splitlines()[-1]
    assert child.exitcode == 1 and "Traceback" not in last
    assert last == f"error: Interrupted. The same command goes on from the 0.0 MB in {str(part)!r}."
    assert part.stat().st_size == 3000
    server.pause = 0.0
    download.download_dataset(NAME)
    check_whole(server)
    assert server.requests[-1]["Range"] == "bytes=3000-"


def test_no_server(server, monkeypatch):
    monkeypatch.setenv("DYDIFF_D4RL_URL", "http://127.0.0.1:9/")
    with pytest.raises(DydiffError) as caught:
        download.download_dataset(NAME)
    for part in ("http://127.0.0.1:9/gym_mujoco_v2/hopper_medium-v2.hdf5", "refused", str(dataset_path(NAME).parent)):
        assert part in str(caught.value)
    monkeypatch.setenv("DYDIFF_D4RL_URL", "file:///etc/")
    with pytest.raises(DydiffError, match="must be an address"):
        download.download_dataset(NAME)


def test_silent_server_times_out(server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    monkeypatch.setattr(Handler, "do_GET", lambda self: time.sleep(0.2))
    with pytest.raises(DydiffError, match="timed out"):
        download.download_dataset(NAME)


def test_full_disk_is_told_before(server, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(DydiffError, match="MB are free"):
        download.download_dataset(NAME)
    assert leftovers() == []


def test_several_at_once_download_once(server):
    server.cuts = [2000]
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(download.download_dataset, [NAME] * 8))
    assert set(paths) == {dataset_path(NAME)}
    check_whole(server)
    assert len(server.requests) == 2


def test_folder_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file"))
    with pytest.raises(DydiffError, match="Cannot write to.*D4RL_DATASET_DIR"):
        download.download_dataset(NAME)


def test_loading_downloads_only_when_asked(server, monkeypatch):
    with pytest.raises(DydiffError, match="dydiff data download hopper-medium-v2"):
        load_dataset(NAME)
    assert server.requests == []
    assert len(load_dataset(NAME, download=True)) == ROWS
    dataset_path(NAME).unlink()
    monkeypatch.setenv("DYDIFF_DOWNLOAD", "1")
    assert len(load_dataset(NAME)) == ROWS
    with pytest.raises(DydiffError, match="is not on this machine"):
        load_dataset("hopper-random-local")  # which nobody serves


def test_local_names_are_not_downloaded(server):
    with pytest.raises(DydiffError, match="dydiff collect hopper-random-local"):
        download.download_dataset("hopper-random-local")
    with pytest.raises(DydiffError, match="Unknown dataset"):
        download.download_dataset("hoper-medium-v2")


def test_address_without_a_mirror(monkeypatch):
    monkeypatch.delenv("DYDIFF_D4RL_URL", raising=False)
    assert dataset_url("hopper-medium-v0").startswith("http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco/hopper")
