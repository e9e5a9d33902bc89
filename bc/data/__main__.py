"""``python -m bc.data``: fetch the embedded suite, or say what is missing of it, of ImageNet, or of the hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bc.data import images, pictures
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
    parser.add_argument("--imagenet", metavar="FOLDER", help="only count ImageNet; '' asks BC_IMAGENET")
    parser.add_argument("--part", action="store_true", help="with --imagenet: a part of its validation set will do")
    parser.add_argument("--hub", action="store_true", help="only say whether the hub of models and texts answers")
    options = parser.parse_args(arguments)
    try:
        if options.imagenet is not None or options.hub:
            _check(options.imagenet, options.hub, options.part)
            return 0
        for path in fetch_all(options.offline, options.groups or DEFAULT_GROUPS):
            print(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _check(imagenet: str | None, hub: bool, part: bool) -> None:
    """Ask for ImageNet, the hub or both, what takes longest last."""
    paths = {"imagenet": imagenet or None}
    if imagenet is not None:
        for role in ("calibration", "test"):
            images.check("imagenet", role, paths)
    if hub:
        check_hub()
    if imagenet is None:
        return
    train, test = (len(pictures.imagenet(split, paths)) for split in ("train", "validation"))
    note = "" if train == images.IMAGENET_TRAIN else "; the draws from them are not the published ones"
    print(f"train: {train:,} of {images.IMAGENET_TRAIN:,} pictures{note}")
    print(f"val: {test:,} of {images.IMAGENET_TEST:,} pictures")
    if test != images.IMAGENET_TEST and not part:
        raise UserError(
            f"data.paths.imagenet: the validation set has {test:,} pictures, not {images.IMAGENET_TEST:,}; complete "
            "it, or set data.evaluation.limit (here: --part) for a part"
        )


if __name__ == "__main__":
    sys.exit(main())
