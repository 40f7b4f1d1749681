"""The command `kdflax`: is this machine ready, what methods are there, and what is in this folder.

    kdflax doctor              versions, devices, what is slow or missing and the line that mends it
    kdflax methods [NAME]      the catalogue of methods and balancers, or all about one of them
    kdflax inspect PATH        what a run, checkpoint, teacher record or export is, and whether it is whole

It writes nothing, and needs the core installation only.
"""

from kdflax.command.main import main

__all__ = ["main"]
