"""The folder of what is kept from one command to the next: `$REPVGG_DEPLOY_CACHE`, or the system's place for it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError

VARIABLE = "REPVGG_DEPLOY_CACHE"


def cache_folder() -> Path:
    """Where plans, timings and downloads are kept; it need not exist.

    Raises:
        InputError: The environment names no folder, not even a home.
    """
    own, general = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()  # a unit file or a Dockerfile expands no ~
        # Its standard says that a relative path is invalid and to be ignored.
        usable = general is not None and Path(general).is_absolute()
        return (Path(str(general)) if usable else Path.home() / ".cache") / "repvgg-deploy"
    except RuntimeError as error:
        remedy = f"set {VARIABLE} to a folder, or, for a build, give --no-cache"
        raise InputError(f"no folder for the cache: {error}", remedy=remedy) from error
