"""The paths of the Hub's API that huggingface_hub's client asks for, and what is answered."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, quote, urlencode

from hub_stand_in.cards import problems
from hub_stand_in.repositories import Blob, Commit, RefusedError, Repository, describe_commit, is_large, tree
from hub_stand_in.server import Answer, Request

if TYPE_CHECKING:
    from hub_stand_in.hub import HubStandIn

MOVED: Final = 307


class ElsewhereError(RefusedError):
    """The repository has another name now."""


def who_am_i(hub: HubStandIn, request: Request) -> Answer:
    if request.account is None:
        raise RefusedError(401, "Invalid username or password.")
    account = request.account
    orgs = [{"type": "org", "name": name} for name in account.organizations]
    access = {"accessToken": {"displayName": "stand-in", "role": account.role}}
    return Answer.of({"type": "user", "name": account.name, "orgs": orgs, "auth": access})


def create(hub: HubStandIn, request: Request) -> Answer:
    if request.account is None:
        raise RefusedError(401, "Invalid username or password.")
    wanted = request.json
    namespace = wanted.get("organization") or request.account.name
    name = f"{namespace}/{wanted['name']}"
    if request.account.role != "write":
        raise RefusedError(403, "You don't have the rights to create a model under this namespace: use a write token")
    if not request.account.may_write(namespace):
        raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    url = f"{hub.endpoint}/{name}"
    if name in hub.repositories:
        return Answer.of({"error": "You already created this model repo", "url": url, "id": name}, 409)
    hub.create(name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return Answer.of({"url": url, "name": name, "id": name})


def delete(hub: HubStandIn, request: Request) -> Answer:
    wanted = request.json
    assert request.account is not None
    repository = _writable(hub, request, f"{wanted.get('organization') or request.account.name}/{wanted['name']}")
    del hub.repositories[repository.id]
    return Answer()


def settings(hub: HubStandIn, request: Request, repo: str) -> Answer:
    repository = _writable(hub, request, repo)
    wanted = request.json
    repository.gated = wanted.get("gated", repository.gated)
    if "visibility" in wanted:
        repository.private = wanted["visibility"] == "private"
    return Answer.of({})


def models(hub: HubStandIn, request: Request) -> Answer:
    found = []
    for repository in sorted(hub.repositories.values(), key=lambda each: each.id):
        entry = repository.describe(repository.head)
        searched = {*entry["tags"], entry.get("pipeline_tag"), entry.get("library_name")}
        if (
            _may_read(request, repository)
            and set(request.query.get("filter", [])) <= searched
            and request.first("author") in (None, repository.namespace)
            and (request.first("search") or "").lower() in repository.id.lower()
            and request.first("pipeline_tag") in (None, entry.get("pipeline_tag"))
        ):
            if not request.first("full") and "siblings" not in request.query.get("expand", []):
                del entry["siblings"]
            if not request.first("cardData") and "cardData" not in request.query.get("expand", []):
                del entry["cardData"]
            found.append(entry)
    if request.first("sort"):
        found.sort(key=lambda entry: str(entry.get(request.first("sort") or "")), reverse=True)
    return _page(hub, request, found, limit=int(request.first("limit") or hub.page))


def model(hub: HubStandIn, request: Request, repo: str, revision: str = "main") -> Answer:
    repository = _readable(hub, request, repo)
    return Answer.of(repository.describe(repository.find(revision), blobs=bool(request.first("blobs"))))


def list_tree(hub: HubStandIn, request: Request, repo: str, revision: str, path: str = "") -> Answer:
    commit = _readable(hub, request, repo).find(revision)
    return _page(hub, request, tree(commit, path, recursive=request.first("recursive") in {"true", "True", "1"}))


def paths_info(hub: HubStandIn, request: Request, repo: str, revision: str) -> Answer:
    commit = _readable(hub, request, repo).find(revision)
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return Answer.of([commit.files[path].describe(path) for path in wanted if path in commit.files])


def refs(hub: HubStandIn, request: Request, repo: str) -> Answer:
    repository = _readable(hub, request, repo)
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    found: dict[str, list[Any]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for ref, oid in sorted(repository.refs.items()):
        kind, prefix = next((kind, prefix) for kind, prefix in kinds.items() if ref.startswith(prefix))
        found[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
    return Answer.of(found)


def commits(hub: HubStandIn, request: Request, repo: str, revision: str) -> Answer:
    repository = _readable(hub, request, repo)
    return _page(hub, request, [describe_commit(each) for each in repository.log(repository.find(revision))])


def discussions(hub: HubStandIn, request: Request, repo: str) -> Answer:
    repository = _readable(hub, request, repo)
    found = []
    for number, status in sorted(repository.pull_requests.items(), reverse=True):
        top = repository.commits[repository.refs[f"refs/pr/{number}"]]
        if request.first("status") in (None, "all", status):
            facts = {"num": number, "title": top.title, "status": status, "isPullRequest": True}
            more = {"author": {"name": top.author}, "createdAt": describe_commit(top)["date"]}
            found.append(facts | more | {"repo": {"name": repository.id, "type": "model"}})
    return Answer.of({"discussions": found, "count": len(found), "start": 0})


def create_branch(hub: HubStandIn, request: Request, repo: str, branch: str) -> Answer:
    return _new_ref(_writable(hub, request, repo), f"refs/heads/{branch}", request.json.get("startingPoint") or "main")


def create_tag(hub: HubStandIn, request: Request, repo: str, revision: str) -> Answer:
    return _new_ref(_writable(hub, request, repo), f"refs/tags/{request.json['tag']}", revision)


def delete_branch(hub: HubStandIn, request: Request, repo: str, branch: str) -> Answer:
    repository = _writable(hub, request, repo)
    if repository.refs.pop(f"refs/heads/{branch}", None) is None:
        raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return Answer.of({})


def _new_ref(repository: Repository, ref: str, start: str) -> Answer:
    if ref in repository.refs:
        raise RefusedError(409, f"Reference already exists: {ref}")
    repository.refs[ref] = repository.find(start).oid
    return Answer.of({})


def validate_yaml(hub: HubStandIn, request: Request) -> Answer:
    errors, warnings = problems(request.json["content"])
    if errors and request.headers.get("Accept") == "text/plain":
        return Answer("\n".join(f"- Error: {text}" for text in errors).encode(), 400, {"Content-Type": "text/plain"})
    named = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Answer.of(named, 400 if errors else 200)


def preupload(hub: HubStandIn, request: Request, repo: str, revision: str) -> Answer:
    repository = _committable(hub, request, repo)
    there = repository.find(revision).files
    modes = []
    for file in request.json["files"]:
        large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if file["path"] in there:
            entry["oid"] = there[file["path"]].etag
        modes.append(entry)
    return Answer.of({"files": modes})


def commit(hub: HubStandIn, request: Request, repo: str, revision: str) -> Answer:
    repository = _committable(hub, request, repo)
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]["value"]
    top = repository.find(revision)
    if header.get("parentCommit") not in (None, top.oid):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    added: dict[str, bytes | Blob] = {}
    deleted: list[str] = []
    for line in lines[1:]:
        _take(repository, top, line["key"], line["value"], added, deleted)
    ref = repository.find_ref(revision)
    opened = None
    if request.first("create_pr"):
        number = len(repository.pull_requests) + 1
        repository.pull_requests[number] = "open"
        ref = f"refs/pr/{number}"
        opened = f"{hub.endpoint}/{repository.id}/discussions/{number}"
    if ref is None or ref.startswith("refs/tags/"):
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    assert request.account is not None
    facts = {"author": request.account.name, "message": header["description"], "parent": top}
    done = repository.commit(ref, header["summary"], added, deleted=deleted, **facts)
    url = f"{hub.endpoint}/{repository.id}/commit/{done.oid}"
    answer = {"success": True, "commitOid": done.oid, "commitUrl": url, "hookOutput": ""}
    return Answer.of(answer | ({"pullRequestUrl": opened} if opened else {}))


def _take(
    repository: Repository, top: Commit, key: str, value: Any, added: dict[str, bytes | Blob], deleted: list[str]
) -> None:
    path = value["path"]
    if path.startswith("/") or ".." in path.split("/"):
        raise RefusedError(400, f"Invalid path: {path}")
    if key == "file":
        added[path] = Blob(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        if value["oid"] not in repository.objects:
            raise RefusedError(
                400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path}"
            )
        added[path] = Blob(repository.objects[value["oid"]], lfs=True)
    else:
        gone = [name for name in top.files if name == path or (key == "deletedFolder" and name.startswith(path))]
        if not gone:
            raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        deleted += gone


def lfs_batch(hub: HubStandIn, request: Request, repo: str) -> Answer:
    repository = _readable(hub, request, repo)
    if request.account is None:
        raise RefusedError(401, "Invalid username or password.")
    objects = []
    for wanted in request.json["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repository.objects:
            query = urlencode({"repo": repository.id})
            upload = {"href": f"{hub.storage}/objects/{oid}?{query}"}
            chunk = hub.multipart_over
            if chunk is not None and size > chunk:
                parts = range(1, -(-size // chunk) + 1)
                urls = {f"{part:05d}": f"{hub.storage}/parts/{oid}/{part}?{query}" for part in parts}
                href = f"{hub.endpoint}/api/complete_multipart?{query}"
                upload = {"href": href, "header": {"chunk_size": str(chunk), **urls}}  # type: ignore[dict-item]
            verify = {"href": f"{hub.endpoint}/{repository.id}.git/info/lfs/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return Answer.of({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")


def lfs_verify(hub: HubStandIn, request: Request, repo: str) -> Answer:
    wanted = request.json
    data = _readable(hub, request, repo).objects.get(wanted["oid"])
    if data is None or len(data) != wanted["size"]:
        raise RefusedError(404, "Object does not exist")
    return Answer.of({})


def complete_multipart(hub: HubStandIn, request: Request) -> Answer:
    wanted = request.json
    parts = hub.parts.pop(wanted["oid"])
    for part in wanted["parts"]:
        if part["etag"] != _etag(parts[part["partNumber"]]):
            raise RefusedError(400, "Invalid part")
    return _store(hub, request, wanted["oid"], b"".join(parts[number] for number in sorted(parts)))


def put_part(hub: HubStandIn, request: Request, oid: str, part: str) -> Answer:
    hub.parts.setdefault(oid, {})[int(part)] = request.body
    return Answer(headers={"ETag": _etag(request.body)})


def put_object(hub: HubStandIn, request: Request, oid: str) -> Answer:
    return _store(hub, request, oid, request.body)


def _store(hub: HubStandIn, request: Request, oid: str, data: bytes) -> Answer:
    if hashlib.sha256(data).hexdigest() != oid:
        raise RefusedError(400, "The content does not match its sha256")
    hub.repositories[request.first("repo") or ""].objects[oid] = data
    return Answer(headers={"ETag": _etag(data)})


def get_object(hub: HubStandIn, request: Request, oid: str) -> Answer:
    data = hub.repositories[request.first("repo") or ""].objects[oid]
    return _ranged(request, data, {"ETag": f'"{oid}"'})


def resolve(hub: HubStandIn, request: Request, repo: str, revision: str, path: str) -> Answer:
    repository = _readable(hub, request, repo)
    _let_in(request, repository)
    try:
        commit, blob = repository.file(revision, path)
    except RefusedError as error:
        known = repository.find_ref(revision) or revision in repository.commits
        return Answer.refused(error, {"X-Repo-Commit": repository.find(revision).oid} if known else {})
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
    if not blob.lfs:
        return _ranged(request, blob.data, headers)
    where = f"{hub.storage}/objects/{blob.sha256}?{urlencode({'repo': repository.id})}"
    linked = {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": f'"{blob.sha256}"', "Location": where}
    return Answer(b"", 302, headers | linked)


def _ranged(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range") or "")
    if asked is None:
        return Answer(data, 200, headers)
    if asked[1]:
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
    else:
        start, end = max(len(data) - int(asked[2]), 0), len(data) - 1
    if start > end:
        return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
    return Answer(data[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})


def _page(hub: HubStandIn, request: Request, entries: list[Any], limit: int | None = None) -> Answer:
    start = int(request.first("cursor") or 0)
    end = start + min(limit or hub.page, hub.page)
    answer = Answer.of(entries[start:end])
    if end < len(entries):
        query = urlencode({**request.query, "cursor": [str(end)]}, doseq=True)
        answer.headers["Link"] = f'<{hub.endpoint}{request.path}?{query}>; rel="next"'
    return answer


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _may_read(request: Request, repository: Repository) -> bool:
    return not repository.private or (request.account is not None and request.account.belongs_to(repository.namespace))


def _readable(hub: HubStandIn, request: Request, repo: str) -> Repository:
    """The repository, where it is there and this account may know of it."""
    if repo in hub.moved:
        raise ElsewhereError(MOVED, request.path.replace(f"/{repo}", f"/{hub.moved[repo]}", 1))
    repository = hub.repositories.get(repo)
    if repository is not None and _may_read(request, repository):
        return repository
    if request.account is None:
        # The Hub sends no code here; its client takes any 401 of a repository for this, but only over https.
        raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
    raise RefusedError(404, "Repository not found", "RepoNotFound")


def _let_in(request: Request, repository: Repository) -> None:
    account = request.account
    if not repository.gated or (
        account and (account.belongs_to(repository.namespace) or account.name in repository.allowed)
    ):
        return
    restricted = f"Access to model {repository.id} is restricted"
    if account is None:
        raise RefusedError(401, f"{restricted}. You must have access to it and be authenticated.", "GatedRepo")
    where = f"{request.endpoint}/{repository.id}"
    message = f"{restricted} and you are not in the authorized list. Visit {where} to ask for access."
    raise RefusedError(403, message, "GatedRepo")


def _writable(hub: HubStandIn, request: Request, repo: str) -> Repository:
    repository = _readable(hub, request, repo)
    if request.account is None:
        raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
    if not request.account.belongs_to(repository.namespace):
        raise RefusedError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    if request.account.role != "write":
        raise RefusedError(403, "Forbidden: you must use a write token to upload to a repository.")
    return repository


def _committable(hub: HubStandIn, request: Request, repo: str) -> Repository:
    """The repository, where this account may commit to it; whoever may read may open a pull request."""
    if request.first("create_pr") and request.account is not None:
        return _readable(hub, request, repo)
    return _writable(hub, request, repo)


def _redirecting(route: Callable[..., Answer]) -> Callable[..., Answer]:
    def answer(hub: HubStandIn, request: Request, **found: str) -> Answer:
        try:
            return route(hub, request, **found)
        except ElsewhereError as moved:
            return Answer(b"", MOVED, {"Location": quote(moved.message, safe="/%")})

    return answer


REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"

ROUTES: Final = [
    (method, pattern, _redirecting(route))
    for method, pattern, route in [
        ("GET", r"/api/whoami-v2", who_am_i),
        ("POST", r"/api/repos/create", create),
        ("DELETE", r"/api/repos/delete", delete),
        ("POST", r"/api/validate-yaml", validate_yaml),
        ("POST", r"/api/complete_multipart", complete_multipart),
        ("GET", r"/api/models", models),
        ("PUT", rf"/api/models/{REPO}/settings", settings),
        ("GET", rf"/api/models/{REPO}/refs", refs),
        ("GET", rf"/api/models/{REPO}/commits/{REVISION}", commits),
        ("GET", rf"/api/models/{REPO}/discussions", discussions),
        ("GET", rf"/api/models/{REPO}/revision/{REVISION}", model),
        ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", list_tree),
        ("POST", rf"/api/models/{REPO}/paths-info/{REVISION}", paths_info),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", create_branch),
        ("DELETE", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", delete_branch),
        ("POST", rf"/api/models/{REPO}/tag/{REVISION}", create_tag),
        ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", preupload),
        ("POST", rf"/api/models/{REPO}/commit/{REVISION}", commit),
        ("GET", rf"/api/models/{REPO}", model),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        ("POST", rf"/{REPO}\.git/info/lfs/verify", lfs_verify),
        ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
    ]
]
"""Method, pattern of the quoted path, and what answers. A HEAD is answered as a GET, without its body."""

STORAGE_ROUTES: Final = [
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", put_object),
    ("PUT", r"/parts/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", put_part),
    ("GET", r"/objects/(?P<oid>[0-9a-f]{64})", get_object),
]
"""The same for the storage of large files, whose links are signed: nobody says who they are."""
