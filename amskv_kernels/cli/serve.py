"""`amskv serve`: an HTTP endpoint that draws images at different steps in one batch."""

from __future__ import annotations

import argparse
import ipaddress
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amskv_kernels.arguments import shown
from amskv_kernels.cli.arguments import command, memory, whole
from amskv_kernels.cli.processes import each_of, is_first, processes
from amskv_kernels.cli.subjects import DIGIT_NAMES, add_sampling, add_var, subject_of
from amskv_kernels.planning.memory import MIB

if TYPE_CHECKING:
    from fastapi import FastAPI
    from torch.distributed.device_mesh import DeviceMesh

    from amskv_kernels.cli.drawing import Subject
    from amskv_kernels.serving import Engine

AT_ONCE = 8  # images whose widest steps fit the pool together, where no memory is given
WAITING = 256  # images
PORT = 8000
BACKLOG = 2048  # connections that may wait to be taken; uvicorn's own default
GRACE = 60  # seconds for what is being drawn when the server is told to stop
SHORTEST_KEY = 16  # characters
EPILOG = """\
for example:
  amskv serve                                      the digits of this project, in a clone of it
  amskv serve --var var_d16.pth --vae vae_ch160v4096z32.pth --policy ams-kv:75 --memory 16GiB --classes imagenet.txt
  torchrun --standalone --nproc-per-node 2 -m amskv_kernels serve …      a model that one GPU does not hold, on two

then:
  curl -s localhost:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "7"}'
  a browser on http://localhost:8000 draws images scale by scale; docs/serving.md tells the rest
"""


def add(commands: Any) -> None:
    """Add the command to the parser's."""
    serve = command(commands, "serve", "serve a checkpoint over HTTP, as OpenAI's images API", EPILOG)
    add_var(serve)
    add_sampling(serve)
    serve.add_argument("--policy", default="full", help="as `amskv plan` takes it, such as ams-kv:75 (default full)")
    serve.add_argument(
        "--memory", type=memory, help=f"for pages, such as 8GiB of each process (default: {AT_ONCE} images at once)"
    )
    serve.add_argument("--classes", metavar="FILE", help="names for prompts, a line per class, several by commas")
    serve.add_argument("--queue", type=whole(0), default=WAITING, help=f"images that may wait (default {WAITING})")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    serve.add_argument("--port", type=whole(0, 65535), default=PORT, help=f"0 for any (default {PORT})")
    serve.add_argument("--key-file", metavar="FILE", help="holds the key that requests must bear (default: none)")
    serve.add_argument(
        "--grace", type=whole(0), default=GRACE,
        help=f"seconds for images under way when it is told to stop (default {GRACE})",
    )  # fmt: skip
    serve.set_defaults(run=run, stack=None, schedule=None)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal says to stop; started by torchrun, in several processes, of which the first answers."""
    with processes(arguments.device) as mesh:
        return _serve(arguments, mesh) if is_first(mesh) else _follow(arguments, mesh)


def _serve(arguments: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    try:
        import uvicorn
    except ImportError as error:
        raise RuntimeError(
            f"{error.name} is not installed; serving needs pip install 'amskv_kernels[serve]'"
        ) from error
    from amskv_kernels.serving import ShardedEngine

    listening = _listen(arguments.host, arguments.port)
    try:
        subject = subject_of(arguments, mesh)
        engine = _engine(arguments, subject, mesh)
        app = _app(arguments, subject, engine, mesh)
    except BaseException:
        listening.close()
        raise
    if arguments.key_file is None and not _is_loopback(arguments.host):
        print(f"warning   whoever reaches {arguments.host} may draw; --key-file asks for a key", flush=True)
    config = uvicorn.Config(
        app, host=arguments.host, port=arguments.port, timeout_graceful_shutdown=arguments.grace, server_header=False,
        log_level="warning",
    )  # fmt: skip
    host, port = listening.getsockname()[:2]
    print(f"listening http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    server = uvicorn.Server(config)
    if isinstance(engine, ShardedEngine):
        engine.when_lost = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listening])
    if isinstance(engine, ShardedEngine) and engine.lost is not None:
        raise RuntimeError(f"the processes of the sharded model are no longer at one: {engine.lost}")
    return 0


def _follow(arguments: argparse.Namespace, mesh: DeviceMesh | None) -> int:
    """In another process than the first, which ends it: signals are the first one's to obey."""
    from amskv_kernels.serving import ShardedEngine

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    engine = _engine(arguments, subject_of(arguments, mesh), mesh)
    assert isinstance(engine, ShardedEngine)
    engine.follow()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    if not host:
        raise ValueError("--host is empty; 0.0.0.0 stands for every address of this machine")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, TypeError, UnicodeError) as error:  # TypeError: of names that are not encodable
        raise ValueError(f"--host {shown(host)} --port {port} cannot be listened at: {error}") from error


def _engine(arguments: argparse.Namespace, subject: Subject, mesh: DeviceMesh | None) -> Engine:
    import torch

    from amskv_kernels.cli.drawing import Checkpoint
    from amskv_kernels.policies import parse_policy
    from amskv_kernels.serving import Engine, ShardedEngine

    assert isinstance(subject, Checkpoint)
    policy = parse_policy(arguments.policy, subject.shape.schedule, subject.shape.layers)
    bytes_of_pool = arguments.memory or round(AT_ONCE * subject.image_bytes(subject.plan(policy)))
    kind = Engine if mesh is None else ShardedEngine
    return kind(
        subject.var, subject.vae, policy, memory=bytes_of_pool, max_waiting=arguments.queue,
        dtype=torch.int8 if subject.eight_bit else None,
    )  # fmt: skip


def _app(arguments: argparse.Namespace, subject: Subject, engine: Engine, mesh: DeviceMesh | None) -> FastAPI:
    from amskv_kernels.cli.drawing import Checkpoint
    from amskv_kernels.serving.web import EngineSource, Served, create_app

    assert isinstance(subject, Checkpoint)
    key = None if arguments.key_file is None else _key(arguments.key_file)
    names: tuple[str, ...] = DIGIT_NAMES if subject.shape.name == "digits" else ()
    if arguments.classes is not None:
        names = _names(arguments.classes)
    guidance, top_k, top_p = (subject.sampling[name] for name in ("cfg", "top_k", "top_p"))
    served = Served.of(engine, subject.shape.name, names, guidance=guidance, top_k=top_k, top_p=top_p)
    pace = engine.admission.pace
    inside = pace.inside(len(subject.shape.schedule)) / 2
    print(f"model     {served.name}, {served.size}, {served.classes} classes, under {arguments.policy}")
    print(
        f"pool      {engine.pool.nbytes / MIB:.2f} MiB, {inside:.1f} images with guidance inside at once{each_of(mesh)}"
    )
    return create_app(served, EngineSource(engine), key=key)


def _names(path: str) -> tuple[str, ...]:
    try:
        return tuple(Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--classes {path} cannot be read: {error}") from error


def _key(path: str) -> str:
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--key-file {path} cannot be read: {error}") from error
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"--key-file {path} must hold one word of at least {SHORTEST_KEY} printable ASCII characters")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
