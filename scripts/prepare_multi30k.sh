#!/usr/bin/env bash
# Multi30k task 1 (Elliott et al. 2016), English-German, lower-cased, joint BPE of 10 000: data/multi30k/data-bin.
# The captions are under CC BY-NC-SA 4.0.
# usage: prepare_multi30k.sh [FOLDER]   a folder with {train,val,test_2016_flickr}.{en,de}(.gz) instead of a download;
#                                       OUT=, TOKENISED=1, WORKERS= as in prepare.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
begin multi30k en de || exit 0
lowercase=true

from=${1:-}
if [ -z "$from" ]; then
  from=$out/download
  base=https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw
  python "$root/scripts/download.py" "$from" "$base"/{train,val,test_2016_flickr}.{en,de}.gz
fi
for language in en de; do
  take "$from" train $language train
  take "$from" val $language valid
  take "$from" test_2016_flickr $language test
done
binarise 10000 175 --joined-dictionary
