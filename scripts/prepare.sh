#!/usr/bin/env bash
# Sourced by demo.sh and prepare_*.sh: from parallel text to what fairseq-train and lightseq-train read.
#   OUT        folder that everything goes to (default: data/NAME in the repository's root)
#   TOKENISED  set: the text is tokenised (and lower-cased) already, take it as it is
#   WORKERS    processes (default: all cores)

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

workers=${WORKERS:-$(nproc)}

# begin NAME SOURCE TARGET: names the output folder and the languages; fails if all is prepared already.
begin() {
  out=${OUT:-$root/data/$1} source=$2 target=$3
  if [ -e "$out/data-bin" ]; then
    echo "$out/data-bin is there already; remove it to prepare it again"
    return 1
  fi
  mkdir -p "$out"
  out=$(cd "$out" && pwd)
  rm -rf "$out/text"
  mkdir "$out/text"
}

# take FOLDER FILE LANGUAGE SPLIT: FOLDER/FILE.LANGUAGE, or its .gz, becomes one side of a split.
take() {
  local file=$1/$2.$3 text=$out/text/$4.$3
  if [ -e "$file" ]; then
    cp "$file" "$text"
  elif [ -e "$file.gz" ]; then
    gzip -dc "$file.gz" >"$text"
  else
    fail "$file(.gz) is missing: name a folder that holds it, or none to download the data"
  fi
}

# segments: the <seg>s of NIST's XML, one a line, on standard output.
segments() { sed -nE 's/.*<seg[^>]*> *(.*[^ ]) *<\/seg>.*/\1/p'; }

lower() { python -c 'import sys; sys.stdout.writelines(line.lower() for line in sys.stdin)'; }

tokenise() {  # LANGUAGE: standard input to standard output
  if [ -n "${TOKENISED:-}" ]; then
    cat
  else
    tr -d '\r' | sacremoses --quiet --language "$1" normalize --remove-control-chars \
      tokenize --aggressive-dash-splits --xml-escape | if [ -n "${lowercase:-}" ]; then lower; else cat; fi
  fi
}

same_lines() {  # FILE FILE
  local first second
  first=$(wc -l <"$1") second=$(wc -l <"$2")
  [ "$first" = "$second" ] || fail "$1 has $first lines and $2 has $second: they must be parallel"
}

# clean FROM TO LONGEST: pairs of 1 to LONGEST words, neither side 1.5 times as long as the other.
clean() {
  paste "$1.$source" "$1.$target" | awk -F '\t' -v longest="$3" -v s="$2.$source" -v t="$2.$target" '
    { n = split($1, words, " "); m = split($2, words, " ") }
    n && m && n <= longest && m <= longest && n <= 1.5 * m && m <= 1.5 * n { print $1 > s; print $2 > t; kept++ }
    END { printf "kept %d of %d training pairs\n", kept, NR }'
}

# binarise MERGES LONGEST FLAGS...: text/{train,valid,test*} to data-bin with a joint BPE of MERGES merges, learnt on
# the training pairs of at most LONGEST words. FLAGS go to fairseq-preprocess. The codes are data-bin/codes.
binarise() {
  local merges=$1 longest=$2 file split tests=() work=$out/bpe
  shift 2
  rm -rf "$work"
  mkdir "$work"
  for file in "$out"/text/*."$source"; do
    split=$(basename "$file" ".$source")
    same_lines "$out/text/$split.$source" "$out/text/$split.$target"
    echo "tokenising $split"
    tokenise "$source" <"$out/text/$split.$source" >"$work/$split.tok.$source" &
    tokenise "$target" <"$out/text/$split.$target" >"$work/$split.tok.$target"
    wait $!
    same_lines "$work/$split.tok.$source" "$work/$split.tok.$target"
    case $split in test*) tests+=("$work/$split") ;; esac
  done
  clean "$work/train.tok" "$work/train.clean" "$longest"
  mv "$work/train.clean.$source" "$work/train.tok.$source"
  mv "$work/train.clean.$target" "$work/train.tok.$target"

  echo "learning $merges merges"
  [ -t 2 ] || export TQDM_DISABLE=1
  cat "$work/train.tok.$source" "$work/train.tok.$target" | subword-nmt learn-bpe -s "$merges" >"$work/codes"
  for file in "$work"/*.tok.*; do
    subword-nmt apply-bpe -c "$work/codes" --num-workers "$workers" --input "$file" --output "${file/.tok./.}"
    rm "$file"
  done

  echo "binarising"
  fairseq-preprocess --source-lang "$source" --target-lang "$target" --workers "$workers" "$@" \
    --trainpref "$work/train" --validpref "$work/valid" --testpref "$(IFS=,; echo "${tests[*]}")" \
    --destdir "$work/data-bin" >"$work/preprocess.log" 2>&1 ||
    { tail "$work/preprocess.log" >&2; fail "fairseq-preprocess failed (all of its output: $work/preprocess.log)"; }
  mv "$work/codes" "$work/data-bin/codes"
  mv "$work/data-bin" "$out/data-bin"
  rm -rf "$work" "$out/text"
  echo "prepared $out/data-bin"
}
