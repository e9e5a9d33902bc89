"""``python -m bc.data``: fetch the embedded suite, or say what is missing of it, of ImageNet, or of the hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bc.data import images
from bc.data.embedded import DEFAULT_GROUPS, GROUPS, fetch_all
from bc.data.sources import check_hub
from bc.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line arguments; those of the process by default.

    Returns:
        0, or 2 after a message on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bc.data", description="Fetch the embedded models, texts and images."
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"any of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--offline", action="store_true", help="download nothing; say what is missing")
    parser.add_argument("--imagenet", metavar="FOLDER", help="only say whether ImageNet is there; '' asks BC_IMAGENET")
    parser.add_argument("--hub", action="store_true", help="only say whether the hub of models and texts answers")
    options = parser.parse_args(arguments)
    try:
        if options.hub:
            check_hub()
            return 0
        if options.imagenet is not None:
            for role in ("calibration", "test"):
                images.check("imagenet", role, {"imagenet": options.imagenet or None})
            return 0
        for path in fetch_all(options.offline, options.groups or DEFAULT_GROUPS):
            print(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
