"""Write a run's page: curves, images with their descriptions, and settings, in one HTML file that opens anywhere.

    python scripts/report.py out/sft_vlm_128     writes out/sft_vlm_128.report.html
    python scripts/report.py                     the same, where out/ holds one run

Training writes the page too, at its end.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, file_path
from common.errors import UsageError, run_script
from common.paths import SAVE_DIR, display_path
from trainer.report.page import write_report
from trainer.support.run_files import ENDINGS, RunFiles

A_RUN = "a run like out/sft_vlm_128, one of its files, or a folder that holds one run"
METRICS = RunFiles(Path(), "").metrics.name


def find_run(typed: Path) -> tuple[Path, str]:
    """Returns the folder and name of the run that a path names; raises UsageError if it names none, or several."""
    path = typed.resolve()
    for name in (path.name.removesuffix(ending) for ending in ("", *ENDINGS)):
        if RunFiles(path.parent, name).metrics.is_file():
            return path.parent, name
    names = sorted(file.name.removesuffix(METRICS) for file in path.glob(f"*{METRICS}"))
    if len(names) == 1:
        return path, names[0]
    found = f"holds {len(names)} runs ({', '.join(names)})" if names else f"is no run: it has no *{METRICS}"
    raise UsageError(f"{display_path(path)} {found}. Name {A_RUN}")


def main():
    parser = ArgumentParser(description=__doc__)
    default = f"default: {display_path(SAVE_DIR)}"
    parser.add_argument("run", nargs="?", type=file_path, default=SAVE_DIR, help=f"{A_RUN} ({default})")
    print(f"wrote {display_path(write_report(*find_run(parser.parse_args().run)))}")


if __name__ == "__main__":
    run_script(main)
