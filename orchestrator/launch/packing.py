"""What travels with a submitted job: the files that git tracks, in one archive."""

import re
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import RunError
from orchestrator.files import sha256

LIMIT = 100 << 20  # bytes; Ray's own limit is 500 MiB, and each node keeps a copy
_SECRET = re.compile(
    r"(^|/)(\.env(\.(?!example$|sample$|template$).*)?|\.netrc|\.pgpass|\.pypirc|\.aws/.*|\.ssh/.*"
    r"|id_(rsa|dsa|ecdsa|ed25519)|kubeconfig|auth_token|.*access_?keys?\.csv|rootkey\.csv"
    r"|(.*[._-])?(credentials?|secrets?)(\.(json|ya?ml|toml|ini|csv|txt))?"
    r"|.*\.(pem|key|p12|pfx|kdbx))$",
    re.IGNORECASE,
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal files make an equal archive


@dataclass(frozen=True, kw_only=True)
class Package:
    """An archive of a project; `digest` is its sha256, the version of the code."""

    path: Path
    digest: str
    size: int  # bytes, packed
    largest: tuple[tuple[str, int], ...]  # files and their bytes, unpacked
    commit: str
    changed: tuple[str, ...]  # tracked files that differ from the commit

    def describe(self) -> Iterator[str]:
        """Lines for whoever submits it."""
        state = f" with {len(self.changed)} changed files" if self.changed else ""
        yield f"code: commit {self.commit[:12]}{state}, sha256 {self.digest[:12]}"
        top = ", ".join(f"{name} {size / 1024:.0f} KiB" for name, size in self.largest[:5])
        yield f"packed: {self.size / 1024:.0f} KiB; largest: {top}"


def pack(root: Path, out: Path, *, limit: int = LIMIT) -> Package:
    """Write the tracked files under `root` to the archive `out`.

    Raises:
        RunError: not a git repository, a tracked file looks like a credential, or more bytes than
            `limit`; nothing was uploaded then.
    """
    names = sorted(name for name in _git(root, "ls-files", "-z").split("\0") if name)
    names = [name for name in names if (root / name).is_file()]
    secrets = [name for name in names if _SECRET.search(name)]
    if secrets:
        raise RunError(
            f"{root}: git tracks {', '.join(secrets[:5])}, which looks like a credential; take it "
            "out (git rm --cached) and give credentials by environment or role"
        )
    sizes = sorted(((name, (root / name).stat().st_size) for name in names), key=lambda n: -n[1])
    total = sum(size for _, size in sizes)
    if total > limit:
        top = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes[:10])
        raise RunError(
            f"{root}: the tracked files have {total / 2**20:.0f} MiB, the limit is "
            f"{limit / 2**20:.0f}; take data and weights out of git. The largest: {top}"
        )
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            path = root / name
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = (0o100755 if path.stat().st_mode & 0o100 else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    changed = [line[3:] for line in _git(root, "status", "--porcelain", "-uno").splitlines()]
    return Package(
        path=out,
        digest=sha256(out),
        size=out.stat().st_size,
        largest=tuple(sizes[:10]),
        commit=_git(root, "rev-parse", "HEAD").strip(),
        changed=tuple(changed),
    )


def project_root(job_file: Path) -> Path:
    """The git repository that a job file lies in.

    Raises:
        RunError: none.
    """
    return Path(_git(job_file.absolute().parent, "rev-parse", "--show-toplevel").strip())


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise RunError("git is not installed; atrous submit packs what git tracks") from None
    except subprocess.CalledProcessError as error:
        raise RunError(
            f"{root}: {error.stderr.strip() or error}; atrous submit packs what git tracks: "
            "git init and commit, or use ray job submit --working-dir"
        ) from None
