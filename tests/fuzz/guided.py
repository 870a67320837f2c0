"""Coverage-guided fuzzing of every target with atheris: scripts/fuzz.

Each target runs in a process of its own, one after the other. What it finds is told once for each place in the code,
with the input in .cache/fuzz/findings, and it goes on; a hang or a crash of the interpreter ends that target. What
covers new code is kept in .cache/fuzz/corpus, and the next run begins there.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHERE = ROOT / ".cache" / "fuzz"
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
sys.path.append(str(WHERE / "site"))

INSTALL = f"pip install --target {WHERE.relative_to(ROOT) / 'site'} atheris"
ALONE = ("--target", "--seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of all targets together")
    parser.add_argument("--only", nargs="+", help="these targets alone")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    try:
        import atheris
    except ImportError:
        parser.error(f"atheris is missing: {INSTALL}")
    if asked.target:
        return one(atheris, asked.target, asked.seconds)
    return every(asked.only, asked.minutes * 60)


def every(only: list[str] | None, seconds: float) -> int:
    """Each in turn, for an equal share of the time; 1 where anything was found."""
    from targets import TARGETS
    from targets_folders import FOLDERS

    names = only or [*TARGETS, *FOLDERS]
    bad = 0
    for name in names:
        line = [sys.executable, __file__, "--target", name, "--seconds", str(int(seconds / len(names)))]
        done = subprocess.run(line, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        told = [text for text in done.stdout.splitlines() if text.startswith(("found ", "  ", "Done "))]
        print(f"{name}: exit {done.returncode}", *told, sep="\n", flush=True)
        if done.returncode:
            print(*done.stdout.splitlines()[-30:], sep="\n", flush=True)
        bad += bool(done.returncode) or any(text.startswith("found ") for text in told)
    return bool(bad)


def one(atheris, name: str, seconds: int) -> int:
    with atheris.instrument_imports(include=["backend", "client"]):
        from targets import SEEDS, TARGETS, TASKS
        from targets_folders import FOLDER_SEEDS, FOLDERS
    shared = Path("/dev/shm")  # files there are many times faster to write
    scratch = tempfile.TemporaryDirectory(prefix="tritonspeed-fuzz-", dir=shared if shared.is_dir() else None)
    folder = WHERE / "models" / name if name in TASKS else Path(scratch.name)
    folder.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["backend", "client"]):  # tasks are imported when asked for
        target = (TARGETS | FOLDERS)[name](folder)
    corpus, found = WHERE / "corpus" / name, WHERE / "findings" / name
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate((SEEDS | FOLDER_SEEDS).get(name, list)()):
        (corpus / f"seed{number}").write_bytes(seed)
    limits = ["-timeout=20", "-rss_limit_mb=3072", "-max_len=4096", f"-max_total_time={seconds}"]
    atheris.Setup(
        [name, *limits, "-print_final_stats=1", f"-artifact_prefix={found}/", str(corpus)], _kept(target, found)
    )
    atheris.Fuzz()  # does not return
    return 0


def _kept(target, found: Path):
    """The target, whose faults are told once for each place and do not end the run."""
    seen: set[tuple[str, str]] = set()

    def run(data: bytes) -> None:
        try:
            target(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Rust's panics are no Exception
            frames = traceback.extract_tb(error.__traceback__)
            ours = [each for each in frames if "/backend/" in each.filename or "/client/" in each.filename]
            place = (ours or frames)[-1]
            key = type(error).__name__, f"{place.filename}:{place.lineno}"
            if key not in seen:
                seen.add(key)
                (found / f"{key[0]}-{Path(place.filename).stem}-{place.lineno}-{int(time.time())}").write_bytes(data)
                print(
                    f"found {key[0]} at {key[1]}: {error!s:.300}",
                    "  ".join(["", *_short(frames)]),
                    sep="\n",
                    flush=True,
                )

    return run


def _short(frames) -> list[str]:
    return [f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in frames]


if __name__ == "__main__":
    sys.exit(main())
