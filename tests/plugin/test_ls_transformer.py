"""ls_transformer is fairseq's transformer: same parameters, same start, same outputs and gradients, by option."""

from __future__ import annotations

import pytest
import torch

from tests import tolerances
from tests.conftest import build_model, scramble, training_args

SMALL = ["--encoder-layers", "2", "--decoder-layers", "2", "--encoder-embed-dim", "24", "--decoder-embed-dim", "24",
         "--encoder-ffn-embed-dim", "40", "--decoder-ffn-embed-dim", "40", "--encoder-attention-heads", "4",
         "--decoder-attention-heads", "4", "--dropout", "0"]

OPTIONS = {
    "post-LN": [],
    "pre-LN": ["--encoder-normalize-before", "--decoder-normalize-before"],
    "pre-LN decoder only": ["--decoder-normalize-before"],
    "no decoder final norm": ["--decoder-normalize-before", "--no-decoder-final-norm"],
    "embedding norm": ["--layernorm-embedding"],
    "learned positions": ["--encoder-learned-pos", "--decoder-learned-pos"],
    "learned decoder positions": ["--decoder-learned-pos"],
    "no positions": ["--no-token-positional-embeddings"],
    "no embedding scale": ["--no-scale-embedding"],
    "tied output": ["--share-decoder-input-output-embed"],
    "different widths": ["--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "28", "--encoder-layers", "3"],
    "output width": ["--decoder-output-dim", "20"],
    "cross+self attention": ["--cross-self-attention"],
    "cross+self attention alone": ["--cross-self-attention", "--no-cross-attention"],
    "no cross-attention": ["--no-cross-attention"],
    "checkpointed activations": ["--checkpoint-activations"],
    "offloaded activations": ["--offload-activations"],
    "left-padded target": ["--left-pad-target"],
    "right-padded source": ["--left-pad-source"],
    "odd width": ["--encoder-embed-dim", "21", "--decoder-embed-dim", "21", "--encoder-attention-heads", "3",
                  "--decoder-attention-heads", "7"],
    **{f"{name} activation": ["--activation-fn", name] for name in
       ("gelu", "gelu_accurate", "gelu_fast", "tanh", "linear")},
}


def pair(data, flags, scrambled=True):
    """The stock model, ours with the same weights, and a padded batch of unequal sentences."""
    task, stock = build_model(data, "--arch", "transformer", *SMALL, *flags)
    _, ours = build_model(data, "--arch", "ls_transformer", *SMALL, *flags)
    if scrambled:
        scramble(stock)
        ours.load_state_dict(stock.state_dict())
    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[i] for i in (3, 50, 7, 120, 33)])
    return task, stock, ours, batch


def run(model, batch):
    """Logits and all gradients of a fixed projection of the real targets' logits."""
    model.train()
    logits, _ = model(**batch["net_input"])
    real = batch["target"].ne(1)
    probe = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * probe)[real].sum().backward()
    return logits[real], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients_are_fairseqs(data_bin, option):
    _, stock, ours, batch = pair(data_bin, OPTIONS[option])
    expected, expected_grads = run(stock, batch)
    actual, grads = run(ours, batch)
    torch.testing.assert_close(actual, expected, **tolerances.LAYER)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        if grad is None:
            assert grads[name] is None, name
        else:
            torch.testing.assert_close(grads[name], grad, **tolerances.GRADIENT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("option", OPTIONS)
def test_one_seed_gives_one_model_with_fairseqs_names_in_fairseqs_order(data_bin, option):
    _, stock, ours, _ = pair(data_bin, OPTIONS[option], scrambled=False)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert ours.state_dict().keys() == stock.state_dict().keys()
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_all_embeddings_shared(joined_data_bin):
    _, stock, ours, batch = pair(joined_data_bin, ["--share-all-embeddings"])
    torch.testing.assert_close(run(ours, batch)[0], run(stock, batch)[0], **tolerances.LAYER)
    assert ours.encoder.embed_tokens.weight is ours.decoder.output_projection.weight


def test_merged_embeddings(data_bin):
    _, stock, ours, batch = pair(data_bin, ["--merge-src-tgt-embed"])
    torch.testing.assert_close(run(ours, batch)[0], run(stock, batch)[0], **tolerances.LAYER)


@pytest.mark.parametrize("option", ["pre-LN", "post-LN", "cross+self attention", "left-padded target"])
def test_packed_output_is_the_real_rows(data_bin, option):
    _, _, ours, batch = pair(data_bin, OPTIONS[option])
    padded, _ = ours(**batch["net_input"])
    packed, _ = ours(**batch["net_input"], packed_output=True)
    torch.testing.assert_close(packed, padded[batch["net_input"]["prev_output_tokens"].ne(1)], **tolerances.LAYER)


@pytest.mark.parametrize("layer", [None, 0])
def test_attention_and_hidden_states_are_fairseqs(data_bin, layer):
    _, stock, ours, batch = pair(data_bin, OPTIONS["pre-LN"])
    args = {**batch["net_input"], "alignment_layer": layer, "return_all_hiddens": True}
    with torch.no_grad():
        (_, expected), (_, actual) = stock.eval()(**args), ours.eval()(**args)
    real = batch["target"].ne(1)
    torch.testing.assert_close(actual["attn"][0][real], expected["attn"][0][real], **tolerances.LAYER)
    for mine, theirs in zip(actual["inner_states"], expected["inner_states"], strict=True):
        torch.testing.assert_close(mine.transpose(0, 1)[real], theirs.transpose(0, 1)[real], **tolerances.LAYER)


@pytest.mark.parametrize("option", OPTIONS)
def test_fairseqs_own_generator_finds_the_same_hypotheses(data_bin, option):
    from fairseq.sequence_generator import SequenceGenerator

    task, stock, ours, batch = pair(data_bin, OPTIONS[option])
    expected, actual = (
        SequenceGenerator([model.eval()], task.target_dictionary, beam_size=4, max_len_b=30).generate([model], batch)
        for model in (stock, ours))
    for theirs, mine in zip(expected, actual, strict=True):
        for one, other in zip(theirs, mine, strict=True):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            torch.testing.assert_close(other["positional_scores"], one["positional_scores"], **tolerances.SCORE)
            torch.testing.assert_close(other["attention"], one["attention"], **tolerances.LAYER)


def test_layerdrop_drops_the_layers_fairseq_drops(data_bin):
    flags = ["--encoder-layerdrop", "0.5", "--decoder-layerdrop", "0.3", "--encoder-layers", "5"]
    _, stock, ours, batch = pair(data_bin, flags)
    for seed in range(4):
        logits = []
        for model in (stock, ours):
            torch.manual_seed(seed)
            logits.append(model.train()(**batch["net_input"])[0][batch["target"].ne(1)])
        torch.testing.assert_close(logits[1], logits[0], **tolerances.LAYER)


def test_a_pruned_stack_loads_the_layers_to_keep(data_bin, tmp_path):
    """--model-overrides "{'decoder_layers_to_keep': '1'}" at load time, as fairseq's layerdrop README has it."""
    from fairseq import checkpoint_utils

    _, _, ours, batch = pair(data_bin, OPTIONS["pre-LN"])
    args = training_args(data_bin, "--arch", "ls_transformer", *SMALL, *OPTIONS["pre-LN"])
    history = {"optimizer_history": [{"num_updates": 0, "best_loss": 1.0}], "last_optimizer_state": {},
               "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1}}}
    torch.save({"args": args, "model": ours.state_dict(), **history}, tmp_path / "model.pt")
    (pruned,), _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(tmp_path / "model.pt")], arg_overrides={"encoder_layers_to_keep": "0,1", "decoder_layers_to_keep": "1"})
    del ours.decoder.layers[0]
    ours.decoder.num_layers = 1
    torch.testing.assert_close(run(pruned, batch)[0], run(ours, batch)[0], rtol=0, atol=0)


