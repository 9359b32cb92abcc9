"""Makes the environments of the public models, and runs the tests of each there.

    python3.11 tests/public/run.py [ENVIRONMENT...]

Without names all of them are made, one after the other, in a folder that is removed.
The packages do not fit into one: each pins the versions of what it is built on.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
TOOLS = ("pytest", "pytest-xdist", "hypothesis")

# For each environment, a package of `MODELS` by its import name, and what pip installs for
# it. The releases are those that the tests were written against; JAX is the newest that
# they allow.
ENVIRONMENTS = {
    "quick": {
        "haiku": ("dm-haiku==0.0.17",),
        "equinox": ("equinox==0.13.8",),
        "flowjax": ("flowjax==19.1.2",),
        "jraph": ("jraph==0.0.6.dev0",),
        "penzai": ("penzai==0.2.5",),
    },
    "small": {
        "bijx": ("bijx==1.3.2",),
        "diffrax": ("diffrax==0.7.2",),
        "dynamax": ("dynamax==1.0.3",),
        "e3nn_jax": ("e3nn-jax==0.21.0", "dm-haiku==0.0.17", "flax"),
        "e3x": ("e3x==1.0.2",),
        "equimo": ("equimo==1.1.0",),
        "jax_resnet": ("jax-resnet==0.0.4",),
        "jraphx": ("jraphx==0.1.0",),
        "long_range_models": ("long-range-models==0.0.1",),
        "mamba2_jax": ("mamba2-jax==1.1.2",),
        "nanodl": ("nanodl==0.0.0",),
        "netket": ("netket==3.23.0",),
        "numpyro": ("numpyro==0.22.0",),
    },
    "transformers": {"transformers": ("transformers==4.48.3", "flax")},
    "tunix": {"tunix": ("google-tunix==0.1.7",)},
    "gemma": {"gemma": ("gemma==3.3.0",)},
    "keras-hub": {"keras_hub": ("keras-hub==0.32.0",)},
    # It imports git, which it does not require.
    "levanter": {"levanter": ("marin-levanter==0.2.20.dev202606180959", "gitpython")},
}


def run(name: str, folder: pathlib.Path, arguments: list[str]) -> bool:
    """Makes an environment and runs the tests of its packages; whether they pass."""
    print(f"\n== public models: {name}", flush=True)
    packages = ENVIRONMENTS[name]
    python = folder / "bin" / "python"
    wanted = sorted({line for lines in packages.values() for line in lines})
    tests = ["-q", "-n", "2", "-p", "no:cacheprovider", "-m", "public", "tests/public"]
    steps = (
        [sys.executable, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", *wanted, *TOOLS, "-e", "."],
        [python, "-c", f"import jax, {', '.join(packages)}; print('JAX', jax.__version__)"],
        [python, "-m", "pytest", *tests, "--packages", ",".join(packages), *arguments],
    )
    settings = {**os.environ, "KERAS_BACKEND": "jax", "NETKET_SHARDING": "0"}
    return all(
        subprocess.run(step, cwd=ROOT, env=settings).returncode == 0 for step in steps
    )


def main() -> int:
    """Runs the environments that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="ENVIRONMENT", help="; ".join(ENVIRONMENTS)
    )
    parser.add_argument("--pytest", default="", help="arguments of pytest, in one word")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"no such environment: {unknown}; there are {[*ENVIRONMENTS]}")
    failed = []
    for name in given.names or ENVIRONMENTS:
        with tempfile.TemporaryDirectory() as folder:
            if not run(name, pathlib.Path(folder), shlex.split(given.pytest)):
                failed.append(name)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall passed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
