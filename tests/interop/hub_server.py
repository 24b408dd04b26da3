"""A Hub on the loopback: repositories with branches and commits, one user's token, and what huggingface_hub asks of them."""

import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITES, READS = "hf_writes", "hf_reads"
"""The tokens of the user `ann`, who may write to her own repositories with the first."""


class Repo:
    def __init__(self, private):
        self.private = private
        self.commits = {"0" * 40: {}}
        self.branches = {"main": "0" * 40}
        self.messages = []

    def at(self, revision):
        """Returns a commit and its files by name; None where there is no such revision."""
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None

    def commit(self, branch, files, message):
        sha = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha


class Hub(http.server.ThreadingHTTPServer):
    """`refused` gives the status of requests by a pattern over method and path; `asked` are the requests so far."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.lfs, self.asked, self.refused = {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, value=None, body=b"", **headers):
        body = json.dumps(value).encode() if value is not None else body
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def handle_any(self):
        url, sent = urlsplit(self.path), self.body()
        self.path, self.query = unquote(url.path), parse_qs(url.query)
        self.server.asked.append((self.command, self.path))
        for pattern, status in self.server.refused.items():
            if re.search(pattern, f"{self.command} {self.path}"):
                return self.answer(status, {"error": "refused"})
        if self.path.startswith("/lfs/"):
            self.server.lfs[self.path.removeprefix("/lfs/")] = sent
            return self.answer(200)
        if self.token not in ("", WRITES, READS):
            said = "Invalid credentials in Authorization header"
            return self.answer(401, {"error": said}, X_Error_Message=said)
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, self.path)
            if found and self.command in method:
                return function(self, sent, *found.groups())
        return self.answer(404, {"error": "no such place"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def repo(self, name, writes=False):
        """Returns a repository that the token may read or write; else says so, as the Hub does."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.token):
            self.answer(404 if self.token else 401, {"error": "not found"}, X_Error_Code="RepoNotFound")
        elif writes and not self.may_write(name):
            self.answer(403, {"error": "forbidden"})
        else:
            return repo
        return None

    def may_write(self, name):
        return self.token == WRITES and name.startswith("ann/")

    def files_at(self, name, revision):
        repo = self.repo(name)
        if repo is None:
            return None
        found = repo.at(revision)
        if found is None:
            self.answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
        return found

    def home(self, sent):
        self.answer(200)

    def create(self, sent):
        asked = json.loads(sent)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.may_write(name):
            return self.answer(403, {"error": "forbidden"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.server.repos[name] = Repo(private)
        return self.answer(200, {"url": f"{self.server.url}/{name}"})

    def card(self, sent):
        front = yaml.safe_load(json.loads(sent)["content"].split("---")[1])
        base = front.get("base_model", "a/b")
        wrong = [] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) else [{"message": f"base_model {base} is not valid"}]
        self.answer(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def info(self, sent, name, revision="main"):
        if found := self.files_at(name, revision):
            sha, files = found
            private = self.server.repos[name].private
            sizes = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            self.answer(200, {"id": name, "sha": sha, "private": private, "siblings": sizes})

    def branch(self, sent, name, branch):
        if repo := self.repo(name, writes=True):
            if branch in repo.branches:
                return self.answer(409, {"error": "there already"})
            repo.branches[branch] = repo.branches["main"]
            return self.answer(200, {})
        return None

    def tree(self, sent, name, revision):
        if found := self.files_at(name, revision):
            rows = []
            for path, data in found[1].items():
                row = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
                if is_lfs(path):
                    row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
                rows.append(row)
            self.answer(200, rows)

    def resolve(self, sent, name, revision, path):
        if found := self.files_at(name, revision):
            sha, files = found
            if path not in files:
                return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            data = files[path]
            etag = hashlib.sha256(data).hexdigest() if is_lfs(path) else git_oid(data)
            return self.answer(200, body=data, ETag=f'"{etag}"', X_Repo_Commit=sha)
        return None

    def preupload(self, sent, name, branch):
        if repo := self.repo(name, writes=True):
            if repo.at(branch) is None:
                return self.answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
            held = repo.at(branch)[1]
            rows = []
            for file in json.loads(sent)["files"]:
                path, row = file["path"], {"path": file["path"], "shouldIgnore": False, "oid": None}
                if path in held:
                    row["oid"] = hashlib.sha256(held[path]).hexdigest() if is_lfs(path) else git_oid(held[path])
                rows.append({**row, "uploadMode": "lfs" if is_lfs(path) else "regular"})
            return self.answer(200, {"files": rows})
        return None

    def batch(self, sent, name):
        if self.repo(name, writes=True):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                if each["oid"] not in self.server.lfs
                else each
                for each in json.loads(sent)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, sent, name, branch):
        if repo := self.repo(name, writes=True):
            files, message = dict(repo.at(branch)[1]), ""
            for line in map(json.loads, sent.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.lfs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = repo.commit(branch, files, message)
            self.answer(200, {"success": True, "commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})


def is_lfs(path):
    return path.endswith(".safetensors")


def git_oid(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


NAME, REST = r"([\w.-]+/[\w.-]+)", r"(.+)"
ROUTES = [
    ("HEAD", r"/?", Handler.home),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.card),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REST}", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/branch/{REST}", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/{REST}", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", f"/api/models/{NAME}/commit/{REST}", Handler.commit),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/{REST}", Handler.resolve),
]
"""Methods, path and what answers."""
