"""The stand-in itself: its repositories and accounts, what is to go wrong, and what was asked of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hub_stand_in.faults import Corruption, Cut, Event, Failure, Fault
from hub_stand_in.repositories import Account, RefusedError, Repository
from hub_stand_in.server import serve

TOKEN = "hf_pirateTokenThatNobodyMaySee"


@dataclass(frozen=True)
class Asked:
    """One request: its method, its path with the query, its token, and the host that it came to."""

    method: str
    path: str
    token: str | None
    storage: bool


class HubStandIn:
    """The Hub's HTTP API on loopback, for huggingface_hub's own client.

    Large files lie on a second server, as on the Hub: `resolve` redirects there, and the token must not follow.

        with HubStandIn() as hub:
            repository = hub.create("ada/pirate", private=True)
            repository.put({"adapter_config.json": b"{}"})
            hub.faults.append(Failure("GET", "/resolve/", status=503))
            HfApi(hub.endpoint, hub.token).model_info("ada/pirate")

    Attributes:
        repositories: by id.
        accounts: by token; `token` is that of ``ada``, who belongs to ``crew`` too.
        faults: see `hub_stand_in.faults`; the first that fits befalls a request.
        asked: every request in order.
        moved: repositories that have another name now, by their old id.
        multipart_over: objects of more bytes are uploaded in parts of that many.
        page: how many entries a page of a list has.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.token = TOKEN
        self.accounts = {TOKEN: Account("ada", ("crew",))}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.moved: dict[str, str] = {}
        self.multipart_over: int | None = None
        self.page = 1000
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()
        self._api, self._storage = serve(self), serve(self, storage=True)
        self.endpoint = f"http://127.0.0.1:{self._api.server_port}"
        self.storage = f"http://127.0.0.1:{self._storage.server_port}"

    def __enter__(self) -> HubStandIn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in (self._api, self._storage):
            server.shutdown()
            server.server_close()

    def create(self, repository: str, *, private: bool = False, gated: str | bool = False) -> Repository:
        """Add a repository with the commit that a new one has."""
        self.repositories[repository] = Repository(repository, private=private, gated=gated)
        return self.repositories[repository]

    def account(self, name: str, *organizations: str, role: str = "write") -> str:
        """Add an account; its token."""
        token = f"hf_tokenOf{name.title()}{role.title()}"
        self.accounts[token] = Account(name, organizations, role)
        return token

    def environment(self, home: Path) -> dict[str, str]:
        """The variables under which another process takes this for the Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def count(self, method: str, part: str) -> int:
        """How many requests of that method had `part` in their path."""
        return sum(request.method == method and part in request.path for request in self.asked)


__all__ = [
    "TOKEN",
    "Account",
    "Asked",
    "Corruption",
    "Cut",
    "Event",
    "Failure",
    "HubStandIn",
    "RefusedError",
    "Repository",
]
