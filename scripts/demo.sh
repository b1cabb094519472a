#!/usr/bin/env bash
# The whole path on a small corpus: set-up, data, lightseq-train (two minutes on two cores), lightseq-export,
# lightseq-generate, and fairseq-generate on the same checkpoint beside it. All is kept in data/demo; remove that folder
# to start over. PYTHON= and TORCH= as in environment.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/prepare.sh"
export OUT=$root/data/demo
export OMP_WAIT_POLICY=passive  # threads that wait asleep leave a shared machine its cores

echo "== data: a toy corpus made by a grammar (CC0)"
if begin demo en de; then
  python "$root/scripts/toy_corpus/make.py" "$out/corpus"
  cp "$out"/corpus/* "$out/text"
  binarise 2000 100 --joined-dictionary
fi
cd "$out"

echo "== training (log: $out/train.log)"
if [ -e model.pb ]; then
  echo "done already, $out/model.pb is there"
else
  # tqdm draws its bar on standard error where that is a terminal; elsewhere a line appears every 50 updates. The
  # warnings are fairseq's, about torch and hydra.
  PYTHONWARNINGS=ignore \
    lightseq-train data-bin -s en -t de --arch ls_transformer --share-all-embeddings --dropout 0.1 \
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 --encoder-attention-heads 4 \
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 \
    --criterion ls_label_smoothed_cross_entropy --label-smoothing 0.1 \
    --optimizer ls_adam --adam-betas '(0.9, 0.98)' \
    --lr 0.003 --lr-scheduler inverse_sqrt --warmup-updates 300 \
    --max-tokens 2048 --max-update 700 --save-dir checkpoints --no-epoch-checkpoints \
    --log-format tqdm --log-interval 50 | tee train.log | sed -un 's/.*\(| \(train_inner\|valid\) |.*\)/\1/p'
  lightseq-export checkpoints/checkpoint_last.pt -o model.part.pb
  mv model.part.pb model.pb
fi

echo "== translating the held-out part"
options=(data-bin --gen-subset test --beam 4 --batch-size 32 --remove-bpe)
sentences_per_second() { sed -nE 's/.*Translated .*\(([0-9.,]+) sentences\/s.*/\1/p' "$1" | tr -d ,; }
lightseq-generate "${options[@]}" --path model.pb >generate.log 2>&1 || { tail generate.log >&2; exit 1; }
fairseq-generate "${options[@]}" --path checkpoints/checkpoint_last.pt --user-dir "$root/lightseq_fairseq" \
  --model-overrides "{'_name': 'transformer'}" --required-batch-size-multiple 1 >fairseq-generate.log 2>&1 ||
  { tail fairseq-generate.log >&2; exit 1; }

grep ^H- generate.log | sort -t- -k2n | cut -f3 | sacremoses -q -l de detokenize --xml-unescape >translation.txt
paste corpus/test.en translation.txt corpus/test.de |
  awk -F '\t' 'NR <= 5 { printf "  source       %s\n  translation  %s\n  reference    %s\n\n", $1, $2, $3 }'
sacrebleu corpus/test.de -i translation.txt -m bleu --format text
bleu=$(sacrebleu corpus/test.de -i translation.txt -m bleu -b)
awk -v bleu="$bleu" 'BEGIN { exit !(bleu >= 60) }' || fail "BLEU is $bleu, at least 60 was expected: see $out/train.log"
awk -v ours="$(sentences_per_second generate.log)" -v theirs="$(sentences_per_second fairseq-generate.log)" 'BEGIN {
  printf "lightseq-generate %.1f sentences/s, fairseq-generate on the same checkpoint %.1f: %.1f times as fast\n",
    ours, theirs, ours / theirs }'
