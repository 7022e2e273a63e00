"""Fetches files of a model on the Hugging Face hub into the cache of huggingface_hub.

A hub id is ORG/NAME[@REVISION][/FOLDER], with or without hf:// before it.  Its cache, tokens,
offline mode, mirrors (HF_ENDPOINT) and resumed downloads are those of huggingface_hub, which is
imported only for an id.
"""

import errno
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from hunyuan_jax.errors import ConfigError

# Of a tokenizer, with the configs that it reads.
TOKENIZER_FILES = ("*.json", "*.jinja", "*.tiktoken")

_PROTOCOL = "hf://"
_WORD = r"[A-Za-z0-9_][\w.-]*"
_ID = re.compile(rf"({_WORD}/{_WORD})(?:@(refs/[a-z]+/[\w.-]+|[\w.-]+))?((?:/{_WORD})*)")


class HubId(NamedTuple):
    """A folder of a model on the hub, or a file.

    repo: ORG/NAME; revision: a branch, tag or commit, or None; folder: inside, "" is the root.
    """

    repo: str
    revision: str | None
    folder: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f"/{self.folder}" if self.folder else "")


def hub_id(path: str) -> HubId | None:
    """Returns the hub id that a path of the user names, or None if it is another path or URL.

    What exists here, or would lie in a folder that exists here, is not an id, unless hf:// stands
    before it.

    Raises:
      ConfigError: hf:// with something else than an id behind it.
    """
    if not path.startswith(_PROTOCOL) and os.path.lexists(path.partition("/")[0]):
        return None
    if match := _ID.fullmatch(path.removeprefix(_PROTOCOL)):
        return HubId(match[1], match[2], match[3].strip("/"))
    if path.startswith(_PROTOCOL):
        raise ConfigError(
            f"{path!r} is not hf://ORG/NAME, hf://ORG/NAME@REVISION or a folder in one of them."
        )
    return None


def fetch(wanted: HubId, patterns: Sequence[str]) -> tuple[str, HubId]:
    """Returns (the local folder with the files of `wanted` that match a pattern, `wanted` at the
    commit that they are from).  If `wanted` is a file, it is what is fetched.

    Only what is not in the cache is downloaded.

    Raises:
      ConfigError: one line with the remedy: huggingface_hub is not installed; no such model or
        revision; one that is gated; no network and not in the cache; a download that broke off; a
        full disk.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError as e:
        raise ConfigError(
            f"{wanted} does not exist here. To fetch a model of that name from the Hugging Face "
            "hub: pip install -e '.[hub]'."
        ) from e
    hub = constants.ENDPOINT
    if wanted.folder:
        patterns = [wanted.folder, *(f"{wanted.folder}/{pattern}" for pattern in patterns)]
    try:
        snapshot = huggingface_hub.snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            allow_patterns=list(patterns),
            library_name="hunyuan_jax",
        )
    except errors.GatedRepoError as e:
        raise ConfigError(
            f"{wanted.repo} is gated: accept its licence at {hub}/{wanted.repo}, then log in with "
            "`hf auth login` or set HF_TOKEN."
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise ConfigError(
            f"{wanted.repo} does not exist, neither here nor on {hub}; check the name. A "
            "private model needs `hf auth login` or HF_TOKEN."
        ) from e
    except errors.RevisionNotFoundError as e:
        raise ConfigError(
            f"{wanted.repo} on {hub} has no revision {wanted.revision!r}; give a branch, a tag or "
            "a commit."
        ) from e
    except errors.LocalEntryNotFoundError as e:
        if constants.HF_HUB_OFFLINE:
            why, remedy = "HF_HUB_OFFLINE is set", "unset it once to download the model"
        else:
            why = f"{hub} cannot be reached ({_reason(e.__cause__ or e)})"
            remedy = "check the name and the connection"
        raise ConfigError(
            f"{wanted} does not exist here, nor complete in {constants.HF_HUB_CACHE}, and {why}; "
            f"{remedy}."
        ) from e
    except (OSError, errors.HTTPError, RuntimeError) as e:  # RuntimeError: Xet's, a closed client
        if getattr(e, "errno", None) == errno.ENOSPC:
            raise ConfigError(
                f"{constants.HF_HUB_CACHE}: the disk is full; make room, or set HF_HOME to a "
                "folder on another disk. What is there already is kept."
            ) from e
        raise ConfigError(
            f"the download of {wanted} from {hub} broke off ({_reason(e)}); the same command "
            "fetches the files that are missing."
        ) from e
    folder = os.path.join(snapshot, wanted.folder) if wanted.folder else snapshot
    return folder, wanted._replace(revision=os.path.basename(snapshot))


def _reason(error: BaseException) -> str:
    """The first line of an error, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
