# shellcheck shell=bash
# Reading other suites of Debian than the machine's own, from the machine's own
# source entry, without touching its apt. Sourced by scripts that have `work`,
# a directory that apt's unprivileged user can read.

debian_codename() {
    sed -n 's/^VERSION_CODENAME=//p' /etc/os-release
}

# The machine's own source entry for Debian itself, with another suite, on
# standard output: first the kind of file it has to stand in.
# `indextargets` is apt's own reading of all entries, which also knows which of
# them are Debian's and not merely for Debian.
debian_entry() {
    local suite=$1 codename line origin name uri component entry file
    codename=$(debian_codename)
    line=
    # shellcheck disable=SC2016 # apt's own placeholders, not the shell's
    while IFS='|' read -r origin name uri component entry; do
        if [ "$origin" = Debian ] && [ "$name" = "$codename" ] && [ "$component" = main ]; then
            line=$uri
            file=${entry%:*}
            break
        fi
    done < <(apt-get indextargets --format \
        '$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(COMPONENT)|$(SOURCESENTRY)' 'Created-By: Packages')
    [ -n "$line" ] || return 1
    uri=${line%/}
    case $file in
    *.sources)
        echo sources
        # The stanza that names this address and this release, its suites,
        # components and types replaced, all else (above all the keys) kept.
        awk -v uri="$uri" -v codename="$codename" -v suite="$suite" '
            function field(name,   i, parts) {
                for (i = 1; i <= lines; i++)
                    if (tolower(text[i]) ~ "^" name ":") return text[i]
                return ""
            }
            function has(list, wanted,   i, n, parts) {
                n = split(list, parts, /[ \t]+/)
                for (i = 2; i <= n; i++) {
                    sub(/\/$/, "", parts[i])
                    if (parts[i] == wanted) return 1
                }
                return 0
            }
            function flush(   i, skip, key) {
                if (!done && lines && has(field("uris"), uri) &&
                    (has(field("suites"), codename) || has(field("suites"), release[codename]))) {
                    print "Types: deb"
                    print "URIs: " uri
                    print "Suites: " suite
                    print "Components: main"
                    for (i = 1; i <= lines; i++) {
                        key = tolower(text[i])
                        if (key !~ /^[ \t]/)
                            skip = key ~ /^(types|uris|suites|components|enabled|x-[a-z-]*):/
                        if (!skip) print text[i]
                    }
                    done = 1
                }
                lines = 0
            }
            BEGIN { release["bookworm"] = "oldstable"; release["trixie"] = "stable" }
            /^#/ { next }
            /^[ \t]*$/ { flush(); next }
            { text[++lines] = $0 }
            END { flush(); exit !done }' "$file"
        ;;
    *)
        echo list
        # deb [options] ADDRESS SUITE COMPONENTS
        awk -v uri="$uri" -v suite="$suite" '
            $1 == "deb" {
                at = 2
                if ($2 ~ /^\[/) {
                    while (at < NF && $at !~ /\]$/) at++
                    at++
                }
                address = $at
                sub(/\/$/, "", address)
                if (address == uri && $(at + 1) !~ /-(security|updates|backports)/) {
                    line = "deb"
                    for (i = 2; i <= at; i++) line = line " " $i
                    print line " " suite " main"
                    done = 1
                    exit
                }
            }
            END { exit !done }' "$file"
        ;;
    esac
}

# An apt that knows of nothing on this machine but how to reach its servers
# and which keys to trust: lists, packages, state and sources are its own.
# The list of installed packages is empty, so that "install criu" names every
# library CRIU needs down to the C library.
isolated() {
    local tool=$1
    shift
    "$tool" -o Dir::State="$work/apt/state" \
        -o Dir::State::status="$work/apt/status" \
        -o Dir::Cache="$work/apt/cache" \
        -o Dir::Etc::sourcelist=/dev/null \
        -o Dir::Etc::sourceparts="$work/apt/sources.list.d" \
        -o Dir::Etc::preferences=/dev/null \
        -o Dir::Etc::preferencesparts=/dev/null \
        -o APT::Default-Release= \
        -o Acquire::Languages=none \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false \
        -o Acquire::Retries=3 \
        "$@"
}

# isolated_suite SUITE: points the isolated apt at a suite and reads its lists.
# A suite that does not exist yet or any more is no error in itself; what apt
# said of it is in $work/log.
isolated_suite() {
    local kind
    rm -rf "$work/apt"
    mkdir -p "$work"/apt/{state/lists/partial,cache/archives/partial,sources.list.d}
    : >"$work/apt/status"
    debian_entry "$1" >"$work/entry" || return 1
    kind=$(head -n 1 "$work/entry")
    tail -n +2 "$work/entry" >"$work/apt/sources.list.d/migrate.$kind"
    # `--error-on=any` makes a failed download one, which apt calls a warning.
    isolated apt-get update --error-on=any >"$work/log" 2>&1 </dev/null
}
