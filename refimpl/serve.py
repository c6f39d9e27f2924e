"""Serve a model to every client that speaks OpenAI's protocol, and a page to chat with it:

    python -m refimpl.serve [--model_path DIR|HUB_ID] [--gguf_path DIR] [--port 8000]

Without a model it serves the embedded one. It listens on this machine alone unless --host says otherwise, and
then wants an API key. See docs/serve.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.chat import add_model_flags, check_sampling_flags, open_conversation
from refimpl.cli import Parser, integer, number, run
from refimpl.errors import refusal
from refimpl.files import read_small
from refimpl.loading import compiling
from refimpl.talk.conversation import Conversation

if TYPE_CHECKING:
    from refimpl.server.app import Server

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
MOST_TOKENS = 4096  # of an answer, unless told otherwise


def make_server(
    chat: Conversation,
    name: str,
    *,
    places: int = 64,
    waiting: int = 64,
    most_tokens: int = MOST_TOKENS,
    cache_bytes: int | None = None,
) -> Server:
    """An engine for a model that is open, and what speaks for it. UnsupportedError E9002 without the
    extra.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise refusal("E9002", "serve", package=package)
    # An extra, and half a second to import.
    from refimpl.server.answering import Served
    from refimpl.server.app import Server
    from refimpl.server.engine import Engine
    from refimpl.server.room import Room

    model, config = chat.session.model, chat.session.model.config
    engine = Engine(model, chat.session.banned, Room(model, cache_bytes), places, waiting)  # type: ignore[arg-type]
    context = config.max_position_embeddings
    served = Served(
        name,
        chat.tokenizer,
        chat.template,
        chat.sampling,
        context,
        config.vocab_size,
        min(most_tokens, context),
        chat.max_new_tokens,
        chat.variables,
    )
    return Server(engine, served)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys, one a line, from a file or else from REFIMPL_API_KEY; a flag's value all users of a machine
    can read. InputFormatError E9005 for one that a header could not carry.
    """
    text = (
        read_small(file, 1 << 20).decode("utf-8", "replace")
        if file
        else os.environ.get("REFIMPL_API_KEY", "")
    )
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if any(len(key) > 512 or not key.isascii() or not key.isprintable() or " " in key for key in keys) or (
        file and not keys
    ):
        raise refusal("E9005", file or "REFIMPL_API_KEY")
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. ResourceError E9004."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        raise refusal(
            "E9004", f"{host}:{port}", reason=getattr(error, "strerror", None) or str(error)
        ) from None


def _parser() -> Parser:
    parser = Parser("python -m refimpl.serve", __doc__)
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=integer(0, 65535), default=8000, help="0: any that is free (default 8000)"
    )
    parser.add_argument("--served_model_name", metavar="NAME", help="default: the name of the model's folder")
    parser.add_argument(
        "--api_key_file", type=Path, metavar="FILE", help="keys, one a line; or one in REFIMPL_API_KEY"
    )
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may ask; may be repeated",
    )
    parser.add_argument(
        "--parallel",
        type=integer(1, 4096),
        default=64,
        metavar="N",
        help="conversations at once (default 64)",
    )
    parser.add_argument(
        "--queue",
        type=integer(0, 65536),
        default=64,
        metavar="N",
        help="more that may wait (default 64); then 503",
    )
    parser.add_argument(
        "--max_tokens",
        type=integer(1),
        default=MOST_TOKENS,
        metavar="N",
        help=f"of an answer (default {MOST_TOKENS})",
    )
    parser.add_argument(
        "--cache_gb",
        type=number(1e-6, 1e6),
        metavar="GB",
        help="memory for latent caches on each device (default: half of what is free)",
    )
    parser.add_argument(
        "--max_body_mb", type=number(1e-3, 1e3), default=4.0, metavar="MB", help="of a request (default 4)"
    )
    return parser


def main(argv: list[str]) -> int | None:
    """Serve a model over HTTP as OpenAI's API does, until a signal ends it. RefimplError E9001 when the host
    is not the loopback and there is no key.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    check_sampling_flags(parser, args)
    loopback = args.host in ("127.0.0.1", "localhost", "::1")
    keys = read_keys(args.api_key_file)
    if not loopback and not keys:
        raise refusal("E9001", args.host)
    with listen(args.host, args.port) as sock:  # before seconds are spent on the model
        chat = open_conversation(args)
        compiling.for_model(chat.session.model)
        place = Path(args.model_path or args.gguf_path or "refimpl-tiny")
        server = make_server(
            chat,
            args.served_model_name or place.name or place.resolve().name,
            places=args.parallel,
            waiting=args.queue,
            most_tokens=args.max_tokens,
            cache_bytes=None if args.cache_gb is None else int(args.cache_gb * 1e9),
        )
        _serve(server, sock, keys, loopback, args)
    return 0


def _serve(
    server: Server, sock: socket.socket, keys: tuple[str, ...], loopback: bool, args: argparse.Namespace
) -> None:
    import uvicorn  # the extra, see make_server

    from refimpl.server import guard, listen
    from refimpl.server.app import make_app

    limits = guard.Limits(body_bytes=int(args.max_body_mb * 1e6))
    app = make_app(server, keys, loopback, tuple(args.cors), limits)
    host, port = sock.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    print(
        f"refimpl: {server.served.name} at http://{name}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True
    )
    uvicorn.Server(listen.config(app, host, port)).run(sockets=[sock])


if __name__ == "__main__":
    raise SystemExit(run(main))
