"""A lab for drills, from its topology to a `Site`: one that is up already, or one of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lbctl.lab.api import Api
from lbctl.lab.bringup import KUBECONFIG, bring_up
from lbctl.lab.cluster.handle import ClusterKind
from lbctl.lab.drill.mentions import file_of
from lbctl.lab.drill.site import Site
from lbctl.lab.lab import Lab, directory_of, held, take_down


@contextmanager
def opened(topology: str, kind: ClusterKind, own: str, given: str = "") -> Iterator[Site]:
    """A site whose managers and agents are ready.

    given: the name of a lab that is up, and stays so (what a killed run left in it is mended);
    without it one named `own` is made, and taken down at the end. Raises LabError if it does not
    come up, or drills are run in it.
    """
    with _claimed(given or own):
        if not given:
            take_down(own)
        try:
            lab = Lab.load(given) if given else _made(topology, kind, own)
            with Api(lab.directory / KUBECONFIG) as api:
                site = Site(lab, api)
                site.take_over() if given else site.configure()
                yield site
        finally:
            if not given:
                take_down(own)


@contextmanager
def _claimed(name: str) -> Iterator[None]:
    """One run at a time: two would see each other's faults, and take the lab from each other."""
    file = directory_of(name).with_name(f"{name}.drills")
    file.parent.mkdir(parents=True, exist_ok=True)
    busy = f"drills are being run in lab {name!r}: wait for them, or bring up a lab of another name"
    with held(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), f"{busy} and say --lab"):
        yield


def _made(topology: str, kind: ClusterKind, own: str) -> Lab:
    lab = Lab.up(file_of(topology), own, _silent)
    bring_up(lab, kind, _silent)
    return lab


def _silent(_text: str) -> None:
    """Progress of the lab that nobody needs to read here."""
