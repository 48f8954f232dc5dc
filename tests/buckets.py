"""A bucket for tests: gcp-storage-emulator in a process of its own, `python -m tests.buckets`.

What it ignores is added here: the precondition of an upload, and the generation of a download;
and the last byte of an upload that ends with a carriage return, which it takes for a line's end.
"""

import contextlib
import http.server
import subprocess
import sys
import threading
import uuid
from http import HTTPStatus

import pytest

from gcl_jax.paths import filesystem

BUCKET = "bucket"


@pytest.fixture(scope="session")
def bucket_server():
    """The environment of processes that are to see the bucket."""
    command = [sys.executable, "-m", "tests.buckets"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # it tells of every request
    with subprocess.Popen(command, text=True, **quiet) as server:
        address = server.stdout.readline().strip()
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }
        server.kill()


@pytest.fixture
def bucket(bucket_server, monkeypatch, tmp_path):
    """The address of an empty folder in the bucket, of which no copies are here."""
    for name, value in bucket_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GCL_JAX_CACHE", str(tmp_path / "cache"))
    known = type(filesystem("gs://"))
    known.clear_instance_cache()  # one may have spoken with Google
    yield f"gs://{BUCKET}/{uuid.uuid4().hex}"
    known.clear_instance_cache()


@pytest.fixture
def s3_bucket(monkeypatch, tmp_path):
    """The same in a bucket of Amazon's kind, of a server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("localhost", 0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    for name, value in {"AWS_ENDPOINT_URL": address, **dict.fromkeys(names, "us-east-1")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GCL_JAX_CACHE", str(tmp_path / "cache"))
    known = filesystem("s3://")
    known.mkdir(BUCKET)
    yield f"s3://{BUCKET}/x"
    type(known).clear_instance_cache()
    server.stop()


def main():
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def generation(request, storage, name):
        with contextlib.suppress(NotFound):
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        return "0"

    def conditional(upload):
        def uploaded(request, response, storage):  # the server does one thing at a time
            name = request.query.get("name") or [request.data["meta"]["name"]]
            now = generation(request, storage, name[0])
            if request.query.get("ifGenerationMatch", [now]) == [now]:
                return upload(request, response, storage)
            response.status = HTTPStatus.PRECONDITION_FAILED
            return None

        return uploaded

    def download(request, response, storage, *args, **kwargs):
        name = request.params["object_id"]
        response["X-Goog-Generation"] = generation(request, storage, name)
        return without_generation(request, response, storage, *args, **kwargs)

    def decoded(data, request):
        end = b"\n--==0==--"  # of gcsfs
        data = as_sent(data, request)
        return data.removesuffix(end) + b"\r" + end if data and data.endswith(end) else data

    as_sent, emulator._decode_raw_data = emulator._decode_raw_data, decoded
    without_generation, objects.download = objects.download, download
    objects._media_upload = conditional(objects._media_upload)
    objects._multipart_upload = conditional(objects._multipart_upload)
    http.server.HTTPServer.request_queue_size = 128  # who finds no place waits for seconds
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    print(f"http://localhost:{server._api._httpd.server_port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
