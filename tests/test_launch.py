"""The launch templates: they parse, their command lines are the program's, and their scripts do what they say.

Nothing here reaches a cloud or a cluster. What a template calls there (`srun`, `scontrol`, `gcloud`, `kubectl`) is a
few lines of shell here; the templates themselves run as they are, with a program that only prints its arguments.
"""

import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from unihetero_jax import cli
from unihetero_jax.command_line import parse_arguments, parse_config_flags

LAUNCH = Path(__file__).resolve().parent.parent / "experiments" / "launch"
ROOT = LAUNCH.parent.parent
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.slurm"), *LAUNCH.glob("*.env")])
JOBSETS = sorted(LAUNCH.glob("jobset*.yaml"))
# Where the programs of this environment lie, shellcheck among them.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# The long options of sbatch that a template may use (slurm.schedmd.com/sbatch.html), with what their values look like.
SBATCH_OPTIONS = {
    "job-name": r"\w+", "partition": r"\w+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+", "cpus-per-task": r"\d+", "time": r"(\d+-)?\d+:\d\d:\d\d",
    "signal": r"([BR]+:)?[A-Z]+\d*(@\d{1,5})?", "requeue": None, "open-mode": "append|truncate",
    "output": r"[\w%./-]+",
}  # fmt: skip

