"""Checkpoints and data files by their names on the Hugging Face Hub.

They lie in huggingface_hub's own cache, where other programs find them too. What is there is used without a network,
and with HF_HUB_OFFLINE=1. A folder or a file of that name on this machine always comes first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from capcur_jax.errors import InputError

DATA = "hf://datasets/"  # what a data file's name begins with, as in huggingface_hub's own file system
NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_CHECKPOINT = re.compile(rf"({NAME})(?:@([\w./-]+))?", re.ASCII)
_FILE = re.compile(rf"{DATA}({NAME})(?:@([\w.-]+))?/(\S+)", re.ASCII)
_VERSION = re.compile(rf"(?:hf://)?((?:datasets/)?{NAME})@([0-9a-f]{{40}})(?:/.*)?", re.ASCII)
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "README.md")  # of a checkpoint: all but its weights
_WEIGHTS = "*.safetensors"
_NONE: Mapping[str, str] = MappingProxyType({})


class Named(NamedTuple):
    """What a name says."""

    repository: str  # OWNER/NAME
    revision: str  # branch, tag or commit; "": the default branch
    file: str = ""  # of a data set; "": a checkpoint

    @property
    def key(self) -> str:
        """The repository among those of both kinds."""
        return f"datasets/{self.repository}" if self.file else self.repository

    @property
    def kind(self) -> str:
        """Of the repository, as huggingface_hub calls it."""
        return "dataset" if self.file else "model"


def named(spec: str) -> Named | None:
    """What a checkpoint's or a data file's name says; None: it is a path.

    Raises:
      InputError: it names a data set of the Hub, and no file of it.
    """
    if spec.startswith(DATA):
        if found := _FILE.fullmatch(spec):
            return Named(found[1], found[2] or "", found[3])
        raise InputError(f"{spec}: name a file of the data set, {DATA}OWNER/NAME[@REVISION]/FILE.parquet")
    found = _CHECKPOINT.fullmatch(spec)
    if not found or Path(spec).expanduser().exists():
        return None
    return Named(found[1], found[2] or "")


def checkpoint(
    spec: str, key: str = "config.checkpoint", weights: bool = True, commits: Mapping[str, str] = _NONE
) -> Path:
    """The directory of a checkpoint: `spec` itself, or where its files are in the cache, downloaded if need be.

    Of several processes all call this; one of each host downloads, all get the same commit.

    Args:
      spec: a directory, or OWNER/NAME or OWNER/NAME@REVISION of the Hub.
      key: the option that says so, for messages.
      weights: whether the weights are needed; else only what says how the model is built and asked.
      commits: repository -> commit that stands for its default branch (`begun_with`).

    Raises:
      InputError: it can't be had; the message names the remedy.
    """
    wanted = named(spec)
    if wanted is None:
        return Path(spec).expanduser()
    from huggingface_hub import constants, snapshot_download  # late: a run from a directory needs none of it

    from capcur_jax.devices import distributed  # JAX comes with it, which commands do without

    where, patterns = f"{key} = {spec}", [*_SMALL, *([_WEIGHTS] if weights else [])]
    commit = _commit(wanted, "config.json", where, commits)

    def download() -> Path:
        cache = constants.HF_HUB_CACHE  # a line for logs, in which progress bars are not shown
        print(f"{where}: commit {commit}; what {cache} lacks of it is downloaded", file=sys.stderr, flush=True)
        folder = snapshot_download(
            wanted.repository, revision=commit, allow_patterns=patterns, ignore_patterns="*/*",
            local_files_only=not _reachable(wanted, "config.json", commit),
        )  # fmt: skip
        return Path(folder)

    return distributed.by_host(lambda: _tried(download, wanted, where), where)


def data_file(spec: str, key: str, commits: Mapping[str, str] = _NONE) -> Path:
    """The file of a data set, hf://datasets/OWNER/NAME[@REVISION]/FILE, in the cache; see `checkpoint`."""
    from capcur_jax.devices import distributed

    wanted, where = named(spec), f"{key} = {spec}"
    assert wanted is not None
    commit = _commit(wanted, wanted.file, where, commits)
    return distributed.by_host(lambda: _file(wanted, wanted.file, commit, where), where)


