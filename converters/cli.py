"""python -m converters IN OUT: converts a checkpoint once, so that it loads fast afterwards."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from converters import locate
from converters.load import load, read_config
from converters.save import FORMATS, check_empty, check_save_format, save
from jaxserve.errors import JaxserveError
from jaxserve.models.quantization import SCHEMES
from jaxserve.models.registry import config_from_hf


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after an error that was printed to stderr."""
    args = _parser().parse_args(argv)
    try:
        return _convert(args)
    except JaxserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m converters", description=__doc__)
    parser.add_argument("source", metavar="IN", help="model folder, .gguf file or Hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder, new or empty")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16 or float16; auto (default) keeps the checkpoint's",
    )
    parser.add_argument(
        "--quantization", choices=tuple(SCHEMES), help="of the layers' weights (orbax only)"
    )
    parser.add_argument("--format", default="orbax", choices=FORMATS, help="default: orbax")
    parser.add_argument(
        "--load-format", default="auto", help=f"of IN: {', '.join(locate.FORMATS)} (default: auto)"
    )
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--download-dir", help="where Hub downloads go")
    return parser


def _convert(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    check_empty(args.out)
    check_save_format(args.format, args.quantization)
    locate.check_format(args.load_format)
    local = locate.find_local(
        args.source, revision=args.revision, download_dir=args.download_dir, weights=True
    )
    path, kind = locate.detect_format(local, args.load_format)
    config = config_from_hf(read_config(path))
    with tqdm(desc="converting", unit=" parameters", disable=kind == "orbax") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        loaded = load(
            str(path),
            load_format=kind,
            dtype=config.dtype if args.dtype == "auto" else args.dtype,
            quantization=args.quantization,
            progress=progress,
        )
    save(loaded, args.out, args.format)
    size = sum(array.nbytes for array in loaded.everything().values())
    seconds = time.perf_counter() - started
    print(f"{path} ({kind}) -> {args.out} ({args.format}): {size / 1e9:.3f} GB in {seconds:.1f} s")
    return 0
