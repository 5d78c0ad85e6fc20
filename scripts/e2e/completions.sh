# The completions, in the shells that they are for. Sourced by ../e2e.sh.

# A line, and what the shell makes of it when TAB is pressed.
completions_wanted=(
    "tunneld con" "tunneld connect"
    "tunneld --log-f" "tunneld --log-format"
    "tunneld --log-format j" "tunneld --log-format json"
    "tunneld connect --proto" "tunneld connect --protocol"
    "tunneld connect ws://box --protocol c" "tunneld connect ws://box --protocol connect-tcp"
    "tunneld connect ws://box -L 8080 --access-t" "tunneld connect ws://box -L 8080 --access-token-file"
    "tunneld connect ws://box -H 'A: b' --ca" "tunneld connect ws://box -H 'A: b' --ca-file"
)

complete_in_zsh() { timeout 60 zsh -f scripts/e2e/completions.zsh "$@" | sed 's/[= ]*$//'; }

complete_in_bash() { # its script has no words from a library
    # shellcheck disable=SC2016  # expanded inside
    timeout 60 bash --norc -c '
        . "$1/tunneld.bash"
        for line in "${@:2}"; do
            eval "COMP_WORDS=($line)"
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
            _tunneld tunneld "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
            echo "${line% *} ${COMPREPLY[*]}"
        done' bash "$@"
}

complete_in_fish() { # each as a line of its own, with a tab and its description behind it
    # shellcheck disable=SC2016  # expanded inside
    timeout 60 fish --no-config -c '
        source $argv[1]/tunneld.fish
        for line in $argv[2..]
            echo (string replace --regex " [^ ]*\$" "" -- $line) (complete -C $line | string replace --regex "\t.*" "")
        end' "$@"
}

completions() {
    timeout 600 cargo run --quiet --locked --example manual "$work/manual" || return
    local lines=() at shell
    for ((at = 0; at < ${#completions_wanted[@]}; at += 2)); do
        lines+=("${completions_wanted[at]}")
        echo "${completions_wanted[at + 1]}"
    done >"$work/wanted"
    for shell in zsh bash fish; do
        "complete_in_$shell" "$work/manual" "${lines[@]}" >"$work/out" || return
        diff "$work/wanted" "$work/out" || { echo "in $shell"; return 1; }
    done
}

check "completions: TAB in zsh, bash and fish offers options and their values" completions
