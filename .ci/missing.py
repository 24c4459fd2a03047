"""Prints the requirements of slab-kernels that this Python does not meet, one per line.

Arguments are the extras to look at. A machine that brings its own torch asks pip only for what is
printed here, so that a complete machine needs no network.
"""

from __future__ import annotations

import sys
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement


def main() -> None:
    extras = sys.argv[1:] or [""]
    for line in metadata.requires("slab-kernels") or []:
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras):
            continue
        try:
            met = requirement.specifier.contains(
                metadata.version(requirement.name), prereleases=True
            )
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            print(requirement)


if __name__ == "__main__":
    main()
