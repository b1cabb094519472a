"""From checkpoint to model: every option is carried over or refused by name, every tensor used or named."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

from lightseq_fairseq.export import ExportError, from_checkpoints
from lightseq_fairseq.model_file import load, save
from lightseq_fairseq.model_file.spec import validate
from tests.export.checkpoints import TINY, state_of, write_checkpoint
from tests.model_file.models import LEARNED, PRE, small_config
from tests.model_file.test_spec import SMALL

UNTIED = ("--arch", "transformer", *SMALL)


def expected_config(task_sizes, **changes):
    return small_config(**{"src_vocab_size": task_sizes[0], "tgt_vocab_size": task_sizes[1]} | changes)


def export(tmp_path, data_bin, *flags, **kwargs):
    """The stock (or our) model and what is exported of its checkpoint."""
    model = write_checkpoint(tmp_path / "checkpoint.pt", data_bin, *flags)
    return model, from_checkpoints([tmp_path / "checkpoint.pt"], **kwargs)


@pytest.mark.parametrize("arch", ["transformer", "ls_transformer"])
@pytest.mark.parametrize("flags, changes", [
    ((), {}),
    (("--encoder-normalize-before", "--decoder-normalize-before"), PRE),
    (("--encoder-normalize-before", "--decoder-normalize-before", "--no-decoder-final-norm"),
     PRE | dict(no_decoder_final_norm=True)),
    (("--layernorm-embedding", "--encoder-learned-pos", "--decoder-learned-pos"),
     LEARNED | dict(layernorm_embedding=True)),
    (("--encoder-learned-pos",), dict(encoder_positions="learned")),
    (("--no-token-positional-embeddings",), dict(encoder_positions="none", decoder_positions="none")),
    (("--decoder-embed-dim", "18", "--decoder-ffn-embed-dim", "10"),
     dict(decoder_embed_dim=18, decoder_ffn_embed_dim=10)),
    (("--decoder-output-dim", "8"), dict(decoder_output_dim=8)),
    (("--cross-self-attention", "--no-cross-attention"), dict(cross_self_attention=True, no_cross_attention=True)),
    (("--share-decoder-input-output-embed", "--no-scale-embedding", "--activation-fn", "gelu"),
     dict(share_decoder_input_output_embed=True, no_scale_embedding=True, activation_fn="gelu")),
], ids=lambda value: " ".join(value) or "plain" if isinstance(value, tuple) else "")
def test_options_and_weights_are_carried_over(tmp_path, data_bin, arch, flags, changes):
    model, exported = export(tmp_path, data_bin, *UNTIED, *flags, "--arch", arch)
    sizes = len(model.encoder.dictionary), len(model.decoder.dictionary)
    assert exported.config == expected_config(sizes, **changes)
    weights = {name: tensor for name, tensor in model.state_dict().items()
               if not name.endswith(("version", "_float_tensor"))}
    assert exported.tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(exported.tensors[name], tensor), name
    assert list(exported.src_symbols) == model.encoder.dictionary.symbols
    assert list(exported.tgt_symbols) == model.decoder.dictionary.symbols
    assert (exported.source_lang, exported.target_lang) == ("xx", "yy")
    validate(exported)


def test_one_vocabulary(tmp_path, joined_data_bin):
    _, exported = export(tmp_path, joined_data_bin, *UNTIED, "--share-all-embeddings")
    assert exported.config.share_all_embeddings and exported.src_symbols == exported.tgt_symbols
    table = exported.tensors["encoder.embed_tokens.weight"]
    assert table is exported.tensors["decoder.embed_tokens.weight"]
    assert table is exported.tensors["decoder.output_projection.weight"]


def test_merged_embeddings_have_the_merged_dictionary(tmp_path, data_bin):
    model, exported = export(tmp_path, data_bin, *UNTIED, "--merge-src-tgt-embed")
    assert list(exported.src_symbols) == model.encoder.dictionary.symbols == list(exported.tgt_symbols)
    assert exported.config.share_all_embeddings


@pytest.mark.parametrize("suffix", [".pb", ".hdf5"])
@pytest.mark.parametrize("flags", [
    ("--encoder-normalize-before", "--decoder-normalize-before"), (), ("--layernorm-embedding",),
], ids=["pre-LN", "post-LN", "embedding norm"])
def test_checkpoint_to_file_and_back(tmp_path, data_bin, flags, suffix):
    model, exported = export(tmp_path, data_bin, *TINY, *flags)
    save(exported, tmp_path / f"model{suffix}")
    loaded = load(tmp_path / f"model{suffix}")
    for name, tensor in loaded.tensors.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=2e-7, atol=0)
    assert dataclasses.replace(loaded, tensors={}) == dataclasses.replace(exported, tensors={})


def test_the_mean_of_checkpoints_is_fairseqs(tmp_path, data_bin):
    paths = [tmp_path / f"checkpoint{seed}.pt" for seed in (1, 2, 3)]
    models = [write_checkpoint(path, data_bin, *TINY, seed=seed) for seed, path in enumerate(paths)]
    mean = from_checkpoints(paths, average=True)
    for name, tensor in mean.tensors.items():
        total = sum(model.state_dict()[name].clone() for model in models)
        assert torch.equal(tensor, total / 3), name
    assert mean.tensors["decoder.output_projection.weight"] is mean.tensors["decoder.embed_tokens.weight"]


def test_several_checkpoints_need_average_and_one_kind(tmp_path, data_bin):
    write_checkpoint(tmp_path / "a.pt", data_bin, *TINY)
    write_checkpoint(tmp_path / "b.pt", data_bin, *TINY, "--encoder-layers", "1")
    with pytest.raises(ExportError, match="expected one checkpoint, or several with --average, got 2"):
        from_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"])
    with pytest.raises(ExportError, match=r"b.pt: cannot be averaged with .*a.pt: encoder.layers.1.* is missing"):
        from_checkpoints([tmp_path / "a.pt", tmp_path / "b.pt"], average=True)
    with pytest.raises(ExportError, match="at least one checkpoint"):
        from_checkpoints([], average=True)


def test_half_precision_checkpoints_become_fp32(tmp_path, data_bin):
    state, model = state_of(data_bin, *TINY)
    state["model"] = {name: tensor.half() for name, tensor in state["model"].items()}
    torch.save(state, tmp_path / "c.pt")
    for name, tensor in from_checkpoints([tmp_path / "c.pt"]).tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, model.state_dict()[name].half().float())


def test_exported_tensors_do_not_depend_on_the_file(tmp_path, data_bin):
    model, exported = export(tmp_path, data_bin, *TINY)
    (tmp_path / "checkpoint.pt").write_bytes(bytes(10))
    assert torch.equal(exported.tensors["decoder.layers.2.fc1.weight"], model.decoder.layers[2].fc1.weight)


def old_names(weights):
    """As fairseq stored them before its version 0.6: joint projections, numbered norms, no output projection."""
    old = {}
    for name, tensor in weights.items():
        name = name.replace("encoder_attn_layer_norm", "layer_norms.1").replace("self_attn_layer_norm", "layer_norms.0")
        name = name.replace("final_layer_norm", "layer_norms.1" if name.startswith("encoder") else "layer_norms.2")
        if any(f".{key}_proj." in name for key in "kv") or name.startswith("decoder.output_projection"):
            continue
        if ".q_proj." in name:
            tensor = torch.cat([weights[name.replace("q_proj", f"{key}_proj")] for key in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        old[name] = tensor
    return old


def test_names_of_old_checkpoints(tmp_path, data_bin):
    state, model = state_of(data_bin, *TINY, "--encoder-normalize-before", "--decoder-normalize-before")
    weights = old_names(state["model"])
    assert "encoder.layers.1.self_attn.in_proj_weight" in weights and "decoder.layers.2.layer_norms.2.bias" in weights
    weights["encoder.embed_positions._float_tensor"] = torch.zeros(1)
    weights["decoder.embed_positions.weights"] = torch.zeros(10, 12)
    args = argparse.Namespace(**vars(state["cfg"]["model"]))
    del args.decoder_ffn_embed_dim, args.no_scale_embedding, args.activation_fn  # not known in those days
    torch.save({"args": args, "model": weights}, tmp_path / "old.pt")
    exported = from_checkpoints([tmp_path / "old.pt"])
    for name, tensor in exported.tensors.items():
        assert torch.equal(tensor, model.state_dict()[name]), name


UNUSED = [f"{module}_{part}" for module in ("in_proj", "out_proj", "fc1", "fc2") for part in ("weight", "bias")]


def test_unused_copies_of_fairseq_0_12_2_are_dropped(tmp_path, data_bin):
    """Its encoder layers hold eight tensors that nothing reads; the same names elsewhere are unexpected."""
    state, model = state_of(data_bin, *TINY)
    copies = {f"encoder.layers.{i}.{name}": torch.zeros(1) for i in range(len(model.encoder.layers)) for name in UNUSED}
    torch.save({**state, "model": state["model"] | copies}, tmp_path / "copies.pt")
    exported = from_checkpoints([tmp_path / "copies.pt"])
    assert not copies.keys() & exported.tensors.keys()
    for strange in ("decoder.layers.0.fc1_weight", "encoder.layers.0.fc3_weight"):
        torch.save({**state, "model": state["model"] | {strange: torch.zeros(1)}}, tmp_path / "strange.pt")
        with pytest.raises(ExportError, match=strange):
            from_checkpoints([tmp_path / "strange.pt"])


def test_old_decoders_without_a_final_norm_and_untied_output(tmp_path, data_bin):
    state, model = state_of(data_bin, *UNTIED, "--decoder-normalize-before")
    weights = state["model"]
    weights["decoder.embed_out"] = weights.pop("decoder.output_projection.weight")
    weights["decoder.version"] = torch.tensor([2.0])
    for part in ("weight", "bias"):
        del weights[f"decoder.layer_norm.{part}"]
    torch.save(state, tmp_path / "old.pt")
    exported = from_checkpoints([tmp_path / "old.pt"])
    assert exported.config.no_decoder_final_norm
    assert torch.equal(exported.tensors["decoder.output_projection.weight"], model.decoder.output_projection.weight)


def test_a_dataclass_configuration_and_omegaconf(tmp_path, data_bin):
    from omegaconf import OmegaConf

    state, model = state_of(data_bin, *TINY)
    flat = {key: value for key, value in vars(state["cfg"]["model"]).items() if value is None or
            isinstance(value, (bool, int, float, str))}
    nested = {key: value for key, value in flat.items() if not key.startswith(("encoder_", "decoder_"))}
    for side in ("encoder", "decoder"):
        nested[side] = {key[8:]: value for key, value in flat.items() if key.startswith(side)}
    nested["decoder"]["output_dim"] = "${model.decoder.embed_dim}"
    task = {"data": str(data_bin), "source_lang": "xx", "target_lang": "yy"}
    state["cfg"] = OmegaConf.create({"model": nested, "task": task})
    torch.save(state, tmp_path / "c.pt")
    exported = from_checkpoints([tmp_path / "c.pt"])
    assert exported.config == expected_config((len(model.encoder.dictionary), len(model.decoder.dictionary)),
                                              share_decoder_input_output_embed=True)


@pytest.mark.parametrize("changes, message", [
    (dict(adaptive_softmax_cutoff="10,20"), r"the adaptive softmax \(--adaptive-softmax-cutoff\)"),
    (dict(quant_noise_pq=0.1, char_inputs=True), r"product quantization .*, character inputs \(--char-inputs\)"),
    (dict(base_layers=2), r"BASE layers \(--base-layers\)"),
    (dict(scale_attn=True), r"NormFormer's scales \(--scale-attn\)"),
])
def test_options_that_cannot_be_exported_are_refused_by_name(tmp_path, data_bin, changes, message):
    state, _ = state_of(data_bin, *TINY)
    vars(state["cfg"]["model"]).update(changes)
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ExportError, match=message):
        from_checkpoints([tmp_path / "c.pt"])


def test_missing_unexpected_and_misshapen_tensors_are_named_together(tmp_path, data_bin):
    state, _ = state_of(data_bin, *TINY)
    weights = state["model"]
    del weights["encoder.layers.0.fc1.bias"]
    weights["encoder.layers.0.fc3.bias"] = weights["extra"] = torch.zeros(3)
    weights["decoder.layers.0.fc1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ExportError) as error:
        from_checkpoints([tmp_path / "c.pt"])
    for part in ("c.pt: encoder.layers.0.fc1.bias is missing", "encoder.layers.0.fc3.bias is unexpected",
                 "extra is unexpected", "decoder.layers.0.fc1.bias must have shape (20,), got (3,)"):
        assert part in str(error.value)


def test_tied_tensors_that_differ(tmp_path, data_bin):
    state, _ = state_of(data_bin, *TINY)
    state["model"]["decoder.output_projection.weight"] = state["model"]["decoder.embed_tokens.weight"] + 1
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ExportError, match="output_projection.weight and decoder.embed_tokens.weight differ"):
        from_checkpoints([tmp_path / "c.pt"])


def test_other_models(tmp_path, data_bin):
    state, _ = state_of(data_bin, *TINY)
    weights = state["model"]
    state["model"] = {name: tensor for name, tensor in weights.items() if name.startswith("encoder")}
    vars(state["cfg"]["model"])["_name"] = "hubert"
    torch.save(state, tmp_path / "hubert.pt")
    with pytest.raises(ExportError, match="expected a Transformer with a decoder, got architecture 'hubert'"):
        from_checkpoints([tmp_path / "hubert.pt"])
    state["model"] = weights | {"encoder.layers.0.para": torch.zeros(9)}
    torch.save(state, tmp_path / "ls.pt")
    with pytest.raises(ExportError, match="encoder.layers.0.para is packed by LightSeq itself; .* export_ls_encoder"):
        from_checkpoints([tmp_path / "ls.pt"])
    torch.save({"model": weights}, tmp_path / "bare.pt")
    with pytest.raises(ExportError, match="expected the arguments of the training"):
        from_checkpoints([tmp_path / "bare.pt"])


def test_dictionaries_are_looked_for_and_compared(tmp_path, data_bin):
    state, _ = state_of(data_bin, *TINY)
    vars(state["cfg"]["model"])["data"] = f"{tmp_path / 'gone'}:{data_bin}"
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ExportError, match="expected dict.xx.txt and dict.yy.txt in .*gone, got no .* name the folder"):
        from_checkpoints([tmp_path / "c.pt"])
    assert from_checkpoints([tmp_path / "c.pt"], data_bin=data_bin).source_lang == "xx"
    other = tmp_path / "other"
    other.mkdir()
    for language in ("xx", "yy"):
        (other / f"dict.{language}.txt").write_text("a 1\nb 1\n")
    with pytest.raises(ExportError, match="expected a source dictionary of 48 types, got 6; name the folder"):
        from_checkpoints([tmp_path / "c.pt"], data_bin=other)


def test_languages_from_the_call(tmp_path, data_bin):
    state, _ = state_of(data_bin, *TINY)
    for args in (vars(state["cfg"]["model"]), state["cfg"]["task"]):
        args["source_lang"] = args["target_lang"] = None
    torch.save(state, tmp_path / "c.pt")
    bare = tmp_path / "bare"
    bare.mkdir()
    for language in ("xx", "yy"):
        shutil.copyfile(data_bin / f"dict.{language}.txt", bare / f"dict.{language}.txt")
    with pytest.raises(ExportError, match="got no such data; pass --source-lang and --target-lang"):
        from_checkpoints([tmp_path / "c.pt"], bare)
    exported = from_checkpoints([tmp_path / "c.pt"], bare, source_lang="xx", target_lang="yy")
    assert (exported.source_lang, exported.target_lang) == ("xx", "yy")


def test_languages_that_fairseq_inferred_from_the_data(tmp_path, data_bin):
    """fairseq-train DATA_BIN without -s and -t: the checkpoint says None."""
    state, _ = state_of(data_bin, *TINY)
    for args in (vars(state["cfg"]["model"]), state["cfg"]["task"]):
        args["source_lang"] = args["target_lang"] = None
    torch.save(state, tmp_path / "c.pt")
    exported = from_checkpoints([tmp_path / "c.pt"])
    assert (exported.source_lang, exported.target_lang) == ("xx", "yy")
    many = tmp_path / "many"
    shutil.copytree(data_bin, many)
    (many / "train.yy-xx.xx.idx").write_bytes(b"")
    with pytest.raises(ExportError, match="got xx-yy, yy-xx; pass --source-lang and --target-lang"):
        from_checkpoints([tmp_path / "c.pt"], many)
    assert from_checkpoints([tmp_path / "c.pt"], many, source_lang="xx").target_lang == "yy"


def test_neither_fairseq_nor_omegaconf_is_loaded(tmp_path, data_bin):
    write_checkpoint(tmp_path / "c.pt", data_bin, *TINY)
    program = f"""
import sys
from lightseq_fairseq.export import from_checkpoints
from_checkpoints([{str(tmp_path / "c.pt")!r}])
print([module for module in ("fairseq", "omegaconf", "hydra", "h5py", "google.protobuf") if module in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
