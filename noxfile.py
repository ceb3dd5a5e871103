"""The suite on every Python that README names, and with the lowest versions that pyproject.toml allows.

    nox -s tests           every interpreter that is here, the path's and pyenv's; the others are named
    nox -s tests-3.12      one of them
    nox -s lowest

Browser, slow and GPU tests differ by machine, not by Python; what pages show is run on the default one.
"""

import os
from pathlib import Path

import nox

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
ARGUMENTS = ("-n", "2", "--dist", "worksteal", "-m", "not slow and not gpu and not browser and not pages")

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

# pyenv puts only the interpreters that are switched on where they can be found.
_KEPT = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
os.environ["PATH"] = os.pathsep.join([*map(str, sorted(_KEPT.glob("3.*/bin"), reverse=True)), os.environ["PATH"]])


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The versions of constraints.txt."""
    session.install("--constraint", "constraints.txt", "--editable", ".[tests]")
    run_suite(session)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """The lowest versions of what the packages import, and what their tests need beside it."""
    if session.venv_backend != "uv":
        session.error("The lowest versions are found by uv; install it, `pip install uv`.")
    # Without --upgrade, what an earlier run installed would stay where it is newer.
    session.install("--upgrade", "--resolution", "lowest-direct", "--editable", ".")
    session.install("--editable", ".[tests]")
    run_suite(session)


def run_suite(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", *ARGUMENTS, *session.posargs, env={"OMP_WAIT_POLICY": "passive"})