# The fields of JobSet v1alpha2 (github.com/kubernetes-sigs/jobset, config/components/crd) and of the Job and Pod in it
# that the templates use. A dict holds fields, a list its one kind of element, a tuple the allowed values.
CONTAINER = {
    "name": str, "image": str, "workingDir": str, "command": [str], "args": [str], "ports": [{"containerPort": int}],
    "env": [{"name": str, "value": str}], "volumeMounts": [{"name": str, "mountPath": str}],
    "resources": {"limits": {"google.com/tpu": int, "nvidia.com/gpu": int}},
}  # fmt: skip
POD = {
    "restartPolicy": ("Never",), "terminationGracePeriodSeconds": int, "containers": [CONTAINER],
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": ("tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice"),
        "cloud.google.com/gke-tpu-topology": str, "cloud.google.com/gke-accelerator": str,
    },
    "volumes": [{"name": str, "emptyDir": {"medium": ("Memory",)}}],
}  # fmt: skip
POD_FAILURE_RULE = {
    "action": ("FailJob", "FailIndex", "Ignore", "Count"),
    "onExitCodes": {"containerName": str, "operator": ("In", "NotIn"), "values": [int]},
    "onPodConditions": [{"type": ("DisruptionTarget",), "status": ("True", "False", "Unknown")}],
}
JOB = {
    "parallelism": int, "completions": int, "completionMode": ("Indexed",), "backoffLimit": int,
    "backoffLimitPerIndex": int, "maxFailedIndexes": int, "podFailurePolicy": {"rules": [POD_FAILURE_RULE]},
    "template": {"spec": POD},
}  # fmt: skip
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",), "kind": ("JobSet",),
    "metadata": {"name": str, "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str}},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int, "restartStrategy": ("Recreate", "BlockingRecreate", "InPlaceRestart"),
            "rules": [{
                "name": str, "onJobFailureReasons": [("PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded")],
                "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                "onJobFailureMessagePatterns": [str],
            }],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip


def schema_faults(value, schema, path="") -> list[str]:
    """What in `value` the schema does not know, with the place."""
    if isinstance(schema, tuple):
        return [] if value in schema else [f"{path}: {value!r} is none of {schema}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: {value!r} is no list with elements"]
        return [fault for i, element in enumerate(value) for fault in schema_faults(element, schema[0], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return [f"{path}: {value!r} has no fields"]
    faults = [f"{path}.{name}: no such field" for name in value.keys() - schema.keys()]
    known = value.keys() & schema.keys()
    return faults + [fault for name in known for fault in schema_faults(value[name], schema[name], f"{path}.{name}")]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return path


def shell(*command, env=None, cwd=ROOT) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": PATH, "HOME": str(cwd)} | {name: str(value) for name, value in (env or {}).items()}
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=120)


def check_command(words: list[str]) -> None:
    """`words` is a command line that the program takes: its flags, its experiment, its fields. Raises if not."""
    assert words, "no command line"
    flags, overrides = parse_arguments(cli._parser(), words)
    if words[0] == "train":
        parse_config_flags(flags.config, overrides)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def printer(tmp_path) -> Path:
    """A program that prints its arguments, one a line, and exits with $CODE."""
    return executable(tmp_path / "program", 'printf "%s\\n" "$@"\nexit "${CODE:-0}"\n')


# --- syntax -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script):
    assert (parsed := shell("bash", "-n", script)).returncode == 0, parsed.stderr
    assert shutil.which("shellcheck", path=PATH), "shellcheck is missing; `make install` installs it"
    assert (checked := shell("shellcheck", "-x", script)).returncode == 0, checked.stdout


def test_slurm_options_are_those_of_sbatch():
    lines = (LAUNCH / "train.slurm").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = {}
    for number, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            assert number < first_command, f"sbatch stops reading options at the first command: {line}"
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert name in SBATCH_OPTIONS and name not in options, line
            assert re.fullmatch(SBATCH_OPTIONS[name] or "", value), line
            options[name] = value
    assert options["ntasks-per-node"] == options["gpus-per-node"], "one process for each GPU"
    assert options["signal"].startswith("TERM@"), "the signal goes to the processes, not to the batch shell"


def test_schema_rule_itself():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    assert len(schema_faults(jobset, JOBSET)) == 2


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_are_valid(path):
    jobset = yaml.safe_load(path.read_text())
    assert schema_faults(jobset, JOBSET) == []
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    exit_rules = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert [rule["values"] for rule in exit_rules] == [[cli.EXIT_BAD_INPUT], [128 + signal.SIGTERM]]
    assert {rule["containerName"] for rule in exit_rules} == {container["name"]}
    bad_input, saved = (rule["action"] for rule in job["podFailurePolicy"]["rules"][:2])
    if path.name == "jobset_array.yaml":
        assert (bad_input, saved) == ("FailIndex", "Ignore")
    else:
        rules = jobset["spec"]["failurePolicy"]["rules"]
        assert (bad_input, saved) == ("FailJob", "FailJob") and job["backoffLimit"] == 0
        assert [rule["action"] for rule in rules] == ["FailJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
        # Kubernetes words the failure of a job so: batch/job_controller, getFailJobMessage.
        message = "Container {} for pod default/x-0 failed with exit code {} matching FailJob rule at index {}"
        (pattern,) = rules[0]["onJobFailureMessagePatterns"]
        assert re.search(pattern, message.format("train", 2, 0))
        assert not re.search(pattern, message.format("train", 143, 1))


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_ask_for_whole_slices(path):
    jobset = yaml.safe_load(path.read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (chips,) = pod["containers"][0]["resources"]["limits"].values()
    topology = pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology")
    if path.name == "jobset_array.yaml":
        assert math.prod(map(int, topology.split("x"))) == chips, "every index is one host"
    elif topology:
        assert math.prod(map(int, topology.split("x"))) == job["parallelism"] * chips
        assert job["completions"] == job["parallelism"]
    else:
        environment = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
        name = jobset["metadata"]["name"]
        assert int(environment["NUM_NODES"]) == job["parallelism"] == job["completions"]
        assert environment["COORDINATOR"].startswith(
            f"{name}-{jobset['spec']['replicatedJobs'][0]['name']}-0-0.{name}:"
        )


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset_commands_are_the_programs(path, printer, tmp_path):
    container = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    shutil.copy(printer, tmp_path / "python")
    environment = {variable["name"]: variable["value"] for variable in container.get("env", [])}
    environment |= {"JOB_COMPLETION_INDEX": 1, "PATH": f"{tmp_path}{os.pathsep}{PATH}"}
    ran = shell(*container["command"], *container["args"], env=environment)
    assert ran.returncode == 0, ran.stderr
    module, name, *words = ran.stdout.splitlines()
    assert (module, name) == ("-m", "unihetero_jax")
    check_command(words)
    if path.name == "jobset_gpu.yaml":
        assert {"--num_processes=2", "--process_id=1"} <= set(words)
    if path.name == "jobset_array.yaml":
        assert "--workdir=runs/sweep/understanding-1" in words


# --- lines of flags for arrays ----------------------------------------------------------------------------------------


def test_an_index_gets_its_line(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text('# first\n--a=1 --b=2\n\n  # between\n--c="two words" \'--d={"x": 1}\'\n--e=*  $HOME\n')
    lines = [shell("bash", LAUNCH / "overrides.sh", file, index).stdout.splitlines() for index in range(3)]
    assert lines == [["--a=1", "--b=2"], ["--c=two words", '--d={"x": 1}'], ["--e=*", "$HOME"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lines.txt", "2"], "lines.txt has lines 0 to 1, asked for 2"),
        (["lines.txt", "-1"], "index '-1' is no number"),
        (["other.txt", "0"], "there is no file other.txt"),
        (["quotes.txt", "0"], "quotes.txt, line 0: unmatched quote"),
    ],
)
def test_what_is_no_line_is_refused(arguments, said, tmp_path):
    (tmp_path / "lines.txt").write_text("--a=1\n--b=2\n")
    (tmp_path / "quotes.txt").write_text("--a='1\n")
    ran = shell("bash", LAUNCH / "overrides.sh", *arguments, cwd=tmp_path)
    assert ran.returncode == 2 and said in ran.stderr


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("overrides.txt", ["train", "--config=experiments/quickstart.py"]),
        ("evaluations.txt", ["evaluate", "--workdir=runs/x"]),
    ],
)
def test_example_lines_fit_the_program(file, command):
    lines = [line for line in (LAUNCH / file).read_text().splitlines() if line and not line.startswith("#")]
    assert len(set(lines)) == len(lines) >= 3
    for line in lines:
        check_command([*command, *shlex.split(line)])
    workdirs = re.findall(r"--workdir=(\S+)", "\n".join(lines))
    assert len(set(workdirs)) == len(workdirs), "two runs in one folder"


# --- Slurm ------------------------------------------------------------------------------------------------------------


# Like srun: every process has its own SLURM_PROCID, and the highest exit code is srun's.
FAKE_SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  processes+=($!)
done
highest=0
for process in "${processes[@]}"; do
  wait "$process"; code=$?; ((code > highest)) && highest=$code
done
exit $highest
"""


@pytest.fixture
def batch(tmp_path, printer):
    """Runs train.slurm as a job's first node would, `srun` starting two processes. Returns (finished, requeued)."""
    executable(tmp_path / "bin" / "srun", FAKE_SRUN)
    executable(
        tmp_path / "bin" / "scontrol",
        'case $1 in show) echo "JobId=7 JobState=$STATE Reason=None" ;;\n'
        f'requeue) echo "$2" >>{tmp_path}/requeued ;; esac\n',
    )

    def run(*arguments, **env):
        environment = {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{PATH}", "SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": 7,
            "PYTHON": printer, "STATE": "RUNNING",
        } | env  # fmt: skip
        finished = shell("bash", LAUNCH / "train.slurm", *arguments, env=environment)
        requeued = tmp_path / "requeued"
        return finished, requeued.read_text().split() if requeued.exists() else []

    return run


@pytest.mark.parametrize(
    ("env", "requeued"),
    [
        ({"CODE": 0}, []),
        ({"CODE": 2}, []),  # bad input
        ({"CODE": 143}, ["7"]),  # saved before the time limit
        ({"CODE": 75, "SLURM_RESTART_COUNT": 19}, ["7"]),
        ({"CODE": 75, "SLURM_RESTART_COUNT": 20}, []),
        ({"CODE": 143, "SLURM_RESTART_COUNT": 20}, ["7"]),
        ({"CODE": 1}, ["7"]),
        ({"CODE": 143, "STATE": "CANCELLED"}, []),  # by its owner: must not come back
        ({"CODE": 143, "STATE": "PREEMPTED"}, []),  # Slurm requeues it itself
    ],
)
def test_slurm_restarts_what_another_start_can_help(batch, env, requeued):
    finished, found = batch("train", "--config=experiments/quickstart.py", "--workdir=runs/x", **env)
    assert finished.returncode == env["CODE"] and found == requeued, finished.stdout + finished.stderr


def test_slurm_array_element_gets_its_line_and_goes_back_alone(batch):
    array = {"SLURM_ARRAY_JOB_ID": 7, "SLURM_ARRAY_TASK_ID": 2}
    finished, requeued = batch("train", "--config=experiments/quickstart.py", CODE=75, **array)
    expected = [
        "-m", "unihetero_jax", "train", "--config=experiments/quickstart.py", "--workdir=runs/sweep/semantic-0",
        "--config.objective=semantic_input", "--config.seed=0",
    ]  # fmt: skip
    assert sorted(finished.stdout.splitlines()[:-1]) == sorted(expected * 2)
    check_command(expected[2:])
    assert requeued == ["7_2"]
    past, _ = batch("train", SLURM_ARRAY_JOB_ID=7, SLURM_ARRAY_TASK_ID=4)
    assert (
        past.returncode == 2 and "has lines 0 to 3, asked for 4" in past.stderr and "unihetero_jax" not in past.stdout
    )


def test_slurm_processes_find_each_other(batch, tmp_path):
    program = (
        "import jax, numpy, sys; jax.distributed.initialize(); from jax.experimental import multihost_utils as m; "
        "print(jax.process_index(), m.process_allgather(numpy.array([jax.process_index()])).ravel().tolist())"
    )
    python = executable(tmp_path / "python", f"exec {sys.executable} -c {shlex.quote(program)}\n")
    finished, _ = batch("train", PYTHON=python, JAX_PLATFORMS="cpu", SLURM_JOB_ID=os.getpid())
    found = sorted(line for line in finished.stdout.splitlines() if "Gloo" not in line)
    assert found == ["0 [0, 1]", "1 [0, 1]"], finished.stdout + finished.stderr


# --- TPU VMs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "starts", "end"),
    [
        ([0], 1, 0),
        ([2], 1, 2),
        ([143, 75, 1, 0], 4, 0),
        ([75, 143, 76, 134, 0], 4, 134),  # MAX_RESTARTS is 2, and 143 does not count
    ],
)
def test_a_worker_keeps_its_process_running(codes, starts, end, tmp_path):
    program = executable(
        tmp_path / "program",
        f'echo "$@" >>{tmp_path}/starts\ncodes=({" ".join(map(str, codes))})\n'
        f"exit ${{codes[$(wc -l <{tmp_path}/starts) - 1]}}\n",
    )
    env = {"PYTHON": program, "PAUSE_S": 0, "MAX_RESTARTS": 2}
    ran = shell("bash", LAUNCH / "keep_running.sh", "train", "--workdir=a b", env=env)
    assert ran.returncode == end, ran.stderr
    assert (tmp_path / "starts").read_text().splitlines() == ["-m unihetero_jax train --workdir=a b"] * starts


def test_a_stopped_worker_waits_for_the_save_and_stays_down(tmp_path):
    log = tmp_path / "log"
    program = executable(
        tmp_path / "program",
        f"trap 'echo signal >>{log}; stop=yes' TERM\necho start >>{log}\n"
        f"while [[ -z ${{stop:-}} ]]; do sleep 0.05; done\nsleep 0.5\necho saved >>{log}\nexit 143\n",
    )
    worker = subprocess.Popen(
        ["bash", LAUNCH / "keep_running.sh", "train"], env={"PATH": PATH, "PYTHON": str(program)}, cwd=ROOT
    )
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker.terminate()
    assert worker.wait(30) == 143
    assert log.read_text().split() == ["start", "signal", "saved"]


def test_a_signal_that_comes_as_the_program_starts_is_handed_on_once(tmp_path):
    """Between the start of the program and the line that remembers its number: lost in one of 15 before."""
    for number in range(20):
        log = tmp_path / str(number)
        program = executable(
            tmp_path / f"program-{number}",
            f"trap 'echo signal >>{log}; stop=yes' TERM\necho start >>{log}\n"
            f"while [[ -z ${{stop:-}} ]]; do sleep 0.02; done\nexit 143\n",
        )
        worker = subprocess.Popen(
            ["bash", LAUNCH / "keep_running.sh", "train"], env={"PATH": PATH, "PYTHON": str(program)}, cwd=ROOT
        )
        try:
            while not log.exists():
                assert worker.poll() is None
            worker.terminate()
            assert worker.wait(30) == 143
        finally:
            worker.kill()
            worker.wait()
        assert log.read_text().split() == ["start", "signal"]


@pytest.fixture
def slice_of_one(tmp_path, printer):
    """Runs tpu_vm.sh with a `gcloud` that writes its arguments down and runs --command here, in a home of its own."""
    home = tmp_path / "home"
    shutil.copytree(LAUNCH, home / "unihetero" / "experiments" / "launch")
    executable(
        tmp_path / "bin" / "gcloud",
        f'printf "%s\\n" "$@" --- >>{tmp_path}/calls\nfor word in "$@"; do\n'
        '  if [[ $word == --command=* ]]; then bash -c "${word#--command=}"; fi\ndone\n',
    )

    def run(*arguments, **env):
        environment = {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{PATH}", "PROJECT": "p", "ZONE": "z", "PYTHON": printer,
        } | env  # fmt: skip
        finished = shell("bash", LAUNCH / "tpu_vm.sh", *arguments, env=environment, cwd=home)
        calls = tmp_path / "calls"
        return finished, calls.read_text().splitlines() if calls.exists() else []

    return home / "unihetero", run


def test_tpu_workers_get_the_flags_as_they_were_written(slice_of_one):
    folder, run = slice_of_one
    flags = ["--config=experiments/pretrain_200m.py", "--workdir=gs://b/r", "--config.name=two words, $HOME"]
    finished, calls = run("train", *flags)
    assert finished.returncode == 0, finished.stderr
    assert calls[:5] == ["compute", "tpus", "tpu-vm", "ssh", "unihetero"] and "--worker=all" in calls
    deadline = time.monotonic() + 30
    while "--config.name" not in (folder / "train.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (folder / "train.log").read_text().splitlines() == ["-m", "unihetero_jax", "train", *flags]
    assert (folder / "train.pid").read_text().strip().isdecimal()
    check_command(["train", *flags[:2]])


def test_tpu_slices_are_asked_for_together(slice_of_one):
    _, run = slice_of_one
    finished, calls = run("create", NUM_SLICES=2, SPOT=1, ACCELERATOR_TYPE="v6e-256", RUNTIME_VERSION="v2-alpha-tpuv6e")
    assert finished.returncode == 0, finished.stderr
    assert calls[:5] == ["compute", "tpus", "queued-resources", "create", "unihetero"]
    assert {"--node-count=2", "--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e", "--spot"} <= set(calls)


@pytest.mark.parametrize(("arguments", "env", "said"), [
    (["fly"], {}, "usage: tpu_vm.sh"), (["create"], {"PROJECT": ""}, "set PROJECT"), (["setup"], {}, "set REPOSITORY"),
])  # fmt: skip
def test_tpu_mistakes_are_said_before_anything_is_rented(slice_of_one, arguments, env, said):
    _, run = slice_of_one
    finished, calls = run(*arguments, **env)
    assert finished.returncode != 0 and said in finished.stderr and calls == []


# --- flags of XLA and libtpu ------------------------------------------------------------------------------------------

LOAD_JAX = "import jax; jax.devices(); print('started')"


@pytest.mark.parametrize("file", ["gpu.env", "tpu.env"])
def test_every_flag_has_a_reason_and_a_source(file):
    text = (LAUNCH / file).read_text()
    sources = set(re.findall(r"^#   (\w+): +https://", text, re.M))
    reason = ""
    for line in text.splitlines():
        if line.startswith("# "):
            reason = line
        elif "=" in line:
            assert sources & set(re.findall(r"\w+", reason.rpartition("(")[2])), f"{line}: no source in {reason!r}"


def test_gpu_flags_are_known_to_this_jaxlib():
    command = f". {LAUNCH}/gpu.env; XLA_FLAGS+=$MORE exec {sys.executable} -c {shlex.quote(LOAD_JAX)}"
    known = shell("bash", "-c", command, env={"JAX_PLATFORMS": "cpu", "MORE": ""})
    assert known.stdout == "started\n", known.stderr
    unknown = shell("bash", "-c", command, env={"JAX_PLATFORMS": "cpu", "MORE": " --xla_gpu_no_such_flag=true"})
    assert unknown.returncode != 0 and "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag" in unknown.stderr


COMPILE_FOR_TPU = """
import jax, numpy
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
split = NamedSharding(Mesh(numpy.array(devices), ("x",)), PartitionSpec("x"))
values = jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=split)
jax.jit(lambda a: a @ a.T).lower(values).compile()
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu on the path")
def test_tpu_flags_are_known_to_this_libtpu():
    command = f". {LAUNCH}/tpu.env; LIBTPU_INIT_ARGS+=$MORE exec {sys.executable} -c {shlex.quote(COMPILE_FOR_TPU)}"
    env = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": 1, "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_ID": 0,
        "TPU_WORKER_HOSTNAMES": "localhost", "PYTHONPATH": os.pathsep.join(sys.path),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": 1,  # compiling takes no TPU, so another process may compile, too
    }  # fmt: skip
    known = shell("bash", "-c", command, env=env | {"MORE": ""})
    assert known.stdout == "compiled\n", known.stderr[-2000:]
    unknown = shell("bash", "-c", command, env=env | {"MORE": " --xla_tpu_no_such_flag=true"})
    assert unknown.returncode != 0 and "Unknown command line flag 'xla_tpu_no_such_flag'" in unknown.stderr


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_pages_command_lines_are_the_programs():
    blocks = "\n".join(re.findall(r"```\n(.*?)```", (LAUNCH / "README.md").read_text(), re.S)).replace("\\\n", " ")
    starts = re.compile(r"(?:train\.slurm|tpu_vm\.sh|-m unihetero_jax) ((?:train|evaluate) --[^'\n]*)")
    found = [match.group(1) for match in starts.finditer(blocks)]
    assert len(found) >= 5, found
    for line in found:
        words = shlex.split(line)
        if not any(word.startswith("--workdir=") for word in words):
            words.append("--workdir=of-the-line")  # an array element's comes from its line
        check_command(words)


def test_the_page_makes_a_jobset_of_each_line(tmp_path):
    (loop,) = re.findall(r"^for i in .*?^done$", (LAUNCH / "README.md").read_text(), re.S | re.M)
    executable(tmp_path / "kubectl", f"echo --- >>{tmp_path}/applied; cat >>{tmp_path}/applied\n")
    ran = shell("bash", "-euc", loop, env={"PATH": f"{tmp_path}{os.pathsep}{PATH}"})
    assert ran.returncode == 0, ran.stderr
    jobsets = list(yaml.safe_load_all((tmp_path / "applied").read_text()))
    assert [jobset["metadata"]["name"] for jobset in jobsets] == [f"unihetero-{i}" for i in range(4)]
    for jobset, last in zip(jobsets, ("understanding-0", "understanding-1", "semantic-0", "semantic-1"), strict=True):
        assert schema_faults(jobset, JOBSET) == []
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        line = job["template"]["spec"]["containers"][0]["args"][0].replace("\\\n", " ")
        words = shlex.split(line.partition("-m unihetero_jax ")[2])
        assert f"--workdir=runs/sweep/{last}" in words and "BUCKET" not in line
        check_command(words)


def test_the_page_names_every_file():
    page = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in page, f"{path.name} is not on the page"
