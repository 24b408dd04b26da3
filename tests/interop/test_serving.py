"""A merged folder in the format of llama.cpp, as far as its Python package goes: docs/serving.md has the converter by hand."""

import gguf
import torch
from trained import logits
from transformers import AutoModelForCausalLM

from highrank.interop.hub_model import merge_run


def as_gguf(folder, file):
    """Writes a Llama folder as GGUF in fp32, with the names of the package's table; q and k turned as llama.cpp wants them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        named = names.get_name(name, try_suffixes=(".weight",))
        assert named is not None, f"llama.cpp knows no {name}"
        if count := heads.get(name.split(".")[-2]):
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(named, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_merged_folder_has_what_llama_cpp_names(make_run, tmp_path):
    run, model = make_run("model=tiny_llama", "method=hira", "r=2", "placement=all")
    merged = merge_run(run, tmp_path / "merged")
    as_gguf(merged, tmp_path / "merged" / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(merged, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
