"""`pcpo rewards serve`: rewards for other processes and machines, behind HTTP."""

from __future__ import annotations

import ipaddress
import os
import socket
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from ...pcpo.remote import protocol
from ...pcpo.rewards import Reward
from ...pcpo.rewards.remote import KEY
from ...remedies import install
from ..config.arguments import Arguments, Words, parse
from ..config.reward_options import rewards_of
from ..config.train_config import ConfigError, validate
from ..job.preflight import check_rewards
from ..memory.devices import device_of
from ..reading import named
from ..run.rewards import RewardSet

if TYPE_CHECKING:
    import uvicorn

PROG = "pcpo rewards serve"


class ServeArguments(Arguments):
    """Serve rewards to the reward 'remote', of this machine or others."""

    names: Words = Field(min_length=1, description="rewards, at least one")
    options: list[str] = Field(
        default=[], description="NAME.OPTION=VALUE ..., as shown by the command rewards list"
    )
    host: str = Field(default="127.0.0.1", description="address to listen at; 0.0.0.0 means all")
    port: int = Field(default=protocol.PORT, ge=0, le=65535, description="port; 0 takes a free one")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where networks compute"
    )
    batch: int = Field(
        default=protocol.BATCH, ge=1, le=4096, description="most images in a request"
    )
    request_mib: int = Field(
        default=protocol.REQUEST_BYTES >> 20, ge=1, le=4096, description="largest request, in MiB"
    )
    megapixels: int = Field(
        default=protocol.PIXELS >> 20,
        ge=1,
        le=1024,
        description="most pixels of all images in a request, in units of 1024 x 1024",
    )


def main(arguments: list[str]) -> int:
    """Load the rewards and serve them until Ctrl-C."""
    a = parse(ServeArguments, arguments, PROG)
    missing = [package for package in ("starlette", "uvicorn") if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"a server needs the package {missing[0]!r}, which is not installed; run "
            f"{install(*missing)} and start again"
        )
    rewards = load(a.names, a.options, device_of(a.device))
    key = os.environ.get(f"{KEY}_KEY", "").strip()
    listener = _listener(a.host, a.port)
    with listener:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(rewards)} at http://{shown}:{port}", flush=True)
        if not key and not ipaddress.ip_address(host).is_loopback:
            print(f"anyone who reaches this address can use it; set {KEY}_KEY to ask for a key")
        _run(listener, rewards, a, key)
    return 0


def load(names: list[str], options: list[str], device: torch.device) -> dict[str, Reward]:
    """Load the rewards by name, with their networks on a device.

    Args:
        names: keys of `REWARDS`.
        options: NAME.OPTION=VALUE.

    Returns:
        The rewards by name; `ConfigError` if one is not available as asked.
    """
    config = validate({"rewards": rewards_of(names, options)}, PROG)
    check_rewards(config, PROG)
    reward_set = RewardSet.from_config(config)
    reward_set.place(device, is_lent=False)
    return dict(zip(reward_set.labels, reward_set.rewards, strict=True))


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, TypeError, ValueError) as error:  # the last two: what can be no name
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{named(host)} port {port} cannot be listened at: {why}; give another --host or --port"
        ) from error


def _run(listener: socket.socket, rewards: dict[str, Reward], a: ServeArguments, key: str) -> None:
    is_local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    limits = {"batch": a.batch, "request_bytes": a.request_mib << 20}
    limits["pixels"] = a.megapixels << 20
    server_of(rewards, key=key, is_local=is_local, **limits).run(sockets=[listener])


def server_of(
    rewards: dict[str, Reward],
    *,
    idle_seconds: float = 10.0,
    connections: int = 256,
    of_one: int = 32,
    **service: Any,
) -> uvicorn.Server:
    """An HTTP server of loaded rewards, to be run.

    Args:
        idle_seconds: that a connection may take to send the head of a request.
        of_one: connections of one address at once.
        service: fields of `Service`.
    """
    import uvicorn

    from .app import Service
    from .limits import protocol_of

    config = uvicorn.Config(
        Service(rewards, **service).application(),
        log_level="warning",
        lifespan="off",
        http=protocol_of(idle_seconds, connections, of_one),
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)
