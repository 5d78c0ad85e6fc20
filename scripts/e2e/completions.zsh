# Types each LINE into an interactive zsh that has the completions of DIRECTORY, presses TAB, and prints what the line is
# then. Run by completions.sh.
#
#   zsh -f completions.zsh DIRECTORY LINE...
zmodload zsh/zpty

# ^X prints the line between marks that nobody types.
set_up='
    fpath=($DIRECTORY $fpath); autoload -U compinit; compinit -u -D; unsetopt beep
    show() { zle -I; print -r -- "<<${BUFFER}>>"; BUFFER= }; zle -N show; bindkey "^X" show
    print rea''dy'

until_has() { # until_has PATTERN: reads what the shell prints
    zpty -r -m shell printed "*$1*" || { print -ru2 -- "ended with: $printed"; exit 1 }
}

zpty shell "DIRECTORY=${(q)1} TERM=dumb COLUMNS=200 zsh -f"
zpty -w shell "${set_up//$'\n'/;}"
until_has ready
for line in "${@:2}"; do
    zpty -n -w shell "$line"$'\t\x18'
    until_has '<<*>>'
    shown=${${printed##*<<}%%>>*}
    print -r -- "$shown"
done
