"""Servers of a studio, all real: PostgreSQL, an S3-like store, and MLflow on both."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlflow_servers import free_port

_NOBODY = 65534  # PostgreSQL refuses root
_TIMEOUT_S = 120


def postgres_program(name: str) -> str | None:
    """Return a program of PostgreSQL, also where Debian keeps them; None without PostgreSQL."""
    folders = [str(folder) for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run PostgreSQL with a new database in a folder that any user can enter, and yield its URI for MLflow."""
    port, user = free_port(), _NOBODY if os.getuid() == 0 else None
    data = folder / "postgres"
    data.mkdir(mode=0o700)
    if user is not None:
        os.chown(data, user, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(postgres_program(program)), "-D", str(data), *arguments]
        with (folder / f"{program}.log").open("ab") as log:
            subprocess.run(
                command, check=True, timeout=_TIMEOUT_S, stdout=log, stderr=log, user=user, group=user, cwd="/"
            )

    run("initdb", "--username=mlflow", "--auth=trust", "--encoding=UTF8")
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1"
    run("pg_ctl", "start", "--wait", "-l", str(data / "log"), "-o", options)
    try:
        yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "stop", "-m", "immediate")


@contextmanager
def object_store() -> Iterator[Mapping[str, str]]:
    """Run an S3-like server, and yield the environment variables by which clients reach it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    try:
        yield {
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextmanager
def bucket(name: str) -> Iterator[str]:
    """Run an S3-like server with an empty bucket, which clients in this process reach, and yield its URL."""
    import boto3
    import fsspec

    with object_store() as variables, pytest.MonkeyPatch.context() as patch:
        for variable, value in variables.items():
            patch.setenv(variable, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # connected to earlier servers
        boto3.client("s3").create_bucket(Bucket=name)
        yield f"s3://{name}"
