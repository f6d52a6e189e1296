# shellcheck shell=bash
# Shared by the stage scripts: reads their flags and starts the trainer. Not run on its own.
#
#   run_stage STAGE NEEDS_CRITIC "$@"     NEEDS_CRITIC: yes or no
#
# A script that defines before_training has it called with the settings, once its flags are found right.
#
# From the environment: PYTHON (python3 by default), DATA_DIR (data), N_GPUS_PER_NODE (this machine's GPUs, or 1),
# LAUNCH_FLAGS (further flags of `python -m verl.launch`).

usage() {
    cat <<TEXT
usage: bash $0 --model PATH $([[ $needs_critic == yes ]] && echo '--reward_model PATH ')--exp_name NAME [--nnodes N [--head]] [KEY=VALUE ...]
       bash $0 --worker ADDRESS

  --model PATH         student: a Hugging Face folder, or a checkpoint's actor folder as it is
  --reward_model PATH  discriminator: a Hugging Face folder, or a checkpoint's critic folder as it is
  --exp_name NAME      checkpoints and metrics go to checkpoints/gad/NAME
  --nnodes N           machines (default 1); Ray runs on them already (RAY_ADDRESS), or is started by:
  --head               start Ray here, wait for the other machines, and end them with the run (docs/nodes.md)
  --worker ADDRESS     on the others: join the head at HOST or HOST:PORT; other flags are the head's and have no effect
  --port PORT          the head's (default 6379)
  KEY=VALUE            any setting of verl/trainer/config, e.g. data.train_files=data/train.parquet
  --cfg job            show the settings and what is wrong with them, and train nothing

Data: DATA_DIR/train.parquet and DATA_DIR/test.parquet unless data.train_files and data.val_files say otherwise.
TEXT
}

# A Python that has what training needs, asked before anything else is started.
find_python() {
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || { echo "no such Python: $python; set PYTHON" >&2; return 1; }
    "$python" -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, ("torch", "hydra", "ray"))))' || {
        echo "$(command -v "$python") has no torch, hydra or ray: activate the environment that the trainer is" \
            "installed in (source .venv/bin/activate), or set PYTHON to its python" >&2
        return 1
    }
}

run_stage() {
    local stage=$1 needs_critic=$2 model="" reward_model="" exp_name="" nnodes=1 overrides=() shows=no
    local worker="" port="" head=no
    shift 2
    while (($#)); do
        case $1 in
            --model | --reward_model | --exp_name | --nnodes | --worker | --port)
                [[ $# -ge 2 ]] || { echo "$1 needs a value" >&2; usage >&2; return 2; }
                printf -v "${1#--}" '%s' "$2"; shift 2 ;;
            --head) head=yes; shift ;;
            --cfg | -c)
                [[ $# -ge 2 ]] || { echo "$1 needs a value: job" >&2; return 2; }
                shows=yes; overrides+=("$1" "$2"); shift 2 ;;
            --resolve) overrides+=("$1"); shift ;;
            --resume_step)
                echo "$1: a run goes on from its newest checkpoint by itself; from another one with" \
                    "trainer.resume_mode=resume_path trainer.resume_from_path=.../global_step_N" >&2
                return 2 ;;
            -h | --help) usage; return 0 ;;
            --*=*) echo "write ${1%%=*} VALUE, without '='" >&2; return 2 ;;
            *=*) overrides+=("$1"); shift ;;
            *) echo "unknown argument: $1" >&2; usage >&2; return 2 ;;
        esac
    done
    local python=${PYTHON:-python3} launch=()
    # Split on purpose: several flags.
    # shellcheck disable=SC2206
    local flags=(${port:+--port "$port"} ${LAUNCH_FLAGS:-})
    if [[ -n $worker ]]; then
        [[ $head == no ]] || { echo "--head and --worker: this machine is one of them" >&2; return 2; }
        [[ $shows == no ]] || { echo "--cfg: the head shows the settings, and no node is waited for" >&2; return 0; }
        find_python || return
        exec "$python" -m verl.launch --worker "$worker" ${flags[@]+"${flags[@]}"}
    fi
    [[ -z $port || $head == yes ]] || { echo "--port: goes with --head or --worker" >&2; return 2; }
    [[ $head == no || $shows == yes ]] || launch=("$python" -m verl.launch --head --nnodes "$nnodes" ${flags[@]+"${flags[@]}"} --)
    local name missing=()
    local needed=(model exp_name)
    [[ $needs_critic == no ]] || needed=(model reward_model exp_name)
    for name in "${needed[@]}"; do [[ -n ${!name} ]] || missing+=("--$name"); done
    ((${#missing[@]} == 0)) || { echo "missing: ${missing[*]}" >&2; usage >&2; return 2; }

    find_python || return
    if [[ $shows == no ]] && declare -F before_training >/dev/null; then before_training ${overrides[@]+"${overrides[@]}"}; fi
    local data=${DATA_DIR:-data}
    local ranks=${N_GPUS_PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    echo "$(date +%T) loading libraries ..." >&2
    # In this process' place, so that who ends the script ends the trainer, and has its exit code.
    exec ${launch[@]+"${launch[@]}"} "$python" -m verl.trainer.main_ppo "stage=$stage" \
        data.train_files="$data/train.parquet" data.val_files="$data/test.parquet" \
        actor_rollout_ref.model.path="$model" ${reward_model:+critic.model.path="$reward_model"} \
        trainer.experiment_name="$exp_name" trainer.nnodes="$nnodes" \
        trainer.n_gpus_per_node="$ranks" ${overrides[@]+"${overrides[@]}"}
}
