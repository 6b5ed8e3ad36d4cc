"""Installs the project and its scorers in a Colab runtime: adds what is missing, and replaces nothing that is there.

Colab's jax, libtpu, torch and numpy belong to its TPU and GPU drivers; another version may see neither. So pip is held
to every version that is installed, and fails rather than change one.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path


def main():
    have = {d.name: d.version for d in importlib.metadata.distributions() if d.name and d.name != "gpt2lib"}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        kept.writelines(f"{name}=={version}\n" for name, version in sorted(have.items()))
        kept.flush()
        project = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", "pip", "install", "-q", "-c", kept.name, "-e", f"{project}[evaluate]"]
        failed = subprocess.run(command).returncode
    if failed:
        print("pip could not install the project beside what this runtime has; its lines above name the package")
    return failed


if __name__ == "__main__":
    sys.exit(main())
