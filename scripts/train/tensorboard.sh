# shellcheck shell=bash
# Shared by the stage scripts: TensorBoard in the background for as long as the script, and the trainer that takes its
# place, runs. Not run on its own.

# Where the runs are: TENSORBOARD_LOGDIR, or what the settings say, the last of them, or the scripts' own folder.
runs_folder() {
    local setting folder=checkpoints
    for setting in "$@"; do
        [[ $setting =~ ^\+{0,2}trainer\.default_(local|tensorboard)_dir=(.*)$ ]] && folder=${BASH_REMATCH[2]}
    done
    [[ $folder =~ ^\'(.*)\'$ || $folder =~ ^\"(.*)\"$ ]] && folder=${BASH_REMATCH[1]}
    # A setting's own tilde, which no shell has seen.
    # shellcheck disable=SC2088
    [[ $folder == "~/"* ]] && folder=$HOME/${folder#"~/"}
    printf '%s' "${TENSORBOARD_LOGDIR:-$folder}"
}

start_tensorboard() {
    local host=${TENSORBOARD_HOST:-127.0.0.1} port=${TENSORBOARD_PORT:-6006} folder
    [[ ${TENSORBOARD:-on} != off ]] || return 0
    folder=$(runs_folder "$@")
    mkdir -p "$folder"
    : >"$folder/tensorboard.log"
    "${PYTHON:-python3}" -m tensorboard.main --logdir "$folder" --host "$host" --port "$port" \
        >"$folder/tensorboard.log" 2>&1 &
    local server=$!
    (while kill -0 $$ 2>/dev/null; do sleep 1; done; kill "$server" 2>/dev/null || true) >/dev/null 2>&1 &
    for _ in {1..60}; do
        grep -q "http://" "$folder/tensorboard.log" && { echo "TensorBoard: http://$host:$port (runs under $folder)"; return 0; }
        kill -0 "$server" 2>/dev/null || break
        sleep 0.5
    done
    echo "TensorBoard did not start on $host:$port; training goes on without it. Its log: $folder/tensorboard.log" >&2
}