def version(spec: str, path: Path) -> str:
    """What was taken for `spec`, as OWNER/NAME@COMMIT or hf://datasets/OWNER/NAME@COMMIT/FILE; "" for a path.

    Args:
      path: what `checkpoint` or `data_file` gave for it.
    """
    wanted = named(spec)
    if wanted is None:
        return ""
    name = f"{wanted.repository}@{_commit_of(path, wanted.file)}"
    return f"{DATA}{name}/{wanted.file}" if wanted.file else name


def begun_with(versions: Mapping[str, str]) -> dict[str, str]:
    """Repository -> commit, of all that are versions among the values."""
    found = (_VERSION.fullmatch(value) for value in versions.values())
    return {match[1]: match[2] for match in found if match}


def _commit(wanted: Named, file: str, where: str, commits: Mapping[str, str]) -> str:
    """The commit that process 0 finds for the revision, for all processes; `file` is one that is there."""
    from capcur_jax.devices import distributed

    known = commits.get(wanted.key, "") if not wanted.revision else ""
    revision = known or wanted.revision or None
    path = distributed.by_owner(lambda: _file(wanted, file, revision, where), where)
    return distributed.gather((_commit_of(path, file) if path else "").encode())[0].decode()


def _commit_of(path: Path, file: str) -> str:
    """snapshots/COMMIT/FILE: the cache's folders have the commit's name."""
    return path.parents[len(Path(file).parts) - 1].name if file else path.name


def _file(wanted: Named, file: str, revision: str | None, where: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    def download() -> Path:
        cached = try_to_load_from_cache(wanted.repository, file, repo_type=wanted.kind, revision=revision)
        local = not isinstance(cached, str) and not _reachable(wanted, file, revision)
        found = hf_hub_download(
            wanted.repository, file, repo_type=wanted.kind, revision=revision, local_files_only=local
        )
        return Path(found)

    return _tried(download, wanted, where)


def _reachable(wanted: Named, file: str, revision: str | None) -> bool:
    """Whether the Hub answers, whatever it says; asked once. What is not in the cache huggingface_hub itself asks for
    six times in half a minute, or in six where packets get lost, before it gives up, and has no setting for that."""
    import httpx2
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(wanted.repository, file, repo_type=wanted.kind, revision=revision)
    try:
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (httpx2.ConnectError, httpx2.TimeoutException, errors.OfflineModeIsEnabled):
        return False
    except errors.HfHubHTTPError:  # the download will get the same, and say it
        pass
    return True


def _tried(download: Callable[[], Path], wanted: Named, where: str) -> Path:
    """Raises InputError for whatever keeps it from being there."""
    import httpx2
    from huggingface_hub import constants, errors

    try:
        return download()
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{wanted.key}"
        why = f"its owner gives access on request: ask at {page}, then log in on this machine with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "the Hub has no such repository, or it is private: check the name, or log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        why = f"the Hub has no revision {wanted.revision!r} of it: name a branch, a tag or a commit that is there"
    except errors.LocalEntryNotFoundError:
        asked = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the Hub can't be reached"
        name = f"{wanted.repository} --repo-type dataset" if wanted.file else wanted.repository
        why = (
            f"{asked}, and not all of it is in the cache {constants.HF_HUB_CACHE}: download it where there is a "
            f"network (`hf download {name}`), or name a local {'file' if wanted.file else 'directory'}"
        )
    except errors.EntryNotFoundError:
        why = f"the repository has no {wanted.file or 'config.json, so it is no checkpoint'}: check the name"
    except (OSError, ValueError, httpx2.HTTPError, errors.XetDownloadError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        why = f"it can't be downloaded ({said[:300]}): try again, or name what lies on this machine"
    folder = "" if wanted.file else "no such folder is here, and as a name on the Hub: "
    raise InputError(f"{where}: {folder}{why}")
