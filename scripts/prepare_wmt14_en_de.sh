#!/usr/bin/env bash
# WMT 2014 English-German (Europarl v7, Common Crawl, News Commentary v9; valid newstest2013, test newstest2014), joint
# BPE of 32 000, vocabulary padded to a multiple of 8: data/wmt14_en_de/data-bin.
# usage: prepare_wmt14_en_de.sh [FOLDER]   a folder with {train,valid,test}.{en,de}(.gz) instead of a download;
#                                          OUT=, TOKENISED=1, WORKERS= as in prepare.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
begin wmt14_en_de en de || exit 0

from=${1:-}
if [ -n "$from" ]; then
  for split in train valid test; do
    take "$from" $split en $split
    take "$from" $split de $split
  done
else
  from=$out/download
  # The checksums are those of TensorFlow Datasets (url_checksums/wmt14_translate.txt).
  wmt=http://www.statmt.org dev=http://data.statmt.org/wmt19/translation-task/dev.tgz
  python "$root/scripts/download.py" "$from" \
    $wmt/wmt13/training-parallel-europarl-v7.tgz=0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7 \
    $wmt/wmt13/training-parallel-commoncrawl.tgz=c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5 \
    $wmt/wmt14/training-parallel-nc-v9.tgz=cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485 \
    $dev=7a7deccf82ebb05ba508dba5eb21356492224e8f630ec4f992132b029b4b25e7
  for archive in "$from"/*.tgz; do
    tar -xzf "$archive" -C "$from"
  done
  for language in en de; do
    cat "$from"/{training/europarl-v7,commoncrawl,training/news-commentary-v9}.de-en.$language \
      >"$out/text/train.$language"
    take "$from/dev" newstest2013 $language valid
    file=$(find "$from/dev" -name "newstest2014-deen-*.$language.sgm" | sort | head -n 1)
    segments <"$file" >"$out/text/test.$language"
  done
fi
binarise 32000 250 --joined-dictionary --padding-factor 8
