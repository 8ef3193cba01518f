"""Sends an export to the Hugging Face Hub.

    python -m capcur_jax.hub.push WORKDIR/checkpoints/final OWNER/NAME

A repository that is not there yet is made, and is private: its page has the switch. An interrupted push is taken up by
the same command, which sends what is missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from capcur_jax.errors import InputError
from capcur_jax.hub.download import NAME
from capcur_jax.records import streams


def check(repository: str) -> None:
    """What would fail hours later without a word of the network. Raises InputError."""
    if not re.fullmatch(NAME, repository, re.ASCII):
        raise InputError(f"{repository!r} names no repository of the Hub: give OWNER/NAME, your user name first")
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise InputError(f"{repository} can't be sent to the Hub: HF_HUB_OFFLINE is set; unset it")
    if not get_token():
        raise InputError(
            f"{repository} can't be sent to the Hub: nobody is logged in on this machine; `hf auth login` with a token "
            "that may write, or set HF_TOKEN"
        )


def push(directory: Path, repository: str) -> str:
    """Sends the files of an export; returns the address of its page.

    Raises:
      InputError: it can't be sent; the message has the command to repeat.
    """
    check(repository)
    if not (directory / "config.json").is_file() or not any(directory.glob("*.safetensors")):
        raise InputError(f"{directory} holds no checkpoint (config.json, *.safetensors): give WORKDIR/checkpoints/NAME")
    import httpx2
    from huggingface_hub import HfApi, errors

    try:
        hub = HfApi(library_name="capcur_jax")
        made = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=directory, commit_message=f"Upload {directory.name}")
        return str(made)
    except (OSError, ValueError, httpx2.HTTPError, RuntimeError, errors.XetDownloadError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise InputError(
            f"{directory} is whole, but was not sent to the Hub ({said}). Again: "
            f"python -m capcur_jax.hub.push {directory} {repository}"
        ) from error


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m capcur_jax.hub.push", description="Sends an export to the Hugging Face Hub.", allow_abbrev=False
    )
    made.add_argument("export", type=Path, metavar="DIR", help="a checkpoint directory, WORKDIR/checkpoints/NAME")
    made.add_argument("repository", metavar="OWNER/NAME", help="where to; one that is not there is made, and private")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        print(push(options.export, options.repository))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    streams.prepare()
    main()
