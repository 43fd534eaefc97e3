# eval "$(hft completion bash)", for instance in ~/.bashrc
_hft() {
    local line=${COMP_LINE:0:COMP_POINT}
    local word=${line##*[[:space:]]}
    local before=${word%"${word##*[=:]}"} # bash completes what follows the last of = and :
    mapfile -t COMPREPLY < <(hft completion words "$line" 2>/dev/null)
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
    if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _hft hft