def test_dropout_is_on_in_training_and_off_in_evaluation(data_bin):
    _, _, ours, batch = pair(data_bin, ["--dropout", "0.3", "--attention-dropout", "0.2", "--relu-dropout", "0.2"])
    first, second = (ours.train()(**batch["net_input"])[0] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (ours.eval()(**batch["net_input"])[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("flag", [["--adaptive-softmax-cutoff", "10,20"], ["--quant-noise-pq", "0.1"],
                                  ["--quant-noise-scalar", "0.1"], ["--base-layers", "1"], ["--char-inputs"],
                                  ["--tie-adaptive-weights"]])
def test_unsupported_options_are_refused_by_name(data_bin, flag):
    with pytest.raises(ValueError, match=flag[0]):
        build_model(data_bin, "--arch", "ls_transformer", *SMALL, *flag)


def test_old_checkpoints_load_as_fairseq_loads_them(data_bin):
    """Before 0.6 q, k and v were one matrix and norms were numbered; nothing stood behind the stack."""
    _, stock, ours, batch = pair(data_bin, OPTIONS["post-LN"])
    old = {}
    state = stock.state_dict()
    for name, value in state.items():
        for number, norm in enumerate(("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")):
            is_encoder = name.startswith("encoder")
            number = 1 if is_encoder and norm == "final_layer_norm" else number
            name = name.replace(f".{norm}.", f".layer_norms.{number}.")
        if "attn.q_proj" in name:
            parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            old[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name and not name.endswith("version"):
            old[name] = value
    ours.upgrade_state_dict(old)
    ours.load_state_dict({**old, "encoder.version": torch.tensor([1.0]), "decoder.version": torch.tensor([1.0])})
    torch.testing.assert_close(run(ours, batch)[0], run(stock, batch)[0], **tolerances.LAYER)


def test_unused_copies_of_fairseq_0_12_2_are_dropped(data_bin):
    """Its encoder layers hold eight tensors that nothing reads; the same names elsewhere are unexpected."""
    _, stock, ours, batch = pair(data_bin, OPTIONS["post-LN"])
    unused = [f"{module}_{part}" for module in ("in_proj", "out_proj", "fc1", "fc2") for part in ("weight", "bias")]
    copies = {f"encoder.layers.{i}.{name}": torch.zeros(1) for i in range(len(stock.encoder.layers)) for name in unused}
    ours.load_state_dict({**stock.state_dict(), **copies})
    torch.testing.assert_close(run(ours, batch)[0], run(stock, batch)[0], **tolerances.LAYER)
    with pytest.raises(RuntimeError, match="decoder.layers.0.fc1_weight"):
        ours.load_state_dict({**stock.state_dict(), "decoder.layers.0.fc1_weight": torch.zeros(1)})
