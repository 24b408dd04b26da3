"""What the loaders of two servers ask of a LoRA folder, as rules in our own words; neither is installed for the tests.

vLLM (vllm/lora/peft_helper.py: PEFTHelper; vllm/lora/lora_model.py: from_local_checkpoint; vllm/lora/utils.py:
parse_fine_tuned_lora_name; vllm/config/lora.py: MaxLoRARanks):
- adapter_config.json has r, lora_alpha and target_modules; r and lora_alpha are whole numbers, r is at most 512;
- modules_to_save is empty, use_dora is false, bias is "none"; there is no other rank or scale per module;
- every tensor of adapter_model.safetensors is called base_model.model.<module>.lora_A.weight or .lora_B.weight, and the last
  name of the module is that of a linear layer of the model;
- lora_A is (r, in) and lora_B (out, r) of that layer.

SGLang (python/sglang/srt/lora/lora_config.py: LoRAConfig; lora.py: LoRAAdapter, normalize_qkv_proj and
normalize_gate_up_proj; utils.py: get_normalized_target_modules):
- peft_type is LORA, target_modules is a list of names, or one of the words all and all-linear;
- a tensor's layer is the number behind `layers.`;
- q_proj, k_proj and v_proj of a layer are stacked where a q_proj is seen, which takes v_proj for granted; gate_proj and up_proj where
  a gate_proj is seen: a pair without its siblings is lost or an error;
- there is no rank_pattern, no alpha_pattern and no added_tokens.json.
"""

import json
import re

import safetensors.torch
from torch import nn

TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def broken_by(folder, model):
    """Returns the rules that a folder breaks, in words, given the base model."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    broken = [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    broken += [f"{key} is no whole number" for key in ("r", "lora_alpha") if type(config.get(key)) is not int]
    broken += [
        f"{key} is set" for key in ("modules_to_save", "use_dora", "rank_pattern", "alpha_pattern") if config.get(key)
    ]
    if config.get("bias", "none") != "none" or config.get("use_rslora"):
        broken.append("bias or rsLoRA")
    if not 1 <= config["r"] <= 512:
        broken.append("r is beyond 512")
    if config["peft_type"] != "LORA" or not isinstance(config["target_modules"], list):
        broken.append("type or target_modules")
    if (folder / "added_tokens.json").exists():
        broken.append("added tokens")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    seen = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if not found or found[1] not in linear:
            broken.append(f"{name} is no layer's")
            continue
        path, factor = found.groups()
        n, k = linear[path].weight.shape
        if tuple(tensor.shape) != ((config["r"], k) if factor == "A" else (n, config["r"])):
            broken.append(f"{name} has the shape {tuple(tensor.shape)}")
        if not re.search(r"layers\.\d+\.", path):
            broken.append(f"{path} is in no layer")
        if not any(path == target or path.endswith(f".{target}") for target in config["target_modules"]):
            broken.append(f"{path} is no target")
        seen.setdefault(path.rpartition(".")[0], {}).setdefault(path.rpartition(".")[2], set()).add(factor)
    for parent, leaves in seen.items():
        broken += [f"{parent}.{leaf} is half a pair" for leaf, factors in leaves.items() if factors != {"A", "B"}]
        broken += [
            f"{parent} lacks {group - leaves.keys()}"
            for group in TOGETHER
            if group & leaves.keys() and group - leaves.keys()
        ]
    return broken
