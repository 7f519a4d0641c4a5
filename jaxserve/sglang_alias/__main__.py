"""`python -m jaxserve.sglang_alias script.py ...`: Python with jaxserve under the name sglang."""

from __future__ import annotations

import os
import sys

from jaxserve.sglang_alias import FOLDER, install

USAGE = """\
python -m jaxserve.sglang_alias script.py [argument ...]
python -m jaxserve.sglang_alias -m module [argument ...]
    runs Python with these arguments, and jaxserve as what `import sglang` finds
python -m jaxserve.sglang_alias --path
    prints the folder that does it, to be put first on PYTHONPATH"""


def main(arguments: list[str]) -> int:
    """Runs another Python in this one's place, which therefore behaves as without the alias."""
    if arguments == ["--path"]:
        print(FOLDER)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    install()
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
