"""The missing runs of a sweep as an array of jobs: their flags, the job that starts them, and its submission.

An element is the command `train` with one line of flags more (experiments/launch/README.md), so it takes the lock of
its run, goes on where it was interrupted, and is queued again by the template. What sites differ in, partition, image,
node pool, is changed in the templates of experiments/launch.
"""

import hashlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

TEMPLATES = Path("experiments/launch")
JOBSET = TEMPLATES / "jobset_array.yaml"
OVERRIDES = "overrides.txt"
PLACEHOLDER = "PROJECT/REPOSITORY"
"""In the image of the template, until a site has put its own there."""
Launcher = Literal["slurm", "jobset"]


def write_array(launcher: Launcher, lines: Sequence[str], base: str, workdir: Path) -> list[str]:
    """Writes the flags, and of a JobSet the manifest, into the sweep's folder; returns the command that submits it.

    Args:
        launcher: `slurm`: an array of `train.slurm`; `jobset`: `jobset_array.yaml` filled in.
        lines: flags of each run (`sweep.override_lines`), at least one.
        base: the experiment of all runs.
        workdir: of the sweep; elements on other machines read it at the same place.

    Raises:
        ValueError: the folder's name has blanks or commas, or the manifest's template was changed so that it cannot be
            filled in; names what is missing.
    """
    flags = workdir / OVERRIDES
    if re.search(r"[\s,]", str(flags)):
        raise ValueError(
            f"--workdir={workdir}: an array cannot be told of a folder with blanks or commas; name another"
        )
    flags.write_text("\n".join(lines) + "\n")
    if launcher == "slurm":
        return [
            "sbatch", f"--array=0-{len(lines) - 1}", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1",
            f"--export=ALL,OVERRIDES={flags}", str(TEMPLATES / "train.slurm"), "train", f"--config={base}",
        ]  # fmt: skip
    manifest = workdir / "jobset_array.yaml"
    manifest.write_text(
        _filled_in((TEMPLATES / "jobset_array.yaml").read_text(), len(lines), base, flags, workdir.name)
    )
    return ["kubectl", "apply", "-f", str(manifest)]


def _filled_in(template: str, count: int, base: str, flags: Path, name: str) -> str:
    # Of its own for each set of missing runs: what a set has to do cannot be changed once it was submitted.
    digest = hashlib.blake2b(flags.read_bytes(), digest_size=3).hexdigest()
    kubernetes_name = re.sub(r"[^a-z0-9]+", "-", f"unihetero-{name}-{digest}".lower()).strip("-")
    for old, new in {
        "name: unihetero-array": f"name: {kubernetes_name}",
        "completions: 4 ": f"completions: {count} ",
        "maxFailedIndexes: 4 ": f"maxFailedIndexes: {count} ",
        "experiments/launch/overrides.txt": str(flags),
        "--config=experiments/quickstart.py": f"--config={base}",
    }.items():
        if template.count(old) != 1:
            raise ValueError(f"{JOBSET}: `{old.strip()}` has to be there once, to be filled in")
        template = template.replace(old, new)
    return template


def submit(command: Sequence[str]) -> str:
    """Runs what `write_array` returned; what it printed.

    Raises:
        ValueError: the template's image is not filled in, or the command is not installed here or refused the job;
            says what to do.
    """
    if command[0] == "kubectl" and PLACEHOLDER in Path(command[-1]).read_text():
        raise ValueError(f"--submit: {JOBSET} names no image of yours yet ({PLACEHOLDER}); write it there first")
    by_hand = f"; submit it where that works: {shlex.join(command)}"
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError(f"--submit: there is no {command[0]} on this machine{by_hand}") from None
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip()
        raise ValueError(f"--submit: {command[0]} exited with {ended.returncode}: {said}{by_hand}")
    return ended.stdout.strip()
