#!/usr/bin/env bash
# IWSLT 2014 German-English (TED talks), lower-cased, joint BPE of 10 000: data/iwslt14/data-bin. Splits as in
# fairseq's example: every 23rd training pair held out (here before cleaning), dev2010 to tst2012 for the test.
# usage: prepare_iwslt14.sh [FOLDER]   the unpacked folder (train.tags.de-en.*, IWSLT14.TED*.xml) instead of a download;
#                                      OUT=, WORKERS= as in prepare.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
begin iwslt14 de en || exit 0
lowercase=true

from=${1:-}
if [ -z "$from" ]; then
  python "$root/scripts/download.py" "$out/download" http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz
  tar -xzf "$out/download/de-en.tgz" -C "$out/download"
  from=$out/download/de-en
fi
held_out=(TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012)
for language in de en; do
  take "$from" train.tags.de-en $language all
  sed -E '/<(url|talkid|keywords)>/d; s/<\/?(title|description)>//g' "$out/text/all.$language" |
    awk -v train="$out/text/train.$language" -v valid="$out/text/valid.$language" \
      '{ print > (NR % 23 ? train : valid) }'
  rm "$out/text/all.$language"
  for name in "${held_out[@]}"; do
    file=$from/IWSLT14.$name.de-en.$language.xml
    [ -e "$file" ] || fail "$file is missing: name the unpacked de-en folder, or none to download it"
    segments <"$file"
  done >"$out/text/test.$language"
done
binarise 10000 175
